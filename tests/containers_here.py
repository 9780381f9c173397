"""Whether this machine lets containers start, and what a test does where it does not."""

import os

import pytest

from environments.isolation import containers


def need():
    """Skips where containers cannot start; fails instead where `.ci/run` has started one."""
    if why := containers.problem():
        if os.environ.get("LDM_JAX_TESTS_CONTAINERS"):
            pytest.fail(f"containers start on this machine, and yet: {why}")
        pytest.skip(why)

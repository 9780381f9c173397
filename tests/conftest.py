"""What holds for every test."""

import chex
import pytest


@pytest.fixture(autouse=True)
def _traces_are_counted_anew():
    # Chex counts them by the place of a function in the sources, over all tests of a process.
    chex.clear_trace_counter()

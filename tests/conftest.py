"""What holds for every test."""

import chex
import jax
import pytest

from experiments.harness import compilation

# What a test compiles is there for the next run, for the other workers and for the processes that tests start.
compilation.keep_programs(compilation.default_folder())


@pytest.fixture(autouse=True)
def _traces_are_counted_anew():
    # Chex counts them by the place of a function in the sources, over all tests of a process.
    chex.clear_trace_counter()


@pytest.fixture(scope="module")
def in_haste():
    """Compiles in half the time what runs slower then: for modules whose programs run a few times each."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

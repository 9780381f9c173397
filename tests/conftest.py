"""What holds for every test."""

import os

from experiments.harness import compilation

# Before JAX is imported: what a test compiles is there for the next run, for other workers and for its own processes.
os.environ.setdefault(compilation.FOLDER, compilation.default_folder())
os.environ.setdefault(compilation.SECONDS, compilation.LEAST_SECONDS)

import chex
import pytest


@pytest.fixture(autouse=True)
def _traces_are_counted_anew():
    # Chex counts them by the place of a function in the sources, over all tests of a process.
    chex.clear_trace_counter()

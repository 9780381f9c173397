"""Memory that is freed is kept for what comes next, where the C library can."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import mmap, pathlib
import numpy as np
from experiments.harness import allocator
was_set = allocator.keep_freed_memory()
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
before = resident()
np.ones(64 << 20, np.uint8)
print(was_set, resident() - before > 32 << 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("variables", "printed"),
    [({}, "True True"), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}, "False False")],
)
def test_the_pages_of_a_large_array_stay_when_it_is_freed_unless_the_user_chose_otherwise(variables, printed):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | variables, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == printed

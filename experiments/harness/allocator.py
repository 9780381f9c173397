"""How the C library keeps memory that JAX frees: for the next step, instead of giving it back to the kernel."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Names of `mallopt` in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Has glibc keep large arrays that were freed, for all of this process; nothing on other C libraries.

    A training step allocates and frees hundreds of megabytes. Mapped anew each time, every page of them costs a fault
    and zeros: a fifth of the step of a small model. Processes started from here are not touched.

    Returns:
      Whether it was set: not where `GLIBC_TUNABLES` or a variable `MALLOC_*` says what the user wants.
    """
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One heap, which large arrays come from too and which is not cut back: an int holds no more than 2 GiB - 1.
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, (1 << 31) - 1), (_ARENA_MAX, 1))
    return all(mallopt(name, value) for name, value in settings)

"""Where virtual environments and compiled programs are kept."""

from __future__ import annotations

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Where what can be made again is kept: `$LDM_JAX_CACHE`, or `ldm_jax` in the user's folder of caches.

    Raises:
      RuntimeError: the user has no home.
    """
    if named := os.environ.get("LDM_JAX_CACHE"):
        return pathlib.Path(named).expanduser().absolute()
    parent = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(parent) if parent else pathlib.Path.home() / ".cache") / "ldm_jax"

"""Folders for what the libraries of workers write, which outlive nobody."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import typing

_PREFIX = "ldm_jax-worker-"


def make_scratch() -> tuple[str, typing.Callable[[], None]]:
    """Makes an empty folder in the system's folder for temporary files, and removes those of processes that died.

    Returns:
      The folder, and a function that removes it.
    """
    parent = pathlib.Path(tempfile.gettempdir())
    for folder in parent.glob(f"{_PREFIX}*"):
        _remove_if_left(folder)
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX)
        # The lock says that the owner lives: the kernel lets go of it however the owner ends.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(path):
                break
            os.close(descriptor)
        # Another process took it for one that was left, before it was locked: try again.

    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)

    return path, remove


def _remove_if_left(folder: pathlib.Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)

"""Places for what workers write and share, which outlive nobody: folders, and memory without a name."""

from __future__ import annotations

import collections.abc
import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import sys
import tempfile
import typing

_PREFIX = "ldm_jax-worker-"
_SHARED = pathlib.Path("/dev/shm")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


class NoRoomError(Exception):
    """There is too little room for the arrays that workers share."""


def make_shared_file(size: int) -> typing.IO[bytes]:
    """Makes a file of zeros for workers to share, in memory where the machine has such a folder.

    It has no name: no other process can find it, and it is gone with the last descriptor. All of its room is taken now:
    where there turns out to be too little only when it is written, the kernel ends the process.

    Args:
      size: bytes.

    Raises:
      NoRoomError: there is too little room.
    """
    folder = _SHARED if os.access(_SHARED, os.W_OK) else pathlib.Path(tempfile.gettempdir())
    status = os.statvfs(folder)
    room = status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize  # without blocks it has no limit
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 it is returned
    try:
        if size <= room:
            file.truncate(size)
            _take(file.fileno(), size)
            return file
    except OSError as error:
        if error.errno not in _FULL:
            file.close()
            raise
    file.close()
    raise NoRoomError(
        f"its arrays need {-(-size >> 20)} MB and {folder} has room for {room >> 20} MB; take fewer rows (batch_size), "
        f"or enlarge it: `mount -o remount,size=8G {folder}`, or `--shm-size=8g` of the container that this runs in"
    )


def _take(descriptor: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # this kind of folder cannot tell
            raise


class Scratch(typing.NamedTuple):
    """A folder for what workers write.

    Attributes:
      path: of the folder.
      remove: removes it, and lets go of its lock.
    """

    path: str
    remove: collections.abc.Callable[[], None]


def make_scratch() -> Scratch:
    """Makes an empty folder in the system's folder for temporary files, and removes those of processes that died."""
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

    return Scratch(path, remove)


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

"""Writing files and folders whole or not at all: aside first, then renamed into place."""

from __future__ import annotations

import collections.abc
import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file, whole or not at all; what was in its place stays until then.

    Args:
      path: the file; its folder must exist. A symbolic link is followed.
      content: text is written as UTF-8.

    Raises:
      OSError: the place cannot be written, or the disk is full; nothing is left behind.
    """
    with replacing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> collections.abc.Iterator[pathlib.Path]:
    """Yields a free path beside another, and renames what was written there to it once the block ends without error.

    Args:
      path: of a file, new or old, or of a folder that does not exist; the one around it must. A symbolic link is
        followed.

    Yields:
      Where to write the file or folder.

    Raises:
      OSError: the place cannot be written; nothing is left behind.
    """
    target = pathlib.Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.aside")
    try:
        yield aside
        # On the disk before its name is: else a loss of power could leave an empty file under it.
        for written in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
            _flush(written)
        os.replace(aside, target)
        _flush(target.parent)
    finally:
        remove(aside)


def remove(path: pathlib.Path) -> None:
    """Removes a file, a symbolic link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path, *, shared: bool = False) -> collections.abc.Iterator[None]:
    """Waits for other processes that have locked a folder, and locks it; the lock ends with its process.

    Args:
      folder: that is there.
      shared: whether others that share it, too, may go on.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no locks: there, two at once are for their users to keep apart.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

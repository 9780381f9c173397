"""Writing files and folders whole or not at all: aside first, then renamed into place."""

from __future__ import annotations

import collections.abc
import contextlib
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
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files of units on their way between machines: packed, sent in pieces, and unpacked aside."""

from __future__ import annotations

import collections.abc
import contextlib
import io
import os
import pathlib
import secrets
import shutil
import tarfile
import tempfile

_PIECE_BYTES = 32 << 20
_SCRATCH = "ldm_jax-unit-"

Listing = dict[str, tuple[int, int]]
"""The files below a folder: size and time of change by name."""


def pack(root: pathlib.Path, names: collections.abc.Iterable[str]) -> bytes:
    """Packs files and folders below a folder; what is not there is left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            if (root / name).exists():
                archive.add(root / name, name)
    return buffer.getvalue()


def unpack(archives: collections.abc.Iterable[bytes], root: pathlib.Path) -> Listing:
    """Unpacks what `pack` made, where it made anything, and says what is there then."""
    for data in filter(None, archives):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(root, filter="data")
    return _listing(root)


def pieces(root: pathlib.Path, before: Listing) -> collections.abc.Iterator[bytes]:
    """Packs what is new or other below a folder, in pieces that together are one archive; none if there is nothing."""
    changed = [name for name, state in sorted(_listing(root).items()) if before.get(name) != state]
    if not changed:
        return
    with tempfile.TemporaryFile(dir=root) as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in changed:
                archive.add(root / name, name)
        file.seek(0)
        while piece := file.read(_PIECE_BYTES):
            yield piece


def place_in(folder: pathlib.Path) -> pathlib.Path:
    """A path in a folder for an archive that is to arrive, at which nothing is yet."""
    return folder / f"{secrets.token_hex(8)}.tar"


@contextlib.contextmanager
def unpacked(path: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """Unpacks an archive beside itself for the time of the block; removes both then. No file is an empty archive."""
    folder = path.with_suffix("")
    try:
        folder.mkdir()
        if path.exists():
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch() -> collections.abc.Iterator[pathlib.Path]:
    """A folder for one unit, on the disk of this machine; removes what processes that were killed have left, too."""
    place = pathlib.Path(tempfile.gettempdir())
    for left in place.glob(f"{_SCRATCH}*"):
        try:
            os.kill(int(left.name.removeprefix(_SCRATCH).partition("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, PermissionError):
            pass  # not ours
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        yield pathlib.Path(folder)


def _listing(root: pathlib.Path) -> Listing:
    found = {}
    for path in root.rglob("*"):
        if path.is_file():
            state = path.stat()
            found[path.relative_to(root).as_posix()] = (state.st_size, state.st_mtime_ns)
    return found

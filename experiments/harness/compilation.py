"""Compiled programs, kept from one process to the next in a folder of the user's caches.

JAX reads and writes the folder. Its own bound on the size does not survive a process that is killed while it writes (it
misses a file from then on, and keeps nothing more), so that the folder is cut back when a script starts instead. The
programs are machine code: each kind of machine has a folder of its own, since a home may be shared.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import typing
import warnings

from environments.isolation.caches import cache_folder
from experiments.harness.progress import logger

FOLDER, SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
"""JAX's own variables, which other processes inherit; where the user has set them, they stand."""
LEAST_SECONDS = "0.1"
"""What compiles faster is not worth a file."""
MOST_BYTES = 2 << 30
"""Of a folder, when a script starts."""
_FAILURE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.DOTALL)


def default_folder() -> str:
    """Where this machine's programs are kept: `xla/` in our folder of caches; empty where there is no home."""
    try:
        return str(cache_folder() / "xla" / f"{platform.machine()}-{_processor()}")
    except RuntimeError:
        return ""


def keep_programs(folder: str) -> None:
    """Keeps what is compiled from now on, here and in processes started from here; call it before JAX compiles.

    A folder that cannot be used is said in one line, and nothing is kept.

    Args:
      folder: where; empty for nowhere. `$JAX_COMPILATION_CACHE_DIR` takes its place, where it is set.
    """
    say_failures_once()
    if FOLDER in os.environ or not folder:
        return
    path = pathlib.Path(folder).expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever writes there decides what we run
        cut_back(path, MOST_BYTES)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        logger.warning("compiled programs are not kept: %s: %s; give another --compilation_cache", path, error.strerror)
        return
    import jax

    os.environ[FOLDER] = str(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    if SECONDS not in os.environ:
        os.environ[SECONDS] = LEAST_SECONDS
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(LEAST_SECONDS))


def cut_back(folder: pathlib.Path, most_bytes: int) -> None:
    """Removes the programs that were used least recently, until the others have so many bytes or fewer.

    Args:
      folder: of programs.
      most_bytes: of all that stay.

    Raises:
      OSError: the folder cannot be read.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process cuts back too
                continue
            if entry.is_file():
                found.append((max(status.st_atime, status.st_mtime), status.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            break
        pathlib.Path(path).unlink(missing_ok=True)
        total -= size


def say_failures_once() -> None:
    """Makes one line of the log of all that JAX says of programs which it cannot write.

    What cannot be read, because another process is at it, was killed or had no room, is removed and compiled anew,
    without a word.
    """
    if getattr(warnings.showwarning, "func", None) is not _show:
        warnings.showwarning = functools.partial(_show, warnings.showwarning, set())


def _show(
    otherwise: typing.Any, said: set[str], message: Warning | str, *args: typing.Any, **kwargs: typing.Any
) -> None:
    if not (match := _FAILURE.match(str(message))):
        otherwise(message, *args, **kwargs)
        return
    action, program, reason = match.groups()
    folder = os.environ.get(FOLDER, "")
    with contextlib.suppress(OSError):
        broken = sorted(pathlib.Path(folder).glob(f"{program}-*"), key=os.path.getmtime)
        for path in broken if action == "reading" else broken[-1:]:  # what was being written is the newest
            path.unlink(missing_ok=True)
    if action == "writing" and action not in said:
        said.add(action)
        logger.warning(
            "compiled programs are not kept: %s: %s; make room there, or give another --compilation_cache",
            folder,
            " ".join(reason.split()),
        )


def _processor() -> str:
    """What its instructions are, in eight digits."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    said = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*", text, re.MULTILINE)
    return hashlib.sha256("\n".join(sorted({*said}) or [text]).encode()).hexdigest()[:8]

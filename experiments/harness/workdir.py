"""The folder a run writes into: whose it is, with which configuration, and what in it is finished.

A workdir holds one file of configuration per stage, written before the stage's first result and never changed: what
lies beside it was made with it, so a result that is there is finished and right.
"""

from __future__ import annotations

import collections.abc
import contextlib
import contextvars
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import typing
import zlib

import jax

from ldm_jax import files
from ldm_jax.errors import LdmError, differences

FREE = "free"
"""Metadata of a field of a configuration that changes nothing in the results, so it may differ from run to run."""

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems
_held: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("held", default=frozenset())
begun: contextvars.ContextVar[frozenset[tuple[typing.Any, str]]] = contextvars.ContextVar("begun", default=frozenset())
"""Workdirs and the stages that have found them to be theirs, of what this context has begun."""


class WorkdirError(LdmError, ValueError):
    """A workdir that cannot be written, belongs to something else, or was begun with another configuration."""


@contextlib.contextmanager
def lock(workdir: pathlib.Path, stage: str) -> collections.abc.Iterator[None]:
    """Keeps other processes from working in a folder until the block ends; a lock dies with its process.

    The thread that holds it may lock the folder again: a stage may be made of stages.

    Args:
      workdir: made if missing, and removed if nothing was written into it.
      stage: what is done there, for those who find it locked.

    Raises:
      WorkdirError: another process is at work there, or the place cannot be written.
    """
    place = os.path.realpath(workdir)
    if place in _held.get():
        yield
        return
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        handle = _acquire(workdir, stage)
    except OSError as error:
        raise _unusable(workdir, error) from error
    token = _held.set(_held.get() | {place})
    try:
        yield
    finally:
        _held.reset(token)
        (workdir / _LOCK).unlink(missing_ok=True)  # before it is let go: whoever comes next makes a new one
        os.close(handle)
        with contextlib.suppress(OSError):  # what was written into stays
            for folder in missing:
                folder.rmdir()


def _acquire(workdir: pathlib.Path, stage: str) -> int:
    path = workdir / _LOCK
    while True:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # whoever was here has just removed the folder
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(handle, 4096, 0).decode(errors="replace") or "another process works there"
            os.close(handle)
            raise WorkdirError(f"{workdir} is in use: {owner}. Wait for its end, or give another --workdir") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
        with contextlib.suppress(FileNotFoundError):
            # Not one that its owner removed after it was opened here: nobody else would meet that one.
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
                where = f"process {os.getpid()} of {socket.gethostname()}"
                owner = f"experiments.{stage} is at work there, {where}, since {now}"
                os.ftruncate(handle, 0)
                os.pwrite(handle, owner.encode(), 0)
                return handle
        os.close(handle)


def _unusable(workdir: pathlib.Path, error: Exception) -> WorkdirError:
    return WorkdirError(f"cannot use the workdir {workdir}: {error}. Choose one that this user may write")


def pin_config(workdir: pathlib.Path, name: str, config: typing.Any, owns: tuple[str, ...]) -> None:
    """Writes `<name>.json`, the resolved configuration, or checks that the one there is the same.

    Args:
      workdir: made if missing.
      name: of the stage.
      config: a dataclass.
      owns: names in the workdir that only this stage writes: they must not be there before the configuration is.

    Raises:
      WorkdirError: the place cannot be written, has files of another origin, or another configuration.
    """
    path, wanted = workdir / f"{name}.json", json.loads(json.dumps(resolved(config)))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = json.loads(path.read_text())
        else:
            foreign = [other for other in owns if (workdir / other).exists()]
            if owns == ("*",):
                foreign = sorted(entry.name for entry in workdir.iterdir() if not _is_own(entry.name, path.name))
            if foreign:
                raise WorkdirError(
                    f"{workdir} belongs to something else: it holds {', '.join(foreign[:3])} but no {path.name}. "
                    "Choose another --workdir; nothing was touched"
                )
            files.write(path, json.dumps(wanted, indent=1) + "\n")
            found = wanted
    except (OSError, json.JSONDecodeError) as error:
        raise _unusable(workdir, error) from error
    if found != wanted:
        raise WorkdirError(
            f"{workdir} was begun with another configuration: {'; '.join(differences(found, wanted))}. "
            "Give the same flags to go on with it, or another --workdir"
        )
    begun.set(begun.get() | {(workdir, name)})


def _is_own(name: str, own: str) -> bool:
    """Whether a name in a workdir is that of the lock, or of a configuration that was not wholly written."""
    return name == _LOCK or (name.startswith(f".{own}.") and name.endswith(".aside"))


def resolved(config: typing.Any) -> dict[str, typing.Any]:
    """The fields of a configuration that change the results, those of inner dataclasses as dicts."""
    fields = [field for field in dataclasses.fields(config) if not field.metadata.get(FREE)]
    values = {field.name: getattr(config, field.name) for field in fields}
    return {name: resolved(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def listed(references: pathlib.Path, *, names: tuple[str, ...] = ("reference.json",)) -> tuple[str, ...]:
    """The ids that have a reference, finished, in a folder of them.

    Args:
      references: the folder.
      names: of files of which an id has one.

    Raises:
      WorkdirError: there is none.
    """
    found = {path.parent.relative_to(references).as_posix() for name in names for path in references.rglob(name)}
    ids = tuple(id for id in sorted(found) if not any(word.startswith(".") for word in id.split("/")))
    if not ids:
        raise WorkdirError(f"there is no reference policy in {references}: run experiments.references first")
    return ids


def seed_of(seed: int, stage: str, id: str) -> int:
    """A seed for one stage of one environment, which does not depend on the others."""
    return zlib.crc32(f"{seed}/{stage}/{id}".encode()) & 0x7FFFFFFF


def key_of(seed: int, stage: str, id: str) -> jax.Array:
    """The typed key of `seed_of`."""
    return jax.random.key(seed_of(seed, stage, id))

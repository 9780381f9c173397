"""The folder a run writes into: whose it is, with which configuration, and what in it is finished.

A workdir holds one file of configuration per stage, written before the stage's first result and never changed: what
lies beside it was made with it, so a result that is there is finished and right.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import secrets
import typing
import zlib

import jax

import environments
from ldm_jax.errors import LdmError, differences

FREE = "free"
"""Metadata of a field of a configuration that changes nothing in the results, so it may differ from run to run."""


class WorkdirError(LdmError, ValueError):
    """A workdir that cannot be written, belongs to something else, or was begun with another configuration."""


def claim(workdir: pathlib.Path, name: str, config: typing.Any, owns: tuple[str, ...]) -> None:
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
                foreign = sorted(entry.name for entry in workdir.iterdir() if not entry.name.startswith(path.name))
            if foreign:
                raise WorkdirError(
                    f"{workdir} belongs to something else: it holds {', '.join(foreign[:3])} but no {path.name}. "
                    "Choose another --workdir; nothing was touched"
                )
            write(path, json.dumps(wanted, indent=1) + "\n")
            found = wanted
    except (OSError, json.JSONDecodeError) as error:
        raise WorkdirError(f"cannot use the workdir {workdir}: {error}. Choose one that this user may write") from error
    if found != wanted:
        raise WorkdirError(
            f"{workdir} was begun with another configuration: {'; '.join(differences(found, wanted))}. "
            "Give the same flags to go on with it, or another --workdir"
        )


def resolved(config: typing.Any) -> dict[str, typing.Any]:
    """The fields of a configuration that change the results, those of inner dataclasses as dicts."""
    fields = [field for field in dataclasses.fields(config) if not field.metadata.get(FREE)]
    values = {field.name: getattr(config, field.name) for field in fields}
    return {name: resolved(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def listed(references: pathlib.Path) -> tuple[str, ...]:
    """The ids that have a reference, finished, in a folder of them.

    Raises:
      WorkdirError: there is none.
    """
    found = sorted(path.parent.relative_to(references).as_posix() for path in references.rglob("reference.json"))
    ids = tuple(id for id in found if not any(word.startswith(".") for word in id.split("/")))
    if not ids:
        raise WorkdirError(f"there is no reference policy in {references}: run experiments.references first")
    return ids


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_ids(ids: typing.Iterable[str]) -> None:
    """Checks that all environments can be made, before anything is done with the first.

    Raises:
      UnknownEnvironmentError: an id that is not known; says the nearest ones.
      LibraryMissingError: its library is not installed; says the extra to install.
      WorkdirError: an id given twice.
    """
    ids = list(ids)
    if twice := sorted({id for id in ids if ids.count(id) > 1}):
        raise WorkdirError(f"the list of environments holds {', '.join(twice)} twice; give each one once")
    known: dict[str, set[str]] = {}
    for id in ids:
        library = id.partition("/")[0]
        if library not in known or id not in known[library]:
            environments.make(id).close()  # says what is wrong with the id, or what its library needs
            known[library] = set(environments.list_ids(library))


def seed_of(seed: int, stage: str, id: str) -> int:
    """A seed for one stage of one environment, which does not depend on the others."""
    return zlib.crc32(f"{seed}/{stage}/{id}".encode()) & 0x7FFFFFFF


def key_of(seed: int, stage: str, id: str) -> jax.Array:
    """The typed key of `seed_of`."""
    return jax.random.key(seed_of(seed, stage, id))

"""Lists of environment ids, as flags and programs give them: one parser for all stages."""

from __future__ import annotations

import collections.abc
import contextlib
import difflib
import fnmatch
import pathlib
import typing

import environments
from experiments.harness.units import LOCAL, Engine
from experiments.harness.workdir import WorkdirError
from ldm_jax.encoding.buckets import bucket_for
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.errors import LdmError
from ldm_jax.model.config import ModelConfig
from ldm_jax.types import EnvironmentSpec


class Choice(typing.NamedTuple):
    """Which environments a stage is for, and what is to be done about them.

    Attributes:
      environments: ids with commas between, or several; `gymnax/*` for all that match, `@file` for those in a file.
      select: a selection from the catalog, see `environments.select`.
      retry: "failed" to try again what has failed before.
      dry_run: whether to say what would be done, and do nothing.
      engine: where it is done: on this machine or on a cluster.
    """

    environments: str | collections.abc.Iterable[str] = ""
    select: str = ""
    retry: str = ""
    dry_run: bool = False
    engine: Engine = LOCAL


Among = collections.abc.Callable[[], collections.abc.Iterable[str]]
"""Gives the ids among which patterns and selections choose."""


def parse_ids(ids: str | collections.abc.Iterable[str]) -> tuple[str, ...]:
    """Reads a list of environment ids.

    Args:
      ids: a text with commas between the ids, or several. Blanks around an id and empty ones do not count.

    Returns:
      The ids, in their order.

    Raises:
      WorkdirError: an id is given twice.
    """
    texts = [ids] if isinstance(ids, str) else ids
    found = tuple(id for text in texts for word in text.split(",") if (id := word.strip()))
    if twice := sorted({id for id in found if found.count(id) > 1}):
        raise WorkdirError(f"the list of environments holds {', '.join(twice)} twice; give each one once")
    return found


def chosen_ids(choice: Choice, among: Among | None = None) -> tuple[str, ...]:
    """The ids that are meant.

    Args:
      choice: ids, patterns, files and a selection.
      among: the ids that there are, where patterns and selections are not to take others; default: those in the catalog
        that work, and those of libraries that other packages add.

    Returns:
      The ids that were given, in their order, then those that the selection adds. Empty where nothing was given.

    Raises:
      WorkdirError: an id is given twice, a file cannot be read, or nothing of a selection is among the ids.
      UnknownEnvironmentError: a pattern matches nothing; names the nearest ids.
      SelectionError: the selection cannot be read, or selects nothing.
    """
    words = parse_ids([inside for word in parse_ids(choice.environments) for inside in _lines(word)])
    found = [id for word in words for id in (_match(word, among) if _is_pattern(word) else [word])]
    if choice.select:
        selected = environments.select(choice.select).ids
        there = selected if among is None else [*({*selected} & {*among()})]
        if not there:
            raise WorkdirError(
                f"none of the {len(selected):,} environments that --select={choice.select!r} selects is there: "
                "run the stages before this one for them, or select others"
            )
        found += [id for id in selected if id in {*there}]
    return tuple(dict.fromkeys(found))


def _lines(word: str) -> list[str]:
    """A word, or what is in the file that it names."""
    if not word.startswith("@"):
        return [word]
    return [*read_ids(pathlib.Path(word[1:]).expanduser())]


def read_ids(path: pathlib.Path) -> tuple[str, ...]:
    """Reads a list of ids, one a line; `#` begins a remark.

    Raises:
      WorkdirError: it cannot be read, or is empty.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkdirError(f"cannot read the list of environments {path}: {error}") from error
    found = tuple(id for line in lines if (id := line.partition("#")[0].strip()))
    if not found:
        raise WorkdirError(f"the list of environments {path} is empty: give an id a line")
    return found


def _is_pattern(word: str) -> bool:
    return "*" in word or "?" in word


def _match(pattern: str, among: Among | None) -> list[str]:
    library, _, name = pattern.partition("/")
    if among is not None:
        known = [*among()]
    elif _is_pattern(library) or not name:
        known = environments.list_ids()
    else:
        known = environments.list_ids(library)
    if found := [id for id in known if fnmatch.fnmatchcase(id, pattern.replace("[", "[[]"))]:
        return found
    near = difflib.get_close_matches(pattern.replace("*", ""), known, n=3, cutoff=0.4)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise environments.UnknownEnvironmentError(f"none of {len(known):,} environments matches {pattern!r}{hint}")


def spec_of(id: str) -> EnvironmentSpec:
    """What is known of an environment: by the catalog, or, of one that is not in it, by making it.

    Raises:
      UnknownEnvironmentError: an id that is not known; says the nearest ones.
      LibraryMissingError: it is not in the catalog, and its library is not installed.
      LdmError: it cannot be made.
    """
    try:
        return environments.spec(id)
    except environments.UnknownEnvironmentError:
        with contextlib.closing(environments.make(id)) as environment:
            return environment.spec


def find_unfit(ids: collections.abc.Iterable[str], model: ModelConfig | None = None) -> dict[str, str]:
    """Finds the environments that nothing can be done with, before anything is done with the first.

    Args:
      ids: of environments; those that are not in the catalog are made once.
      model: that they have to fit; default: the largest there may be.

    Returns:
      The reason, by id: it cannot be made here, or its spaces are too large.

    Raises:
      UnknownEnvironmentError: an id that is not known; says the nearest ones.
    """
    reasons = {}
    for id in ids:
        try:
            spec = spec_of(id)
            bucket = bucket_for(spec.observation_space, spec.action_space)
            if model:
                model.check_fits(bucket, id, max(observation_layout(spec.observation_space).sizes, default=0))
        except environments.UnknownEnvironmentError:
            raise
        except LdmError as error:
            reasons[id] = str(error)
    return reasons

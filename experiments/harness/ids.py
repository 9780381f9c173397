"""Lists of environment ids, as flags and programs give them: one parser and one check for all stages."""

from __future__ import annotations

import collections.abc

import environments
from experiments.harness.workdir import WorkdirError


def parse_ids(ids: str | collections.abc.Iterable[str]) -> tuple[str, ...]:
    """Reads a list of environment ids.

    Args:
      ids: a text with commas between the ids, or the ids themselves. Blanks around an id and empty ones do not count.

    Returns:
      The ids, in their order.

    Raises:
      WorkdirError: an id is given twice.
    """
    words = ids.split(",") if isinstance(ids, str) else ids
    found = tuple(filter(None, (word.strip() for word in words)))
    if twice := sorted({id for id in found if found.count(id) > 1}):
        raise WorkdirError(f"the list of environments holds {', '.join(twice)} twice; give each one once")
    return found


def check_ids(ids: collections.abc.Iterable[str]) -> None:
    """Checks that all environments can be made, before anything is done with the first.

    Raises:
      UnknownEnvironmentError: an id that is not known; says the nearest ones.
      LibraryMissingError: its library is not installed; says the extra to install.
    """
    known: dict[str, set[str]] = {}
    for id in ids:
        library = id.partition("/")[0]
        if library not in known or id not in known[library]:
            environments.make(id).close()  # says what is wrong with the id, or what its library needs
            known[library] = set(environments.list_ids(library))

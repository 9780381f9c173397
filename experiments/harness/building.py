"""The interpreters that isolated libraries need, built before the first environment: one attempt each."""

from __future__ import annotations

import collections.abc
import typing

from environments import registry
from experiments.harness import progress
from experiments.harness.engine import run_units
from experiments.harness.outcomes import UnitOutcome, failure
from ldm_jax.environment import LibraryMissingError


class _Group(typing.NamedTuple):
    name: str
    library: str


def needed_groups(ids: collections.abc.Iterable[str]) -> dict[str, list[str]]:
    """The groups whose interpreters are not built yet, each with the ids that need it."""
    groups: dict[str, list[str]] = {}
    known: dict[str, str] = {}
    for id in ids:
        library = id.partition("/")[0]
        if library not in known:
            known[library] = registry.unbuilt_group(library)
        if known[library]:
            groups.setdefault(known[library], []).append(id)
    return groups


def build_all(ids: collections.abc.Iterable[str], workers: int) -> dict[str, UnitOutcome]:
    """Builds what environments need.

    Args:
      ids: of the environments.
      workers: that build at the same time; 0 for this process.

    Returns:
      What came of the environments whose interpreter cannot be built.
    """
    needed = needed_groups(ids)
    units = [_Group(name, users[0].partition("/")[0]) for name, users in needed.items()]
    for unit in units:
        progress.log("build", group=unit.name, environments=len(needed[unit.name]))
    failed: dict[str, UnitOutcome] = {}
    for finished in run_units(units, _build, workers=workers):
        outcome = finished.result or UnitOutcome("failed", finished.reason, finished.cause)
        if finished.result != _BUILT:
            failed |= dict.fromkeys(needed[finished.unit.name], outcome)
    return failed


_BUILT = UnitOutcome("admitted", "")


def _build(group: _Group, advance: progress.Advance) -> UnitOutcome:
    try:
        registry.build_group(group.library)
    except (Exception, SystemExit) as error:
        found = failure(error)
        missing = isinstance(error, LibraryMissingError) and found.cause.startswith("system")
        return found if missing else found._replace(cause="group does not build")
    return _BUILT

"""The interpreters that isolated libraries need, built before the environments that live in them: one attempt each."""

from __future__ import annotations

import collections.abc
import typing

from environments import registry
from experiments.harness import progress
from experiments.harness.engine import run_units
from experiments.harness.outcomes import UnitOutcome, failure
from experiments.harness.units import LOCAL, NOT_BUILT, Engine, Job, Limits
from ldm_jax.environment import LibraryMissingError


class _Group(typing.NamedTuple):
    name: str
    library: str


def needed_groups(ids: collections.abc.Iterable[str], engine: Engine = LOCAL) -> dict[str, list[str]]:
    """The groups whose interpreters are not built yet, each with the ids that need it.

    Args:
      ids: of environments.
      engine: where they are needed; what the machines of a cluster have is not known: all are named.
    """
    groups: dict[str, list[str]] = {}
    known: dict[str, str] = {}
    for id in ids:
        library = id.partition("/")[0]
        if library not in known:
            known[library] = registry.unbuilt_group(library) if engine.is_local else registry.group(library)
        if known[library]:
            groups.setdefault(known[library], []).append(id)
    return groups


def build_all(
    ids: collections.abc.Iterable[str], workers: int, build_seconds: float = 0.0, engine: Engine = LOCAL
) -> dict[str, UnitOutcome]:
    """Builds what environments need; on a cluster on one machine of it, so that it is known whether it can be built.

    Args:
      ids: of the environments.
      workers: that build at the same time; 0 for this process.
      build_seconds: that one interpreter may take; 0 for any number. They do not hold in this process.
      engine: where they are needed.

    Returns:
      What came of the environments whose interpreter cannot be built.
    """
    needed = needed_groups(ids, engine)
    units = [_Group(name, users[0].partition("/")[0]) for name, users in needed.items()]
    for unit in units:
        progress.log("build", group=unit.name, environments=len(needed[unit.name]))
    failed: dict[str, UnitOutcome] = {}
    job = Job(_say_built, _build)
    for finished in run_units(units, job, workers=workers, engine=engine, limits=Limits(build_seconds=build_seconds)):
        outcome = finished.result or UnitOutcome("failed", finished.reason, finished.cause)
        if finished.result != _BUILT:
            failed |= dict.fromkeys(needed[finished.unit.name], outcome)
    return failed


def build_for(id: str) -> UnitOutcome | None:
    """Builds what an environment needs on the machine that this is called on, where it is not there.

    Another that builds the same there is waited for.

    Returns:
      Why it cannot be built; None where it is there.
    """
    library, _, _ = id.partition("/")
    if not registry.unbuilt_group(library):
        return None
    try:
        registry.build_group(library)
    except (Exception, SystemExit) as error:
        found = failure(error)
        missing = isinstance(error, LibraryMissingError) and found.cause.startswith("system")
        return found if missing else found._replace(cause=NOT_BUILT)
    return None


_BUILT = UnitOutcome("admitted", "")


def _build(group: _Group) -> UnitOutcome | None:
    return build_for(f"{group.library}/")


def _say_built(group: _Group, advance: progress.Advance) -> UnitOutcome:
    return _BUILT

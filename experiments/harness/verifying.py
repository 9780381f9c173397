"""References scored anew, on episodes of their own: whether what was written down of them holds."""

from __future__ import annotations

import collections.abc
import functools
import pathlib
import typing

import environments as registry
from data.references import load_reference
from data.references.zoo import Comparison, verify_reference
from experiments.harness import progress
from experiments.harness.building import build_for
from experiments.harness.engine import work_on
from experiments.harness.making import ReferencesConfig
from experiments.harness.outcomes import UnitOutcome, failure
from experiments.harness.stage import UnitsFailedError
from experiments.harness.units import Engine, Job
from experiments.harness.workdir import seed_of
from ldm_jax.cards import Returns


class _Unit(typing.NamedTuple):
    id: str
    directory: pathlib.Path
    steps: int = 1


_Verified = Comparison | UnitOutcome


def verify_all(
    config: ReferencesConfig, references: pathlib.Path, ids: collections.abc.Sequence[str], engine: Engine
) -> None:
    """Scores references anew, prints what was recorded beside what was measured, and writes nothing.

    Args:
      config: how they are scored; the episodes are others than its seed had for scoring.
      references: folder of them.
      ids: of the environments.
      engine: where; machines of a cluster have to see the folder.

    Raises:
      UnitsFailedError: some do not hold, or could not be scored.
    """
    units = [_Unit(id, references / id) for id in ids]
    job = Job(functools.partial(_verify, config), _prepare)
    found: dict[str, _Verified] = {}
    workers = config.workers_for(len(ids))
    for each in work_on("verify", units, job, config, workers=workers, engine=engine, counted="reference"):
        found[each.unit.id] = each.result or UnitOutcome("failed", each.reason, each.cause)
        progress.log("verified", id=each.unit.id, holds=_verdict(found[each.unit.id]))
    print(verification_table({id: found[id] for id in ids}))
    failed = {id: _reason(one) for id, one in found.items() if _verdict(one) != "holds"}
    if failed:
        raise UnitsFailedError(failed)


def verification_table(found: collections.abc.Mapping[str, _Verified]) -> str:
    """A line for each reference, and how many hold."""
    rows = [("environment", "verdict", "recorded", "measured")]
    for id, one in found.items():
        if isinstance(one, UnitOutcome):
            rows.append((id, "failed", one.reason, ""))
            continue
        rows.append((id, _verdict(one), _told(one.recorded[1]), _told(one.measured[1])))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:{widths[0]}} {b:{widths[1]}} {c:{widths[2]}} {d}".rstrip() for a, b, c, d in rows]
    holding = sum(_verdict(one) == "holds" for one in found.values())
    return "\n".join([*lines, "", f"{holding} of {len(found)} references hold"])


def _told(returns: Returns) -> str:
    return f"{returns.mean:.4g} +- {returns.standard_error:.2g}"


def _verdict(one: _Verified) -> str:
    if isinstance(one, UnitOutcome):
        return "failed"
    return "holds" if one.holds else "differs"


def _reason(one: _Verified) -> str:
    if isinstance(one, UnitOutcome):
        return one.reason
    return f"recorded {_told(one.recorded[1])}, measured {_told(one.measured[1])}"


def _prepare(unit: _Unit) -> _Verified | None:
    return build_for(unit.id)


def _verify(config: ReferencesConfig, unit: _Unit, advance: progress.Advance) -> _Verified:
    try:
        scored = load_reference(unit.directory)
        found = verify_reference(registry.make, scored, seed_of(config.seed, "verify", unit.id), config.played)
    except (Exception, SystemExit) as error:
        return failure(error)
    advance(1)
    return found

"""Packs a zoo of references: `python -m experiments.pack_zoo --workdir=runs/mine --config.folder=runs/zoo`.

Takes the admitted references of a workdir, in float16 where that changes no score beyond its error, and leaves what
the zoo has, with `outcome.json`, which says what they took. Of environments that have none it takes that alone, which
says why, unless it was for want of time or memory.
`experiments.references --config.zoo=runs/zoo` takes both instead of training.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import typing

import environments as registry
from data.references import load_reference
from data.references.zoo import add_to_zoo
from experiments.harness import progress
from experiments.harness.building import build_for
from experiments.harness.engine import work_on
from experiments.harness.making import ScoredConfig, outcome_of
from experiments.harness.outcomes import OUTCOME, UnitOutcome, failure, read_outcome, with_costs, write_outcome
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import LIMITS, Job
from experiments.harness.workdir import WorkdirError, listed, seed_of


@dataclasses.dataclass(frozen=True)
class ZooConfig(ScoredConfig):
    """What is packed where, and the episodes that tell whether float16 will do.

    Attributes:
      folder: of the zoo; made if missing.
      seed: of the episodes.
    """

    folder: str = ""
    seed: int = 0


class _Unit(typing.NamedTuple):
    id: str
    source: pathlib.Path
    target: pathlib.Path
    steps: int = 1


def _among(config: ZooConfig, workdir: pathlib.Path) -> tuple[str, ...]:
    del config
    return listed(workdir / "references", names=("reference.json", OUTCOME))


@stage("pack_zoo", among=_among)
def run(config: ZooConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> None:
    """Packs references.

    Args:
      config: where to.
      workdir: has `references/`.
      environments: their ids; default: all that the workdir has, or has said something of.

    Raises:
      WorkdirError: no folder was named, or the workdir has no references.
      UnitsFailedError: some could not be packed; the others are.
    """
    if not config.folder:
        raise WorkdirError("no folder was named: give --config.folder=runs/zoo or the like")
    folder = pathlib.Path(config.folder).expanduser().absolute()
    ids = environments or _among(config, workdir)
    units = [_Unit(id, workdir / "references" / id, folder / id) for id in ids]
    units = [unit for unit in units if not (unit.target / "reference.json").exists() and not _says_why(unit)]
    job = Job(functools.partial(_pack, config, folder), _prepare)
    failed: dict[str, str] = {}
    workers = config.workers_for(len(units))
    for each in work_on("pack", units, job, config, workers=workers, counted="reference"):
        outcome = each.result or UnitOutcome("failed", each.reason, each.cause)
        if outcome.verdict == "failed":
            failed[each.unit.id] = outcome.reason
        else:
            progress.log("packed", id=each.unit.id, outcome=outcome.reason)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    print(f"{folder} has {len(list(folder.rglob('reference.json')))} references, {sum(sizes) / 1e6:.1f} MB")
    if failed:
        raise UnitsFailedError(failed)


def _says_why(unit: _Unit) -> bool:
    """Packs what there is of an environment without a reference: why it has none, unless that was up to the machine."""
    said = read_outcome(unit.source)
    if said is None or said.verdict == "admitted":
        return False
    if said.cause in LIMITS:
        return True
    write_outcome(unit.target, said)
    return True


def _prepare(unit: _Unit) -> UnitOutcome | None:
    return build_for(unit.id)


def _pack(config: ZooConfig, folder: pathlib.Path, unit: _Unit, advance: progress.Advance) -> UnitOutcome:
    try:
        scored = load_reference(unit.source)
        if not scored.admission.admitted:
            write_outcome(unit.target, outcome_of(scored))
            return outcome_of(scored)
        (unit.target / OUTCOME).unlink(missing_ok=True)  # an earlier try came to nothing, which is no longer so
        put = add_to_zoo(folder, registry.make, scored, seed_of(config.seed, "zoo", unit.id), config.played)
    except (Exception, SystemExit) as error:
        return failure(error)
    write_outcome(unit.target, with_costs(outcome_of(put), read_outcome(unit.source)))
    advance(1)
    returned = f"returns {put.reference_returns.mean:.4g}, {scored.reference_returns.mean:.4g} before"
    return UnitOutcome("admitted", returned)


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": ZooConfig()})

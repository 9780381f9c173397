"""Scores the references of a zoo more finely, in place: `python -m experiments.score_zoo --workdir=runs/scored`.

Each plays, in the form that it has, and a random policy beside it, on episodes of their own, until the standard error
of z near the reference is small or they have taken their steps. The zoo gets the new returns where they tell z more
finely than the old ones. What they show not to be better than random is refused from then on. Killed and started again,
it goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
import typing

import environments as registry
from data.references import load_reference, save_reference, score_further
from data.references.pipeline import ScoredReference
from data.references.saving import is_halved
from data.references.scoring import Rounds
from experiments.harness import progress
from experiments.harness.building import build_for
from experiments.harness.engine import work_on
from experiments.harness.making import ScoredConfig, outcome_of
from experiments.harness.outcomes import UnitOutcome, failure, read_outcome, with_costs, write_outcome
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import Job
from experiments.harness.workdir import listed, pin_config, seed_of
from ldm_jax.errors import ConfigError, check_at_least
from ldm_jax.evaluation import scores


@dataclasses.dataclass(frozen=True)
class FinerConfig(ScoredConfig):
    """How finely references are scored.

    Attributes:
      folder: of the zoo.
      z_error: standard error of z, of a policy as good as the reference that is played as long, at which there are
        enough episodes; a reference that tells it already is left alone.
      steps: environment steps of both policies after which no further round is begun, once the least were played.
      seed: of the episodes.
    """

    folder: str = "data/zoo"
    z_error: float = 0.025
    steps: int = 24_000
    seed: int = 0

    @property
    def zoo(self) -> pathlib.Path:
        """The folder, wherever this process goes."""
        return pathlib.Path(self.folder).expanduser().absolute()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"steps": 1})
        if not self.z_error > 0:
            raise ConfigError(f"z_error is {self.z_error}, expected a positive number")


class _Unit(typing.NamedTuple):
    id: str
    directory: pathlib.Path
    steps: int = 1


def _among(config: FinerConfig, workdir: pathlib.Path) -> tuple[str, ...]:
    del workdir
    return listed(config.zoo)


@stage("score_zoo", among=_among)
def run(config: FinerConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> None:
    """Scores references anew, in place.

    Args:
      config: how finely.
      workdir: gets `scored/`, which says of each what came of it.
      environments: their ids; default: all of the zoo.

    Raises:
      WorkdirError: the workdir cannot be used, or there is no zoo.
      UnitsFailedError: some could not be scored; the others are.
    """
    ids = environments or _among(config, workdir)
    pin_config(workdir, "score_zoo", config, owns=("scored",))
    units = [_Unit(id, config.zoo / id) for id in ids if read_outcome(workdir / "scored" / id) is None]
    job = Job(functools.partial(_score, config), functools.partial(_prepare, config))
    failed: dict[str, str] = {}
    workers = config.workers_for(len(units))
    for each in work_on("score", units, job, config, workers=workers, counted="reference"):
        outcome = each.result or UnitOutcome("failed", each.reason, each.cause)
        progress.log("scored", id=each.unit.id, verdict=outcome.verdict, reason=outcome.reason)
        if outcome.verdict == "failed":
            failed[each.unit.id] = outcome.reason
        else:
            write_outcome(workdir / "scored" / each.unit.id, outcome)
    if failed:
        raise UnitsFailedError(failed)


def _prepare(config: FinerConfig, unit: _Unit) -> UnitOutcome | None:
    """Builds what the environment lives in, unless its reference needs no finer score, or is damaged."""
    try:
        known = _error(load_reference(unit.directory))
    except (Exception, SystemExit) as error:
        return failure(error)
    if known <= config.z_error:
        return UnitOutcome("admitted", f"z has a standard error of {known:.2g} already")
    return build_for(unit.id)


def _score(config: FinerConfig, unit: _Unit, advance: progress.Advance) -> UnitOutcome:
    try:
        before, begun = load_reference(unit.directory), time.perf_counter()
        seed = seed_of(config.seed, "score_zoo", unit.id)
        after = score_further(registry.make, before, config.z_error, Rounds(*config.played, config.steps), seed)
        outcome = _put(unit.directory, before, after, time.perf_counter() - begun)
    except (Exception, SystemExit) as error:
        return failure(error)
    advance(1)
    return outcome


def _error(scored: ScoredReference) -> float:
    return scores.z_error_at_reference(scored.random_returns.array, scored.reference_returns.array)


def _put(directory: pathlib.Path, before: ScoredReference, after: ScoredReference, seconds: float) -> UnitOutcome:
    """Writes the new score where it is finer, or that there is no reference."""
    old, new = before.admission, after.admission
    finer = f"z has a standard error of {_error(after):.2g}, {_error(before):.2g} before"
    better = new.difference > scores.ADMIT_STANDARD_ERRORS * new.standard_error
    if new.standard_error >= old.standard_error or (better and not new.admitted):  # it would take more steps to tell
        return UnitOutcome("admitted", f"{finer}: left as it was")
    said = with_costs(outcome_of(after), read_outcome(directory))
    said = said._replace(score_seconds=round(said.score_seconds + seconds, 1))
    if new.admitted:
        save_reference(directory, after, halved=is_halved(directory))
        write_outcome(directory, said)
        return said._replace(reason=f"{finer}: {said.reason}")
    write_outcome(directory, said)  # first: a reference that is still there is scored again, if this is interrupted
    (directory / "reference.json").unlink()
    for path in directory.glob("params-*.npz"):
        path.unlink()
    return said


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": FinerConfig()})

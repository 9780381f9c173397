"""Trains references: `python -m experiments.references --workdir=runs/mine --environments=gymnax/Catch-bsuite`.

Writes `references/<id>/` as each is finished, with `outcome.json`: admitted, refused or failed, and why. One that
fails, crashes or hangs does not stop the others; in the end a table says what came of each, and the exit status whether
all went well. Killed and started again, it trains only what is missing; `--retry=failed` tries again what failed.

Where an environment has experts, each is a candidate beside what is trained, and the best by episodes of its own
is kept: `--select='expert=yes' --config.algorithms=expert` trains nothing and takes experts alone.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib

import environments as registry
from data.references import (
    ReferencePolicyError,
    load_reference,
)
from data.references.candidates import TOTAL_STEPS, total_steps
from environments import UnknownEnvironmentError
from environments.registry import check_known
from experiments.harness import progress
from experiments.harness.building import build_all, build_for
from experiments.harness.dry_run import TO_DO, Planned
from experiments.harness.engine import work_on
from experiments.harness.making import (
    Made,
    ReferencesConfig,
    ReferenceUnit,
    make_reference,
    outcome_of,
    refused_by,
    take_isolated,
    too_large,
    zoo_of,
)
from experiments.harness.outcomes import (
    UnitOutcome,
    failure,
    outcome_table,
    read_outcome,
    write_outcome,
)
from experiments.harness.spare_time import Clock, Tried, try_again
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import LOCAL, OUT_OF_TIME, Engine, Job, Travel
from experiments.harness.verifying import verify_all
from experiments.harness.workdir import WorkdirError, pin_config
from ldm_jax.environment import LibraryMissingError

NOT_BEGUN = UnitOutcome("failed", "the hours were over before it was finished: start again", OUT_OF_TIME)


def foresee(config: ReferencesConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> list[Planned]:
    """What would be done, told without reading a reference."""
    planned = []
    for id in environments:
        found = read_outcome(workdir / "references" / id) or refused_by(config, id) or _foreseen(config, id)
        if isinstance(found, UnitOutcome):
            planned.append(Planned(id, f"{found.verdict} ({found.cause})" if found.cause else found.verdict))
        else:
            planned.append(Planned(id, TO_DO, found))
    return planned


@stage("references", plan=foresee, retries=True)
def run(
    config: ReferencesConfig, workdir: pathlib.Path, environments: tuple[str, ...], *, engine: Engine = LOCAL
) -> None:
    """Makes the references that are missing.

    Args:
      config: how.
      workdir: gets `references/`.
      environments: their ids.
      engine: where they are worked on.

    Raises:
      UnknownEnvironmentError: an id that is not known; nothing has been done then.
      WorkdirError: the workdir cannot be used, or no environment was named.
      ClusterError: the cluster cannot be reached or used; what is finished stays.
      UnitsFailedError: some environments have no reference in the end; the others do.
    """
    if not environments:
        raise WorkdirError(
            "no environment was named; give --environments=gymnax/CartPole-v1,envpool/Taxi-v3 or the like, or --select"
        )
    if config.verify:
        verify_all(config, zoo_of(config) or workdir / "references", environments, engine)
        return
    folder, clock = workdir / "references", Clock(config.total_hours)
    found = {id: _examine(config, id, folder / id) for id in environments}
    pin_config(workdir, "references", config, owns=("references",))
    outcomes: dict[str, UnitOutcome] = {}

    def settle(id: str, made: Made) -> None:
        outcomes[id] = made.outcome
        write_outcome(folder / id, made.outcome)
        _tell(id, made)

    for id, known in found.items():
        if made := Made(known) if isinstance(known, UnitOutcome) else take_isolated(config, known):
            settle(id, made)
    workers = config.workers_for(len(environments))
    unbuilt = (id for id in found if id not in outcomes)
    for id, outcome in build_all(unbuilt, workers, config.build_seconds, engine).items():
        settle(id, Made(outcome))
    units = [unit for id, unit in found.items() if isinstance(unit, ReferenceUnit) and id not in outcomes]
    if workers > 1:  # the longest first: else one of them may be what all wait for in the end
        units.sort(key=lambda unit: -unit.steps)
    job = Job(functools.partial(make_reference, config), _prepare)
    travel = Travel(workdir, _needed, _moved, _arrived)

    def work(units: list[ReferenceUnit]) -> None:
        working = work_on("references", units, job, config, workers=workers, engine=engine, travel=travel)
        with contextlib.closing(working):
            for each in working:
                made = each.result or Made(UnitOutcome("failed", each.reason, each.cause))
                settle(each.unit.id, _with_what_was(made, outcomes.get(each.unit.id), each.unit))
                if clock.left <= 0:
                    break

    work(units)
    while config.total_hours and (again := _spend(config, folder, outcomes, clock.left, workers)):
        work(again)
    _conclude({id: outcomes.get(id, NOT_BEGUN) for id in environments})


def _tell(id: str, made: Made) -> None:
    if made.outcome.verdict == "failed":
        progress.log("failed", id=id, cause=made.outcome.cause, reason=made.outcome.reason)
    elif made.facts:
        progress.log("reference", id=id, **made.facts)


def _conclude(outcomes: dict[str, UnitOutcome]) -> None:
    print(outcome_table(outcomes))
    failed = {id: outcome.reason for id, outcome in outcomes.items() if outcome.verdict == "failed"}
    if failed:
        raise UnitsFailedError(failed)


def _with_what_was(made: Made, before: UnitOutcome | None, unit: ReferenceUnit) -> Made:
    """What came of a unit; where another try came to nothing, what there was is there still."""
    if not unit.budget or before is None:
        return made
    outcome = made.outcome
    if outcome.verdict == "failed":
        progress.log("failed again", id=unit.id, reason=outcome.reason)
        return Made(before._replace(budget=unit.budget))
    trained, scored = before.train_seconds + outcome.train_seconds, before.score_seconds + outcome.score_seconds
    return made._replace(outcome=outcome._replace(budget=unit.budget, train_seconds=trained, score_seconds=scored))


def _examine(config: ReferencesConfig, id: str, directory: pathlib.Path) -> ReferenceUnit | UnitOutcome:
    """What there is to do for an id, or what came of it already: all that can be known before anything is made."""
    try:
        if (directory / "reference.json").exists():
            made = outcome_of(load_reference(directory))  # what was finished, or what is wrong with it
            before = read_outcome(directory)
            return before if before and before[:2] == made[:2] else made
        if before := read_outcome(directory) or refused_by(config, id):
            return before
        check_known(id)
    except (ReferencePolicyError, LibraryMissingError) as error:
        return failure(error)
    steps = _foreseen(config, id)
    return steps if isinstance(steps, UnitOutcome) else ReferenceUnit(id, directory, steps)


def _spend(
    config: ReferencesConfig, folder: pathlib.Path, outcomes: dict[str, UnitOutcome], seconds: float, workers: int
) -> list[ReferenceUnit]:
    """What the time that is left is spent on."""
    tried = {
        id: Tried(load_reference(folder / id), outcome.budget or config.budget)
        for id, outcome in outcomes.items()
        if seconds > 0 and outcome.verdict in ("admitted", "refused") and (folder / id / "reference.json").exists()
    }
    again = try_again(tried, seconds, workers)
    for each in again:
        progress.log("again", id=each.id, budget=each.budget, seconds=round(each.seconds))
    steps = {id: total_steps(known.scored.policy.spec) for id, known in tried.items()}
    return [ReferenceUnit(one.id, folder / one.id, round(one.budget * steps[one.id]), one.budget) for one in again]


def _foreseen(config: ReferencesConfig, id: str) -> int | UnitOutcome:
    """The steps that an environment will take, by the catalog, or why it is not even tried."""
    if config.algorithms == "expert" and not registry.experts(id):
        return UnitOutcome("failed", f"{id} has no expert, see environments.experts", "no expert")
    try:
        spec = registry.spec(id)
    except UnknownEnvironmentError:
        return round(config.budget * TOTAL_STEPS)  # the catalog does not have it; training will see
    if config.algorithms == "expert":  # nothing is trained: it and the random policy are scored
        episodes = max(config.least_episodes, config.num_envs * config.episodes)
        return too_large(spec) or 2 * episodes * spec.time_limit
    return too_large(spec) or max(1, round(config.budget * total_steps(spec)))


def _prepare(unit: ReferenceUnit) -> Made | None:
    failed = build_for(unit.id)
    return Made(failed) if failed else None


def _needed(unit: ReferenceUnit) -> list[str]:
    return [f"references/{unit.id}"]  # what an attempt before has left there


def _moved(unit: ReferenceUnit, root: pathlib.Path) -> ReferenceUnit:
    return unit._replace(directory=root / "references" / unit.id)


def _arrived(unit: ReferenceUnit, root: pathlib.Path) -> None:
    """Takes a reference that was made elsewhere: whole, since what says that it is there comes last."""
    folder = _moved(unit, root).directory
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name == "reference.json"):
        target = unit.directory / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


if __name__ == "__main__":
    from experiments import references  # by its own name: other machines run another script
    from experiments.harness.flags import launch

    launch(references.run, {"default": references.ReferencesConfig()})

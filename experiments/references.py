"""Trains references: `python -m experiments.references --workdir=runs/mine --environments=gymnax/Catch-bsuite`.

Writes `references/<id>/` as each is finished, with `outcome.json`: admitted, refused or failed, and why. One that
fails, crashes or hangs does not stop the others; in the end a table says what came of each, and the exit status whether
all went well. Killed and started again, it trains only what is missing; `--retry=failed` tries again what failed.

Where an environment has experts, each is a candidate beside what is trained, and the best by episodes of its own
is kept: `--select='expert=yes' --config.algorithms=expert` trains nothing and takes experts alone.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import typing

import environments as registry
from data.distil import score_distilled
from data.references import (
    ReferencePolicyError,
    load_reference,
    save_reference,
    score_reference,
    train_reference,
)
from data.references.candidates import TOTAL_STEPS, total_steps
from data.references.choosing import choose_reference
from data.references.pipeline import ScoredReference, opened
from data.references.policy import ReferencePolicy
from environments import UnknownEnvironmentError
from environments.registry import check_known
from experiments.harness import progress
from experiments.harness.building import build_all, build_for
from experiments.harness.dry_run import TO_DO, Planned
from experiments.harness.engine import work_on
from experiments.harness.experts import Watch, expert_policies, write_facts
from experiments.harness.outcomes import TOO_LARGE, UnitOutcome, failure, outcome_table, read_outcome, write_outcome
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import LOCAL, Engine, Job, Travel, UnitsConfig
from experiments.harness.workdir import WorkdirError, pin_config, seed_of
from experiments.report.targets import find_target
from ldm_jax.encoding.buckets import bucket_for
from ldm_jax.environment import LibraryMissingError
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.types import EnvironmentSpec


@dataclasses.dataclass(frozen=True)
class ReferencesConfig(UnitsConfig):
    """How references are made; what they are does not depend on how they are worked on.

    Attributes:
      seed: of training and scoring.
      budget: share that is spent of an environment's training steps, `data.references.candidates.total_steps`; they are
        those of all candidates together.
      algorithms: `all`, `trained` to leave the experts of environments out, or `expert` to take them alone.
      num_envs: parallel environments of scoring.
      episodes: in each of them in one round; rounds are played until the errors are small enough.
      least_episodes: of each policy scored, whatever they tell.
      most_episodes: of each policy scored, however noisy; fewer where they would take a quarter of training's steps.
    """

    seed: int = 0
    budget: float = 1.0
    algorithms: str = "all"
    num_envs: int = 64
    episodes: int = 1
    least_episodes: int = 64
    most_episodes: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budget > 0:
            raise ConfigError(f"budget is {self.budget}, expected a positive fraction")
        if self.algorithms not in ("all", "trained", "expert"):
            raise ConfigError(f"algorithms is {self.algorithms!r}, expected all, trained or expert")
        for name, least in (("num_envs", 1), ("episodes", 1), ("least_episodes", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.most_episodes < self.least_episodes:
            raise ConfigError(f"most_episodes is {self.most_episodes}, expected at least {self.least_episodes}")


class ReferenceUnit(typing.NamedTuple):
    """One environment to work on: its id, the folder of its reference, and the steps that it will take, about."""

    id: str
    directory: pathlib.Path
    steps: int


class _Made(typing.NamedTuple):
    """What came of a unit, and what the log says of it."""

    outcome: UnitOutcome
    facts: dict[str, typing.Any] | None = None


def foresee(config: ReferencesConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> list[Planned]:
    """What would be done, told without reading a reference."""
    planned = []
    for id in environments:
        found = read_outcome(workdir / "references" / id) or _foreseen(config, id)
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
    folder = workdir / "references"
    found = {id: _examine(config, id, folder / id) for id in environments}
    pin_config(workdir, "references", config, owns=("references",))
    outcomes: dict[str, UnitOutcome] = {}

    def settle(id: str, made: _Made) -> None:
        outcomes[id] = made.outcome
        write_outcome(folder / id, made.outcome)
        if made.outcome.verdict == "failed":
            progress.log("failed", id=id, cause=made.outcome.cause, reason=made.outcome.reason)
        elif made.facts:
            progress.log("reference", id=id, **made.facts)

    for id, known in found.items():
        if isinstance(known, UnitOutcome):
            settle(id, _Made(known))
    workers = config.workers_for(len(environments))
    unbuilt = (id for id in found if id not in outcomes)
    for id, outcome in build_all(unbuilt, workers, config.build_seconds, engine).items():
        settle(id, _Made(outcome))
    units = [unit for id, unit in found.items() if isinstance(unit, ReferenceUnit) and id not in outcomes]
    if workers > 1:  # the longest first: else one of them may be what all wait for in the end
        units.sort(key=lambda unit: -unit.steps)
    job = Job(functools.partial(_make, config), _prepare)
    travel = Travel(workdir, _needed, _moved, _arrived)
    for each in work_on("references", units, job, config, workers=workers, engine=engine, travel=travel):
        settle(each.unit.id, each.result or _Made(UnitOutcome("failed", each.reason, each.cause)))
    print(outcome_table({id: outcomes[id] for id in environments}))
    failed = {id: outcomes[id].reason for id in environments if outcomes[id].verdict == "failed"}
    if failed:
        raise UnitsFailedError(failed)


def _examine(config: ReferencesConfig, id: str, directory: pathlib.Path) -> ReferenceUnit | UnitOutcome:
    """What there is to do for an id, or what came of it already: all that can be known before anything is made."""
    try:
        if (directory / "reference.json").exists():
            return _outcome(load_reference(directory))  # finished, or it says what is wrong with it
        if before := read_outcome(directory):
            return before
        check_known(id)
    except (ReferencePolicyError, LibraryMissingError) as error:
        return failure(error)
    steps = _foreseen(config, id)
    return steps if isinstance(steps, UnitOutcome) else ReferenceUnit(id, directory, steps)


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
        return _too_large(spec) or 2 * episodes * spec.time_limit
    return _too_large(spec) or max(1, round(config.budget * total_steps(spec)))


def _too_large(spec: EnvironmentSpec) -> UnitOutcome | None:
    """Why there is no reference: what no model can be given needs none."""
    try:
        bucket_for(spec.observation_space, spec.action_space)
    except LdmError as error:
        return failure(error, TOO_LARGE)
    return None


def _outcome(scored: ScoredReference) -> UnitOutcome:
    admission = scored.admission
    return UnitOutcome("admitted" if admission.admitted else "refused", admission.reason)


def _prepare(unit: ReferenceUnit) -> _Made | None:
    failed = build_for(unit.id)
    return _Made(failed) if failed else None


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


def _score_best(config: ReferencesConfig, policies: list[ReferencePolicy], seed: int, watch: Watch) -> ScoredReference:
    """Scores the best; one that fails, or that reads what a policy does not see and cannot be followed, makes room."""
    policy = choose_reference(registry.make, policies, seed, config.num_envs, config.episodes)
    others = [other for other in policies if other is not policy]
    played = (config.num_envs, config.episodes, config.least_episodes, config.most_episodes)
    try:
        scored = score_reference(watch, policy, seed, *played)
        if not policy.reference.privileged:
            return scored
        if scored.reference_returns.mean > scored.random_returns.mean:
            scored = dataclasses.replace(scored, distilled_returns=score_distilled(registry.make, scored, seed))
    except LdmError as error:
        if not others:
            raise
        progress.log("left out", id=policy.spec.id, expert=policy.reference.expert, reason=str(error))
        return _score_best(config, others, seed, watch)
    return scored if scored.admission.admitted or not others else _score_best(config, others, seed, watch)


def _make(config: ReferencesConfig, unit: ReferenceUnit, advance: progress.Advance) -> _Made:
    """Trains, scores and saves; whatever the environment does is its own failure, `sys.exit` included."""
    clock, seed = progress.clock(), seed_of(config.seed, "references", unit.id)
    try:
        with opened(registry.make, unit.id, 1) as environment:
            spec = environment.spec
        refused = _too_large(spec)
        if refused:
            return _Made(refused)
        published = find_target(unit.id)
        target = published and published.target_return
        told = progress.up_to(advance)
        policies = [] if config.algorithms == "trained" else expert_policies(spec)
        if config.algorithms != "expert":
            policies.append(train_reference(registry.make, unit.id, None, seed, told, config.budget, target))
        trained_s = clock()
        watch = Watch(registry.make)
        scored = _score_best(config, policies, seed, watch)
        if config.algorithms == "expert":
            advance(unit.steps)
    except (Exception, SystemExit) as error:
        return _Made(failure(error))
    try:
        save_reference(unit.directory, scored)
        if measured := watch.facts(scored.policy.reference.expert):
            write_facts(unit.directory, measured)
    except ReferencePolicyError as error:  # something else is in the folder
        return _Made(failure(error))
    made = scored.policy.reference
    facts = {
        "algorithm": made.algorithm,
        "expert": made.expert,
        "candidate": made.candidate,
        "candidates": len(made.candidates),
        "steps": made.steps,
        "decoding": made.decoding,
        "random": scored.random_returns.mean,
        "reference": scored.reference_returns.mean,
        "admitted": scored.admission.admitted,
        "episodes": scored.reference_returns.episodes,
        "share_of_target": scored.share_of_target,
        "train_seconds": trained_s,
        "score_seconds": round(clock() - trained_s, 1),
    }
    return _Made(_outcome(scored), facts)


if __name__ == "__main__":
    from experiments import references  # by its own name: other machines run another script
    from experiments.harness.flags import launch

    launch(references.run, {"default": references.ReferencesConfig()})

"""How one reference is made: what it may take, and what comes of it."""

from __future__ import annotations

import dataclasses
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
from data.references.choosing import choose_reference
from data.references.opening import opened
from data.references.pipeline import ScoredReference
from data.references.policy import ReferencePolicy
from data.references.zoo import take_from_zoo
from environments.registry import group
from experiments.harness import progress
from experiments.harness.experts import Watch, expert_policies, write_facts
from experiments.harness.outcomes import TOO_LARGE, UnitOutcome, failure, in_one_line, read_outcome, with_costs
from experiments.harness.units import UnitsConfig
from experiments.harness.workdir import FREE, WorkdirError, seed_of
from experiments.report.targets import find_target
from ldm_jax.encoding.buckets import bucket_for
from ldm_jax.errors import ConfigError, LdmError, check_at_least
from ldm_jax.types import EnvironmentSpec


@dataclasses.dataclass(frozen=True)
class ScoredConfig(UnitsConfig):
    """How references are scored.

    Attributes:
      num_envs: parallel environments of scoring.
      episodes: in each of them in one round; rounds are played until the errors are small enough.
      least_episodes: of each policy scored, whatever they tell.
      most_episodes: of each policy scored, however noisy; fewer where they would take a quarter of the steps
        of a full budget.
    """

    num_envs: int = 64
    episodes: int = 1
    least_episodes: int = 64
    most_episodes: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"num_envs": 1, "episodes": 1, "least_episodes": 2})
        if self.most_episodes < self.least_episodes:
            raise ConfigError(f"most_episodes is {self.most_episodes}, expected at least {self.least_episodes}")

    @property
    def played(self) -> tuple[int, int, int, int]:
        """As `score_reference` takes them, after the seed."""
        return self.num_envs, self.episodes, self.least_episodes, self.most_episodes


@dataclasses.dataclass(frozen=True)
class ReferencesConfig(ScoredConfig):
    """How references are made; what they are does not depend on how they are worked on.

    Attributes:
      seed: of training and scoring.
      budget: share that is spent of an environment's training steps, `data.references.candidates.total_steps`; they are
        those of all candidates together.
      total_hours: that this start may take, about; what is over before it is begun waits for the next. What is left of
        them goes to those that fall short: refused, or without 0.9 of their public target. They are tried for again
        with four times the budget, and again, and the better is kept. 0: however long it takes, each once.
      algorithms: `all`, `trained` to leave the experts of environments out, or `expert` to take them alone.
      zoo: folder of references that are taken instead of trained, where the environment is still the one that they were
        made for; one that every machine sees. Where it says that an environment has none, there is none.
      verify: whether to score what there is anew, in the zoo where one is given, and make nothing.
    """

    seed: int = 0
    budget: float = 1.0
    total_hours: float = dataclasses.field(default=0.0, metadata={FREE: True})
    algorithms: str = "all"
    zoo: str = ""
    verify: bool = dataclasses.field(default=False, metadata={FREE: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budget > 0:
            raise ConfigError(f"budget is {self.budget}, expected a positive fraction")
        if self.total_hours < 0:
            raise ConfigError(f"total_hours is {self.total_hours}, expected a number of hours, or 0")
        if self.algorithms not in ("all", "trained", "expert"):
            raise ConfigError(f"algorithms is {self.algorithms!r}, expected all, trained or expert")


class ReferenceUnit(typing.NamedTuple):
    """One environment to work on.

    Attributes:
      id: of the environment.
      directory: of its reference.
      steps: that it will take, about.
      budget: share of its training steps that another try may have; 0 for the first, with the one of the configuration.
    """

    id: str
    directory: pathlib.Path
    steps: int
    budget: float = 0.0


class Made(typing.NamedTuple):
    """What came of a unit, and what the log says of it."""

    outcome: UnitOutcome
    facts: dict[str, typing.Any] | None = None


def outcome_of(scored: ScoredReference) -> UnitOutcome:
    """Whether a reference is admitted, and why not."""
    admission = scored.admission
    return UnitOutcome("admitted" if admission.admitted else "refused", admission.reason)


def too_large(spec: EnvironmentSpec) -> UnitOutcome | None:
    """Why there is no reference: what no model can be given needs none."""
    try:
        bucket_for(spec.observation_space, spec.action_space)
    except LdmError as error:
        return failure(error, TOO_LARGE)
    return None


def zoo_of(config: ReferencesConfig) -> pathlib.Path | None:
    """The folder of the zoo, None where none is named.

    Raises:
      WorkdirError: it is not there.
    """
    if not config.zoo:
        return None
    folder = pathlib.Path(config.zoo).expanduser().absolute()
    if not folder.is_dir():
        raise WorkdirError(f"there is no zoo {folder}: give the folder that experiments.pack_zoo has written")
    return folder


def refused_by(config: ReferencesConfig, id: str) -> UnitOutcome | None:
    """What the zoo says of an environment that it has no reference of, where somebody tried to make one."""
    folder = zoo_of(config)
    said = folder and read_outcome(folder / id)
    return said if said and said.verdict != "admitted" else None


def _take(config: ReferencesConfig, spec: EnvironmentSpec) -> ScoredReference | None:
    """What the zoo has of an environment; what is not of this one is told of and left."""
    folder = zoo_of(config)
    try:
        return take_from_zoo(folder, spec) if folder else None
    except LdmError as error:
        progress.log("left in the zoo", id=spec.id, reason=in_one_line(error))
        return None


def _score_best(config: ReferencesConfig, policies: list[ReferencePolicy], seed: int, watch: Watch) -> ScoredReference:
    """Scores the best; one that fails, or that reads what a policy does not see and cannot be followed, makes room."""
    policy = choose_reference(registry.make, policies, seed, config.num_envs, config.episodes)
    others = [other for other in policies if other is not policy]
    try:
        scored = score_reference(watch, policy, seed, *config.played)
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


def take_isolated(config: ReferencesConfig, unit: ReferenceUnit) -> Made | None:
    """Takes a reference without opening its environment, if that lives in an interpreter of the catalog's versions."""
    if not config.zoo or not group(unit.id.partition("/")[0]):
        return None
    try:
        taken = _take(config, registry.spec(unit.id))
        if taken:
            save_reference(unit.directory, taken)
    except LdmError as error:
        return Made(failure(error))
    return _taken(config, taken) if taken else None


def _taken(config: ReferencesConfig, scored: ScoredReference) -> Made:
    """What came of taking a reference, with what it took to make it where the zoo says that."""
    folder = zoo_of(config)
    said = read_outcome(folder / scored.policy.spec.id) if folder else None
    return Made(with_costs(outcome_of(scored), said), {"taken": scored.policy.reference.algorithm})


def make_reference(config: ReferencesConfig, unit: ReferenceUnit, advance: progress.Advance) -> Made:
    """Trains, scores and saves; whatever the environment does is its own failure, `sys.exit` included."""
    clock, seed = progress.clock(), seed_of(config.seed, "references", unit.id)
    training_seed = seed_of(seed, "again", f"{unit.budget:g}") if unit.budget else seed  # another try has other luck
    try:
        with opened(registry.make, unit.id, 1) as environment:
            spec = environment.spec
        refused = too_large(spec)
        if refused:
            return Made(refused)
        taken = None if unit.budget else _take(config, spec)
        if taken:
            save_reference(unit.directory, taken)
            advance(unit.steps)
            return _taken(config, taken)
        published = find_target(unit.id)
        target = published and published.target_return
        told = progress.up_to(advance)
        policies = [] if config.algorithms == "trained" else expert_policies(spec, target)
        if config.algorithms != "expert":
            budget = unit.budget or config.budget
            policies.append(train_reference(registry.make, unit.id, None, training_seed, told, budget, target))
        if unit.budget:
            policies.insert(0, load_reference(unit.directory).policy)  # of equals what is there stays
        trained_s = clock()
        watch = Watch(registry.make)
        scored = _score_best(config, policies, seed, watch)
        if config.algorithms == "expert":
            advance(unit.steps)
    except (Exception, SystemExit) as error:
        return Made(failure(error))
    try:
        save_reference(unit.directory, scored)
        if measured := watch.facts(scored.policy.reference.expert):
            write_facts(unit.directory, measured)
    except ReferencePolicyError as error:  # something else is in the folder
        return Made(failure(error))
    made, scored_s = scored.policy.reference, round(clock() - trained_s, 1)
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
        "score_seconds": scored_s,
    }
    return Made(outcome_of(scored)._replace(train_seconds=trained_s, score_seconds=scored_s), facts)

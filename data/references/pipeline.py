"""From an environment's id to a scored reference policy: search, choose the decoding, score, admit or refuse."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import typing

import jax
import numpy as np

from ldm_jax import cards, rollout
from ldm_jax.environment import Environment
from ldm_jax.evaluation import scores
from ldm_jax.types import Agent

from . import action_range
from .candidates import TOTAL_STEPS, total_steps
from .expert import ExpertConfig, check_learnable, expert_policy
from .opening import MakeEnvironment, opened, opened_for, with_room
from .policy import ReferencePolicy, SlotDecoding, random_agent, with_decoding
from .recipes import ALGORITHMS, Recipe
from .scoring import LEAST_STEPS, STEPS_SHARE, Enough, Rounds, play_rounds, told_apart
from .search import Found, search, train_one

_SCORING = 0x5C0E  # sets the randomness of scoring apart from that of training


@dataclasses.dataclass(frozen=True)
class ScoredReference:
    """A reference in its better decoding, with what it and a random policy score; it can be pickled and compared.

    Attributes:
      policy: the reference.
      random_returns: of the uniformly random policy.
      reference_returns: of the reference, on other episodes than those that chose it and its decoding.
      distilled_returns: of a policy on observations alone that was trained on its labels, where it is privileged.
      admission: whether it is good enough to score others against, and why not.
    """

    policy: ReferencePolicy
    random_returns: cards.Returns
    reference_returns: cards.Returns
    distilled_returns: cards.Returns | None = None

    @property
    def admission(self) -> scores.Admission:
        """Whether it is good enough to score others against, and why not."""
        admission = scores.admit(self.random_returns.array, self.reference_returns.array)
        if not self.policy.reference.privileged:
            return admission
        return check_learnable(admission, self.random_returns, self.distilled_returns)

    @property
    def share_of_target(self) -> float | None:
        """How much of the way from random to the public target it gets, None where none is known."""
        target = self.policy.reference.public_target
        return cards.share_of_target(self.random_returns.mean, self.reference_returns.mean, target)

    @property
    def weak(self) -> bool:
        """Whether it is known to be weak: it gets less than `cards.WEAK` of the way to a public target."""
        return self.share_of_target is not None and self.share_of_target < cards.WEAK


def _single_precision() -> contextlib.AbstractContextManager[typing.Any]:
    """Computes in 32 bits whatever the process is set to, so that the results are the same."""
    return jax.enable_x64(False)


def train_reference(
    make: MakeEnvironment,
    id: str,
    how: Recipe | None = None,
    seed: int = 0,
    progress: rollout.Progress | None = None,
    budget: float = 1.0,
    target: float | None = None,
) -> ReferencePolicy:
    """Trains a reference policy.

    Args:
      make: makes the environment, `environments.make` or the like.
      id: of the environment.
      how: the recipe; if None, candidates are found by the environment's spaces and a probe, and the best is kept.
      seed: of everything random.
      progress: is told the environment steps done and their total.
      budget: where candidates are found, the share that is spent of `candidates.total_steps`, all of them together.
      target: a public return of the task, None where none is known; a search that reaches it stops.

    Returns:
      The policy, decoding by sampling.

    Raises:
      ActionRangeError: the action space declares no bounds, and none were found.
      DivergenceError: training diverged.
    """
    if how is not None and isinstance(how.config, ExpertConfig):
        with opened(make, id, 1) as environment:
            return expert_policy(environment.spec, how.config)
    with _single_precision():
        if how is None:
            found = search(make, id, budget, seed, target, progress)
        else:
            found = train_one(make, id, how, seed, progress)
    return _policy(found, seed, target)


def _policy(found: Found, seed: int, target: float | None) -> ReferencePolicy:
    recipe, spec, config = found.candidate.recipe, found.spec, found.config
    return ReferencePolicy(
        agent=ALGORITHMS[recipe.algorithm].agent(spec, config),
        params=with_decoding(found.params, "sample"),
        reference=cards.Reference(
            algorithm=recipe.algorithm,
            decoding="sample",
            budget_steps=config.budget_steps,
            seed=seed + found.candidate.seed,
            assumed_slots=tuple(np.flatnonzero(action_range.unbounded(spec.action_space)).tolist()),
            candidate=found.candidate.name,
            candidates=found.tried,
            steps=found.steps,
            seconds=found.seconds,
            curve=found.curve,
            public_target=target,
            stopped=found.stopped,
        ),
        spec=spec,
        config=config,
    )


@contextlib.contextmanager
def _opened_to_score(
    make: MakeEnvironment, policy: ReferencePolicy, num_envs: int
) -> collections.abc.Iterator[tuple[tuple[Environment, Agent], ...]]:
    """Where the reference plays and where the random policy does, each with its agent: experts are slow."""
    with opened_for(make, policy, num_envs) as environment:
        if not policy.reference.expert:
            yield ((environment, policy.agent),) * 2
            return
        with opened(make, policy.spec.id, num_envs) as plain:
            yield (environment, policy.agent), (plain, random_agent(policy.spec.action_space))


def score_reference(
    make: MakeEnvironment,
    policy: ReferencePolicy,
    seed: int = 0,
    num_envs: int = 64,
    episodes_per_env: int = 1,
    least: int = 64,
    most: int = 4096,
    progress: rollout.Progress | None = None,
) -> ScoredReference:
    """Scores a reference and a random policy on fresh episodes, equally many in every one of the parallel environments.

    The better of greedy and sampled decoding is found on episodes of its own, and scored afresh: choosing by the
    reported episodes would flatter it. Episodes are played by the round until the errors are small enough, whichever
    way they lean, or have cost a quarter of the steps of training; of a full budget's where z is to be told, and of an
    expert, which has had none, as many as training takes.

    Args:
      make: makes the environment, as for training.
      policy: the reference, whichever way it decodes.
      seed: of the episodes.
      num_envs: parallel environments; fewer where memory has no room for so many.
      episodes_per_env: E of one round.
      least: episodes of each policy, at least two, whatever they tell.
      most: episodes of each policy, however noisy.
      progress: is told the episodes done and how many there may be.

    Returns:
      The reference in its better decoding, and the scores.

    Raises:
      CardError: the environment is no longer the one that the reference was trained in.
    """
    rounds = Rounds(num_envs, episodes_per_env, least, most, steps=0)
    return with_room(lambda rows: _score(make, policy, seed, rounds._replace(rows=rows), progress), num_envs)


def score_further(
    make: MakeEnvironment, scored: ScoredReference, z_error: float, rounds: Rounds, seed: int = 0
) -> ScoredReference:
    """Scores a reference, in the form that it has, and a random policy anew, until they tell z more finely.

    Args:
      make: makes the environment, as for training.
      scored: the reference.
      z_error: standard error of z, of a policy as good as the reference that is played as long, at which there are
        enough episodes.
      rounds: how many are played whatever they tell.
      seed: of the episodes; not the one that it was scored with.

    Returns:
      The same reference with the new scores alone: old episodes, which may have chosen it, are not among them.

    Raises:
      CardError: the environment is no longer the one that it was made for.
    """

    def told(reference: np.ndarray, random: np.ndarray) -> bool:
        return scores.z_error_at_reference(random, reference) <= z_error and _z_is_told(reference, random)

    def score(rows: int) -> ScoredReference:
        fitting = rounds._replace(rows=rows)
        with _players(make, scored.policy, seed, fitting) as play:
            reference, random = _against_random(scored.policy, play, fitting, told)
        return dataclasses.replace(scored, random_returns=random, reference_returns=reference)

    return with_room(score, rounds.rows)


_Play = collections.abc.Callable[[int, SlotDecoding, int], rollout.EpisodeReturns]
"""`play(stage, form, number)`: the episodes of a round, whose randomness is that of its stage and number."""


@contextlib.contextmanager
def _players(
    make: MakeEnvironment,
    policy: ReferencePolicy,
    seed: int,
    rounds: Rounds,
    progress: rollout.Progress | None = None,
) -> collections.abc.Iterator[_Play]:
    """Where a reference and the random policy play."""
    root = jax.random.fold_in(jax.random.key(seed), _SCORING)
    with _opened_to_score(make, policy, rounds.rows) as players, _single_precision():
        cards.check_matches(policy.spec, players[0][0].spec, f"the reference of {policy.spec.id}")

        def play(stage: int, form: SlotDecoding, number: int) -> rollout.EpisodeReturns:
            key = jax.random.fold_in(jax.random.fold_in(root, stage), number)
            params = with_decoding(policy.params["policy"], form)
            episodes = rollout.run_episodes(*players[form == "random"], params, key, rounds.each)
            if progress is not None:
                progress(min((number + 1) * episodes.returns.size, rounds.most), rounds.most)
            return episodes

        yield play


def _score(
    make: MakeEnvironment, policy: ReferencePolicy, seed: int, rounds: Rounds, progress: rollout.Progress | None
) -> ScoredReference:
    with _players(make, policy, seed, rounds, progress) as play:
        if policy.reference.expert:
            policy = policy.with_decoding("greedy")  # it has one form only
        else:
            trained = max(policy.reference.steps, policy.reference.budget_steps)
            rounds = rounds._replace(steps=_steps_to_score(trained))
            policy = _in_better_form(policy, play_rounds(lambda i, n: play(i, _FORMS[i], n), rounds, told_apart))
        rounds = rounds._replace(steps=_steps_to_tell_z(policy))
        reference, random = _against_random(policy, play, rounds, _z_is_told)
    return ScoredReference(policy, random, reference)


def _against_random(
    policy: ReferencePolicy, play: _Play, rounds: Rounds, told: Enough
) -> tuple[cards.Returns, cards.Returns]:
    """The returns of a reference and of the random policy, played until they tell enough."""
    pair: tuple[SlotDecoding, ...] = (policy.reference.decoding, "random")
    return play_rounds(lambda i, n: play(2 + i, pair[i], n), rounds, told)


_FORMS: tuple[typing.Literal["greedy"], typing.Literal["sample"]] = ("greedy", "sample")


def _steps_to_score(trained: int) -> int:
    """What each of two comparisons may take after so many steps of training: half of a share of them."""
    return int(max(LEAST_STEPS, STEPS_SHARE * trained)) // 2


def _steps_to_tell_z(policy: ReferencePolicy) -> int:
    """What the comparison with random may take, without which there is no reference; an expert has had no training."""
    reference, full = policy.reference, total_steps(policy.spec)
    if reference.expert:
        return max(TOTAL_STEPS, full)  # a table's would leave long episodes untold
    # What trained little is as noisy as what trained long: the share is of a full budget at the least.
    return _steps_to_score(max(reference.steps, reference.budget_steps, full))


def _in_better_form(policy: ReferencePolicy, both: tuple[cards.Returns, cards.Returns]) -> ReferencePolicy:
    """The policy in the form that returns more, with what both return in its card."""
    policy = policy.with_decoding("greedy" if both[0].mean >= both[1].mean else "sample")
    told = zip(_FORMS, both, strict=True)
    forms = tuple((form, each.mean, each.standard_error, each.episodes) for form, each in told)
    return dataclasses.replace(policy, reference=dataclasses.replace(policy.reference, forms=forms))


def _z_is_told(reference: np.ndarray, random: np.ndarray) -> bool:
    return scores.z_error(random, reference) <= scores.ADMIT_Z_ERROR

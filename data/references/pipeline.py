"""From an environment's id to a scored reference policy: train, choose the decoding, score, admit or refuse."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import typing
import warnings

import jax
import numpy as np

from ldm_jax import cards, rollout
from ldm_jax.environment import Environment
from ldm_jax.evaluation import scores

from . import action_range
from .expert import ExpertConfig, check_learnable, expert_policy
from .policy import ReferencePolicy, SlotDecoding, with_decoding
from .recipes import ALGORITHMS, Recipe, recipe

MakeEnvironment = collections.abc.Callable[..., Environment]
"""`make(id, batch_size=B)`, as `environments.make`; with `expert=name` too, where a reference is an expert."""

_SCORING = 0x5C0E  # sets the randomness of scoring apart from that of training


@dataclasses.dataclass(frozen=True)
class ScoredReference:
    """A reference in its better decoding, with what it and a random policy score; it can be pickled and compared.

    Attributes:
      policy: the reference.
      random_returns: of the uniformly random policy.
      reference_returns: of the reference, on other episodes than those that chose its decoding.
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


@contextlib.contextmanager
def opened(make: MakeEnvironment, id: str, num_envs: int, expert: str = "") -> collections.abc.Iterator[Environment]:
    """Makes an environment and closes it; one that fails to close costs nothing of what was done with it.

    Args:
      make: makes the environment, `environments.make` or the like.
      id: of the environment.
      num_envs: parallel environments.
      expert: the name of the expert that labels its time steps; empty for none.

    Yields:
      The environment.
    """
    environment = make(id, batch_size=num_envs, expert=expert) if expert else make(id, batch_size=num_envs)
    try:
        yield environment
    finally:
        try:
            environment.close()
        except Exception as error:
            warnings.warn(f"{id} failed to close: {type(error).__name__}: {error}; nothing is lost", stacklevel=3)


def opened_for(
    make: MakeEnvironment, policy: ReferencePolicy, num_envs: int
) -> contextlib.AbstractContextManager[Environment]:
    """Makes the environment that a reference acts or labels in, with its expert where it is one; see `opened`."""
    return opened(make, policy.spec.id, num_envs, policy.reference.expert)


def _single_precision() -> contextlib.AbstractContextManager[typing.Any]:
    """Computes in 32 bits whatever the process is set to, so that the results are the same."""
    return jax.enable_x64(False)


def train_reference(
    make: MakeEnvironment, id: str, how: Recipe | None = None, seed: int = 0, progress: rollout.Progress | None = None
) -> ReferencePolicy:
    """Trains a reference policy.

    Args:
      make: makes the environment, `environments.make` or the like.
      id: of the environment.
      how: the recipe; the one that `recipes.recipe` chooses, if None.
      seed: of everything random.
      progress: is told the environment steps done and their total.

    Returns:
      The policy, decoding by sampling.

    Raises:
      ActionRangeError: the action space declares no bounds, and none were found.
      DivergenceError: training diverged.
    """
    with opened(make, id, 1) as environment:
        spec = environment.spec
    chosen = recipe(spec) if how is None else how
    if isinstance(chosen.config, ExpertConfig):
        return expert_policy(spec, chosen.config)
    algorithm = ALGORITHMS[chosen.algorithm]
    with opened(make, id, chosen.config.num_envs) as environment, _single_precision():
        cards.check_matches(spec, environment.spec, f"what {id} said of itself when made a moment ago")
        config = algorithm.settle(environment, chosen.config, seed)
        for learned in algorithm.learn(environment, config, seed):
            if progress is not None:
                progress(learned.steps, config.budget_steps)
        if progress is not None:
            progress(config.budget_steps, config.budget_steps)
        params = jax.tree.map(np.asarray, learned.params)
    return ReferencePolicy(
        agent=algorithm.agent(spec, config),
        params=with_decoding(params, "sample"),
        reference=cards.Reference(
            algorithm=chosen.algorithm,
            decoding="sample",
            budget_steps=config.budget_steps,
            seed=seed,
            assumed_slots=tuple(np.flatnonzero(action_range.unbounded(spec.action_space)).tolist()),
        ),
        spec=spec,
        config=config,
    )


def score_reference(
    make: MakeEnvironment,
    policy: ReferencePolicy,
    seed: int = 0,
    num_envs: int = 64,
    episodes_per_env: int = 4,
    progress: rollout.Progress | None = None,
) -> ScoredReference:
    """Scores a reference and a random policy on fresh episodes, equally many in every one of the parallel environments.

    The better of greedy and sampled decoding is found on episodes of its own, and scored afresh: choosing by the
    reported episodes would flatter it.

    Args:
      make: makes the environment, as for training.
      policy: the reference, whichever way it decodes.
      seed: of the episodes.
      num_envs: parallel environments.
      episodes_per_env: E; `num_envs * episodes_per_env` of at least 100 make a score.
      progress: is told the episodes done and their total.

    Returns:
      The reference in its better decoding, and the scores.

    Raises:
      CardError: the environment is no longer the one that the reference was trained in.
    """
    root = jax.random.fold_in(jax.random.key(seed), _SCORING)
    each = num_envs * episodes_per_env
    with opened_for(make, policy, num_envs) as environment, _single_precision():
        cards.check_matches(policy.spec, environment.spec, f"the reference of {policy.spec.id}")

        def returns(stage: int, decoding: SlotDecoding) -> cards.Returns:
            report = None if progress is None else (lambda done, _: progress(stage * each + done, 4 * each))
            params, key = with_decoding(policy.params["policy"], decoding), jax.random.fold_in(root, stage)
            return cards.Returns.of(
                rollout.evaluate(environment, policy.agent, params, key, episodes_per_env, report).returns
            )

        better: typing.Literal["greedy", "sample"] = "greedy"  # an expert has one form only
        if not policy.reference.expert and returns(0, "greedy").mean < returns(1, "sample").mean:
            better = "sample"
        reference_returns, random_returns = returns(2, better), returns(3, "random")
    return ScoredReference(policy.with_decoding(better), random_returns, reference_returns)

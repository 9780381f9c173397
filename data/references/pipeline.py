"""From an environment's id to a scored reference policy: train, choose the form, score, admit or refuse."""

from __future__ import annotations

import dataclasses
import typing

import jax

from ldm_jax import cards, rollout
from ldm_jax.encoding.actions import action_layout
from ldm_jax.environment import Environment
from ldm_jax.evaluation import scores

from .policy import Form, ReferencePolicy, with_form
from .recipes import ALGORITHMS, Recipe, recipe

Make = typing.Callable[..., Environment]
"""`make(id, batch_size=B)`, as `environments.make`."""

_SCORING = 0x5C0E  # sets the randomness of scoring apart from that of training


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredReference:
    """A reference in its better form, with what it and a random policy score.

    Attributes:
      policy: the reference.
      random_returns: of the uniformly random policy.
      reference_returns: of the reference, on other episodes than those that chose its form.
      admission: whether it is good enough to score others against, and why not.
    """

    policy: ReferencePolicy
    random_returns: cards.Returns
    reference_returns: cards.Returns

    @property
    def admission(self) -> scores.Admission:
        return scores.admit(self.random_returns.array, self.reference_returns.array)


def train_reference(
    make: Make, id: str, how: Recipe | None = None, seed: int = 0, progress: rollout.Progress | None = None
) -> ReferencePolicy:
    """Trains a reference policy.

    Args:
      make: makes the environment, `environments.make` or the like.
      id: of the environment.
      how: the recipe; the one that `recipes.recipe` chooses, if None.
      seed: of everything random.
      progress: is told the environment steps done and their total.

    Returns:
      The policy, in its sampled form.
    """
    spec = make(id, batch_size=1).spec
    chosen = recipe(spec) if how is None else how
    module, _ = ALGORITHMS[chosen.algorithm]
    environment = make(id, batch_size=chosen.config.num_envs)
    try:
        params = module.train(environment, chosen.config, seed, progress)
    finally:
        environment.close()
    return ReferencePolicy(
        module.agent(spec, chosen.config),
        with_form(params, "sample"),
        cards.Reference(
            algorithm=chosen.algorithm,
            decoding="sample",
            budget_steps=chosen.config.budget_steps,
            seed=seed,
            assumed_slots=action_layout(spec.action_space, low=-1.0, high=1.0).assumed,
        ),
        spec,
        chosen.config,
    )


def score_reference(
    make: Make,
    policy: ReferencePolicy,
    seed: int = 0,
    num_envs: int = 64,
    episodes_per_env: int = 4,
    progress: rollout.Progress | None = None,
) -> ScoredReference:
    """Scores a reference and a random policy on fresh episodes, equally many in every one of the parallel environments.

    The better of the greedy and the sampled form is found on episodes of its own, and scored afresh: choosing by
    the reported episodes would flatter it.

    Args:
      make: makes the environment, as for training.
      policy: the reference, in either form.
      seed: of the episodes.
      num_envs: parallel environments.
      episodes_per_env: E; `num_envs * episodes_per_env` of at least 100 make a score.
      progress: is told the episodes done and their total.

    Returns:
      The reference in its better form, and the scores.
    """
    root = jax.random.fold_in(jax.random.key(seed), _SCORING)
    environment = make(policy.spec.id, batch_size=num_envs)
    each = num_envs * episodes_per_env

    def returns(stage: int, form: Form) -> cards.Returns:
        report = None if progress is None else (lambda done, _: progress(stage * each + done, 4 * each))
        params, key = with_form(policy.params["policy"], form), jax.random.fold_in(root, stage)
        return cards.Returns.of(
            rollout.evaluate(environment, policy.agent, params, key, episodes_per_env, report).returns
        )

    try:
        better: typing.Literal["greedy", "sample"] = (
            "greedy" if returns(0, "greedy").mean >= returns(1, "sample").mean else "sample"
        )
        reference_returns, random_returns = returns(2, better), returns(3, "random")
    finally:
        environment.close()
    return ScoredReference(policy.in_form(better), random_returns, reference_returns)

"""Distillation: a small policy that sees observations alone, trained on what a reference would have done.

It tells whether the labels of a privileged expert can be learned from what a model sees.
Source: Ross, Gordon and Bagnell 2011 (DAgger): labels of states that others than the expert brought about.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax import cards, rollout
from ldm_jax.encoding.actions import ActionLayout, action_layout, normalize, to_slots
from ldm_jax.encoding.transition import Transition, from_leaves
from ldm_jax.errors import ConfigError, check_finite
from ldm_jax.types import Array, EnvironmentSpec, PyTree

from . import collect
from .references import ReferencePolicyError, action_range, ppo
from .references.expert import LEARNABLE
from .references.moments import add_moments, init_moments
from .references.networks import network
from .references.pipeline import MakeEnvironment, ScoredReference, opened, opened_for
from .references.policy import ReferencePolicy, SlotDecoding, choice_logits, with_decoding
from .references.ppo import PPOConfig

_FORMS: tuple[SlotDecoding, ...] = ("greedy", "sample")

HIDDEN = (128, 128)
"""Widths of its hidden layers."""


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """How a policy is distilled.

    Attributes:
      streams: parallel streams of the labels, a few of them without noise.
      steps: of each.
      updates: of the policy.
      rows: labelled steps of each update.
      learning_rate: of Adam, which falls to 0.
    """

    streams: int = 32
    steps: int = 512
    updates: int = 2000
    rows: int = 256
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("streams", "steps", "updates", "rows"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a whole number of at least 2")


def score_distilled(
    make: MakeEnvironment, scored: ScoredReference, seed: int = 0, config: DistilConfig = DistilConfig()
) -> cards.Returns:
    """The returns of a policy on observations alone that was trained on the labels of a reference.

    It plays greedily, and by chance too where that does not keep half of the reference's advantage: a policy without
    memory may stand still where one that tosses a coin gets on. The better of the two counts.

    Args:
      make: makes the environment, as for training.
      scored: the reference; as many episodes are played, in as many rows.
      seed: of everything random.
      config: how.

    Raises:
      ReferencePolicyError: the reference has no label to learn from.
    """
    policy = distil(make, scored.policy, seed, config)
    rows, episodes = scored.reference_returns.array.shape
    with opened(make, policy.spec.id, rows) as environment, jax.enable_x64(False):
        found = []
        enough = (1 - LEARNABLE) * scored.random_returns.mean + LEARNABLE * scored.reference_returns.mean
        for place, form in enumerate(_FORMS, start=1):
            key = jax.random.fold_in(jax.random.key(seed), place)
            params = with_decoding(policy.params["policy"], form)
            played = rollout.run_episodes(environment, policy.agent, params, key, episodes).returns
            found.append(cards.Returns.of(played))
            if found[-1].mean >= enough:
                break
        return max(found, key=lambda returns: returns.mean)


def distil(make: MakeEnvironment, reference: ReferencePolicy, seed: int, config: DistilConfig) -> ReferencePolicy:
    """Trains a policy on observations alone to do what a reference would do; it acts greedily.

    Args:
      make: makes the environment.
      reference: whose labels.
      seed: of everything random.
      config: how.

    Raises:
      ReferencePolicyError: the reference has no label to learn from.
    """
    spec = reference.spec
    amount = collect.CollectConfig(config.streams, config.steps, min(128, config.steps), 2**28)
    streams = collect.affordable_streams(spec, amount)
    with opened_for(make, reference, streams) as environment, jax.enable_x64(False):
        leaves = collect.collect(environment, reference, seed, amount).leaves
        labelled = np.flatnonzero(leaves["label_mask"].ravel())
        if not labelled.size:
            raise ReferencePolicyError(f"the reference of {spec.id} labelled none of {leaves['label_mask'].size} steps")
        labelled = np.resize(labelled, leaves["label_mask"].size)  # as many in all environments: some are there twice
        flat = {name: value.reshape(-1, *value.shape[2:])[labelled] for name, value in leaves.items()}
        transition = from_leaves(spec.observation_space, spec.action_space, flat)
        ppo_config = PPOConfig(hidden=HIDDEN, action_scale=_scale(transition.reference_action))
        params = _fit(spec, ppo_config, transition, seed, config)
    return ReferencePolicy(
        agent=ppo.agent(spec, ppo_config),
        params=with_decoding(params, "greedy"),
        reference=cards.Reference("distilled", "greedy", 0, seed),
        spec=spec,
        config=ppo_config,
    )


def _scale(label: PyTree) -> float:
    """The size that actions without bounds are measured by: of the largest of the labels."""
    return float(max((np.abs(leaf).max(initial=0.0) for leaf in jax.tree.leaves(label)), default=0.0)) or 1.0


def _layout(spec: EnvironmentSpec, config: PPOConfig) -> ActionLayout:
    return action_layout(spec.action_space, *action_range.limits(spec.action_space, config.action_scale or 1.0))


def _fit(
    spec: EnvironmentSpec, ppo_config: PPOConfig, transition: Transition, seed: int, config: DistilConfig
) -> PyTree:
    agent, layout = ppo.agent(spec, ppo_config), _layout(spec, ppo_config)
    timestep = transition.timestep._replace(expert=None)
    numbers = network(spec.observation_space, layout, ppo_config.hidden, ppo_config.activation).numbers
    params: PyTree = ppo.example(spec, ppo_config)
    seen = numbers(timestep.observation)
    params["moments"] = add_moments(init_moments(seen.shape[1]), seen, np.ones(len(seen), bool))._asdict()
    label = to_slots(layout, transition.reference_action)
    optimizer = optax.adam(optax.linear_schedule(config.learning_rate, 0.0, config.updates))

    def loss(learned: PyTree, around: PyTree, rows: PyTree) -> Array:
        seen, wanted = rows
        told = {"policy": around | {"network": learned}, "decoding": np.int32(1)}
        _, _, said = agent.step(told, (), seen, jax.random.key(0))
        likely = choice_logits(layout, said.logits)
        missed = -jnp.take_along_axis(likely, wanted.categorical[..., None], -1).sum((1, 2))
        apart = jnp.square(normalize(layout, said.mean) - jnp.clip(wanted.continuous, -1, 1)).sum(-1)
        return jnp.mean(missed + apart)

    # Whatever differs between environments of the same spaces is an argument: they share what is compiled.
    @jax.jit
    def learn(around: PyTree, data: PyTree, keys: jax.Array) -> PyTree:
        def update(state: tuple[PyTree, typing.Any], key: typing.Any) -> tuple[tuple[PyTree, typing.Any], None]:
            learned, memory = state
            index = jax.random.randint(key, (config.rows,), 0, data[1].categorical.shape[0])
            gradient = jax.grad(loss)(learned, around, jax.tree.map(lambda leaf: leaf[index], data))
            change, memory = optimizer.update(gradient, memory, learned)
            return (optax.apply_updates(learned, change), memory), None

        return jax.lax.scan(update, (around["network"], optimizer.init(around["network"])), keys)[0][0]

    data = jax.tree.map(jnp.asarray, (timestep, label))
    keys = jax.random.split(jax.random.key(seed), config.updates)
    return jax.tree.map(np.asarray, params | {"network": learn(params, data, keys)})

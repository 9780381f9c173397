"""Parallelised Q-networks: values of actions learned from rollouts, without a replay buffer or a second network.

Layer normalization keeps the values from running away, many environments at once take the place of a buffer. Actions of
several slots are worth the mean of what each slot's choice is worth.
Source: Gallici et al. 2024 (PQN); Tavakoli et al. 2018 (one head a slot).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnasium import spaces

from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16, ActionLayout, action_layout, from_slots, split_choices
from ldm_jax.environment import Environment
from ldm_jax.spaces import SpaceError, leaves
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from . import learning
from .algorithm import Learned
from .hyperparameters import Hyperparameters, check_hyperparameters, check_minibatches
from .learning import Experience, LearnerState, Method, Schedule, average, blank, descend
from .moments import Moments, init_moments
from .networks import Network, network
from .policy import SlotPolicy, sample_slots, slot_agent
from .ppo_loss import advantages


@dataclasses.dataclass(frozen=True)
class PQNConfig(Hyperparameters):
    """Hyperparameters; the defaults are for games of a few million steps at most.

    Attributes:
      budget_steps: environment steps of training, over all parallel environments.
      num_envs: parallel environments.
      rollout_length: steps of a rollout in each environment.
      learning_rate: of rectified Adam, falling linearly to 0.
      discount: gamma.
      trace_lambda: lambda of the returns that values are learned from.
      epochs: passes over a rollout.
      minibatches: per pass; divides num_envs times rollout_length.
      first_epsilon: share of random actions at the beginning.
      last_epsilon: share of random actions when exploration has ended, and of the policy where it samples.
      exploration: share of the budget after which it has ended.
      max_gradient_norm: of the whole gradient.
      hidden: widths of the hidden layers.
      convolved: whether small grids are seen through convolutions, and not number by number.
    """

    traced = ("learning_rate", "discount", "trace_lambda", "first_epsilon", "exploration", "max_gradient_norm")

    budget_steps: int = 1_000_000
    num_envs: int = 64
    rollout_length: int = 32
    learning_rate: float = 5e-4
    discount: float = 0.99
    trace_lambda: float = 0.65
    epochs: int = 2
    minibatches: int = 16
    first_epsilon: float = 1.0
    last_epsilon: float = 0.02
    exploration: float = 0.2
    max_gradient_norm: float = 10.0
    hidden: tuple[int, ...] = (128, 128)
    convolved: bool = False

    def __post_init__(self) -> None:
        check_hyperparameters(
            self,
            whole=("budget_steps", "num_envs", "rollout_length", "epochs", "minibatches"),
            positive=("learning_rate", "max_gradient_norm"),
            shares=("discount", "trace_lambda", "first_epsilon", "last_epsilon", "exploration"),
        )
        check_minibatches(self.num_envs * self.rollout_length, self.minibatches)


class _Record(typing.NamedTuple):
    """What the explorer records: the choice of each slot, what these are worth, and what the best ones are."""

    categorical: Array
    chosen: Array
    value: Array


class _Batch(typing.NamedTuple):
    """N steps to learn from; the rows that are not valid may hold anything."""

    observation: PyTree
    categorical: Array
    target: Array
    valid: Array


class _Parts(typing.NamedTuple):
    config: PQNConfig
    layout: ActionLayout
    network: Network
    optimizer: optax.GradientTransformation


def settle(environment: Environment, config: PQNConfig, seed: int) -> PQNConfig:
    """The configuration as it is: it leaves nothing open."""
    del environment, seed
    return config


def learn(environment: Environment, config: PQNConfig, seed: int) -> collections.abc.Iterator[Learned]:
    """Trains a policy, and pauses at each report; see `learning.learn`.

    Args:
      environment: `config.num_envs` rows; its actions are categories.
      config: hyperparameters.
      seed: of everything random.

    Raises:
      SpaceError: an action has continuous parts.
    """
    return learning.learn(environment, _method, config, seed)


def _method(spec: EnvironmentSpec, config: PQNConfig) -> Method:
    parts = _parts(spec, config)
    return Method(
        schedule=Schedule(config.num_envs, config.rollout_length, config.updates),
        begin=functools.partial(_begin, parts),
        numbers=lambda timestep: parts.network.numbers(timestep.observation),
        explorer=_explorer(parts),
        acting=lambda learner: (learner.params, learner.moments, _epsilon(config, learner.own)),
        update=functools.partial(_update, parts),
        kept=lambda learner: {"network": learner.params, "moments": learner.moments._asdict()},
    )


def agent(spec: EnvironmentSpec, config: PQNConfig) -> Agent:
    """The agent of trained parameters, whichever way it decodes; see `policy.slot_agent`."""
    return slot_agent(_layout(spec), functools.partial(_slot_policy, spec, config))


def example(spec: EnvironmentSpec, config: PQNConfig) -> PyTree:
    """Parameters of the structure and shapes that `learn` yields."""
    net = _network(spec, config)
    return {"network": net.init(np.random.default_rng(0)), "moments": init_moments(net.size)._asdict()}


def _slot_policy(spec: EnvironmentSpec, config: PQNConfig, params: PyTree, timestep: TimeStep) -> SlotPolicy:
    moments = Moments(**params["moments"])
    worth, nothing, _ = _network(spec, config).apply(
        params["network"], moments, timestep.observation, timestep.action_mask
    )
    return SlotPolicy(_mostly_best(_layout(spec), worth, config.last_epsilon), nothing, nothing)


def _layout(spec: EnvironmentSpec) -> ActionLayout:
    if any(isinstance(leaf.space, spaces.Box) for leaf in leaves(spec.action_space)):
        raise SpaceError(f"{spec.id} takes {spec.action_space}; what actions are worth is learned of categories only")
    return action_layout(spec.action_space)


def _network(spec: EnvironmentSpec, config: PQNConfig) -> Network:
    space, layout = spec.observation_space, _layout(spec)
    return network(space, layout, config.hidden, "relu", layer_norm=True, convolved=config.convolved)


def _parts(spec: EnvironmentSpec, config: PQNConfig) -> _Parts:
    schedule = optax.linear_schedule(config.learning_rate, 0.0, config.updates * config.epochs * config.minibatches)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.radam(schedule))
    return _Parts(config, _layout(spec), _network(spec, config), optimizer)


def _begin(parts: _Parts, seed: int) -> LearnerState:
    params = parts.network.init(np.random.default_rng(seed))
    shapes, rollouts = jax.eval_shape(parts.optimizer.init, params), np.zeros((), np.int32)
    return learning.init_learner(params, shapes, parts.network.size, parts.config.num_envs, rollouts)


def _epsilon(config: PQNConfig, rollouts: Array) -> Array:
    """The share of random actions after so many rollouts."""
    done = jnp.minimum(1.0, rollouts / jnp.maximum(1.0, config.exploration * config.updates))
    return config.first_epsilon + (config.last_epsilon - config.first_epsilon) * done


def _by_slot(layout: ActionLayout, worth: Array) -> Array:
    """What each choice of each slot is worth, `[..., K, widest]`; very little where there is none."""
    return split_choices(layout, worth, layout.categorical, max(layout.sizes), fill=NOT_ALLOWED_FLOAT16)


def _best_worth(layout: ActionLayout, worth: Array) -> Array:
    """What the best choices are worth, `[...]`; 0 where a mask allows none, as at the end of an episode."""
    best = _by_slot(layout, worth).max(-1)
    return jnp.where(best > NOT_ALLOWED_FLOAT16, best, 0.0).mean(-1)


def _chosen_worth(layout: ActionLayout, worth: Array, categorical: Array) -> Array:
    """What choices `[..., K]` are worth, `[...]`."""
    return jnp.take_along_axis(_by_slot(layout, worth), categorical[..., None], -1)[..., 0].mean(-1)


def _shifted(params: PyTree, level: Array) -> PyTree:
    """The network with everything worth so much more: where values are large, steps would take long to get there.

    It is the step of Newton's method for what the outputs have in common.
    """
    *layers, last = params["actor"]
    return params | {"actor": [*layers, last | {"bias": last["bias"] + level}]}


def _mostly_best(layout: ActionLayout, worth: Array, epsilon: Array | float) -> Array:
    """Logits `[B, M]` of the policy that takes the best choice of each slot, and at times any that is allowed."""
    rows, offset = [], 0
    for size in layout.sizes:
        slot = worth[:, offset : offset + size]
        allowed = slot > NOT_ALLOWED_FLOAT16
        best = jax.nn.one_hot(jnp.argmax(slot, -1), size)
        share = allowed / jnp.maximum(allowed.sum(-1, keepdims=True), 1)
        logits = jnp.log(jnp.maximum((1 - epsilon) * best + epsilon * share, 1e-30))
        rows.append(jnp.where(allowed, logits, NOT_ALLOWED_FLOAT16))
        offset += size
    return jnp.concatenate(rows, -1)


def _explorer(parts: _Parts) -> Agent:
    """The agent that acts while learning."""
    layout = parts.layout

    def step(params: PyTree, carry: tuple[()], timestep: TimeStep, key: Array) -> tuple[tuple[()], PyTree, _Record]:
        learned, moments, epsilon = params
        worth, nothing, _ = parts.network.apply(learned, moments, timestep.observation, timestep.action_mask)
        slots = sample_slots(layout, key, _mostly_best(layout, worth, epsilon), nothing, nothing)
        chosen = _chosen_worth(layout, worth, slots.categorical)
        return carry, from_slots(layout, slots), _Record(slots.categorical, chosen, _best_worth(layout, worth))

    return Agent(lambda batch_size: (), step)


def _update(parts: _Parts, learner: LearnerState, experience: Experience, key: Array) -> LearnerState:
    """One update from a rollout and the time step after it."""
    config, net = parts.config, parts.network
    (steps, _, record), following, _ = experience
    worth, _, _ = net.apply(learner.params, learner.moments, following.observation, following.action_mask)
    value = jnp.concatenate([record.value, _best_worth(parts.layout, worth)[None]])
    reward, terminated, truncated = map(experience.with_following, ("reward", "terminated", "truncated"))
    normalized, learner = learning.normalize_rewards(config.discount, learner, reward, terminated | truncated)
    # With the best choices for values, generalized advantages are Peng's returns less the values.
    gained, valid = advantages(value, normalized, terminated, truncated, config.discount, config.trace_lambda)
    target = gained + value[:-1]
    params = _shifted(learner.params, average(valid, target - record.chosen))
    data = _Batch(steps.observation, record.categorical, target, valid)
    data = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), data)

    def loss(params: PyTree, batch: _Batch) -> Array:
        valid, batch = batch.valid, blank(batch.valid, batch)
        worth, _, _ = net.apply(params, learner.moments, batch.observation, None)
        chosen = _chosen_worth(parts.layout, worth, batch.categorical)
        return average(valid, 0.5 * (chosen - batch.target) ** 2)

    step, state = functools.partial(learning.gradient_step, parts.optimizer, loss), (params, learner.optimizer)
    (params, optimizer), losses = descend(step, state, data, config.epochs, config.minibatches, key)
    moments = learning.add_numbers(learner, net.numbers(data.observation))
    return learner._replace(
        params=params, moments=moments, optimizer=optimizer, loss=losses.mean(), own=learner.own + 1
    )

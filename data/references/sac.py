"""Soft actor-critic: continuous actions learned from all that was seen, for simulators whose steps are dear.

Where observations hold goals, they may be relabelled in hindsight, see `hindsight`.
Source: Haarnoja et al. 2018 (SAC, and its temperature that finds itself); Fujimoto et al. 2018 (the smaller of two
critics).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnasium import spaces

from ldm_jax.encoding.actions import ActionLayout, Slots, action_layout, from_slots
from ldm_jax.environment import Environment
from ldm_jax.spaces import SpaceError, leaf_shape_dtype, leaves, unflatten
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from . import action_range, hindsight, learning
from .algorithm import Learned
from .hyperparameters import Hyperparameters, check_hyperparameters
from .learning import Experience, LearnerState, Method, Schedule, average, blank
from .moments import Moments, init_moments, scale
from .networks import Network, network
from .perceptrons import apply_perceptron, init_perceptron
from .policy import SlotPolicy, slot_agent

LOG_STD = (-5.0, 2.0)
"""The range of the logarithm of the policy's standard deviation, before it is squashed."""

RETURN_UNIT = 10.0
"""The spread that discounted returns are scaled to; the bonus of entropy is small beside it."""

BUFFER_BYTES = 2**29
"""The most memory that the observations of the buffer may take."""


@dataclasses.dataclass(frozen=True)
class SACConfig(Hyperparameters):
    """Hyperparameters.

    Attributes:
      budget_steps: environment steps of training, over all parallel environments.
      num_envs: parallel environments.
      rollout_length: steps in each environment between two rounds of learning.
      replay_ratio: steps of the optimizer for each step of an environment.
      batch_size: transitions of one step of the optimizer.
      capacity: transitions that are kept, at most; those seen first are replaced.
      warmup: steps of random actions before learning begins, a share of the budget.
      learning_rate: of Adam.
      discount: gamma.
      averaging: how far the target critics move to the critics at each step.
      hidden: widths of the hidden layers of policy and critics.
      action_scale: how far actions reach in dimensions that declare no bounds, see `action_range.limits`; 0: it is
        found by trying, before training.
      relabelled: share of what is learned from that gets another goal, where observations hold goals.
    """

    budget_steps: int = 150_000
    num_envs: int = 8
    rollout_length: int = 8
    replay_ratio: float = 0.5
    batch_size: int = 256
    capacity: int = 300_000
    warmup: float = 0.03
    learning_rate: float = 6e-4
    discount: float = 0.99
    averaging: float = 0.005
    hidden: tuple[int, ...] = (128, 128)
    action_scale: float = 0.0
    relabelled: float = 0.0

    def __post_init__(self) -> None:
        check_hyperparameters(
            self,
            whole=("budget_steps", "num_envs", "rollout_length", "batch_size", "capacity"),
            positive=("replay_ratio", "learning_rate", "averaging"),
            not_negative=("action_scale",),
            shares=("warmup", "discount", "averaging", "relabelled"),
        )


class _Transitions(typing.NamedTuple):
    """N transitions, each leaf `[N, ...]`; those that are not valid carry no experience."""

    observation: PyTree
    action: Array
    reward: Array
    following: PyTree
    terminated: Array
    valid: Array


class _Own(typing.NamedTuple):
    """What is kept beside what is trained: the replay buffer, how many rollouts it was given, the target critics.

    And what relabelling keeps, if goals are relabelled.
    """

    buffer: _Transitions
    rollouts: Array
    targets: PyTree
    goals: hindsight.GoalMemory | None


class _Parts(typing.NamedTuple):
    spec: EnvironmentSpec
    config: SACConfig
    layout: ActionLayout
    network: Network
    optimizer: optax.GradientTransformation

    @property
    def rows(self) -> int:
        """Transitions of a rollout."""
        return self.config.num_envs * self.config.rollout_length

    @property
    def places(self) -> int:
        """Transitions that the buffer holds, of whole rollouts: what memory allows and no more than there will be."""
        structs = [leaf_shape_dtype(leaf.space) for leaf in leaves(self.spec.observation_space)]
        each = 2 * sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in structs)
        capacity = min(self.config.capacity, BUFFER_BYTES // max(each, 1))
        return self.rows * max(1, min(capacity // self.rows, self.config.updates))

    @property
    def warmup(self) -> int:
        """Rollouts of random actions."""
        return math.ceil(self.config.warmup * self.config.updates)

    @property
    def relabels(self) -> bool:
        """Whether goals are relabelled."""
        return self.config.relabelled > 0 and hindsight.has_goals(self.spec.observation_space)


def settle(environment: Environment, config: SACConfig, seed: int) -> SACConfig:
    """The configuration with what it left open found by trying; see `action_range.settled`."""
    return action_range.settled(environment, config, seed)


def learn(environment: Environment, config: SACConfig, seed: int) -> collections.abc.Iterator[Learned]:
    """Trains a policy, and pauses at each report; see `learning.learn`.

    Args:
      environment: `config.num_envs` rows; its actions are continuous.
      config: hyperparameters, settled.
      seed: of everything random.

    Raises:
      SpaceError: an action has parts that are categories.
    """
    return learning.learn(environment, _method, config, seed)


def _method(spec: EnvironmentSpec, config: SACConfig) -> Method:
    parts = _parts(spec, config)
    return Method(
        schedule=Schedule(config.num_envs, config.rollout_length, config.updates),
        begin=functools.partial(_begin, parts),
        numbers=lambda timestep: parts.network.numbers(timestep.observation),
        explorer=_explorer(parts),
        acting=lambda learner: (learner.params, learner.moments, learner.own.rollouts < parts.warmup),
        update=functools.partial(_update, parts),
        kept=lambda learner: _kept(learner.params, learner.moments),
    )


def agent(spec: EnvironmentSpec, config: SACConfig) -> Agent:
    """The agent of trained parameters, whichever way it decodes; see `policy.slot_agent`."""
    return slot_agent(_layout(spec, config), functools.partial(_slot_policy, spec, config))


def example(spec: EnvironmentSpec, config: SACConfig) -> PyTree:
    """Parameters of the structure and shapes that `learn` yields."""
    parts = _parts(spec, config)
    return _kept(_init_params(parts, 0), init_moments(parts.network.size))


def _kept(params: PyTree, moments: Moments) -> PyTree:
    return {name: params[name] for name in ("encoder", "actor")} | {"moments": moments._asdict()}


def _slot_policy(spec: EnvironmentSpec, config: SACConfig, params: PyTree, timestep: TimeStep) -> SlotPolicy:
    net = _network(spec, config, _layout(spec, config))
    features = net.encode(params["encoder"], Moments(**params["moments"]), timestep.observation)
    mean, log_std = _actor(params, features)
    point = jnp.tanh(mean)
    # The spread of what was squashed, to first order.
    nothing = jnp.zeros((point.shape[0], 0))
    return SlotPolicy(nothing, point, jnp.exp(log_std) * (1 - point**2))


def _layout(spec: EnvironmentSpec, config: SACConfig) -> ActionLayout:
    if not all(isinstance(leaf.space, spaces.Box) for leaf in leaves(spec.action_space)):
        raise SpaceError(f"{spec.id} takes {spec.action_space}; soft actor-critic is for continuous actions only")
    return action_layout(spec.action_space, *action_range.limits(spec.action_space, config.action_scale or 1.0))


def _network(spec: EnvironmentSpec, config: SACConfig, layout: ActionLayout) -> Network:
    return network(spec.observation_space, layout, config.hidden, "relu")


def _parts(spec: EnvironmentSpec, config: SACConfig) -> _Parts:
    layout = _layout(spec, config)
    return _Parts(spec, config, layout, _network(spec, config, layout), optax.adam(config.learning_rate))


def _init_params(parts: _Parts, seed: int) -> PyTree:
    rng, net, hidden, size = np.random.default_rng(seed), parts.network, parts.config.hidden, parts.layout.continuous
    encoder = {name: value for name, value in net.init(rng).items() if name in ("embeddings", "images")}
    return {
        "encoder": encoder,
        "actor": init_perceptron(rng, (net.width, *hidden, 2 * size), 0.01),
        "critics": [init_perceptron(rng, (net.width + size, *hidden, 1), 1.0) for _ in range(2)],
        "log_temperature": np.zeros((), np.float32),
    }


def _begin(parts: _Parts, seed: int) -> LearnerState:
    params, spec = _init_params(parts, seed), parts.spec

    def zeros(*shape: int, dtype: typing.Any = np.float32) -> np.ndarray:
        return np.zeros((parts.places, *shape), dtype)

    structs = [leaf_shape_dtype(leaf.space) for leaf in leaves(spec.observation_space)]
    now, after = (unflatten(spec.observation_space, [zeros(*s.shape, dtype=s.dtype) for s in structs]) for _ in "ab")
    buffer = _Transitions(
        now, zeros(parts.layout.continuous), zeros(), after, zeros(dtype=np.bool_), zeros(dtype=np.bool_)
    )
    shapes = jax.eval_shape(parts.optimizer.init, params)
    goals = hindsight.begin_goals(parts.places, parts.config.num_envs) if parts.relabels else None
    own = _Own(buffer, np.zeros((), np.int32), jax.tree.map(np.copy, params["critics"]), goals)
    return learning.init_learner(params, shapes, parts.network.size, parts.config.num_envs, own)


def _actor(params: PyTree, features: Array) -> tuple[Array, Array]:
    """Mean and logarithm of the standard deviation, `[N, C]` each, before squashing."""
    mean, spread = jnp.split(apply_perceptron(params["actor"], features, jax.nn.relu), 2, -1)
    low, high = LOG_STD
    return mean, low + (high - low) / 2 * (jnp.tanh(spread) + 1)


def _sample(params: PyTree, features: Array, key: Array) -> tuple[Array, Array]:
    """Actions `[N, C]` from -1 to 1, and their log-probability `[N]`."""
    mean, log_std = _actor(params, features)
    noise = jax.random.normal(key, mean.shape)
    raw = mean + jnp.exp(log_std) * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    squashing = 2 * (math.log(2) - raw - jax.nn.softplus(-2 * raw))  # log(1 - tanh(raw)^2), without cancellation
    return jnp.tanh(raw), (log_prob - squashing).sum(-1)


def _critics(critics: PyTree, features: Array, action: Array) -> Array:
    """What both critics say, `[2, N]`."""
    inputs = jnp.concatenate([features, action], -1)
    return jnp.stack([apply_perceptron(layers, inputs, jax.nn.relu)[..., 0] for layers in critics])


def _explorer(parts: _Parts) -> Agent:
    """The agent that acts while learning; it records its actions from -1 to 1."""

    def step(params: PyTree, carry: tuple[()], timestep: TimeStep, key: Array) -> tuple[tuple[()], PyTree, Array]:
        learned, moments, random = params
        features = parts.network.encode(learned["encoder"], moments, timestep.observation)
        policy_key, random_key = jax.random.split(key)
        action, _ = _sample(learned, features, policy_key)
        action = jnp.where(random, jax.random.uniform(random_key, action.shape, minval=-1.0), action)
        slots = Slots(jnp.zeros((action.shape[0], 0), jnp.int32), action)
        return carry, from_slots(parts.layout, slots), action

    return Agent(lambda batch_size: (), step)


def _update(parts: _Parts, learner: LearnerState, experience: Experience, key: Array) -> LearnerState:
    """Takes a rollout into the buffer and learns from what is in it, once there is enough."""
    config, (steps, _, action), following = parts.config, experience.trajectory, experience.following
    reward, terminated, last = map(experience.with_following, ("reward", "terminated", "last"))
    _, learner = learning.normalize_rewards(config.discount, learner, reward, last)
    after = jax.tree.map(lambda x, y: jnp.concatenate([x[1:], y[None]]), steps.observation, following.observation)
    seen = _Transitions(steps.observation, action, reward[1:], after, terminated[1:], ~last[:-1])
    seen = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), seen)
    learner = learner._replace(moments=learning.add_numbers(learner, parts.network.numbers(seen.observation)))
    own: _Own = learner.own
    begin = own.rollouts * parts.rows % parts.places
    buffer = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, begin, 0), own.buffer, seen)
    goals = own.goals
    if goals is not None:
        goals = hindsight.remember_goals(goals, after, reward[1:], terminated[1:], last, begin)
    rollouts = own.rollouts + 1
    filled = jnp.minimum(rollouts * parts.rows, parts.places)

    def once(i: Array, state: tuple[PyTree, PyTree, PyTree, Array]) -> tuple[PyTree, PyTree, PyTree, Array]:
        params, optimizer, targets, _ = state
        index_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        index_N = jax.random.randint(index_key, (config.batch_size,), 0, filled)
        batch = jax.tree.map(lambda x: x[index_N], buffer)
        if goals is not None:
            batch = _relabel(parts, goals, buffer, batch, index_N, jax.random.fold_in(index_key, 1))
        loss = functools.partial(_loss, parts, learner, targets, noise_key)
        (params, optimizer), value = learning.gradient_step(parts.optimizer, loss, (params, optimizer), batch)
        targets = optax.incremental_update(params["critics"], targets, config.averaging)
        return params, optimizer, targets, value

    count = max(1, round(config.replay_ratio * parts.rows))
    state = (learner.params, learner.optimizer, own.targets, learner.loss)
    params, optimizer, targets, value = jax.lax.fori_loop(
        0, jnp.where(rollouts < parts.warmup, 0, count), once, jax.tree.map(jnp.asarray, state)
    )
    return learner._replace(params=params, optimizer=optimizer, loss=value, own=_Own(buffer, rollouts, targets, goals))


def _relabel(
    parts: _Parts, goals: hindsight.GoalMemory, buffer: _Transitions, batch: _Transitions, index_N: Array, key: Array
) -> _Transitions:
    """The batch with some of its goals relabelled."""
    given = hindsight.Relabelled(batch.observation, batch.following, batch.reward, batch.terminated)
    found = hindsight.relabel(
        goals, given, buffer.following, index_N, key, parts.config.relabelled, parts.spec.time_limit
    )
    return batch._replace(**found._asdict())


def _loss(
    parts: _Parts, learner: LearnerState, targets: PyTree, key: Array, params: PyTree, batch: _Transitions
) -> Array:
    """Of critics, policy and temperature together: what one trains is constant to the others."""
    config, valid, fixed = parts.config, batch.valid, jax.lax.stop_gradient(params)
    batch = blank(valid, batch)
    now_key, after_key = jax.random.split(key)
    encode = functools.partial(parts.network.encode, params["encoder"], learner.moments)
    features, temperature = encode(batch.observation), jnp.exp(fixed["log_temperature"])
    reward = jnp.clip(batch.reward / scale(learner.reward_moments), -10, 10) * RETURN_UNIT
    after = jax.lax.stop_gradient(encode(batch.following))
    next_action, next_log_prob = _sample(fixed, after, after_key)
    next_value = _critics(targets, after, next_action).min(0) - temperature * next_log_prob
    target = jax.lax.stop_gradient(reward + config.discount * jnp.where(batch.terminated, 0.0, next_value))
    critic = 0.5 * ((_critics(params["critics"], features, batch.action) - target) ** 2).sum(0)
    action, log_prob = _sample(params, jax.lax.stop_gradient(features), now_key)
    actor = temperature * log_prob - _critics(fixed["critics"], jax.lax.stop_gradient(features), action).min(0)
    surplus = jax.lax.stop_gradient(log_prob - parts.layout.continuous)  # the entropy to be kept is minus their number
    return average(valid, critic + actor - params["log_temperature"] * surplus)

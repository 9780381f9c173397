"""Proximal policy optimization for any environment of the interface.

Where the environment is jittable, acting and learning compile into one program; elsewhere the same update follows the
rollout of a Python loop.
Source: Schulman et al. 2017 (PPO).
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

from ldm_jax import rollout
from ldm_jax.encoding.actions import ActionLayout, Slots, action_layout, from_slots
from ldm_jax.environment import Environment
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from . import action_range
from .algorithm import REPORTS, Learned
from .moments import Moments, add_moments, first_moments, init_moments, scale
from .networks import Network, network
from .policy import SlotPolicy, sample_slots, slot_agent
from .ppo_loss import Batch, PPOConfig, advantages, log_prob_and_entropy, loss


class DivergenceError(LdmError, FloatingPointError):
    """Training came to numbers that are not finite; nothing is kept of it."""


class ActorRecord(typing.NamedTuple):
    """What the learning agent records: slots as sampled, before clipping, their log-probability and the value."""

    slots: Slots
    log_prob: Array
    value: Array


class LearnerState(typing.NamedTuple):
    """All that training changes; a pytree.

    Attributes:
      params: of the network, with `log_std`.
      moments: of the observation's numbers.
      optimizer: Adam's state.
      reward_moments: of the discounted sum of rewards, `[1]`.
      discounted: that sum so far, `float32 [B]`.
      total: sum of rewards of the episode so far, `float32 [B]`.
      finished: of the returns of the episodes that ended since the last report, `[1]`.
      loss: mean of the last update.
    """

    params: PyTree
    moments: Moments
    optimizer: PyTree
    reward_moments: Moments
    discounted: Array
    total: Array
    finished: Moments
    loss: Array


class _Parts(typing.NamedTuple):
    """What one training is made of and does not change; no array of it depends on a step."""

    config: PPOConfig
    layout: ActionLayout
    network: Network
    optimizer: optax.GradientTransformation


def settle(environment: Environment, config: PPOConfig, seed: int) -> PPOConfig:
    """The configuration with what it left open found by trying: the range of actions that declare no bounds.

    Raises:
      ActionRangeError: no range gives finite rewards.
    """
    if config.action_scale > 0 or not action_range.unbounded(environment.spec.action_space).any():
        return config
    return dataclasses.replace(config, action_scale=action_range.find_scale(environment, seed))


def learn(environment: Environment, config: PPOConfig, seed: int) -> collections.abc.Iterator[Learned]:
    """Trains a policy, and pauses at each report.

    Args:
      environment: `config.num_envs` rows.
      config: hyperparameters, settled.
      seed: of everything random.

    Yields:
      Parameters for the policy of `agent`: the last ones, or the last before a clear decline.

    Raises:
      DivergenceError: training diverged.
    """
    spec = environment.spec
    if spec.batch_size != config.num_envs:
        raise ConfigError(f"the environment has {spec.batch_size} rows, expected num_envs = {config.num_envs}")
    parts = _parts(spec, config)
    explorer = _explorer(parts)
    update_many = _driver(environment, parts, explorer)
    reset_key, key = jax.random.split(jax.random.key(seed))
    loop = rollout.start(environment, explorer, reset_key)
    learner: LearnerState = _begin(parts, seed)
    learner = learner._replace(moments=first_moments(parts.network.numbers(loop.timestep.observation)))
    reports, best = min(config.updates, REPORTS), _Best(learner)
    # Before, only the short episodes have ended, which may be the best or the worst.
    unbiased_after = min(spec.time_limit, config.updates * config.rollout_length // 4)
    for report in range(reports):
        begin, end = (config.updates * i // reports for i in (report, report + 1))
        learner, loop = update_many(learner, loop, key, begin, end)
        _check_finite(spec, learner, end)
        best = _choose(best, learner, biased=begin * config.rollout_length < unbiased_after)
        kept = {"network": best.learner.params, "moments": best.learner.moments._asdict()}
        yield Learned(end * config.num_envs * config.rollout_length, kept, _mean_and_error(learner.finished)[0])
        learner = learner._replace(finished=init_moments(1))


def agent(spec: EnvironmentSpec, config: PPOConfig) -> Agent:
    """The agent of trained parameters, whichever way it decodes; see `policy.slot_agent`."""
    return slot_agent(_layout(spec, config), functools.partial(_slot_policy, spec, config))


def example(spec: EnvironmentSpec, config: PPOConfig) -> PyTree:
    """Parameters of the structure and shapes that `learn` yields."""
    parts = _parts(spec, config)
    return {"network": _init_params(parts, 0), "moments": init_moments(parts.network.size)._asdict()}


def _slot_policy(spec: EnvironmentSpec, config: PPOConfig, params: PyTree, timestep: TimeStep) -> SlotPolicy:
    logits, mean, _ = _network(spec, config).apply(
        params["network"]["perceptrons"], Moments(**params["moments"]), timestep.observation, timestep.action_mask
    )
    return SlotPolicy(logits, mean, jnp.broadcast_to(jnp.exp(params["network"]["log_std"]), mean.shape))


def _layout(spec: EnvironmentSpec, config: PPOConfig) -> ActionLayout:
    return action_layout(spec.action_space, *action_range.limits(spec.action_space, config.action_scale or 1.0))


def _network(spec: EnvironmentSpec, config: PPOConfig) -> Network:
    return network(spec.observation_space, _layout(spec, config), config.hidden, config.activation)


def _parts(spec: EnvironmentSpec, config: PPOConfig) -> _Parts:
    total = config.updates * config.epochs * config.minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0.0, total)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.adam(schedule, eps=1e-5))
    return _Parts(config, _layout(spec, config), _network(spec, config), optimizer)


def _init_params(parts: _Parts, seed: int) -> PyTree:
    log_std = np.full(parts.layout.continuous, np.log(parts.config.initial_std), np.float32)
    return {"perceptrons": parts.network.init(np.random.default_rng(seed)), "log_std": log_std}


def _begin(parts: _Parts, seed: int) -> LearnerState:
    params, rows = _init_params(parts, seed), np.zeros(parts.config.num_envs, np.float32)
    return LearnerState(
        params=params,
        moments=init_moments(parts.network.size),
        # Adam begins at zeros
        optimizer=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(parts.optimizer.init, params)),
        reward_moments=init_moments(1),
        discounted=rows,
        total=rows,
        finished=init_moments(1),
        loss=np.zeros((), np.float32),
    )


def _explorer(parts: _Parts) -> Agent:
    """The agent that acts while learning: sampled slots, with noise that may last; it records what the update needs."""
    config, layout = parts.config, parts.layout

    def init(batch_size: int) -> Array:
        return jnp.zeros((batch_size, layout.continuous))

    def step(params: PyTree, noise: Array, timestep: TimeStep, key: Array) -> tuple[Array, PyTree, ActorRecord]:
        learned, moments = params
        logits, mean, value = parts.network.apply(
            learned["perceptrons"], moments, timestep.observation, timestep.action_mask
        )
        white = sample_slots(layout, key, logits, jnp.zeros_like(mean), jnp.ones_like(mean))
        # Each step's noise is standard normal by itself, so the log-probability of one step needs no history.
        correlation = config.noise_correlation
        going = correlation * noise + (1 - correlation**2) ** 0.5 * white.continuous
        noise = jnp.where(timestep.first[:, None], white.continuous, going)
        slots = Slots(white.categorical, mean + jnp.exp(learned["log_std"]) * noise)
        log_prob, _ = log_prob_and_entropy(layout, slots, logits, mean, learned["log_std"])
        return noise, from_slots(layout, slots), ActorRecord(slots, log_prob, value)

    return Agent(init, step)


_Driver = collections.abc.Callable[
    [LearnerState, rollout.RolloutState, Array, int, int], tuple[LearnerState, rollout.RolloutState]
]


def _driver(environment: Environment, parts: _Parts, explorer: Agent) -> _Driver:
    """Does the updates from `begin` to before `end`, as one program where the environment allows it.

    What is compiled here is forgotten with the driver: a program holds on to the environment it was made for.
    """
    jittable = environment.spec.jittable
    learn = functools.partial(_update, parts) if jittable else jax.jit(functools.partial(_update, parts))

    def act_and_learn(
        key: Array, i: Array | int, learner: LearnerState, loop: rollout.RolloutState
    ) -> tuple[LearnerState, rollout.RolloutState]:
        act_key, learn_key = jax.random.split(jax.random.fold_in(key, i))
        params = (learner.params, learner.moments)
        loop, trajectory = rollout.rollout(environment, explorer, params, loop, act_key, parts.config.rollout_length)
        return learn(learner, trajectory, loop.timestep, learn_key), loop

    def on_host(
        learner: LearnerState, loop: rollout.RolloutState, key: Array, begin: int, end: int
    ) -> tuple[LearnerState, rollout.RolloutState]:
        for i in range(begin, end):
            learner, loop = act_and_learn(key, i, learner, loop)
        return learner, loop

    @jax.jit
    def inside(
        learner: LearnerState, loop: rollout.RolloutState, key: Array, begin: int, end: int
    ) -> tuple[LearnerState, rollout.RolloutState]:
        return jax.lax.fori_loop(begin, end, lambda i, state: act_and_learn(key, i, *state), (learner, loop))

    return inside if jittable else on_host


def _update(
    parts: _Parts, learner: LearnerState, trajectory: rollout.Trajectory, following: TimeStep, key: Array
) -> LearnerState:
    """One PPO update from a rollout and the time step after it."""
    config, steps, record = parts.config, trajectory.timestep, trajectory.record
    _, _, last_value = parts.network.apply(
        learner.params["perceptrons"], learner.moments, following.observation, following.action_mask
    )
    value, reward, terminated, truncated = (
        jnp.concatenate([now, after[None]])
        for now, after in (
            (record.value, last_value),
            (steps.reward, following.reward),
            (steps.terminated, following.terminated),
            (steps.truncated, following.truncated),
        )
    )
    normalized, learner = _normalize_rewards(config, learner, reward, terminated | truncated)
    advantage, valid = advantages(value, normalized, terminated, truncated, config.discount, config.gae_lambda)
    data = Batch(
        observation=steps.observation,
        action_mask=steps.action_mask,
        slots=record.slots,
        log_prob=record.log_prob,
        advantage=advantage,
        target=advantage + value[:-1],
        valid=valid,
    )
    data = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), data)
    numbers = parts.network.numbers(data.observation)
    moments = add_moments(learner.moments, numbers, jnp.ones(numbers.shape[0], bool))
    # Only now: the rollout's log-probabilities were taken under the old moments, and so is its update.
    params, optimizer, losses = _descend(parts, learner, data, key)
    return learner._replace(params=params, moments=moments, optimizer=optimizer, loss=losses.mean())


def _descend(parts: _Parts, learner: LearnerState, data: Batch, key: Array) -> tuple[PyTree, PyTree, Array]:
    """Epochs of minibatches over `[N, ...]` data; the new parameters, the optimizer's state and all losses."""
    config = parts.config

    def step(state: tuple[PyTree, PyTree], index_N: Array) -> tuple[tuple[PyTree, PyTree], Array]:
        params, optimizer_state = state
        batch = jax.tree.map(lambda x: x[index_N], data)
        value, gradient = jax.value_and_grad(loss)(params, config, parts.layout, parts.network, learner.moments, batch)
        change, optimizer_state = parts.optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, change), optimizer_state), value

    shuffles = jnp.argsort(jax.random.bits(key, (config.epochs, data.valid.size), jnp.uint32), -1)
    shuffles = shuffles.reshape(config.epochs * config.minibatches, -1)
    (params, optimizer_state), losses = jax.lax.scan(step, (learner.params, learner.optimizer), shuffles)
    return params, optimizer_state, losses


def _normalize_rewards(
    config: PPOConfig, learner: LearnerState, reward: Array, last: Array
) -> tuple[Array, LearnerState]:
    """Scales rewards `[T + 1, B]` by the spread of their discounted sum, leaving their mean; books the returns."""
    valid = ~last[:-1]
    decays = (config.discount, 1.0)

    def add(sums: tuple[Array, Array], now: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        reward, valid = now
        discounted, total = (jnp.where(valid, decay * x + reward, 0.0) for decay, x in zip(decays, sums, strict=True))
        return (discounted, total), (discounted, total)

    ends, (discounted, total) = jax.lax.scan(add, (learner.discounted, learner.total), (reward[1:], valid))
    moments = add_moments(learner.reward_moments, discounted.reshape(-1, 1), valid.ravel())
    finished = add_moments(learner.finished, total.reshape(-1, 1), (valid & last[1:]).ravel())
    learner = learner._replace(reward_moments=moments, discounted=ends[0], total=ends[1], finished=finished)
    return jnp.clip(reward / scale(moments), -10, 10), learner


class _Best(typing.NamedTuple):
    """The policy to be kept so far, and the highest mean return of any, with its standard error."""

    learner: LearnerState
    mean: float = -np.inf
    error: float = 0.0


def _choose(best: _Best, learner: LearnerState, *, biased: bool) -> _Best:
    """Takes the later policy unless it is clearly worse than an earlier one: learning may collapse late."""
    mean, error = _mean_and_error(learner.finished)
    if mean < best.mean - 2 * np.hypot(error, best.error):
        learner = best.learner
    if biased or not mean > best.mean:
        return best._replace(learner=learner)
    return _Best(learner, mean, error)


def _mean_and_error(finished: Moments) -> tuple[float, float]:
    """Mean return and its standard error; NaN, which is no decline, where no episode ended."""
    count = float(finished.seen)
    if count < 1:
        return np.nan, 0.0
    return float(finished.mean[0]), float(finished.std[0]) / count**0.5


def _check_finite(spec: EnvironmentSpec, learner: LearnerState, updates: int) -> None:
    """What would be kept is looked at, and not the loss alone: the step after a sound loss may still overflow."""
    kept = (learner.loss, learner.params, learner.moments, learner.reward_moments)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept)):
        raise DivergenceError(
            f"training {spec.id} diverged after {updates} updates: the loss is {learner.loss}; "
            "lower the learning rate or look at the rewards"
        )

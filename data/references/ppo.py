"""Proximal policy optimization for any environment of the interface.

Where the environment is jittable, acting and learning compile into one program; elsewhere the same update follows the
rollout of a Python loop.
Source: Schulman et al. 2017 (PPO).
"""

from __future__ import annotations

import collections.abc
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.encoding.actions import ActionLayout, Slots, action_layout, from_slots
from ldm_jax.environment import Environment
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from . import action_range, learning
from .algorithm import Learned
from .learning import (
    Experience,
    LearnerState,
    Method,
    Schedule,
    add_numbers,
    descend,
    gradient_step,
    init_learner,
    normalize_rewards,
)
from .memory import ActorCritic, begin_memory, memoryless, recurrent
from .moments import Moments, init_moments
from .networks import network
from .policy import SlotPolicy, executed, remembering_agent, sample_slots, slot_agent
from .ppo_loss import Batch, PPOConfig, advantages, log_prob_and_entropy, loss


class ActorRecord(typing.NamedTuple):
    """What the learning agent records: slots as sampled, before clipping, their log-probability and the value.

    And what was remembered before the step.
    """

    slots: Slots
    log_prob: Array
    value: Array
    memory: PyTree = ()


class _Parts(typing.NamedTuple):
    """What one training is made of and does not change; no array of it depends on a step."""

    config: PPOConfig
    layout: ActionLayout
    model: ActorCritic
    optimizer: optax.GradientTransformation


def settle(environment: Environment, config: PPOConfig, seed: int) -> PPOConfig:
    """The configuration with what it left open found by trying; see `action_range.settled`."""
    return action_range.settled(environment, config, seed)


def learn(environment: Environment, config: PPOConfig, seed: int) -> collections.abc.Iterator[Learned]:
    """Trains a policy, and pauses at each report; see `learning.learn`.

    Args:
      environment: `config.num_envs` rows.
      config: hyperparameters, settled.
      seed: of everything random.
    """
    return learning.learn(environment, _method, config, seed)


def agent(spec: EnvironmentSpec, config: PPOConfig) -> Agent:
    """The agent of trained parameters, whichever way it decodes; see `policy.slot_agent`."""
    layout = _layout(spec, config)
    if not config.memory:
        return slot_agent(layout, functools.partial(_slot_policy, spec, config))
    begin = functools.partial(begin_memory, spec, config.memory)
    return remembering_agent(layout, begin, functools.partial(_remembering_policy, spec, config))


def example(spec: EnvironmentSpec, config: PPOConfig) -> PyTree:
    """Parameters of the structure and shapes that `learn` yields."""
    parts = _parts(spec, config)
    return {"network": _init_params(parts, 0), "moments": init_moments(parts.model.size)._asdict()}


def _remembering_policy(
    spec: EnvironmentSpec, config: PPOConfig, params: PyTree, memory: PyTree, timestep: TimeStep
) -> tuple[SlotPolicy, PyTree]:
    model, moments = _model(spec, config), Moments(**params["moments"])
    seen = model.see(memory, timestep)
    (logits, mean, _), memory = model.act(params["network"]["perceptrons"], moments, memory, seen, timestep)
    return SlotPolicy(logits, mean, jnp.broadcast_to(jnp.exp(params["network"]["log_std"]), mean.shape)), memory


def _slot_policy(spec: EnvironmentSpec, config: PPOConfig, params: PyTree, timestep: TimeStep) -> SlotPolicy:
    return _remembering_policy(spec, config, params, (), timestep)[0]


def _layout(spec: EnvironmentSpec, config: PPOConfig) -> ActionLayout:
    return action_layout(spec.action_space, *action_range.limits(spec.action_space, config.action_scale or 1.0))


def _model(spec: EnvironmentSpec, config: PPOConfig) -> ActorCritic:
    layout = _layout(spec, config)
    if config.memory:
        return recurrent(spec, layout, config.hidden, config.activation, config.memory, convolved=config.convolved)
    space = spec.observation_space
    return memoryless(network(space, layout, config.hidden, config.activation, convolved=config.convolved))


def _parts(spec: EnvironmentSpec, config: PPOConfig) -> _Parts:
    total = config.updates * config.epochs * config.minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0.0, total)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.adam(schedule, eps=1e-5))
    return _Parts(config, _layout(spec, config), _model(spec, config), optimizer)


def _init_params(parts: _Parts, seed: int) -> PyTree:
    log_std = np.full(parts.layout.continuous, np.log(parts.config.initial_std), np.float32)
    return {"perceptrons": parts.model.init(np.random.default_rng(seed)), "log_std": log_std}


def _begin(parts: _Parts, seed: int) -> LearnerState:
    params = _init_params(parts, seed)
    optimizer = jax.eval_shape(parts.optimizer.init, params)
    return init_learner(params, optimizer, parts.model.size, parts.config.num_envs)


def _method(spec: EnvironmentSpec, config: PPOConfig) -> Method:
    parts = _parts(spec, config)
    model = parts.model
    return Method(
        schedule=Schedule(config.num_envs, config.rollout_length, config.updates),
        begin=functools.partial(_begin, parts),
        numbers=lambda timestep: model.numbers(model.see(model.begin(config.num_envs), timestep)),
        explorer=_explorer(parts.layout, model),
        acting=lambda learner: (learner.params, learner.moments, config.noise_correlation),
        update=functools.partial(_update, parts),
        kept=lambda learner: {"network": learner.params, "moments": learner.moments._asdict()},
    )


def _explorer(layout: ActionLayout, model: ActorCritic) -> Agent:
    """The agent that acts while learning: sampled slots, with noise that may last; it records what the update needs."""

    def init(batch_size: int) -> PyTree:
        return jnp.zeros((batch_size, layout.continuous)), model.begin(batch_size)

    def step(params: PyTree, carry: PyTree, timestep: TimeStep, key: Array) -> tuple[PyTree, PyTree, ActorRecord]:
        (learned, moments, correlation), (noise, memory) = params, carry
        seen = model.see(memory, timestep)
        (logits, mean, value), after = model.act(learned["perceptrons"], moments, memory, seen, timestep)
        white = sample_slots(layout, key, logits, jnp.zeros_like(mean), jnp.ones_like(mean))
        # Each step's noise is standard normal by itself, so the log-probability of one step needs no history.
        going = correlation * noise + (1 - correlation**2) ** 0.5 * white.continuous
        noise = jnp.where(timestep.first[:, None], white.continuous, going)
        slots = Slots(white.categorical, mean + jnp.exp(learned["log_std"]) * noise)
        log_prob, _ = log_prob_and_entropy(layout, slots, logits, mean, learned["log_std"])
        action = from_slots(layout, slots)
        return (noise, executed(after, action)), action, ActorRecord(slots, log_prob, value, memory)

    return Agent(init, step)


def _update(parts: _Parts, learner: LearnerState, experience: Experience, key: Array) -> LearnerState:
    """One PPO update from a rollout and the time step after it."""
    config, model = parts.config, parts.model
    (steps, _, record), following, (_, memory) = experience
    seen = model.see(memory, following)
    (_, _, last_value), _ = model.act(learner.params["perceptrons"], learner.moments, memory, seen, following)
    value = jnp.concatenate([record.value, last_value[None]])
    reward, terminated, truncated = map(experience.with_following, ("reward", "terminated", "truncated"))
    normalized, learner = normalize_rewards(config.discount, learner, reward, terminated | truncated)
    advantage, valid = advantages(value, normalized, terminated, truncated, config.discount, config.gae_lambda)
    data = Batch(
        seen=model.see(record.memory, steps),
        action_mask=steps.action_mask,
        slots=record.slots,
        log_prob=record.log_prob,
        advantage=advantage,
        target=advantage + value[:-1],
        valid=valid,
        first=steps.first,
    )
    moments = add_numbers(learner, _numbers(model, data.seen))
    # Only now: the rollout's log-probabilities were taken under the old moments, and so is its update.
    data = _cut(config, data._replace(memory=record.memory))

    def objective(params: PyTree, batch: Batch) -> Array:
        return loss(params, config, parts.layout, model, learner.moments, batch)

    step, state = functools.partial(gradient_step, parts.optimizer, objective), (learner.params, learner.optimizer)
    (params, optimizer), losses = descend(step, state, data, config.epochs, config.minibatches, key)
    return learner._replace(params=params, moments=moments, optimizer=optimizer, loss=losses.mean())


def _numbers(model: ActorCritic, seen: PyTree) -> Array:
    """What moments are taken of, `[T * B, D]`, of what was seen in a rollout."""
    return model.numbers(jax.tree.map(_rows, seen))


def _cut(config: PPOConfig, data: Batch) -> Batch:
    """A rollout `[T, B, ...]` as steps `[N, ...]`, or as sequences `[N, L, ...]` with what was remembered before."""
    if not config.memory:
        return jax.tree.map(_rows, data._replace(memory=()))
    length = config.sequence_length

    def sequences(x: Array) -> Array:
        return _rows(x.reshape(x.shape[0] // length, length, *x.shape[1:]).swapaxes(1, 2))

    return jax.tree.map(sequences, data._replace(memory=()))._replace(
        memory=jax.tree.map(lambda x: _rows(x[::length]), data.memory)
    )


def _rows(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

"""Proximal policy optimization for any environment of the interface.

Where the environment is jittable, acting and learning compile into one program; elsewhere the same update follows the
rollout of a Python loop.
Source: Schulman et al. 2017 (PPO); Schulman et al. 2016 (generalized advantage estimation).
"""

from __future__ import annotations

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
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from . import networks
from .policy import SlotPolicy, choice_logits, sample_slots, slot_agent

REPORTS = 20
"""How often training reports its progress."""


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Hyperparameters; the defaults do for most small environments.

    Attributes:
      budget_steps: environment steps of training, over all parallel environments.
      num_envs: parallel environments.
      rollout_length: steps of a rollout in each environment.
      learning_rate: of Adam, falling linearly to 0.
      discount: gamma.
      gae_lambda: lambda of the advantage estimation.
      epochs: passes over a rollout.
      minibatches: per pass; divides num_envs times rollout_length.
      clip_eps: how far the probability ratio may go from 1 before the objective stops rewarding it.
      entropy_coef: weight of the entropy bonus.
      value_coef: weight of the value loss.
      max_gradient_norm: of the whole gradient.
      hidden: widths of the hidden layers of policy and value.
      activation: a name in `jax.nn`.
      initial_std: initial standard deviation of continuous slots, in half ranges.
      learn_std: whether it is trained.
      noise_correlation: of the exploration noise of continuous slots from step to step, 0 (white) to below 1.
    """

    budget_steps: int = 500_000
    num_envs: int = 64
    rollout_length: int = 128
    learning_rate: float = 1e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    epochs: int = 4
    minibatches: int = 8
    clip_eps: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_gradient_norm: float = 0.5
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    initial_std: float = 1.0
    learn_std: bool = True
    noise_correlation: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list, when it comes from JSON
        positive = ("budget_steps", "num_envs", "rollout_length", "epochs", "minibatches", "learning_rate", "clip_eps")
        for name in (*positive, "initial_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("discount", "gae_lambda", "noise_correlation"):
            if not 0 <= getattr(self, name) <= 1 or self.noise_correlation == 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number from 0 to 1")
        if self.num_envs * self.rollout_length % self.minibatches:
            raise ValueError(
                f"a rollout of {self.num_envs} environments x {self.rollout_length} steps does not split into "
                f"{self.minibatches} minibatches"
            )
        if not self.hidden or not callable(getattr(jax.nn, self.activation, None)):
            raise ValueError(f"got hidden {self.hidden} and activation {self.activation!r}, expected jax.nn's names")

    @property
    def updates(self) -> int:
        """Rollouts that the budget pays for, at least one."""
        return max(1, self.budget_steps // (self.num_envs * self.rollout_length))


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
    moments: networks.Moments
    optimizer: PyTree
    reward_moments: networks.Moments
    discounted: Array
    total: Array
    finished: networks.Moments
    loss: Array


def advantages(
    value: Array, reward: Array, terminated: Array, truncated: Array, discount: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Generalized advantages under next-step reset.

    A termination cuts the value after it; a truncation does not, and its last observation is there to be valued. The
    action at the end of an episode was ignored, so it has no advantage and what it met counts nowhere.

    Args:
      value: `float32 [T + 1, B]`, of the observations.
      reward: `float32 [T + 1, B]`, earned on the way to them.
      terminated: `bool [T + 1, B]`.
      truncated: `bool [T + 1, B]`.
      discount: gamma.
      gae_lambda: lambda.

    Returns:
      Advantages `float32 [T, B]`, 0 where not valid, and `bool [T, B]`, whether the action counts.

    Source: Schulman et al. 2016, equation 16.
    """
    last = terminated | truncated
    valid = ~last[:-1]
    after = jnp.where(terminated[1:], 0.0, value[1:])
    error = jnp.where(valid, reward[1:] + discount * after - value[:-1], 0.0)

    def back(advantage, now):
        error, valid, ends = now
        advantage = jnp.where(valid, error + discount * gae_lambda * jnp.where(ends, 0.0, advantage), 0.0)
        return advantage, advantage

    _, result = jax.lax.scan(back, jnp.zeros_like(value[0]), (error, valid, last[1:]), reverse=True)
    return result, valid


class Batch(typing.NamedTuple):
    """N steps to learn from; a pytree.

    Attributes:
      observation: each leaf `[N, ...]`.
      action_mask: `bool [N, M]` or None.
      slots: what was sampled.
      log_prob: `float32 [N]`, of it, when acting.
      advantage: `float32 [N]`.
      target: `float32 [N]`, of the value.
      valid: `bool [N]`; the other rows count for nothing, whatever they hold.
    """

    observation: PyTree
    action_mask: Array | None
    slots: Slots
    log_prob: Array
    advantage: Array
    target: Array
    valid: Array


def loss(
    params: PyTree,
    config: PPOConfig,
    layout: ActionLayout,
    network: networks.Network,
    moments: networks.Moments,
    batch: Batch,
) -> Array:
    """The clipped objective, with value loss and entropy bonus, averaged over the valid steps."""
    valid = batch.valid
    # Masking the result is not enough: the gradient of NaN times 0 is NaN.
    batch = jax.tree.map(
        lambda x: jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), batch
    )
    logits, mean, value = network.apply(params["perceptrons"], moments, batch.observation, batch.action_mask)
    log_std = params["log_std"]
    if not config.learn_std:
        log_std = jax.lax.stop_gradient(log_std)
    log_prob, entropy = _log_prob_and_entropy(layout, batch.slots, logits, mean, log_std)

    def average(x):
        return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)

    centered = batch.advantage - average(batch.advantage)
    advantage = centered / (jnp.sqrt(average(centered**2)) + 1e-8)
    ratio = jnp.exp(jnp.where(valid, log_prob - batch.log_prob, 0.0))
    clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    value_loss = 0.5 * (value - batch.target) ** 2
    return average(-objective + config.value_coef * value_loss - config.entropy_coef * entropy)


def train(environment: Environment, config: PPOConfig, seed: int, progress: rollout.Progress | None = None) -> PyTree:
    """Trains a policy.

    Args:
      environment: `config.num_envs` rows.
      config: hyperparameters.
      seed: of everything random.
      progress: is told the environment steps done and their total.

    Returns:
      Parameters for the policy of `agent`, as NumPy arrays: the last ones, or the last before a clear decline.

    Raises:
      FloatingPointError: training diverged.
    """
    if environment.spec.batch_size != config.num_envs:
        raise ValueError(
            f"the environment has {environment.spec.batch_size} rows, expected num_envs = {config.num_envs}"
        )
    reset_key, key = jax.random.split(jax.random.key(seed))
    learning_agent = _learning_agent(typing.cast(typing.Hashable, environment), config)
    learner: typing.Any = _begin(environment, config, seed)
    loop = rollout.start(environment, learning_agent, reset_key)
    reports, kept, top = min(config.updates, REPORTS), learner, (-np.inf, 0.0)
    for report in range(reports):
        begin, end = (config.updates * i // reports for i in (report, report + 1))
        if environment.spec.jittable:
            learner, loop = _train_inside(environment, config, learner, loop, key, begin, end)
        else:
            for update in range(begin, end):
                act_key, learn_key = jax.random.split(jax.random.fold_in(key, update))
                params = (learner.params, learner.moments)
                loop, trajectory = rollout.rollout(
                    environment, learning_agent, params, loop, act_key, config.rollout_length
                )
                learner = _learn(environment, config, learner, trajectory, loop.timestep, learn_key)
        if not np.isfinite(learner.loss):
            raise FloatingPointError(
                f"training {environment.spec.id} diverged after {end} updates: the loss is {learner.loss}; "
                "lower the learning rate or look at the rewards"
            )
        mean, error = _mean_and_error(learner.finished)
        # Learning may collapse late: what is clearly worse than an earlier policy does not replace it.
        if not mean < top[0] - 2 * np.hypot(error, top[1]):
            kept = learner
        top = max(top, (mean, error))
        learner = learner._replace(finished=networks.init_moments(1))
        if progress is not None:
            progress(
                end * config.num_envs * config.rollout_length, config.updates * config.num_envs * config.rollout_length
            )
    return jax.tree.map(np.asarray, {"network": kept.params, "moments": kept.moments._asdict()})


def _mean_and_error(finished: networks.Moments) -> tuple[float, float]:
    """Mean return and its standard error; NaN, which is no decline, where no episode ended."""
    count = float(finished.count)
    if count < 1:
        return np.nan, 0.0
    return float(finished.mean[0]), float(np.sqrt(finished.variance[0] / count))


def agent(spec: EnvironmentSpec, config: PPOConfig) -> Agent:
    """The agent of trained parameters, in either form; see `policy.slot_agent`."""
    layout, network = action_layout(spec.action_space, low=-1.0, high=1.0), _network(spec, config)

    def policy(params, timestep: TimeStep) -> SlotPolicy:
        moments = networks.Moments(**params["moments"])
        logits, mean, _ = network.apply(
            params["network"]["perceptrons"], moments, timestep.observation, timestep.action_mask
        )
        return SlotPolicy(logits, mean, jnp.broadcast_to(jnp.exp(params["network"]["log_std"]), mean.shape))

    return slot_agent(layout, policy)


def _network(spec: EnvironmentSpec, config: PPOConfig) -> networks.Network:
    layout = action_layout(spec.action_space, low=-1.0, high=1.0)
    return networks.network(spec.observation_space, layout, config.hidden, config.activation)


@functools.lru_cache(maxsize=8)  # one agent per training, so that its compiled step is found again
def _learning_agent(environment: typing.Any, config: PPOConfig) -> Agent:
    layout, network = (
        action_layout(environment.spec.action_space, low=-1.0, high=1.0),
        _network(environment.spec, config),
    )

    def init(batch_size):
        return jnp.zeros((batch_size, layout.continuous))

    def step(params, noise, timestep: TimeStep, key):
        learned, moments = params
        logits, mean, value = network.apply(learned["perceptrons"], moments, timestep.observation, timestep.action_mask)
        white = sample_slots(layout, key, logits, jnp.zeros_like(mean), jnp.ones_like(mean))
        # Each step's noise is standard normal by itself, so the log-probability of one step needs no history.
        correlation = config.noise_correlation
        going = correlation * noise + (1 - correlation**2) ** 0.5 * white.continuous
        noise = jnp.where(timestep.first[:, None], white.continuous, going)
        slots = Slots(white.categorical, mean + jnp.exp(learned["log_std"]) * noise)
        log_prob, _ = _log_prob_and_entropy(layout, slots, logits, mean, learned["log_std"])
        return noise, from_slots(layout, slots), ActorRecord(slots, log_prob, value)

    return Agent(init, step)


def _log_prob_and_entropy(layout: ActionLayout, slots: Slots, logits: Array, mean: Array, log_std: Array):
    """Log-probability of the slots and entropy of the distribution, `[N]` each, summed over slots."""
    choices = choice_logits(layout, logits)
    chosen = jnp.take_along_axis(choices, slots.categorical[..., None], -1)[..., 0]
    whitened = (slots.continuous - mean) * jnp.exp(-log_std)
    constant = 0.5 * np.log(2 * np.pi)
    log_prob = chosen.sum(-1) - (0.5 * whitened**2 + log_std + constant).sum(-1)
    entropy = -(jnp.exp(choices) * choices).sum((-2, -1)) + (log_std + constant + 0.5).sum()
    return log_prob, entropy


def _optimizer(config: PPOConfig) -> optax.GradientTransformation:
    total = config.updates * config.epochs * config.minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0.0, total)
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.adam(schedule, eps=1e-5))


def _begin(environment: Environment, config: PPOConfig, seed: int) -> LearnerState:
    layout, network = (
        action_layout(environment.spec.action_space, low=-1.0, high=1.0),
        _network(environment.spec, config),
    )
    params = {
        "perceptrons": network.init(np.random.default_rng(seed)),
        "log_std": np.full(layout.continuous, np.log(config.initial_std), np.float32),
    }
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(_optimizer(config).init, params))
    return LearnerState(
        params,
        networks.init_moments(network.size),
        zeros,  # Adam begins at zeros
        networks.init_moments(1),
        np.zeros(config.num_envs, np.float32),
        np.zeros(config.num_envs, np.float32),
        networks.init_moments(1),
        np.float32(0),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train_inside(environment, config, learner, loop, key, begin, end):
    learning_agent = _learning_agent(environment, config)

    def update(i, state):
        learner, loop = state
        act_key, learn_key = jax.random.split(jax.random.fold_in(key, i))
        params = (learner.params, learner.moments)
        loop, trajectory = rollout.rollout(environment, learning_agent, params, loop, act_key, config.rollout_length)
        return _learn(environment, config, learner, trajectory, loop.timestep, learn_key), loop

    return jax.lax.fori_loop(begin, end, update, (learner, loop))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _learn(environment, config, learner, trajectory, following, key):
    """One PPO update from a rollout and the time step after it."""
    spec = environment.spec
    layout, network, optimizer = (
        action_layout(spec.action_space, low=-1.0, high=1.0),
        _network(spec, config),
        _optimizer(config),
    )
    steps, kept = trajectory.timestep, trajectory.record

    _, _, value = network.apply(
        learner.params["perceptrons"], learner.moments, following.observation, following.action_mask
    )
    value, reward, terminated, truncated = (
        jnp.concatenate([now, after[None]])
        for now, after in (
            (kept.value, value),
            (steps.reward, following.reward),
            (steps.terminated, following.terminated),
            (steps.truncated, following.truncated),
        )
    )
    reward, learner = _normalize_rewards(config, learner, reward, terminated | truncated)
    advantage, valid = advantages(value, reward, terminated, truncated, config.discount, config.gae_lambda)
    target = advantage + value[:-1]

    def flat(tree):
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)

    data = flat(Batch(steps.observation, steps.action_mask, kept.slots, kept.log_prob, advantage, target, valid))

    def descend(state, index_N):
        params, optimizer_state = state
        batch = jax.tree.map(lambda x: x[index_N], data)
        value, gradient = jax.value_and_grad(loss)(params, config, layout, network, learner.moments, batch)
        change, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, change), optimizer_state), value

    shuffles = jnp.argsort(jax.random.bits(key, (config.epochs, valid.size)), -1)
    shuffles = shuffles.reshape(config.epochs * config.minibatches, -1)
    (params, optimizer_state), losses = jax.lax.scan(descend, (learner.params, learner.optimizer), shuffles)
    # Only now: the rollout's log-probabilities were taken under the old moments, and so is its update.
    numbers = network.numbers(data.observation)
    moments = networks.add_moments(learner.moments, numbers, jnp.ones(numbers.shape[0], bool))
    return learner._replace(params=params, moments=moments, optimizer=optimizer_state, loss=losses.mean())


def _normalize_rewards(
    config: PPOConfig, learner: LearnerState, reward: Array, last: Array
) -> tuple[Array, LearnerState]:
    """Scales rewards `[T + 1, B]` by the deviation of their discounted sum, leaving their mean; books the returns."""
    valid = ~last[:-1]

    def add(sums, now):
        reward, valid = now
        discounted, total = (jnp.where(valid, keep * x + reward, 0.0) for keep, x in zip(kept, sums, strict=True))
        return (discounted, total), (discounted, total)

    kept = (config.discount, 1.0)
    ends, (discounted, total) = jax.lax.scan(add, (learner.discounted, learner.total), (reward[1:], valid))
    moments = networks.add_moments(learner.reward_moments, discounted.reshape(-1, 1), valid.ravel())
    finished = networks.add_moments(learner.finished, total.reshape(-1, 1), (valid & last[1:]).ravel())
    learner = learner._replace(reward_moments=moments, discounted=ends[0], total=ends[1], finished=finished)
    return jnp.clip(reward / jnp.sqrt(moments.variance + 1e-8), -10, 10), learner

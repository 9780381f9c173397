"""What every algorithm that learns from rollouts shares: one loop that acts and learns, and says what it came to.

Where the environment is jittable, acting and learning compile into one program; elsewhere the same update follows the
rollout of a Python loop.
"""

from __future__ import annotations

import collections.abc
import functools
import math
import typing
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax import rollout
from ldm_jax.environment import Environment
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from .algorithm import REPORTS, Learned
from .hyperparameters import Hyperparameters
from .moments import Moments, add_moments, first_moments, init_moments, scale


class DivergenceError(LdmError, FloatingPointError):
    """Training came to numbers that are not finite; nothing is kept of it."""


class LearnerState(typing.NamedTuple):
    """All that training changes; a pytree.

    Attributes:
      params: of the network, and what else is trained.
      moments: of the observation's numbers.
      optimizer: its state.
      reward_moments: of the discounted sum of rewards, `[1]`.
      discounted: that sum so far, `float32 [B]`.
      total: sum of rewards of the episode so far, `float32 [B]`.
      finished: of the returns of the episodes that ended since the last report, `[1]`.
      loss: mean of the last update.
      own: what else the algorithm keeps; nobody but its update looks at it.
    """

    params: PyTree
    moments: Moments
    optimizer: PyTree
    reward_moments: Moments
    discounted: Array
    total: Array
    finished: Moments
    loss: Array
    own: PyTree = ()


class Experience(typing.NamedTuple):
    """A rollout and what came after it; a pytree.

    Attributes:
      trajectory: T steps.
      following: the time step after them.
      carry: what the explorer remembers then.
    """

    trajectory: rollout.Trajectory
    following: TimeStep
    carry: PyTree

    def with_following(self, name: str) -> Array:
        """A field of the time steps with the one after them, `[T + 1, B]`."""
        now, after = (getattr(timestep, name) for timestep in (self.trajectory.timestep, self.following))
        return jnp.concatenate([now, after[None]])


class Schedule(typing.NamedTuple):
    """How rollouts share the budget.

    Attributes:
      num_envs: B.
      rollout_length: T.
      updates: how many rollouts, each followed by an update.
    """

    num_envs: int
    rollout_length: int
    updates: int


class Method(typing.NamedTuple):
    """An algorithm bound to its configuration and the spaces; its arrays do not depend on a step.

    Attributes:
      schedule: how rollouts share the budget.
      begin: `begin(seed) -> LearnerState`.
      numbers: `numbers(observation)`, what moments are taken of.
      explorer: who acts while learning; its parameters are `acting(learner)`.
      acting: the explorer's parameters.
      update: `update(learner, experience, key) -> learner`, one update from one rollout.
      kept: `kept(learner)`, parameters for the policy of the algorithm's agent.
    """

    schedule: Schedule
    begin: collections.abc.Callable[[int], LearnerState]
    numbers: collections.abc.Callable[[TimeStep], Array]
    explorer: Agent
    acting: collections.abc.Callable[[LearnerState], PyTree]
    update: collections.abc.Callable[[LearnerState, Experience, Array], LearnerState]
    kept: collections.abc.Callable[[LearnerState], PyTree]


def init_learner(params: PyTree, optimizer: PyTree, size: int, num_envs: int, own: PyTree = ()) -> LearnerState:
    """The state before the first step.

    Args:
      params: to begin with.
      optimizer: shapes of the optimizer's state, which begins at zeros.
      size: how many numbers moments are taken of.
      num_envs: B.
      own: what else the algorithm keeps.
    """
    rows = np.zeros(num_envs, np.float32)
    return LearnerState(
        params=params,
        moments=init_moments(size),
        optimizer=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), optimizer),
        reward_moments=init_moments(1),
        discounted=rows,
        total=rows,
        finished=init_moments(1),
        loss=np.zeros((), np.float32),
        own=own,
    )


MethodOf = collections.abc.Callable[[EnvironmentSpec, typing.Any], Method]
"""A function of a module, which makes the method of a specification and a configuration."""


def learn(
    environment: Environment, method_of: MethodOf, config: Hyperparameters, seed: int
) -> collections.abc.Iterator[Learned]:
    """Acts and learns, and pauses at each report.

    Args:
      environment: with the configuration's number of rows.
      method_of: how; it is called again where a program is compiled, with `config.numbers` traced.
      config: hyperparameters, settled.
      seed: of everything random.

    Yields:
      Parameters for the policy of the algorithm's agent: the last ones, or the last before a clear decline.

    Raises:
      DivergenceError: training diverged.
    """
    spec, method = environment.spec, method_of(environment.spec, config)
    num_envs, length, updates = method.schedule
    if spec.batch_size != num_envs:
        raise ConfigError(f"the environment has {spec.batch_size} rows, expected num_envs = {num_envs}")
    update_many = _driver(environment, method_of, config, method)
    reset_key, key = jax.random.split(jax.random.key(seed))
    loop = rollout.start(environment, method.explorer, reset_key)
    learner = method.begin(seed)
    learner = learner._replace(moments=first_moments(method.numbers(loop.timestep)))
    reports, best = min(updates, REPORTS), Best(learner._replace(own=()))
    # Before, only the short episodes have ended, which may be the best or the worst.
    unbiased_after = min(spec.time_limit, updates * length // 4)
    for report in range(reports):
        begin, end = (updates * i // reports for i in (report, report + 1))
        learner, loop = update_many(learner, loop, key, begin, end)
        check_learner(spec, learner, end)
        best = keep_better(best, learner._replace(own=()), biased=begin * length < unbiased_after)
        yield Learned(end * num_envs * length, method.kept(best.learner), mean_and_error(learner.finished)[0])
        learner = learner._replace(finished=init_moments(1))


_Driver = collections.abc.Callable[
    [LearnerState, rollout.RolloutState, Array, int, int], tuple[LearnerState, rollout.RolloutState]
]

_Numbers = dict[str, typing.Any]


def _driver(environment: Environment, method_of: MethodOf, config: Hyperparameters, method: Method) -> _Driver:
    """Does the updates from `begin` to before `end`, as one program where the environment allows it."""
    if environment.spec.jittable:
        return functools.partial(_inside(environment, method_of, config.structure), config.numbers)
    spec, structure, numbers = environment.spec, config.structure, config.numbers

    def update(numbers: _Numbers, own: PyTree, learner: LearnerState, experience: Experience, key: Array) -> PyTree:
        method = method_of(spec, structure.with_numbers(numbers))
        return method.update(learner._replace(own=own), experience, key)

    compiled = jax.jit(update, donate_argnums=1)  # a replay buffer is written in place

    def on_host(
        learner: LearnerState, loop: rollout.RolloutState, key: Array, begin: int, end: int
    ) -> tuple[LearnerState, rollout.RolloutState]:
        for i in range(begin, end):
            loop, experience, learn_key = _act(environment, method, learner, loop, key, i)
            learner = compiled(numbers, learner.own, learner._replace(own=()), experience, learn_key)
        return learner, loop

    return on_host


_COMPILED: weakref.WeakKeyDictionary[Environment, dict[typing.Any, collections.abc.Callable[..., typing.Any]]] = (
    weakref.WeakKeyDictionary()
)


def _inside(
    environment: Environment, method_of: MethodOf, structure: Hyperparameters
) -> collections.abc.Callable[..., tuple[LearnerState, rollout.RolloutState]]:
    """The program of an environment that all configurations of a structure share; it lives as long as that does."""
    programs = _COMPILED.setdefault(environment, {})
    if (method_of, structure) not in programs:
        alive = weakref.ref(environment)

        @jax.jit
        def inside(
            numbers: _Numbers, learner: LearnerState, loop: rollout.RolloutState, key: Array, begin: int, end: int
        ) -> tuple[LearnerState, rollout.RolloutState]:
            here = alive()
            assert here is not None, "who calls holds it"
            method = method_of(here.spec, structure.with_numbers(numbers))

            def act_and_learn(i: Array, state: PyTree) -> PyTree:
                learner, loop = state
                loop, experience, learn_key = _act(here, method, learner, loop, key, i)
                return method.update(learner, experience, learn_key), loop

            return jax.lax.fori_loop(begin, end, act_and_learn, (learner, loop))

        programs[method_of, structure] = inside
    return programs[method_of, structure]


def _act(
    environment: Environment,
    method: Method,
    learner: LearnerState,
    loop: rollout.RolloutState,
    key: Array,
    i: Array | int,
) -> tuple[rollout.RolloutState, Experience, Array]:
    """The rollout before update i, and the key to learn from it."""
    act_key, learn_key = jax.random.split(jax.random.fold_in(key, i))
    acting, length = method.acting(learner), method.schedule.rollout_length
    loop, trajectory = rollout.rollout(environment, method.explorer, acting, loop, act_key, length)
    return loop, Experience(trajectory, loop.timestep, loop.carry), learn_key


def normalize_rewards(discount: float, learner: LearnerState, reward: Array, last: Array) -> tuple[Array, LearnerState]:
    """Scales rewards `[T + 1, B]` by the spread of their discounted sum, leaving their mean; books the returns."""
    valid = ~last[:-1]
    decays = (discount, 1.0)

    def add(sums: tuple[Array, Array], now: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        reward, valid = now
        discounted, total = (jnp.where(valid, decay * x + reward, 0.0) for decay, x in zip(decays, sums, strict=True))
        return (discounted, total), (discounted, total)

    ends, (discounted, total) = jax.lax.scan(add, (learner.discounted, learner.total), (reward[1:], valid))
    moments = add_moments(learner.reward_moments, discounted.reshape(-1, 1), valid.ravel())
    finished = add_moments(learner.finished, total.reshape(-1, 1), (valid & last[1:]).ravel())
    learner = learner._replace(reward_moments=moments, discounted=ends[0], total=ends[1], finished=finished)
    return jnp.clip(reward / scale(moments), -10, 10), learner


def add_numbers(learner: LearnerState, numbers: Array) -> Moments:
    """The moments with the numbers `[..., D]` of a rollout taken in."""
    *lead, width = numbers.shape
    rows = numbers.reshape(math.prod(lead), width)  # no -1: what is seen may have no numbers
    return add_moments(learner.moments, rows, jnp.ones(len(rows), bool))


_Step = collections.abc.Callable[[PyTree, PyTree], tuple[PyTree, Array]]


def descend(
    step: _Step, state: PyTree, data: PyTree, epochs: int, minibatches: int, key: Array
) -> tuple[PyTree, Array]:
    """Epochs of shuffled minibatches over data with leaves `[N, ...]`.

    Args:
      step: `step(state, batch) -> (state, loss)`.
      state: to begin with.
      data: N a multiple of `minibatches`.
      epochs: passes over the data.
      minibatches: per pass.
      key: of the shuffles.

    Returns:
      The state, and all losses.
    """
    count = jax.tree.leaves(data)[0].shape[0]
    shuffles = jnp.argsort(jax.random.bits(key, (epochs, count), jnp.uint32), -1)
    shuffles = shuffles.reshape(epochs * minibatches, -1)
    return jax.lax.scan(lambda state, i_N: step(state, jax.tree.map(lambda x: x[i_N], data)), state, shuffles)


def gradient_step(
    optimizer: optax.GradientTransformation,
    loss: collections.abc.Callable[[PyTree, PyTree], Array],
    state: tuple[PyTree, PyTree],
    batch: PyTree,
) -> tuple[tuple[PyTree, PyTree], Array]:
    """One step down `loss(params, batch)`.

    Args:
      optimizer: makes the step.
      loss: what is to fall.
      state: parameters, and the optimizer's state.
      batch: to learn from.

    Returns:
      The state after it, and the loss before it.
    """
    params, optimizer_state = state
    value, gradient = jax.value_and_grad(loss)(params, batch)
    change, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return (optax.apply_updates(params, change), optimizer_state), value


def blank(valid: Array, tree: PyTree) -> PyTree:
    """The tree with zeros in the rows that are not valid: masking the result is not enough, NaN times 0 is NaN."""
    return jax.tree.map(
        lambda x: jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x, jnp.zeros_like(x)), tree
    )


def average(valid: Array, x: Array) -> Array:
    """The mean of the valid ones."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


class Best(typing.NamedTuple):
    """The policy to be kept so far, and the highest mean return of any, with its standard error."""

    learner: LearnerState
    mean: float = -np.inf
    error: float = 0.0


def keep_better(best: Best, learner: LearnerState, *, biased: bool) -> Best:
    """Takes the later policy unless it is clearly worse than an earlier one: learning may collapse late."""
    mean, error = mean_and_error(learner.finished)
    if mean < best.mean - 2 * np.hypot(error, best.error):
        learner = best.learner
    if biased or not mean > best.mean:
        return best._replace(learner=learner)
    return Best(learner, mean, error)


def mean_and_error(finished: Moments) -> tuple[float, float]:
    """Mean return and its standard error; NaN, which is no decline, where no episode ended."""
    count = float(finished.seen)
    if count < 1:
        return np.nan, 0.0
    return float(finished.mean[0]), float(finished.std[0]) / count**0.5


def check_learner(spec: EnvironmentSpec, learner: LearnerState, updates: int) -> None:
    """Refuses a learner that is not finite.

    What would be kept is looked at, and not the loss alone: the step after a sound loss may still overflow.

    Raises:
      DivergenceError: something is not finite.
    """
    kept = (learner.loss, learner.params, learner.moments, learner.reward_moments)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept)):
        raise DivergenceError(
            f"training {spec.id} diverged after {updates} updates: the loss is {learner.loss}; "
            "lower the learning rate or look at the rewards"
        )

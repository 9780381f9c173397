"""What standardizes an environment's data, measured as one goes, and the card of one that nobody has measured."""

from __future__ import annotations

import functools
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax import rollout, spaces
from ldm_jax.cards import EnvironmentCard, Reference, Returns, Statistics
from ldm_jax.encoding.actions import action_layout
from ldm_jax.encoding.observations import ObservationLayout, numeric_vector, observation_layout
from ldm_jax.environment import Environment
from ldm_jax.types import EnvironmentSpec, Key, TimeStep

UNMEASURED = "unmeasured"
"""The algorithm on the card of an environment that has no reference."""

RANDOM_STEPS = 64
"""Steps of each row of `measure_by_chance`."""


class RunningStatistics(typing.NamedTuple):
    """What was seen so far; of N numbers, `float64 [N]`.

    Attributes:
      steps: the number of observations.
      mean: of each number.
      squares: the sum of squared differences from it.
      low: the least seen.
      high: the largest seen.
      rewards: the number of rewards that are not 0.
      reward_squares: the sum of their squares.
    """

    steps: int
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rewards: int = 0
    reward_squares: float = 0.0


def start_statistics(observation_space: gymnasium.Space) -> RunningStatistics:
    """The statistics of an environment that nothing was seen of."""
    zeros = np.zeros(observation_layout(observation_space).numbers)
    return RunningStatistics(0, zeros, zeros, zeros + np.inf, zeros - np.inf)


def add_timestep(running: RunningStatistics, layout: ObservationLayout, timestep: TimeStep) -> RunningStatistics:
    """Adds what B rows say at one step.

    Args:
      running: what was seen before.
      layout: of the observations.
      timestep: of B rows, NumPy's.

    Returns:
      What was seen with it.

    Source: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """
    rewards = timestep.reward[timestep.reward != 0].astype(np.float64)
    running = running._replace(
        rewards=running.rewards + rewards.size, reward_squares=running.reward_squares + float((rewards**2).sum())
    )
    count = len(timestep.reward)
    steps = running.steps + count
    if not layout.numbers:
        return running._replace(steps=steps)
    numbers = np.asarray(numeric_vector(layout, timestep.observation), np.float64)
    mean = numbers.mean(0)
    apart = mean - running.mean
    return running._replace(
        steps=steps,
        mean=running.mean + apart * (count / steps),
        squares=running.squares + ((numbers - mean) ** 2).sum(0) + apart**2 * (running.steps * count / steps),
        low=np.minimum(running.low, numbers.min(0)),
        high=np.maximum(running.high, numbers.max(0)),
    )


def statistics_of(running: RunningStatistics, action_space: gymnasium.Space, *, masked: bool) -> Statistics:
    """The statistics of what was seen; actions without bounds are taken in -1 to 1, as nobody knows better.

    Args:
      running: what was seen.
      action_space: of the environment.
      masked: whether its time steps have an action mask.
    """
    std = np.ones_like(running.mean)
    if running.steps:
        std = floored_deviation(np.sqrt(running.squares / running.steps), running.mean, running.low, running.high)
    acted = action_layout(action_space, low=-1.0, high=1.0)
    return Statistics(
        observation_mean=tuple(running.mean.tolist()),
        observation_std=tuple(std.tolist()),
        reward_scale=float(np.sqrt(running.reward_squares / running.rewards)) if running.reward_squares > 0 else 1.0,
        action_low=tuple(acted.low.tolist()),
        action_high=tuple(acted.high.tolist()),
        steps=running.steps,
        masked=masked,
    )


def floored_deviation(std: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Standard deviations that can be divided by, in the unit of what was measured.

    They are floored at a thousandth of the range seen (below it, standardizing would blow up a rare jump) and at 1e-5
    of the mean (what float32 resolves). A number that never changes has its own size for a deviation, 1 where it is 0.

    Args:
      std: `float64 [N]`.
      mean: `float64 [N]`.
      low: `[N]`, the least seen.
      high: `[N]`, the largest seen.

    Returns:
      `float64 [N]`, positive.
    """
    width, size = high.astype(np.float64) - low.astype(np.float64), np.abs(mean)
    constant = np.where(size > 0, size, 1.0)
    return np.where(width > 0, np.maximum(std, np.maximum(1e-3 * width, 1e-5 * size)), constant)


def unmeasured_card(spec: EnvironmentSpec, statistics: Statistics | None = None) -> EnvironmentCard:
    """The card of an environment that a policy was not trained in: its spaces, and no scores.

    Args:
      spec: of the environment.
      statistics: of what was seen of it; default: nothing was.

    Returns:
      The card; its returns are 0 and say nothing, and `card` decoding samples, as nothing is known for a choice.
    """
    nothing = Returns(((0.0,),))
    if statistics is None:
        statistics = statistics_of(start_statistics(spec.observation_space), spec.action_space, masked=False)
    return EnvironmentCard.of(
        spec,
        statistics=statistics,
        random_returns=nothing,
        reference_returns=nothing,
        reference=Reference(algorithm=UNMEASURED, decoding="sample", budget_steps=0, seed=0),
    )


def measure_by_chance(environment: Environment, key: Key) -> Statistics:
    """Measures an environment with `RANDOM_STEPS` random steps of each row; it is to be reset afterwards.

    Args:
      environment: of B rows.
      key: typed key of the episodes and the actions.
    """
    spec = environment.spec
    layout, running = observation_layout(spec.observation_space), start_statistics(spec.observation_space)
    draw = jax.jit(functools.partial(spaces.sample, space=spec.action_space, batch_size=spec.batch_size))
    state, timestep = rollout.reset_from_host(environment, key)
    for t in range(RANDOM_STEPS):
        running = add_timestep(running, layout, jax.tree.map(np.asarray, timestep))
        action = draw(jax.random.fold_in(key, t), action_mask=timestep.action_mask)
        if not spec.jittable:
            action = jax.tree.map(np.asarray, action)
        state, timestep = rollout.step_from_host(environment, state, action)
    return statistics_of(running, spec.action_space, masked=timestep.action_mask is not None)

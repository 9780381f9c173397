"""What a few thousand random steps tell of an environment, before anything is learned in it."""

from __future__ import annotations

import dataclasses
import hashlib
import time

import jax
import numpy as np
from gymnasium import spaces

from ldm_jax import rollout
from ldm_jax.environment import Environment
from ldm_jax.types import Key, PyTree, TimeStep

from .policy import random_agent

PROBING_STEPS = 4096
"""Steps over all parallel environments."""

PROBE_BYTES = 2**26
"""Fewer steps are taken where their observations would fill more."""

LAGS = 8
"""How many steps back is looked for what the observation does not show."""

_SHUFFLES = 16
_SURE = 8.0  # spreads of the shuffled beyond their mean: some two dozen such tests are made of each environment
_LEAST_TOLD = 0.01  # nats a step: less is of no use


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was seen of an environment in which a random policy acts.

    Attributes:
      steps: that were taken; 0 where there was no probe, and all else is not known.
      episode_length: mean of the episodes that ended; the time limit where none has.
      rewarded: share of the steps whose reward is not 0.
      largest_reward: of all rewards, without their sign.
      rewards: how many of them differ.
      positive: whether a reward was above 0.
      states: how many observations differ.
      repeated: share of the steps whose observation had been seen before.
      memory: whether what was seen earlier tells more of what comes next than the observation and the action do.
      idle: values of a Discrete action that changed no observation and earned nothing, as often as they were tried.
      steps_per_second: told and not compared: nothing may depend on it, or two runs would differ.
    """

    steps: int = 0
    episode_length: float = 0.0
    rewarded: float = 1.0
    largest_reward: float = 1.0
    rewards: int = 0
    positive: bool = True
    states: int = 0
    repeated: float = 0.0
    memory: bool = False
    idle: tuple[int, ...] = ()
    steps_per_second: float = dataclasses.field(default=0.0, compare=False)


UNKNOWN = Probe()
"""Nothing was seen."""


def probe(environment: Environment, key: Key) -> Probe:
    """Acts at random and looks.

    Args:
      environment: not in use; it is left in the middle of an episode.
      key: typed key of everything random.
    """
    spec = environment.spec
    agent, rows = random_agent(spec.action_space), spec.batch_size
    reset_key, act_key = jax.random.split(key)
    loop = rollout.start(environment, agent, reset_key)
    row_bytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(loop.timestep.observation))
    steps = int(max(2, min(PROBING_STEPS // rows, PROBE_BYTES // max(row_bytes, 1))))
    began = time.monotonic()
    loop, seen = rollout.rollout(environment, agent, (), loop, act_key, steps)
    timestep = jax.tree.map(lambda x, y: np.concatenate([x, np.asarray(y)[None]]), seen.timestep, loop.timestep)
    seconds = time.monotonic() - began
    return _describe(spec.action_space, timestep, seen.action, spec.time_limit, steps * rows / max(seconds, 1e-9))


def _describe(
    action_space: spaces.Space, timestep: TimeStep, action: PyTree, time_limit: int, steps_per_second: float
) -> Probe:
    """Of `[T + 1, B]` time steps and `[T, B]` actions."""
    last = np.asarray(timestep.terminated) | np.asarray(timestep.truncated)
    valid, reward = ~last[:-1], np.nan_to_num(np.asarray(timestep.reward, np.float64)[1:])
    observation, taken = _number(timestep.observation), _number(action)
    earned = np.abs(reward[valid])
    _, first_seen, states = np.unique(observation[:-1], return_index=True, return_inverse=True)
    ended = int(last[1:][valid].sum())
    return Probe(
        steps=reward.size,
        episode_length=float(valid.sum() / ended) if ended else float(time_limit),
        rewarded=float((earned > 0).mean()) if earned.size else 0.0,
        largest_reward=float(earned.max(initial=0.0)),
        rewards=np.unique(reward[valid]).size,
        positive=bool((reward[valid] > 0).any()),
        states=first_seen.size,
        repeated=1 - first_seen.size / states.size,
        memory=_needs_memory(observation, taken, reward, np.asarray(timestep.terminated), last),
        idle=_idle(action_space, observation, action, reward, valid),
        steps_per_second=steps_per_second,
    )


def _number(tree: PyTree) -> np.ndarray:
    """Equal numbers for equal rows: `int64 [T, B]` of leaves `[T, B, ...]`."""
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(tree)]
    steps, rows = leaves[0].shape[:2]
    flat = [leaf.reshape(steps * rows, -1) for leaf in leaves]
    digests = [
        hashlib.blake2b(b"".join(part[i].tobytes() for part in flat), digest_size=8).digest()
        for i in range(steps * rows)
    ]
    return np.frombuffer(b"".join(digests), np.int64).reshape(steps, rows)


def _needs_memory(
    observation: np.ndarray, taken: np.ndarray, reward: np.ndarray, terminated: np.ndarray, last: np.ndarray
) -> bool:
    """Whether an earlier observation, or the episode's first, tells of what comes next beyond the present one.

    It must tell more than it does by chance, which shuffling what came next among equal presents shows; so an
    environment that is merely random needs none.
    """
    steps, rows = reward.shape
    begins = np.zeros((steps, rows), np.int64)  # of the episode that each step is in
    for t in range(1, steps):
        begins[t] = np.where(last[t - 1], t, begins[t - 1])
    place = np.arange(steps)[:, None]
    valid = ~last[:-1]
    present = _join(observation[:-1], taken)
    outcomes = (_number((reward, terminated[1:])), observation[1:])
    rng = np.random.default_rng(0)
    for lag in (*range(1, LAGS + 1), None):
        whence = begins if lag is None else np.maximum(place - lag, 0)
        used = valid & (begins < place if lag is None else place - lag >= begins)
        earlier = observation[whence, np.arange(rows)]
        for outcome in outcomes:
            if _tells(present[used], earlier[used], outcome[used], rng):
                return True
    return False


def _tells(present: np.ndarray, earlier: np.ndarray, outcome: np.ndarray, rng: np.random.Generator) -> bool:
    """Whether `earlier` and `outcome` depend on each other where `present` is the same."""
    if len(present) < 2:
        return False
    present, earlier, outcome = (np.unique(x, return_inverse=True)[1] for x in (present, earlier, outcome))
    if present.max() + 1 == len(present):
        return False  # nothing was met twice
    order = np.argsort(present, kind="stable")

    def shuffled() -> np.ndarray:
        moved = np.empty_like(outcome)
        moved[order] = outcome[np.lexsort((rng.random(len(present)), present))]
        return moved

    told = _information(present, earlier, outcome)
    if told < _LEAST_TOLD:
        return False
    chance = np.array([_information(present, earlier, shuffled()) for _ in range(_SHUFFLES)])
    return told > chance.mean() + _SURE * chance.std() + _LEAST_TOLD


def _information(present: np.ndarray, earlier: np.ndarray, outcome: np.ndarray) -> float:
    """Mutual information of `earlier` and `outcome` given `present`, in nats, as counted."""

    def entropy(*parts: np.ndarray) -> float:
        joined = parts[0]
        for part in parts[1:]:
            joined = np.unique(joined * (part.max() + 1) + part, return_inverse=True)[1]
        share = np.bincount(joined) / joined.size
        return float(-(share[share > 0] * np.log(share[share > 0])).sum())

    return entropy(present, earlier) + entropy(present, outcome) - entropy(present, earlier, outcome) - entropy(present)


def _join(*parts: np.ndarray) -> np.ndarray:
    """One number for each combination."""
    joined = np.unique(parts[0], return_inverse=True)[1].reshape(parts[0].shape)
    for part in parts[1:]:
        index = np.unique(part, return_inverse=True)[1].reshape(part.shape)
        joined = joined * (index.max() + 1) + index
    return joined


def _idle(
    space: spaces.Space, observation: np.ndarray, action: PyTree, reward: np.ndarray, valid: np.ndarray
) -> tuple[int, ...]:
    if not isinstance(space, spaces.Discrete):
        return ()
    nothing = (observation[1:] == observation[:-1]) & (reward == 0)
    taken = np.asarray(action)
    values = np.unique(taken[valid])
    return tuple(int(value) for value in values if nothing[valid & (taken == value)].all())

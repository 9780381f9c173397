"""References for environments that show one category and take one: learn the model by acting, then plan in it.

Where states are few, planning finds in seconds what policy gradients may never find. Exploration alternates between
seeking what was tried least and following the best plan so far, both planned in the model learned so far.
Source: Strehl and Littman 2008 (count-based bonuses); Bellman 1957 (value iteration).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax import rollout
from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16, action_layout
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import ConfigError, check_finite
from ldm_jax.spaces import SpaceError
from ldm_jax.types import Agent, EnvironmentSpec, PyTree, TimeStep

from .algorithm import REPORTS, Learned
from .policy import SlotPolicy, slot_agent, with_decoding

PAIRS_LIMIT = 50_000
"""States times actions up to which a table is used."""

EXPLORATION_DISCOUNT = 0.95
NOT_BEST = -1e4
"""The logit of an action that is allowed and not best: of probability 0, yet above what is not allowed."""

TOLERANCE = 1e-5
"""Actions whose values differ by less, over the largest expected reward, are tied and share the probability."""


@dataclasses.dataclass(frozen=True)
class TabularConfig:
    """How long to explore and how far to look ahead.

    Attributes:
      budget_steps: environment steps of exploration, over all parallel environments.
      num_envs: parallel environments.
      rollout_length: steps in each environment between two plans.
      discount: gamma; close to 1 where a time limit far away ends episodes.
      epsilon: share of random actions while exploring.
    """

    budget_steps: int = 250_000
    num_envs: int = 64
    rollout_length: int = 128
    discount: float = 0.999
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("budget_steps", "num_envs", "rollout_length"):
            value = getattr(self, name)
            if value < 1 or int(value) != value:
                raise ConfigError(f"{name} is {value}, expected a whole number of at least 1")
        for name in ("discount", "epsilon"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1")

    @property
    def rounds(self) -> int:
        """Plans that the budget pays for, at least one."""
        return max(1, self.budget_steps // (self.num_envs * self.rollout_length))


def is_tabular(spec: EnvironmentSpec) -> bool:
    """Whether observation and action are one category each, few enough for a table."""
    observation, action = spec.observation_space, spec.action_space
    if not (isinstance(observation, spaces.Discrete) and isinstance(action, spaces.Discrete)):
        return False
    return int(observation.n) * int(action.n) <= PAIRS_LIMIT


@dataclasses.dataclass(frozen=True, eq=False)
class EmpiricalMDP:
    """What was seen, each distinct transition once; an empirical Markov decision process.

    Attributes:
      states: S.
      actions: A.
      transitions: `int64 [N, 4]`, state, action, next state, terminated.
      counts: `int64 [N]`, how often.
      rewards: `float64 [N]`, their sum.
    """

    states: int
    actions: int
    transitions: np.ndarray
    counts: np.ndarray
    rewards: np.ndarray

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        """`int64 [N]`, state and action of each transition as one index."""
        return self.transitions[:, 0] * self.actions + self.transitions[:, 1]

    @functools.cached_property
    def tried(self) -> np.ndarray:
        """`int64 [S * A]`, how often each action was tried in each state."""
        return np.bincount(self.pairs, self.counts, self.states * self.actions).astype(np.int64)


def empty_mdp(states: int, actions: int) -> EmpiricalMDP:
    """A model of nothing seen yet."""
    return EmpiricalMDP(states, actions, np.zeros((0, 4), np.int64), np.zeros(0, np.int64), np.zeros(0))


def add_experience(mdp: EmpiricalMDP, state: np.ndarray, action: np.ndarray, timestep: TimeStep) -> EmpiricalMDP:
    """Takes in a rollout.

    Args:
      mdp: so far.
      state: `int [T + 1, B]`, counted from 0.
      action: `int [T, B]`, counted from 0.
      timestep: `[T + 1, B]`; the steps that follow an end carry no experience.
    """
    valid = ~np.asarray(timestep.last)[:-1]
    terminated, reward = np.asarray(timestep.terminated)[1:], np.asarray(timestep.reward, np.float64)[1:]
    seen = np.stack([part[valid] for part in (state[:-1], action, state[1:], terminated)], -1).astype(np.int64)
    rows = np.concatenate([mdp.transitions, seen])
    transitions, index = np.unique(rows, axis=0, return_inverse=True)
    counts = np.bincount(index.ravel(), np.concatenate([mdp.counts, np.ones(len(seen))])).astype(np.int64)
    rewards = np.bincount(index.ravel(), np.concatenate([mdp.rewards, reward[valid]]))
    return EmpiricalMDP(mdp.states, mdp.actions, transitions, counts, rewards)


def plan(mdp: EmpiricalMDP, reward: np.ndarray, untried: float, discount: float) -> np.ndarray:
    """Values of all actions in all states, by value iteration.

    Args:
      mdp: what was seen.
      reward: `float64 [S * A]`, expected at each state and action.
      untried: the value of an action that was never tried.
      discount: gamma.

    Returns:
      `float64 [S, A]`.
    """
    tried = mdp.tried > 0
    probability = mdp.counts / mdp.tried[mdp.pairs]
    after = discount * probability * (1 - mdp.transitions[:, 3])
    values = np.where(tried, 0.0, untried).reshape(mdp.states, mdp.actions)
    scale = float(np.abs(reward).max())
    for _ in range(int(25 / (1 - discount))):
        best = values.max(1)
        gained = np.bincount(mdp.pairs, after * best[mdp.transitions[:, 2]], reward.size)
        following = np.where(tried, reward + gained, untried).reshape(values.shape)
        change = np.abs(following - values).max()
        values = following
        if change <= 1e-9 * scale:
            break
    return values


def settle(environment: Environment, config: TabularConfig, seed: int) -> TabularConfig:
    """The configuration as it is: it leaves nothing open."""
    del environment, seed
    return config


def learn(environment: Environment, config: TabularConfig, seed: int) -> collections.abc.Iterator[Learned]:
    """Explores, learns the model and plans in it, and pauses at each report.

    Args:
      environment: `config.num_envs` rows of one category seen and one chosen.
      config: how long.
      seed: of everything random.

    Yields:
      Parameters for the policy of `agent`.

    Raises:
      SpaceError: the environment's spaces are not for a table.
      EnvironmentFaultError: a reward that is not finite.
    """
    spec = environment.spec
    if not is_tabular(spec):
        raise SpaceError(f"{spec.id} sees {spec.observation_space} and takes {spec.action_space}: too much for a table")
    seen, taken = _discrete(spec.observation_space), _discrete(spec.action_space)
    mdp = empty_mdp(int(seen.n), int(taken.n))
    explorer = agent(spec, config)
    reset_key, key = jax.random.split(jax.random.key(seed))
    loop = rollout.start(environment, explorer, reset_key)
    logits = np.zeros((mdp.states, mdp.actions), np.float32)
    reports = {config.rounds * (i + 1) // REPORTS for i in range(REPORTS)}
    for round in range(config.rounds):
        params = with_decoding({"logits": logits}, "sample")
        loop, trajectory = rollout.rollout(
            environment, explorer, params, loop, jax.random.fold_in(key, round), config.rollout_length
        )
        timestep = jax.tree.map(lambda x, y: np.concatenate([x, y[None]]), trajectory.timestep, loop.timestep)
        action = np.asarray(trajectory.action) - int(taken.start)
        mdp = add_experience(mdp, timestep.observation - int(seen.start), action, timestep)
        if not np.isfinite(mdp.rewards).all():
            raise EnvironmentFaultError(f"{spec.id} gave a reward that is NaN or infinite, expected a finite number")
        greedy = np.exp(_curious(mdp) if round % 2 == 0 else _best(mdp, config))
        logits = np.log((1 - config.epsilon) * greedy + config.epsilon / mdp.actions).astype(np.float32)
        if round + 1 in reports:
            steps = (round + 1) * config.num_envs * config.rollout_length
            yield Learned(steps, {"logits": _best(mdp, config).astype(np.float32)})


def agent(spec: EnvironmentSpec, config: TabularConfig) -> Agent:
    """The agent of a table of logits, whichever way it decodes; see `policy.slot_agent`."""
    del config
    first = int(_discrete(spec.observation_space).start)
    return slot_agent(action_layout(spec.action_space), functools.partial(_slot_policy, first))


def example(spec: EnvironmentSpec, config: TabularConfig) -> PyTree:
    """Parameters of the structure and shapes that `learn` yields."""
    del config
    seen, taken = _discrete(spec.observation_space), _discrete(spec.action_space)
    return {"logits": np.zeros((int(seen.n), int(taken.n)), np.float32)}


def _slot_policy(first: int, params: PyTree, timestep: TimeStep) -> SlotPolicy:
    logits = jnp.asarray(params["logits"])[timestep.observation - first]
    if timestep.action_mask is not None:
        logits = jnp.where(timestep.action_mask, logits, NOT_ALLOWED_FLOAT16)
    nothing = jnp.zeros((logits.shape[0], 0))
    return SlotPolicy(logits, nothing, nothing)


def _discrete(space: gymnasium.Space) -> spaces.Discrete:
    if not isinstance(space, spaces.Discrete):
        raise SpaceError(f"a table needs a Discrete space, got {space}")
    return space


def _curious(mdp: EmpiricalMDP) -> np.ndarray:
    """Logits `[S, A]` of the plan that seeks what was tried least."""
    bonus = 1 / np.sqrt(np.maximum(mdp.tried, 1))
    return _ties(plan(mdp, bonus, 1 / (1 - EXPLORATION_DISCOUNT), EXPLORATION_DISCOUNT))


def _best(mdp: EmpiricalMDP, config: TabularConfig) -> np.ndarray:
    """Logits `[S, A]` of the best plan in the model; the unit of the rewards does not matter."""
    sums = np.bincount(mdp.pairs, mdp.rewards, mdp.states * mdp.actions)
    reward = sums / np.maximum(mdp.tried, 1)
    reward = reward / (np.abs(reward).max() or 1.0)
    # What was never tried is not planned for: it counts as worse than anything that was.
    worst = min(reward.min(), 0.0) / (1 - config.discount) - 1
    return _ties(plan(mdp, reward, worst, config.discount))


def _ties(values: np.ndarray) -> np.ndarray:
    """Logits `[S, A]` of the uniform distribution over the best actions of each state; rewards of 1 are the unit."""
    near = values >= values.max(1, keepdims=True) - TOLERANCE
    return np.where(near, -np.log(near.sum(1, keepdims=True)), NOT_BEST)

"""References for environments that show one category and take one: learn the model by acting, then plan in it.

Where states are few, planning finds in seconds what policy gradients may never find. Exploration alternates between
seeking what was tried least and following the best plan so far, both planned in the model learned so far.
Source: Strehl and Littman 2008 (count-based bonuses); Bellman 1957 (value iteration).
"""

from __future__ import annotations

import dataclasses
import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax import rollout
from ldm_jax.encoding.actions import action_layout
from ldm_jax.environment import Environment
from ldm_jax.types import Agent, EnvironmentSpec, PyTree, TimeStep

from .networks import MASKED
from .policy import SlotPolicy, slot_agent, with_form

PAIRS_LIMIT = 50_000
"""States times actions up to which a table is used."""

EXPLORATION_DISCOUNT = 0.95
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

    def __post_init__(self):
        for name in ("budget_steps", "num_envs", "rollout_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("discount", "epsilon"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1")

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


def add_experience(model: EmpiricalMDP, state: np.ndarray, action: np.ndarray, timestep: TimeStep) -> EmpiricalMDP:
    """Takes in a rollout.

    Args:
      model: so far.
      state: `int [T + 1, B]`, counted from 0.
      action: `int [T, B]`, counted from 0.
      timestep: `[T + 1, B]`; the steps that follow an end carry no experience.
    """
    valid = ~np.asarray(timestep.last)[:-1]
    terminated, reward = np.asarray(timestep.terminated)[1:], np.asarray(timestep.reward, np.float64)[1:]
    seen = np.stack([part[valid] for part in (state[:-1], action, state[1:], terminated)], -1).astype(np.int64)
    rows = np.concatenate([model.transitions, seen])
    transitions, index = np.unique(rows, axis=0, return_inverse=True)
    counts = np.bincount(index.ravel(), np.concatenate([model.counts, np.ones(len(seen))])).astype(np.int64)
    rewards = np.bincount(index.ravel(), np.concatenate([model.rewards, reward[valid]]))
    return EmpiricalMDP(model.states, model.actions, transitions, counts, rewards)


def plan(model: EmpiricalMDP, reward: np.ndarray, untried: float, discount: float) -> np.ndarray:
    """Values of all actions in all states, by value iteration.

    Args:
      model: what was seen.
      reward: `float64 [S * A]`, expected at each state and action.
      untried: the value of an action that was never tried.
      discount: gamma.

    Returns:
      `float64 [S, A]`.
    """
    tried = model.tried > 0
    probability = model.counts / model.tried[model.pairs]
    after = discount * probability * (1 - model.transitions[:, 3])
    values = np.where(tried, 0.0, untried).reshape(model.states, model.actions)
    scale = _scale(reward)
    for _ in range(int(25 / (1 - discount))):
        best = values.max(1)
        gained = np.bincount(model.pairs, after * best[model.transitions[:, 2]], reward.size)
        following = np.where(tried, reward + gained, untried).reshape(values.shape)
        change = np.abs(following - values).max()
        values = following
        if change < 1e-9 * scale:
            break
    return values


def train(
    environment: Environment, config: TabularConfig, seed: int, progress: rollout.Progress | None = None
) -> PyTree:
    """Explores, learns the model and plans in it.

    Args:
      environment: `config.num_envs` rows of one category seen and one chosen.
      config: how long.
      seed: of everything random.
      progress: is told the environment steps done and their total.

    Returns:
      Parameters for the policy of `agent`, as NumPy arrays.
    """
    spec = environment.spec
    if not is_tabular(spec):
        raise ValueError(f"{spec.id} sees {spec.observation_space} and takes {spec.action_space}: too much for a table")
    seen, taken = _discrete(spec.observation_space), _discrete(spec.action_space)
    first_state, first_action = int(seen.start), int(taken.start)
    model = empty_mdp(int(seen.n), int(taken.n))
    explorer = agent(spec, config)
    reset_key, key = jax.random.split(jax.random.key(seed))
    loop = rollout.start(environment, explorer, reset_key)
    logits = np.zeros((model.states, model.actions), np.float32)
    for round in range(config.rounds):
        params = with_form({"logits": logits}, "sample")
        loop, trajectory = rollout.rollout(
            environment, explorer, params, loop, jax.random.fold_in(key, round), config.rollout_length
        )
        timestep = jax.tree.map(lambda x, y: np.concatenate([x, y[None]]), trajectory.timestep, loop.timestep)
        action = np.asarray(trajectory.action) - first_action
        model = add_experience(model, timestep.observation - first_state, action, timestep)
        if round % 2 == 0:
            bonus = 1 / np.sqrt(np.maximum(model.tried, 1))
            greedy = np.exp(_ties(plan(model, bonus, 1 / (1 - EXPLORATION_DISCOUNT), EXPLORATION_DISCOUNT), 1.0))
        else:
            greedy = np.exp(_best(model, config))
        logits = np.log((1 - config.epsilon) * greedy + config.epsilon / model.actions).astype(np.float32)
        if progress is not None:
            progress(
                (round + 1) * config.num_envs * config.rollout_length,
                config.rounds * config.num_envs * config.rollout_length,
            )
    return {"logits": _best(model, config).astype(np.float32)}


def agent(spec: EnvironmentSpec, config: TabularConfig) -> Agent:
    """The agent of a table of logits, in either form; see `policy.slot_agent`."""
    del config
    layout, first = action_layout(spec.action_space, low=-1.0, high=1.0), int(_discrete(spec.observation_space).start)

    def policy(params, timestep: TimeStep) -> SlotPolicy:
        logits = jnp.asarray(params["logits"])[timestep.observation - first]
        if timestep.action_mask is not None:
            logits = jnp.where(timestep.action_mask, logits, 2 * MASKED)
        nothing = jnp.zeros((logits.shape[0], 0))
        return SlotPolicy(logits, nothing, nothing)

    return slot_agent(layout, policy)


def _discrete(space: gymnasium.Space) -> spaces.Discrete:
    if not isinstance(space, spaces.Discrete):
        raise ValueError(f"a table needs a Discrete space, got {space}")
    return space


def _best(model: EmpiricalMDP, config: TabularConfig) -> np.ndarray:
    """Logits `[S, A]` of the best plan in the model."""
    sums = np.bincount(model.pairs, model.rewards, model.states * model.actions)
    reward = sums / np.maximum(model.tried, 1)
    # What was never tried is not planned for: it counts as worse than anything that was.
    worst = min(reward.min(), 0.0) / (1 - config.discount) - 1
    return _ties(plan(model, reward, worst, config.discount), _scale(reward))


def _scale(reward: np.ndarray) -> float:
    return max(float(np.abs(reward).max()), 1e-12)


def _ties(values: np.ndarray, scale: float) -> np.ndarray:
    """Logits `[S, A]` of the uniform distribution over the best actions of each state."""
    near = values >= values.max(1, keepdims=True) - TOLERANCE * scale
    return np.where(near, -np.log(near.sum(1, keepdims=True)), MASKED)

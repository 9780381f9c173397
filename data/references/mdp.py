"""A Markov decision process learned from experience, and planning in it.

Source: Bellman 1957 (value iteration); Strehl and Littman 2008 (count-based bonuses).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ldm_jax.types import TimeStep

EXPLORATION_DISCOUNT = 0.95
NOT_BEST = -1e4
"""The logit of an action that is allowed and not best: of probability 0, yet above what is not allowed."""

TOLERANCE = 1e-5
"""Actions whose values differ by less, over the largest expected reward, are tied and share the probability."""

PLAN_WORK = 300_000_000
"""Pairs and transitions that one plan looks at, at most: a few seconds; large models are looked ahead in less far."""


@dataclasses.dataclass(frozen=True, eq=False)
class EmpiricalMDP:
    """What was seen, each distinct transition once; an empirical Markov decision process.

    Attributes:
      states: S.
      actions: A.
      transitions: `int64 [N, 4]`, state, action, next state, terminated.
      counts: `int64 [N]`, how often.
      rewards: `float64 [N]`, their sum.
      allowed: `bool [S, A]`, what masks allowed; None where there are none.
    """

    states: int
    actions: int
    transitions: np.ndarray
    counts: np.ndarray
    rewards: np.ndarray
    allowed: np.ndarray | None = None

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
    return dataclasses.replace(mdp, transitions=transitions, counts=counts, rewards=rewards)


def plan(
    mdp: EmpiricalMDP, reward: np.ndarray, untried: float, discount: float, horizon: int | None = None
) -> np.ndarray:
    """Values of all actions in all states, by value iteration.

    Args:
      mdp: what was seen.
      reward: `float64 [S * A]`, expected at each state and action.
      untried: the value of an action that was never tried.
      discount: gamma.
      horizon: steps to look ahead at most: an episode has no more.

    Returns:
      `float64 [S, A]`, very negative where not allowed.
    """
    tried = mdp.tried > 0
    probability = mdp.counts / mdp.tried[mdp.pairs]
    after = discount * probability * (1 - mdp.transitions[:, 3])
    values = np.where(tried, 0.0, untried).reshape(mdp.states, mdp.actions)
    scale = float(np.abs(reward).max(initial=0.0))
    # Where nothing is allowed nothing is known of the mask: such states end episodes.
    allowed = None if mdp.allowed is None else mdp.allowed | ~mdp.allowed.any(1, keepdims=True)
    forbidden = -(scale + abs(untried) + 1) / (1 - discount)
    most = max(100, PLAN_WORK // max(1, reward.size + len(mdp.counts)))
    for _ in range(min(int(25 / (1 - discount)), horizon or most, most)):
        values = values if allowed is None else np.where(allowed, values, forbidden)
        best = values.max(1)
        gained = np.bincount(mdp.pairs, after * best[mdp.transitions[:, 2]], reward.size)
        following = np.where(tried, reward + gained, untried).reshape(values.shape)
        following = following if allowed is None else np.where(allowed, following, forbidden)
        change = np.abs(following - values).max()
        values = following
        if change <= 1e-9 * scale:
            break
    return values


def curious_plan(mdp: EmpiricalMDP) -> np.ndarray:
    """Logits `[S, A]` of the plan that seeks what was tried least."""
    bonus = 1 / np.sqrt(np.maximum(mdp.tried, 1))
    return share(plan(mdp, bonus, 1 / (1 - EXPLORATION_DISCOUNT), EXPLORATION_DISCOUNT))


def best_plan(mdp: EmpiricalMDP, discount: float, horizon: int | None = None) -> np.ndarray:
    """Logits `[S, A]` of the best plan in the model; the unit of the rewards does not matter."""
    sums = np.bincount(mdp.pairs, mdp.rewards, mdp.states * mdp.actions)
    reward = sums / np.maximum(mdp.tried, 1)
    reward = reward / (np.abs(reward).max(initial=0.0) or 1.0)
    # What was never tried is not planned for: it counts as worse than anything that was.
    worst = min(reward.min(initial=0.0), 0.0) / (1 - discount) - 1
    return share(plan(mdp, reward, worst, discount, horizon))


def share(values: np.ndarray) -> np.ndarray:
    """Logits `[S, A]` of the uniform distribution over the best actions of each state; rewards of 1 are the unit."""
    near = values >= values.max(1, keepdims=True) - TOLERANCE
    return np.where(near, -np.log(near.sum(1, keepdims=True)), NOT_BEST)

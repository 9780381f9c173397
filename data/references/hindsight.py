"""Goals relabelled in hindsight: what was reached by chance is learned from as if it had been the goal.

An observation that holds `achieved_goal` and `desired_goal` says what an action led to and what was wanted. Where two
rewards tell only whether both are near each other, how near is learned from those that were seen: no environment has
to be asked what it would have paid.
Source: Andrychowicz et al. 2017 (hindsight experience replay, goals of the future).
"""

from __future__ import annotations

import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.types import Array, PyTree

ACHIEVED, DESIRED = "achieved_goal", "desired_goal"

_TRIES = 8  # later steps that are drawn for each transition, to find one of the same episode


class Payment(typing.NamedTuple):
    """What is known of the rewards; a pytree of scalars.

    Attributes:
      low: the smallest reward seen.
      high: the largest.
      reach: the largest distance from the goal that the larger half was paid at; 0 where it was never.
      ends: whether what was paid ended an episode.
    """

    low: Array
    high: Array
    reach: Array
    ends: Array


class GoalMemory(typing.NamedTuple):
    """What relabelling keeps beside a replay buffer of N places; a pytree.

    Attributes:
      episode: `int32 [N]`, the number of each transition's episode in its row; -1 where there is none.
      begun: `int32 [B]`, the number of the present one.
      payment: what is known of the rewards.
    """

    episode: Array
    begun: Array
    payment: Payment


def has_goals(space: gymnasium.Space) -> bool:
    """Whether an observation holds what was achieved and what is desired, numbers of the same shape."""
    if not isinstance(space, spaces.Dict) or not {ACHIEVED, DESIRED} <= set(space.spaces):
        return False
    achieved, desired = space[ACHIEVED], space[DESIRED]
    return isinstance(achieved, spaces.Box) and isinstance(desired, spaces.Box) and achieved.shape == desired.shape


def begin_goals(places: int, rows: int) -> GoalMemory:
    """Before the first transition."""
    low, high, reach = (np.array(value, np.float32) for value in (np.inf, -np.inf, 0.0))
    nothing = Payment(low, high, reach, np.zeros((), np.bool_))
    return GoalMemory(np.full(places, -1, np.int32), np.zeros(rows, np.int32), nothing)


def remember_goals(
    memory: GoalMemory, following: PyTree, reward: Array, terminated: Array, last: Array, begin: Array
) -> GoalMemory:
    """Takes in T steps of B rows.

    Args:
      memory: before them.
      following: the observations after them, leaves `[T, B, ...]`.
      reward: `float32 [T, B]`, that came with those.
      terminated: `bool [T, B]`, whether those ended an episode for good.
      last: `bool [T + 1, B]`, of the time steps acted on, and after them; after an end, an action counts for nothing.
      begin: the first place in the buffer that they take.
    """
    valid = ~last[:-1]
    number = memory.begun + jnp.cumsum(last[:-1], 0, dtype=jnp.int32)
    episode = jnp.where(valid, number, -1).ravel()
    low = jnp.minimum(memory.payment.low, jnp.where(valid, reward, jnp.inf).min())
    high = jnp.maximum(memory.payment.high, jnp.where(valid, reward, -jnp.inf).max())
    paid = valid & (reward > (low + high) / 2)
    # A higher reward than any before says that what was paid for until now was something else.
    known = memory.payment.high == high
    reach = jnp.maximum(
        jnp.where(known, memory.payment.reach, 0.0),
        jnp.where(paid, _distance(following[ACHIEVED], following[DESIRED], 2), 0.0).max(),
    )
    ends = (known & memory.payment.ends) | (paid & terminated).any()
    return GoalMemory(
        jax.lax.dynamic_update_slice_in_dim(memory.episode, episode, begin, 0),
        number[-1],
        Payment(low, high, reach, ends),
    )


class Relabelled(typing.NamedTuple):
    """N transitions with other goals, or with their own; leaves `[N, ...]`."""

    observation: PyTree
    following: PyTree
    reward: Array
    terminated: Array


def relabel(
    memory: GoalMemory,
    given: Relabelled,
    following: PyTree,
    index_N: Array,
    key: Array,
    share: float,
    longest: int,
) -> Relabelled:
    """Gives a share of transitions the goal that their episode has reached then or later.

    Args:
      memory: of the buffer.
      given: the transitions at `index_N`.
      following: the observations after all transitions of the buffer, leaves `[places, ...]`.
      index_N: their places.
      key: of the draws.
      share: of them all that get another goal.
      longest: steps that an episode takes at most.

    Returns:
      The transitions, paid as they would have been.
    """
    places, rows = memory.episode.size, memory.begun.size
    share_key, later_key = jax.random.split(key)
    steps = jax.random.randint(later_key, (_TRIES, index_N.size), 0, longest)
    later = (index_N + steps * rows) % places
    same = memory.episode[later] == memory.episode[index_N]
    first = jnp.take_along_axis(later, same.argmax(0)[None], 0)[0]
    # Those none was found for have reached what they came to.
    whence = jnp.where(same.any(0), first, index_N)
    goal = following[ACHIEVED][whence]
    other = jax.random.uniform(share_key, index_N.shape) < share
    low, high, reach, ends = memory.payment
    reached = _distance(given.following[ACHIEVED], goal, 1) <= reach
    paid = jnp.where(high > low, high, low + 1.0)  # where nothing was paid yet, one will be the unit

    def with_goal(observation: PyTree) -> PyTree:
        old = observation[DESIRED]
        chosen = other.reshape(other.shape + (1,) * (old.ndim - 1))
        return observation | {DESIRED: jnp.where(chosen, goal.astype(old.dtype), old)}

    return Relabelled(
        with_goal(given.observation),
        with_goal(given.following),
        jnp.where(other, jnp.where(reached, paid, low), given.reward),
        jnp.where(other, reached & ends, given.terminated),
    )


def _distance(one: Array, other: Array, lead: int) -> Array:
    """Euclidean distance over all but the leading axes."""
    difference = (one - other).reshape(*one.shape[:lead], -1)
    return jnp.sqrt((difference**2).sum(-1))

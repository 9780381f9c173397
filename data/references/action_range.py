"""How far actions go where the space does not say: a range for dimensions without bounds, found by trying.

Any range that is merely assumed would be explored and then believed: a reference that never left it would be admitted
though the good actions lie elsewhere.
"""

from __future__ import annotations

import dataclasses
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax import rollout
from ldm_jax.encoding.actions import Slots, action_layout, from_slots, normalize, to_slots
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import LdmError
from ldm_jax.spaces import bounds, leaves, sample
from ldm_jax.types import Agent, Array, PyTree, TimeStep

POWERS = (0, 1, -1, 2, -2, 3, -3, 4, 5, 6)
"""Powers of ten that are tried; of equals the first is taken, so a space whose scale does not matter keeps 1."""
PROBE_STEPS = 64
MARGIN = 2.0
"""How far beyond the best power the range reaches: the best action may lie between two powers."""
_HOLDS = (1, 8, PROBE_STEPS, PROBE_STEPS)  # mean number of steps that a row keeps its action, in turn


class ActionRangeError(LdmError, ValueError):
    """No range of actions that declare no bounds gives finite rewards."""


def unbounded(space: gymnasium.Space) -> np.ndarray:
    """`bool [C]`: which continuous slots of an action space lack a bound on either side."""
    low, high = _bounds(space)
    return ~(np.isfinite(low) & np.isfinite(high))


def limits(space: gymnasium.Space, scale: typing.Any) -> tuple[typing.Any, typing.Any]:
    """The range of each continuous slot, `[C]` low and high; NumPy's or traced, as the scale is.

    Args:
      space: the action space.
      scale: a number, how far a dimension reaches: from -scale to scale without bounds, scale from its bound with one;
        its own bounds hold where it has both.
    """
    low, high = _bounds(space)
    has_low, has_high = np.isfinite(low), np.isfinite(high)
    low_base = np.where(has_low, low, np.where(has_high, high, 0.0))
    high_base = np.where(has_high, high, np.where(has_low, low, 0.0))
    return low_base - np.where(has_low, 0.0, 1.0) * scale, high_base + np.where(has_high, 0.0, 1.0) * scale


def find_scale(environment: Environment, seed: int) -> float:
    """Tries random actions of several powers of ten and takes the one whose better rows return most.

    All dimensions without bounds share the scale. The episodes of all tries begin alike, and so do the actions but for
    their scale. What is compared is the return up to `PROBE_STEPS` steps.

    Args:
      environment: not in use; it is left in the middle of an episode.
      seed: of everything random.

    Returns:
      The scale for `limits`, a margin beyond the best power included.

    Raises:
      ActionRangeError: no power gives a finite return in most rows.
    """
    spec = environment.spec
    reset_key, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0xAC7))
    agent, steps = _prober(spec.action_space, spec.batch_size), min(PROBE_STEPS, spec.time_limit)
    best, found = -np.inf, 0.0
    for power in POWERS:
        try:
            loop = rollout.start(environment, agent, reset_key)
            loop, seen = rollout.rollout(environment, agent, np.float32(10.0**power), loop, key, steps)
        except EnvironmentFaultError:
            continue  # too large for the simulator
        score = _score(seen.timestep, loop.timestep)
        if score > best:
            best, found = score, MARGIN * 10.0**power
    if not found:
        raise ActionRangeError(
            f"{spec.id} declares no bounds for {int(unbounded(spec.action_space).sum())} dimensions of its actions, "
            f"and no range from 1e{min(POWERS)} to 1e{max(POWERS)} gave finite rewards and observations; give the "
            "action space its bounds in the adapter, or the recipe an action_scale"
        )
    return found


Settled = typing.TypeVar("Settled")


def settled(environment: Environment, config: Settled, seed: int) -> Settled:
    """A configuration that has `action_scale`, with the range of actions that declare no bounds found by trying.

    Raises:
      ActionRangeError: no range gives finite rewards.
    """
    given: typing.Any = config
    if given.action_scale > 0 or not unbounded(environment.spec.action_space).any():
        return config
    return dataclasses.replace(given, action_scale=find_scale(environment, seed))


def _bounds(space: gymnasium.Space) -> tuple[np.ndarray, np.ndarray]:
    boxes = [bounds(leaf.space) for leaf in leaves(space) if isinstance(leaf.space, spaces.Box)]
    low, high = (np.concatenate([np.zeros(0), *(box[side].ravel() for box in boxes)]) for side in (0, 1))
    return low, high


def _prober(space: gymnasium.Space, rows: int) -> Agent:
    """Random actions within `limits` of the scale that are its parameters, each held for a while.

    Independent actions average out over an episode; held ones show what a constant action is worth. Half of the rows
    move all dimensions alike: among many dimensions, independent draws are hardly ever all far out on one side.
    """
    slots = action_layout(space, *limits(space, 1.0))
    holds = np.array([_HOLDS[i % len(_HOLDS)] for i in range(rows)])
    alike = (np.arange(rows) // len(_HOLDS) % 2 == 1)[:, None]

    def init(batch_size: int) -> Array:
        return jnp.zeros((batch_size, slots.continuous))

    def step(scale: Array, held: Array, timestep: TimeStep, key: Array) -> tuple[Array, PyTree, tuple[()]]:
        renew_key, draw_key, choice_key = jax.random.split(key, 3)
        draw = jax.random.uniform(draw_key, held.shape, minval=-1.0, maxval=1.0)
        draw = jnp.where(alike, draw[:, :1], draw)
        renew = timestep.first | (jax.random.uniform(renew_key, (rows,)) * holds < 1)
        held = jnp.where(renew[:, None], draw, held)
        choice = to_slots(slots, sample(choice_key, space, rows, timestep.action_mask)).categorical
        low, high = limits(space, scale)
        value = normalize(slots, low + (held + 1) / 2 * (high - low))
        return held, from_slots(slots, Slots(choice, value)), ()

    return Agent(init, step)


def _score(timestep: TimeStep, following: TimeStep) -> float:
    """Mean return of the best quarter of rows up to the end of their first episode; -inf if most are not finite."""
    reward, last = (
        np.concatenate([now, after[None]])
        for now, after in ((timestep.reward, following.reward), (timestep.last, following.last))
    )
    ended = np.cumsum(last, 0) - last > 0  # before this step
    returns = np.where(ended, 0.0, np.asarray(reward, np.float64)).sum(0)
    finite = np.isfinite(returns)
    if finite.mean() <= 0.5:
        return -np.inf
    better = np.sort(np.where(finite, returns, -np.inf))[-max(1, len(returns) // 4) :]
    return float(better.mean())

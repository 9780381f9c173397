"""XLand-MiniGrid: the MiniGrid tasks in JAX, seen from where the agent stands.

The XLand ids are worlds whose tasks come from rulesets that the library downloads; without one they have no goal and
never pay, so they are not offered.
"""

from __future__ import annotations

import typing

import gymnasium
import numpy as np

from ldm_jax.types import Array, PyTree

from ..jittable import JittableEnvironment, Outcome, in_32_bits, make_spec, old_key

LIBRARY = "xminigrid"


def candidates() -> dict[str, str]:
    """XLand-MiniGrid's own ids, each with the reason why it is not offered, empty where it is."""
    return {name: _refusal(name) for name in _xminigrid().registered_environments()}


def domain(name: str) -> str:
    """What the task of an id is about."""
    return "memory" if name.startswith("MiniGrid-Memory") else "navigation"


@in_32_bits()
def make(name: str, batch_size: int, time_limit: int | None) -> JittableEnvironment:
    """Makes B environments by the library's own id; None keeps its time limit (100 to 81,920 steps)."""
    constants = _xminigrid().core.constants
    inner, params = _xminigrid().make(name)
    limit = time_limit or int(params.max_steps)
    # Rewards shrink with the share of the limit that was used: the limit asked for is the library's too.
    params = params.replace(max_steps=limit)
    # Each cell is an object and its colour.
    largest = np.array([int(constants.NUM_TILES) - 1, int(constants.NUM_COLORS) - 1], np.uint8)
    shape = inner.observation_shape(params)
    spec = make_spec(
        LIBRARY,
        name,
        observation_space=gymnasium.spaces.Box(0, np.broadcast_to(largest, shape), shape, np.uint8),
        action_space=gymnasium.spaces.Discrete(int(inner.num_actions(params))),
        batch_size=batch_size,
        time_limit=limit,
        domain=domain(name),
    )

    def outcome(time_step: typing.Any) -> Outcome:
        ended, terminated = time_step.last(), time_step.discount == 0
        return Outcome(time_step, time_step.observation, time_step.reward, ended & terminated, ended & ~terminated)

    def reset(key: Array) -> Outcome:
        return outcome(inner.reset(params, old_key(key)))

    def step(key: Array, state: PyTree, action: PyTree) -> Outcome:
        return outcome(inner.step(params, state, action))

    return JittableEnvironment(spec, reset, step)


def _refusal(name: str) -> str:
    if name.startswith("XLand-"):
        return "it has no goal but those of rulesets that are downloaded"
    if name == "MiniGrid-Playground":
        return "it has no goal: no action is ever rewarded"
    return ""


def _xminigrid() -> typing.Any:
    import xminigrid

    return xminigrid

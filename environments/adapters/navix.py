"""Navix: MiniGrid in JAX, the whole grid seen at once as objects, colours and states.

GoToDoor asks for the door of one colour, which navix keeps to itself; it is part of the observation here, as the
mission is in MiniGrid.
"""

from __future__ import annotations

import typing

import gymnasium
import jax
import numpy as np

from ldm_jax.types import Array, PyTree

from ..jittable import JittableEnvironment, Outcome, in_32_bits, make_spec, old_key

LIBRARY = "navix"

_COLOURS = 6
_LARGEST = (10, _COLOURS - 1, 3)  # object, colour, and state of a door or direction


def candidates() -> dict[str, str]:
    """Navix's own ids, each with the reason why it is not offered, empty where it is."""
    return dict.fromkeys(_navix().registry(), "")


def domain(name: str) -> str:
    """What the task of an id is about."""
    return "navigation"


@in_32_bits()
def make(name: str, batch_size: int, time_limit: int | None) -> JittableEnvironment:
    """Makes B environments by navix's own id; None keeps navix's own time limit of 100 steps."""
    inner = _navix().make(name) if time_limit is None else _navix().make(name, max_steps=time_limit)
    struct = jax.eval_shape(lambda key: inner.reset(old_key(key)), jax.random.key(0))
    shape = struct.observation.shape
    space: gymnasium.Space = gymnasium.spaces.Box(
        0, np.broadcast_to(np.array(_LARGEST, np.uint8), shape), shape, np.uint8
    )
    has_mission = struct.state.mission is not None
    if has_mission:
        space = gymnasium.spaces.Dict({"grid": space, "mission": gymnasium.spaces.Discrete(_COLOURS)})
    spec = make_spec(
        LIBRARY,
        name,
        observation_space=space,
        action_space=gymnasium.spaces.Discrete(int(inner.action_space.n)),
        batch_size=batch_size,
        time_limit=int(inner.max_steps),
        domain=domain(name),
    )

    def outcome(time_step: typing.Any) -> Outcome:
        observation = time_step.observation
        if has_mission:
            observation = {"grid": observation, "mission": time_step.state.mission.colour}
        ended = time_step.is_termination(), time_step.is_truncation()
        # Pictures of the grid, drawn at every reset and never shown, are larger than all the rest.
        state = time_step.replace(state=time_step.state.replace(cache=None))
        return Outcome(state, observation, time_step.reward, *ended)

    def reset(key: Array) -> Outcome:
        return outcome(inner.reset(old_key(key)))

    def step(key: Array, state: PyTree, action: PyTree) -> Outcome:
        # Not navix's own `step`, which resets in the step after an end whether asked to or not.
        return outcome(inner._step(state, action))

    return JittableEnvironment(spec, reset, step)


def _navix() -> typing.Any:
    import navix

    return navix

"""Jumanji: combinatorial problems and games in JAX, with nested observations and masks of the allowed actions.

An environment with several agents is one that a single policy controls as a whole: its action is the `MultiDiscrete`
of all agents, its reward the sum of theirs. Where the mask rules out combinations of slots (Sudoku, BinPack, ...) the
action is one choice among all combinations, in C order, because a mask slot by slot would allow illegal moves.
"""

from __future__ import annotations

import inspect
import math
import types
import typing

import gymnasium
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.types import Array, PyTree

from ..jittable import JittableEnvironment, Outcome, in_32_bits, make_spec, old_key

LIBRARY = "jumanji"

_REFUSED = types.MappingProxyType({"Sokoban-v0": "it downloads its levels while it is made"})

_DOMAINS = types.MappingProxyType(
    {
        "Cleaner-v0": "navigation",
        "Game2048-v1": "games",
        "LevelBasedForaging-v0": "navigation",
        "Maze-v0": "navigation",
        "Minesweeper-v0": "games",
        "PacMan-v1": "games",
        "RobotWarehouse-v0": "navigation",
        "RubiksCube-partly-scrambled-v0": "games",
        "RubiksCube-v0": "games",
        "SearchAndRescue-v0": "navigation",
        "SlidingTilePuzzle-v0": "games",
        "Snake-v1": "games",
        "Sudoku-v0": "games",
        "Sudoku-very-easy-v0": "games",
        "Tetris-v0": "games",
    }
)

_DEFAULT_LIMIT = 1000  # steps, where the library has none: those problems end by themselves
_MASK = "action_mask"
_COUNTER = "step_count"  # declared as a category by some


def candidates() -> dict[str, str]:
    """Jumanji's own ids, each with the reason why it is not offered, empty where it is."""
    return {name: _REFUSED.get(name, "") for name in sorted(_jumanji().registered_environments())}


def domain(name: str) -> str:
    """What the task of an id is about."""
    return _DOMAINS.get(name, "operations research")


@in_32_bits()
def make(name: str, batch_size: int, time_limit: int | None) -> JittableEnvironment:
    """Makes B environments by jumanji's own id; None keeps its time limit, or 1,000 steps where it has none."""
    inner = _jumanji().make(name)
    own_limit = getattr(inner, "time_limit", None)
    limit = time_limit or (_DEFAULT_LIMIT if own_limit is None else int(own_limit))
    if "time_limit" in inspect.signature(type(inner).__init__).parameters:
        # Some call the end at their own limit a terminal one: theirs lies one step behind the one that is kept here.
        inner = _jumanji().make(name, time_limit=limit + 1)
    seen = dict(_space(inner.observation_spec).items())
    mask = seen.pop(_MASK, None)
    action_space, nvec = _action_space(inner.action_spec, mask)
    spec = make_spec(
        LIBRARY,
        name,
        observation_space=gymnasium.spaces.Dict(seen),
        action_space=action_space,
        batch_size=batch_size,
        time_limit=limit,
        domain=domain(name),
    )
    paths = [leaf.path for leaf in spaces.leaves(spec.observation_space)]

    def outcome(state: PyTree, time_step: typing.Any) -> Outcome:
        observation = spaces.unflatten(spec.observation_space, [_get(time_step.observation, path) for path in paths])
        ended, terminated = time_step.last(), jnp.max(time_step.discount) == 0
        return Outcome(
            state,
            observation,
            jnp.sum(time_step.reward),
            ended & terminated,
            ended & ~terminated,
            None if mask is None else time_step.observation.action_mask.ravel(),
        )

    def reset(key: Array) -> Outcome:
        return outcome(*inner.reset(old_key(key)))

    def step(key: Array, state: PyTree, action: PyTree) -> Outcome:
        if nvec is not None:
            action = jnp.stack(jnp.unravel_index(action, nvec), -1)
        return outcome(*inner.step(state, action.astype(inner.action_spec.dtype)))

    return JittableEnvironment(spec, reset, step)


def _jumanji() -> typing.Any:
    import jumanji

    return jumanji


def _get(tree: typing.Any, path: tuple[str | int, ...]) -> Array:
    for key in path:
        tree = getattr(tree, str(key))
    return tree


def _space(spec: typing.Any) -> typing.Any:
    """The space of an observation; a nested one becomes a `Dict`."""
    from jumanji import specs

    children = {key: child for key, child in vars(spec).items() if isinstance(child, specs.Spec)}
    if children:
        return gymnasium.spaces.Dict({key: _space(child) for key, child in children.items()})
    if isinstance(spec, specs.DiscreteArray) and spec.name != _COUNTER:
        return gymnasium.spaces.Discrete(int(spec.num_values))
    dtype = np.dtype(spec.dtype)
    low, high = getattr(spec, "minimum", -np.inf), getattr(spec, "maximum", np.inf)
    low, high = (np.broadcast_to(np.asarray(side, np.float64), spec.shape) for side in (low, high))
    if np.issubdtype(dtype, np.bool_):
        dtype = np.dtype(np.uint8)
    elif np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        low, high = np.clip(low, limits.min, limits.max), np.clip(high, limits.min, limits.max)
    return gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), spec.shape, dtype.type)


def _action_space(spec: typing.Any, mask: typing.Any) -> tuple[gymnasium.Space, tuple[int, ...] | None]:
    """The space of actions, and the sizes of the slots where it is one choice among their combinations."""
    from jumanji import specs

    if isinstance(spec, specs.DiscreteArray):
        return gymnasium.spaces.Discrete(int(spec.num_values)), None
    if np.issubdtype(spec.dtype, np.floating):
        return _space(spec), None
    nvec = np.broadcast_to(np.asarray(spec.maximum) + 1, spec.shape)
    if mask is not None and mask.shape == tuple(nvec):
        return gymnasium.spaces.Discrete(math.prod(mask.shape)), mask.shape
    if mask is not None:
        # MultiCVRP declares one choice more than it has.
        nvec = np.full(spec.shape, mask.shape[-1])
    return gymnasium.spaces.MultiDiscrete(nvec.astype(np.int64)), None

"""Spaces as they are carried here, from what a library declares."""

from __future__ import annotations

import collections.abc
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax import spaces

AnArray = typing.TypeVar("AnArray", np.ndarray, jax.Array)

MAX_CATEGORIES = 4096
"""A larger `Discrete` observation is a counter, so a number."""

_NO_LIMIT = 1e10  # on both sides of an action; MuJoCo's mjMAXVAL


def observation_space(space: typing.Any) -> gymnasium.Space:
    """The space of observations as they are carried: numbers of 32 bits at most, no bounds that mean none.

    Raises:
      SpaceError: a kind that is not supported, or numbers that cannot be carried.
    """
    values = []
    for leaf in spaces.leaves(space):
        kind = leaf.space
        if isinstance(kind, gymnasium.spaces.Discrete) and int(kind.n) > MAX_CATEGORIES:
            kind = gymnasium.spaces.Box(int(kind.start), int(kind.start) + int(kind.n) - 1, (), np.int64)
        if isinstance(kind, gymnasium.spaces.Box):
            kind = spaces.carried_box(_widened(kind), inward=False)
        values.append(kind)
    return _rebuilt(space, values, "the observation space")


def action_space(space: typing.Any) -> gymnasium.Space:
    """The space of actions that are offered, within what the library takes; whole numbers are categories.

    Raises:
      SpaceError: a kind that is not supported, or numbers that cannot be carried.
    """
    values = []
    for leaf in spaces.leaves(space):
        kind = leaf.space
        if isinstance(kind, gymnasium.spaces.Text):
            raise spaces.SpaceError(f"actions have a part {leaf.name!r} of Text, which nothing here can choose")
        if isinstance(kind, gymnasium.spaces.Box):
            if np.issubdtype(kind.dtype, np.floating):
                kind = spaces.carried_box(_unlimited(_widened(kind)), inward=True)
            else:
                span = kind.high.astype(np.float64) - kind.low.astype(np.float64)
                if ((span >= MAX_CATEGORIES) | (span < 0)).any():
                    raise spaces.SpaceError(f"actions have a part {leaf.name!r}, {kind}, of too many whole numbers")
                start = kind.low.astype(np.int64)
                kind = gymnasium.spaces.MultiDiscrete(span.astype(np.int64) + 1, start=start)
        values.append(kind)
    return _rebuilt(space, values, "the action space")


def cast(value: AnArray, dtype: np.dtype) -> AnArray:
    """What a library returned, in the dtype that its space is carried in.

    Whole numbers that the dtype has not become its largest or smallest, so that they are outside the bounds still.
    """
    if value.dtype.kind in "iu" and dtype.kind in "iu" and not np.can_cast(value.dtype, dtype):
        ours, theirs = np.iinfo(dtype), np.iinfo(value.dtype)
        value = value.clip(max(ours.min, theirs.min), min(ours.max, theirs.max))
    return value.astype(dtype)


def _widened(space: gymnasium.spaces.Box) -> gymnasium.spaces.Box:
    """A Box of float16 as one of float32, in which nobody has to think of its overflow; others as they are."""
    if space.dtype != np.float16:
        return space
    return gymnasium.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), space.shape, np.float32)


def _unlimited(space: gymnasium.spaces.Box) -> gymnasium.spaces.Box:
    """A Box that is infinite where MuJoCo says that an actuator has no limit."""
    none = (space.low == -_NO_LIMIT) & (space.high == _NO_LIMIT)
    if not none.any():
        return space
    low, high = np.where(none, -np.inf, space.low), np.where(none, np.inf, space.high)
    dtype: typing.Any = space.dtype
    return gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), space.shape, dtype)


def _rebuilt(space: typing.Any, values: collections.abc.Iterable[gymnasium.Space], what: str) -> gymnasium.Space:
    """The space with other leaves, in canonical order, once it is sure that they can be carried."""
    rebuilt = _build(space, iter(values))
    spaces.check_supported(rebuilt, what)
    return rebuilt


def _build(space: typing.Any, values: collections.abc.Iterator[gymnasium.Space]) -> gymnasium.Space:
    if isinstance(space, gymnasium.spaces.Dict):
        return gymnasium.spaces.Dict({key: _build(space[key], values) for key in sorted(space)})
    if isinstance(space, gymnasium.spaces.Tuple):
        return gymnasium.spaces.Tuple([_build(child, values) for child in space])
    return next(values)

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


def observation_space(space: typing.Any) -> gymnasium.Space:
    """The space of observations that are offered: numbers of 32 bits at most, no bounds that mean none.

    Raises:
      SpaceError: a kind that is not supported.
    """
    values = []
    for leaf in spaces.leaves(space):
        kind = leaf.space
        if isinstance(kind, gymnasium.spaces.Discrete) and int(kind.n) > MAX_CATEGORIES:
            start = int(kind.start)
            kind = _whole(gymnasium.spaces.Box(start, start + int(kind.n) - 1, (), np.int64))
        elif isinstance(kind, gymnasium.spaces.Box):
            kind = _real(kind) if np.issubdtype(kind.dtype, np.floating) else _whole(kind)
        values.append(kind)
    return _rebuild(space, iter(values))


def action_space(space: typing.Any) -> gymnasium.Space:
    """The space of actions that are offered; whole numbers are categories.

    Raises:
      SpaceError: a kind that is not supported.
    """
    values = []
    for leaf in spaces.leaves(space):
        kind = leaf.space
        if isinstance(kind, gymnasium.spaces.Text):
            raise spaces.SpaceError(f"actions have a part {leaf.name!r} of Text, which nothing here can choose")
        if isinstance(kind, gymnasium.spaces.Box):
            if np.issubdtype(kind.dtype, np.floating):
                kind = _real(kind)
            else:
                start, high = kind.low.astype(np.int64), kind.high.astype(np.int64)
                if ((high - start) >= MAX_CATEGORIES).any() or ((high - start) < 0).any():
                    raise spaces.SpaceError(f"actions have a part {leaf.name!r}, {kind}, of too many whole numbers")
                kind = gymnasium.spaces.MultiDiscrete(high - start + 1, start=start)
        values.append(kind)
    return _rebuild(space, iter(values))


def cast(value: AnArray, dtype: np.dtype) -> AnArray:
    """What a library returned, in the dtype that its space is carried in.

    Whole numbers that the dtype has not become its largest or smallest, so that they are outside the bounds still.
    """
    if value.dtype.kind in "iu" and dtype.kind in "iu" and not np.can_cast(value.dtype, dtype):
        ours, theirs = np.iinfo(dtype), np.iinfo(value.dtype)
        value = value.clip(max(ours.min, theirs.min), min(ours.max, theirs.max))
    return value.astype(dtype)


def _real(space: gymnasium.spaces.Box) -> gymnasium.spaces.Box:
    low, high = spaces.bounds(space)
    return gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32), space.shape, np.float32)


def _whole(space: gymnasium.spaces.Box) -> gymnasium.spaces.Box:
    if space.dtype == np.bool_:
        return gymnasium.spaces.Box(0, 1, space.shape, np.uint8)
    if np.iinfo(space.dtype).bits <= 16 or space.dtype == np.int32:
        return space
    limits = np.iinfo(np.int32)
    low, high = (np.clip(side, limits.min, limits.max).astype(np.int32) for side in (space.low, space.high))
    return gymnasium.spaces.Box(low, high, space.shape, np.int32)


def _rebuild(space: typing.Any, values: collections.abc.Iterator[gymnasium.Space]) -> gymnasium.Space:
    if isinstance(space, gymnasium.spaces.Dict):
        return gymnasium.spaces.Dict({key: _rebuild(space[key], values) for key in sorted(space)})
    if isinstance(space, gymnasium.spaces.Tuple):
        return gymnasium.spaces.Tuple([_rebuild(child, values) for child in space])
    return next(values)

"""Spaces as they are offered for what a library declares, and the checks of what it then returns."""

from __future__ import annotations

import functools
import typing

import gymnasium
import numpy as np

from ldm_jax import spaces

MAX_CATEGORIES = 4096
"""A larger `Discrete` observation is a counter, so a number."""
_MAX_CHECKED = 4096  # elements; the bounds of larger leaves, images, are not worth checking at every step


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


def every(mask: np.ndarray) -> bool:
    """Whether all of a `bool` array is true; asked at every step, and several times as fast as `mask.all()`."""
    return np.count_nonzero(mask) == mask.size


class Leaf(spaces.Leaf):
    """One leaf of the observations that are offered, with the checks of its values."""

    def faults(self, value: np.ndarray, asked_B: np.ndarray) -> typing.Iterator[tuple[int, str, str]]:
        """Row, kind and description of each value `[B, ...]` that is no number or no category of the space."""
        if value.dtype.kind == "f":
            finite = np.isfinite(value)
            if every(finite):
                return
            bad = ~finite
            kind, expected = "nan", "a finite number"
        elif sizes := spaces.choices(self.space):
            index = value.reshape(len(value), -1) - np.ravel(spaces.start(self.space))
            bad = ((index < 0) | (index >= np.array(sizes))).reshape(value.shape)
            kind, expected = "category", f"a value of {self.space}"
        else:
            return
        if bad.any():
            what = "the observation" + (f", part {self.name!r}," if self.path else "")
            for row in np.flatnonzero(bad.reshape(len(bad), -1).any(1) & asked_B):
                yield int(row), kind, f"{what} is {value[row][bad[row]].ravel()[0]}, expected {expected}"

    def outside(self, value: np.ndarray) -> np.ndarray:
        """`bool [B]`, the rows with a number outside the declared bounds."""
        if not self._bounded:
            return np.zeros(len(value), bool)
        return ((value < self.space.low) | (value > self.space.high)).reshape(len(value), -1).any(1)

    def soundness(self, batch_size: int) -> typing.Callable[[np.ndarray], bool]:
        """A function that says at once whether a value `[B, ...]` has neither `faults` nor rows `outside`.

        It is asked at every step, so it compares with bounds laid out for the whole batch: NaN is within none.
        """
        struct = spaces.leaf_shape_dtype(self.space)
        shape, dtype = struct.shape, struct.dtype
        if sizes := spaces.choices(self.space):
            low = np.broadcast_to(spaces.start(self.space), shape).astype(dtype)
            high = low + np.array(sizes, dtype).reshape(shape) - 1
        elif self._bounded:
            limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
            low, high = (np.clip(side, limits.min, limits.max) for side in (self.space.low, self.space.high))
        elif dtype.kind == "f":
            return lambda value: every(np.isfinite(value))
        else:
            return lambda value: True
        low_B, high_B = (np.repeat(side[None], batch_size, 0) for side in (low, high))
        return lambda value: every(value >= low_B) and every(value <= high_B)

    @functools.cached_property
    def _bounded(self) -> bool:
        """Whether there are bounds that are worth checking at every step."""
        space = self.space
        if not isinstance(space, gymnasium.spaces.Box) or space.dtype == np.uint8:
            return False
        return space.low.size <= _MAX_CHECKED and bool((np.isfinite(space.low) | np.isfinite(space.high)).any())


class Observations:
    """The leaves of a batch of observations, in canonical order, and what is checked of them at every step.

    Attributes:
      leaves: of the space that is offered.
    """

    def __init__(self, space: gymnasium.Space, batch_size: int):
        self.leaves = tuple(Leaf(*leaf) for leaf in spaces.leaves(space))
        self._sound = [leaf.soundness(batch_size) for leaf in self.leaves]

    def odd(self, values: typing.Sequence[np.ndarray]) -> list[tuple[Leaf, np.ndarray]]:
        """The leaves, and of `values` their own `[B, ...]`, that have faults or rows outside their bounds."""
        return [
            (leaf, value)
            for leaf, sound, value in zip(self.leaves, self._sound, values, strict=True)
            if not sound(value)
        ]


def count_outside(odd: typing.Sequence[tuple[Leaf, np.ndarray]]) -> int:
    """The number of rows with a number outside the declared bounds in any leaf."""
    return int(np.any([leaf.outside(value) for leaf, value in odd], 0).sum()) if odd else 0


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


def _rebuild(space: typing.Any, values: typing.Iterator[gymnasium.Space]) -> gymnasium.Space:
    if isinstance(space, gymnasium.spaces.Dict):
        return gymnasium.spaces.Dict({key: _rebuild(space[key], values) for key in sorted(space)})
    if isinstance(space, gymnasium.spaces.Tuple):
        return gymnasium.spaces.Tuple([_rebuild(child, values) for child in space])
    return next(values)

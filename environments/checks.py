"""What is checked of the observations that a simulator returns, at every step."""

from __future__ import annotations

import collections.abc
import functools
import typing

import gymnasium
import numpy as np

from ldm_jax import spaces

_MAX_ROWS = 8  # that an error names
_MAX_CHECKED = 4096  # elements; the bounds of larger leaves, images, are not worth checking at every step


class RowFault(typing.NamedTuple):
    """A number that no environment may return: in which row, of which kind, and what was seen."""

    row: int
    kind: str
    text: str


def where(id: str, step_count: int, rows: collections.abc.Iterable[int]) -> str:
    """The place of a fault, as every error and log of one names it."""
    return f"{id}, step {step_count} after the reset, rows {list(rows)[:_MAX_ROWS]}"


def every(mask: np.ndarray) -> bool:
    """Whether all of a `bool` array is true; asked at every step, and several times as fast as `mask.all()`."""
    return np.count_nonzero(mask) == mask.size


class CheckedLeaf(spaces.Leaf):
    """One leaf of the observations that are offered, with the checks of its values."""

    def faults(self, value: np.ndarray, asked_B: np.ndarray) -> collections.abc.Iterator[RowFault]:
        """Each row asked for of a value `[B, ...]` with what is no number or no category of the space."""
        if value.dtype.kind == "f":
            finite = np.isfinite(value)
            if every(finite):
                return
            bad = ~finite
            kind, expected = "nan", "a finite number"
        elif sizes := spaces.choices(self.space):
            index = value.reshape(len(value), -1) - np.ravel(spaces.first_value(self.space))
            bad = ((index < 0) | (index >= np.array(sizes))).reshape(value.shape)
            kind, expected = "category", f"a value of {self.space}"
        else:
            return
        if bad.any():
            what = "the observation" + (f", part {self.name!r}," if self.path else "")
            for row in np.flatnonzero(bad.reshape(len(bad), -1).any(1) & asked_B):
                yield RowFault(int(row), kind, f"{what} is {value[row][bad[row]].ravel()[0]}, expected {expected}")

    def outside(self, value: np.ndarray) -> np.ndarray:
        """`bool [B]`, the rows with a number outside the declared bounds."""
        if not self._bounded:
            return np.zeros(len(value), bool)
        return ((value < self.space.low) | (value > self.space.high)).reshape(len(value), -1).any(1)

    def validator(self, batch_size: int) -> collections.abc.Callable[[np.ndarray], bool]:
        """A function that says at once whether a value `[B, ...]` has neither `faults` nor rows `outside`.

        It is asked at every step, so it compares with bounds laid out for the whole batch: NaN is within none.
        """
        struct = spaces.leaf_shape_dtype(self.space)
        shape, dtype = struct.shape, struct.dtype
        if sizes := spaces.choices(self.space):
            low = np.broadcast_to(spaces.first_value(self.space), shape).astype(dtype)
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
      leaves: the leaves of the observation space, in canonical order.
    """

    def __init__(self, space: gymnasium.Space, batch_size: int):
        self.leaves = tuple(CheckedLeaf(*leaf) for leaf in spaces.leaves(space))
        self._validators = [leaf.validator(batch_size) for leaf in self.leaves]

    def violations(self, values: collections.abc.Sequence[np.ndarray]) -> list[tuple[CheckedLeaf, np.ndarray]]:
        """The leaves, each with its own of `values`, `[B, ...]`, that have faults or rows outside their bounds."""
        return [
            (leaf, value)
            for leaf, is_valid, value in zip(self.leaves, self._validators, values, strict=True)
            if not is_valid(value)
        ]


def reward_faults(reward_B: np.ndarray, asked_B: np.ndarray) -> collections.abc.Iterator[RowFault]:
    """Each row asked for whose reward is not finite."""
    finite_B = np.isfinite(reward_B)
    if not every(finite_B):
        for row in np.flatnonzero(~finite_B & asked_B):
            yield RowFault(int(row), "nan", f"the reward is {reward_B[row]}, expected a finite number")


def count_outside(violations: collections.abc.Sequence[tuple[CheckedLeaf, np.ndarray]]) -> int:
    """The number of rows with a number outside the declared bounds in any leaf."""
    return int(np.any([leaf.outside(value) for leaf, value in violations], 0).sum()) if violations else 0

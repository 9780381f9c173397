"""The arrays of a batch of rows, which a simulator fills and the host checks and makes time steps of.

Workers in other interpreters and the adapter of Gymnasium in this one fill the same arrays by the same program
(`worker/gym_api.py`), so that what they return is checked, converted and counted in one way.
"""

from __future__ import annotations

import itertools
import math
import typing

import gymnasium
import numpy as np

from ldm_jax import spaces
from ldm_jax.types import MAX_TIME_LIMIT, Array, EnvironmentSpec, PyTree, TimeStep

from .. import checks, conversion
from ..tokens import draw_seeds
from .labels import Labels
from .worker.gym_api import RESET, SEED, STEP

DEFAULT_TIME_LIMIT = 1000
"""Steps, where neither the caller nor the library names a limit."""
_ALIGNMENT = 64  # bytes


def find_limit(*wanted: int | None) -> int:
    """The first limit that is named, in steps, at most what a spec can have: a library may mean that there is none."""
    return min(next(filter(None, wanted), DEFAULT_TIME_LIMIT), MAX_TIME_LIMIT)


class Fault(typing.NamedTuple):
    """One fault of an environment: what kind, in which rows, and what was seen."""

    kind: str
    rows: tuple[int, ...]
    text: str


class ArrayPlace(typing.NamedTuple):
    """Where an array lies in the buffer: its name, shape, dtype as numpy writes it, and offset in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


class Spaces(typing.NamedTuple):
    """The spaces of one environment as they are carried here."""

    observation: gymnasium.Space
    action: gymnasium.Space


def read_spaces(observation: dict[str, typing.Any], action: dict[str, typing.Any]) -> Spaces:
    """The spaces that are carried for those that `worker.values.describe` describes.

    Args:
      observation: what the library declares, as JSON values.
      action: the same of its actions.

    Raises:
      SpaceError: a space that is not supported.
    """
    return Spaces(
        conversion.observation_space(spaces.from_json(observation)), conversion.action_space(spaces.from_json(action))
    )


class EnvironmentBatch:
    """B rows of one environment with next-step reset: their arrays, their episodes, and the checks of what comes out.

    Args:
      spec: of the environment.
      choices: entries of its action mask; 0 where it has none.
      workers: how many fill the arrays.
      has_expert: whether an expert labels each time step.

    Attributes:
      layout: where each array is to lie in a buffer.
      size: of that buffer, in bytes.
      arrays: by name, each `[B, ...]`, once there is a buffer.
      rows_outside: rows so far with a number outside the declared bounds.
      labels: of the expert; None without one.
    """

    layout: list[ArrayPlace]
    size: int
    arrays: dict[str, np.ndarray]
    rows_outside: int
    labels: Labels | None

    def __init__(self, spec: EnvironmentSpec, choices: int, workers: int, *, has_expert: bool = False):
        self.spec, self.rows_outside = spec, 0
        self._observations = checks.Observations(spec.observation_space, spec.batch_size)
        self._action_leaves = spaces.leaves(spec.action_space)
        wanted: dict[str, tuple[tuple[int, ...], typing.Any]] = {
            "command": ((), np.uint8),
            "seed": ((), np.uint32),
            "reward": ((), np.float32),
            "terminated": ((), np.bool_),
            "truncated": ((), np.bool_),
            "cut": ((), np.bool_),
        }
        for prefix, leaves in (("observation", self._observations.leaves), ("action", self._action_leaves)):
            structs = [spaces.leaf_shape_dtype(leaf.space) for leaf in leaves]
            wanted |= {f"{prefix}/{i}": (struct.shape, struct.dtype) for i, struct in enumerate(structs)}
        if choices:
            wanted["mask"] = ((choices,), np.bool_)
        arrays = {name: ((spec.batch_size, *shape), np.dtype(dtype)) for name, (shape, dtype) in wanted.items()}
        arrays["heartbeat"] = ((workers,), np.dtype(np.uint64))
        self.labels = Labels(spec.id, spec.action_space, spec.batch_size) if has_expert else None
        arrays |= self.labels.wanted(workers) if self.labels else {}
        self.layout, self.size = [], 0
        for name, (shape, dtype) in arrays.items():
            self.layout.append(ArrayPlace(name, shape, dtype.str, self.size))
            self.size += -(-max(1, math.prod(shape) * dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT

    def place(self, buffer: typing.Any) -> None:
        """Lays the arrays into a buffer of `size` bytes of zeros."""
        self.arrays = {name: np.ndarray(shape, dtype, buffer, offset) for name, shape, dtype, offset in self.layout}
        self._observed = [self.arrays[f"observation/{i}"] for i in range(len(self._observations.leaves))]
        self._action_slots = [self.arrays[f"action/{i}"] for i in range(len(self._action_leaves))]
        self._values: list[np.ndarray] = []
        if self.labels:
            self.labels.place(self.arrays)

    def start(self, key: Array) -> np.ndarray:
        """Seeds all rows; returns their commands, `uint8 [B]`."""
        batch_size = self.spec.batch_size
        self.arrays["seed"][:] = draw_seeds(key, batch_size).astype(np.uint32)
        self._elapsed_B = np.zeros(batch_size, np.int64)
        self._last_B = np.zeros(batch_size, bool)
        return np.full(batch_size, SEED, np.uint8)

    def act(self, action: PyTree) -> np.ndarray:
        """Takes an action for each row; returns the rows' commands, `uint8 [B]`: those at an end are reset.

        Raises:
          SpaceError: the action has another shape than its space, or numbers that the space cannot have.
        """
        for leaf, slots in zip(self._action_leaves, self._action_slots, strict=True):
            try:
                value = np.asarray(spaces.get(action, leaf.path))
            except (KeyError, IndexError, TypeError):
                raise spaces.SpaceError(f"{self.spec.id}: the action has no part {leaf.name!r}") from None
            if value.shape != slots.shape:
                raise spaces.SpaceError(
                    f"{self.spec.id}: the action, part {leaf.name!r}, has shape {list(value.shape)}, "
                    f"expected {list(slots.shape)}"
                )
            slots[:] = value
            if value.dtype != slots.dtype and slots.dtype.kind in "iu":
                changed = slots[~self._last_B] != value[~self._last_B]
                if changed.any():
                    raise spaces.SpaceError(
                        f"{self.spec.id}: the action, part {leaf.name!r}, is {value[~self._last_B][changed][0]}, "
                        f"expected a whole number of {slots.dtype}"
                    )
        command_B = np.full(self.spec.batch_size, STEP, np.uint8)
        if np.count_nonzero(self._last_B):
            command_B[self._last_B] = RESET
        return command_B

    def collect(self, asked_B: np.ndarray) -> list[Fault]:
        """Takes what lies in the arrays, and looks for numbers that no environment may return.

        What is taken is what is checked: a worker may write at any time.

        Args:
          asked_B: `bool [B]`, rows that were to do something.
        """
        self._reward_B = self.arrays["reward"].copy()
        self._collected = [value.copy() for value in self._observed]
        self._violations = self._observations.violations(self._collected)
        found = [checks.reward_faults(self._reward_B, asked_B)]
        found += [leaf.faults(value, asked_B) for leaf, value in self._violations]
        return [Fault(kind, (row,), text) for row, kind, text in itertools.chain(*found)]

    def receive(self, first_B: np.ndarray, lost_B: np.ndarray) -> TimeStep:
        """The time step of what was collected.

        Args:
          first_B: `bool [B]`, rows that were reset.
          lost_B: `bool [B]`, rows whose environment failed: they end where they were before.
        """
        arrays = self.arrays
        neither_B = ~(first_B | lost_B)
        self._elapsed_B += 1
        self._elapsed_B[first_B] = 0
        terminated_B = arrays["terminated"] & neither_B
        truncated_B = (arrays["truncated"] & neither_B) | lost_B | (self._elapsed_B >= self.spec.time_limit)
        self._last_B = terminated_B | truncated_B
        values, violations = self._collected, self._violations
        if np.count_nonzero(lost_B):
            for value, before in zip(values, self._values, strict=True):
                value[lost_B] = before[lost_B]
            violations = self._observations.violations(values)
        self._values = values
        self.rows_outside += self._count_outside(violations)
        mask = arrays["mask"].copy() if "mask" in arrays else None
        return TimeStep(
            observation=spaces.unflatten(self.spec.observation_space, values),
            reward=np.where(neither_B, self._reward_B, np.float32(0)),
            terminated=terminated_B,
            truncated=truncated_B,
            first=first_B,
            action_mask=mask,
            expert=self.labels.receive(self._last_B, mask) if self.labels else None,
        )

    def _count_outside(self, violations: list[tuple[checks.CheckedLeaf, np.ndarray]]) -> int:
        cut_B = self.arrays["cut"]
        if not np.count_nonzero(cut_B):
            return checks.count_outside(violations)
        outside_B = np.any([cut_B, *(leaf.outside(value) for leaf, value in violations)], 0)
        cut_B[:] = False
        return int(outside_B.sum())

"""The labels of experts as the host takes them from the arrays: checked against the space, counted, and told of."""

from __future__ import annotations

import collections
import logging
import typing

import gymnasium
import numpy as np

from ldm_jax import spaces
from ldm_jax.types import Array, ExpertLabel

from .worker.experts import COUNTS, DREW, NANOSECONDS, NONSENSE, UNTOLD

_ROUNDING = 1e-6
"""How far beyond a bound, of its size, a number may be that was rounded on its way."""

_log = logging.getLogger(__name__)


class ExpertReport(typing.NamedTuple):
    """How an expert has done since its environment was made.

    Attributes:
      counts: of what is in `worker.experts.COUNTS`: `asked`, `labels`, `none`, `slow`, `raised`, `nonsense` and `drew`.
      notes: what went wrong, the first of each kind in each worker.
      label_seconds: of the processor's time that one answer took, on average; 0 where none was asked for.
    """

    counts: collections.Counter[str]
    notes: tuple[str, ...]
    label_seconds: float = 0.0


class Labels:
    """The labels of B rows.

    Args:
      id: of the environment.
      space: of actions, as it is carried here.
      batch_size: B.
    """

    def __init__(self, id: str, space: gymnasium.Space, batch_size: int):
        self._id, self._space, self._batch_size = id, space, batch_size
        self._leaves = spaces.leaves(space)
        # Looked at with every time step: of each leaf its number of choices, the first of them and where they begin in
        # a mask, or its bounds.
        self._sizes = [np.array(spaces.choices(leaf.space), np.int64) for leaf in self._leaves]
        self._firsts = [spaces.first_value(leaf.space) if spaces.choices(leaf.space) else 0 for leaf in self._leaves]
        starts = np.cumsum([0, *(size for sizes in self._sizes for size in sizes)])[:-1]
        self._offsets = np.split(starts, np.cumsum([len(sizes) for sizes in self._sizes])[:-1])
        self._bounds = [
            spaces.bounds(leaf.space) if not len(sizes) else None
            for leaf, sizes in zip(self._leaves, self._sizes, strict=True)
        ]
        self._rows = np.arange(batch_size)[:, None]
        self._nonsense, self._notes = 0, list[str]()

    def wanted(self, workers: int) -> dict[str, tuple[tuple[int, ...], typing.Any]]:
        """Shape and dtype of each array, that of its rows with B."""
        structs = [spaces.leaf_shape_dtype(leaf.space) for leaf in self._leaves]
        found = {f"label/{i}": ((self._batch_size, *s.shape), np.dtype(s.dtype)) for i, s in enumerate(structs)}
        valid, counts = ((self._batch_size,), np.dtype(np.bool_)), ((workers, NANOSECONDS + 1), np.dtype(np.uint64))
        return {**found, "label_valid": valid, "expert": counts, "success": ((self._batch_size,), np.dtype(np.uint8))}

    def place(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes the arrays."""
        self._values = [arrays[f"label/{i}"] for i in range(len(self._leaves))]
        self._valid_B, self._counts, self._success_B = arrays["label_valid"], arrays["expert"], arrays["success"]
        self._success_B[:] = UNTOLD

    @property
    def solved(self) -> np.ndarray | None:
        """`bool [B]`, whether the library said at the last step that its task is solved; None where it does not say."""
        return None if (self._success_B == UNTOLD).any() else self._success_B == 1

    def receive(self, last_B: np.ndarray, mask: np.ndarray | None) -> ExpertLabel:
        """The labels of a time step; those that the space or the mask does not have are left out.

        Args:
          last_B: `bool [B]`, rows whose episode has ended.
          mask: `bool [B, M]` of the time step, or None.
        """
        valid_B = self._valid_B & ~last_B
        values = [value.copy() for value in self._values]
        allowed_B = np.ones_like(valid_B)
        for i, limits in enumerate(self._bounds):
            if limits is None:
                index = (values[i].astype(np.int64) - self._firsts[i]).reshape(self._batch_size, -1)
                inside = (index >= 0) & (index < self._sizes[i])
                if mask is not None:
                    place = np.where(inside, index, 0) + self._offsets[i]
                    inside &= mask[self._rows, place]
            else:
                values[i], inside = _within(values[i], *limits)
            allowed_B &= inside.reshape(self._batch_size, -1).all(1)
        if np.count_nonzero(valid_B & ~allowed_B):
            self._leave_out(valid_B & ~allowed_B)
            valid_B &= allowed_B
        return ExpertLabel(spaces.unflatten(self._space, values), valid_B)

    def note(self, *texts: str) -> None:
        """Keeps and logs what went wrong."""
        self._notes += texts
        for text in texts:
            _log.warning("%s: its expert: %s; where it goes wrong there is no label, and it is counted", self._id, text)

    def lost(self, worker: int) -> str:
        """What the expert of a worker that was lost has to do with it, as the end of a report; nothing, mostly."""
        asked, *answers = self._counts[worker, :DREW].tolist()
        if asked == sum(answers):
            return ""
        self._counts[worker, 0] = sum(answers)
        return "; its expert had been asked for a label and had not answered"

    def report(self) -> ExpertReport:
        """How the expert has done so far."""
        *counted, nanoseconds = self._counts.sum(0).tolist()
        counts = collections.Counter(dict(zip(COUNTS, counted, strict=True)))
        counts["nonsense"] += self._nonsense
        counts["labels"] -= self._nonsense
        return ExpertReport(counts, tuple(self._notes), 1e-9 * nanoseconds / max(counts["asked"], 1))

    def _leave_out(self, wrong_B: np.ndarray) -> None:
        if not self._nonsense:
            row = int(np.flatnonzero(wrong_B)[0])
            label = [value[row].tolist() for value in self._values]
            self.note(f"row {row}: {COUNTS[NONSENSE]}: its label is {label}, which is not allowed in {self._space}")
        self._nonsense += int(wrong_B.sum())


def _within(value: np.ndarray, low: Array, high: Array) -> tuple[np.ndarray, np.ndarray]:
    """Numbers put back to bounds that rounding took them over, and where that is all that is wrong with them."""
    clipped = np.clip(value, *(np.asarray(side).astype(value.dtype) for side in (low, high)))
    with np.errstate(invalid="ignore"):
        inside = np.isfinite(value) & (np.abs(clipped - value) <= _ROUNDING * (1 + np.abs(clipped)))
    return clipped, inside

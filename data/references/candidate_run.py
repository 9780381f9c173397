"""One of the candidates of a search in training: how far it is, and whether it still gets anywhere."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import typing

from ldm_jax.types import Agent

from .algorithm import Learned
from .candidates import Candidate

FLAT_REPORTS, FLAT_SPREAD = 8, 0.01
"""Training is flat when so many reports are within that share of all that it has gained; less sure signs cost much."""

FLAT_AFTER = 0.5
"""Share of the winner's training before which it is not looked for."""


@dataclasses.dataclass
class CandidateRun:
    """A candidate in training."""

    candidate: Candidate
    config: typing.Any
    agent: Agent
    learning: collections.abc.Iterator[Learned]
    close: collections.abc.Callable[[], None]
    learned: Learned | None = None
    ended: bool = False
    look_after: float = 0.0
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> int:
        return 0 if self.learned is None else self.learned.steps

    @property
    def recent(self) -> float:
        """Mean return of the last episodes that training itself ended."""
        return self.curve[-1][1] if self.curve else -math.inf

    def advance(self) -> None:
        """Trains up to the next report."""
        learned = next(self.learning, None)
        if learned is None:
            self.ended = True
            return
        self.learned = learned
        if math.isfinite(learned.mean_return):
            self.curve.append((learned.steps, float(learned.mean_return)))

    def is_flat(self, steps: int) -> bool:
        """Whether the last reports bring nothing, late in a training of so many steps."""
        means = [mean for _, mean in self.curve]
        late, last = self.steps >= FLAT_AFTER * steps, means[-FLAT_REPORTS:]
        gained = max(means, default=0.0) - min(means, default=0.0)
        return late and len(last) == FLAT_REPORTS and max(last) - min(last) <= FLAT_SPREAD * gained and gained > 0

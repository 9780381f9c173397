"""What is done with time that is left: references that fall short are tried for again, with several times the budget.

Those that solved their task early, or stood still, have left their time; it goes to those that fall short the most.
"""

from __future__ import annotations

import collections.abc
import math
import time
import typing

from data.references import ScoredReference
from data.references.candidates import total_steps

MORE = 4
"""Times the budget before that another try has: what was tried before is then a quarter of it at most."""

GOOD = 0.9
"""Share of the way to a public target from which on a reference does not fall short."""

_UNKNOWN = math.nextafter(GOOD, 0.0)

_SCORING = 1.25
"""Seconds of training and scoring over those of training."""


class Tried(typing.NamedTuple):
    """What an environment has had so far.

    Attributes:
      scored: the reference that is kept.
      budget: share of an environment's training steps that the last try had.
    """

    scored: ScoredReference
    budget: float


class Again(typing.NamedTuple):
    """Another try.

    Attributes:
      id: of the environment.
      budget: share of its training steps.
      seconds: that it takes, about.
    """

    id: str
    budget: float
    seconds: float


class Clock:
    """How much is left of a number of hours; of 0 there is always more."""

    def __init__(self, hours: float) -> None:
        self._ends = time.monotonic() + 3600 * hours if hours else float("inf")

    @property
    def left(self) -> float:
        """Seconds, below 0 when they are over."""
        return self._ends - time.monotonic()


def try_again(tried: collections.abc.Mapping[str, Tried], seconds: float, workers: int) -> list[Again]:
    """Whom to try for again, those that fall short the most first, as many as there is time for.

    Args:
      tried: what there is, by id.
      seconds: that are left.
      workers: that work at once.
    """
    found: list[Again] = []
    room = seconds * max(1, workers)
    for id in sorted(tried, key=lambda id: (_merit(tried[id].scored), id)):
        scored, budget = tried[id]
        made = scored.policy.reference
        steps = budget * total_steps(scored.policy.spec)
        flat = scored.share_of_target is None and scored.admission.admitted and made.stopped
        if _merit(scored) >= GOOD or made.expert or flat:
            continue
        needed = _SCORING * MORE * steps * made.seconds / max(1, made.steps)
        if needed <= min(seconds, room):
            found.append(Again(id, MORE * budget, needed))
            room -= needed
    return found


def _merit(scored: ScoredReference) -> float:
    """How good a reference is known to be; what is refused comes first, and last what nobody knows to fall short."""
    if not scored.admission.admitted:
        return -math.inf
    return _UNKNOWN if scored.share_of_target is None else scored.share_of_target

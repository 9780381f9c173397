"""How good a reference is: episodes by the round, until they tell what they have to."""

from __future__ import annotations

import collections.abc
import math
import typing

import numpy as np

from ldm_jax import cards, rollout

STEPS_SHARE, LEAST_STEPS = 0.25, 100_000
"""Environment steps that scoring may take beyond its least episodes: a share of those of training, and at least."""

TOLD = 3.0
"""Forms that are so many standard errors apart are told from each other."""

SAME = 0.1
"""Forms whose difference is known to so much of the larger spread are as good as each other."""


Enough = collections.abc.Callable[[np.ndarray, np.ndarray], bool]
"""`enough(first, second)`, of returns `[rows, episodes]`; it looks at errors, and never at which is better."""


class Rounds(typing.NamedTuple):
    """When to stop playing; a round is added whole.

    Attributes:
      rows: parallel environments.
      each: episodes per row of a round.
      least: episodes of each policy, whatever they tell.
      most: episodes of each policy, whatever they do not tell.
      steps: environment steps of both after which no further round is begun, once the least were played.
    """

    rows: int
    each: int
    least: int
    most: int
    steps: int


def play_rounds(
    play: collections.abc.Callable[[int, int], rollout.EpisodeReturns],
    rounds: Rounds,
    enough: Enough,
) -> tuple[cards.Returns, cards.Returns]:
    """Plays two policies in turn, equally many episodes in every row, until there are enough of them.

    Args:
      play: `play(which, number)`, the episodes of one round of the first (0) or the second (1).
      rounds: how many whatever they tell.
      enough: when the returns of both tell enough.

    Returns:
      The returns of both.
    """
    steps, played = 0, 0
    returns: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    while True:
        for which, found in enumerate(returns):
            episodes = play(which, len(found))
            found.append(episodes.returns.astype(np.float64))
            steps += int(episodes.lengths.sum())
        played += rounds.rows * rounds.each
        first, second = (np.concatenate(found, 1) for found in returns)
        spent = played + rounds.rows * rounds.each > rounds.most or steps >= rounds.steps
        if played >= min(rounds.least, rounds.most) and (spent or enough(first, second)):
            return cards.Returns.of(first), cards.Returns.of(second)


def told_apart(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether it is known which of two forms is better, or that it does not matter.

    Symmetric: it says the same with the two exchanged.
    """
    spreads = [float(returns.std(ddof=1)) for returns in (first, second)]
    error = math.hypot(*(spread / returns.size**0.5 for spread, returns in zip(spreads, (first, second), strict=True)))
    return bool(abs(first.mean() - second.mean()) >= TOLD * error or error <= SAME * max(spreads))

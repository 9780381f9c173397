"""How many rows of a batch each bucket has, and how often each environment is drawn into them."""

from __future__ import annotations

import collections.abc
import dataclasses
import typing

import numpy as np

from ldm_jax.errors import ConfigError, check_finite

_MOST = 1e6
"""The largest weight."""


@dataclasses.dataclass(frozen=True)
class DrawsConfig:
    """How often environments are drawn: n^alpha times a weight of their own, n being their steps, and not too seldom.

    Attributes:
      alpha: 0 draws all environments equally often, 1 all steps.
      floor: the least share of an environment, as a part of an equal share; 0 to 0.5.
      weights: `name=weight` with commas between, the name that of an environment or of a library; 1 for all others.
    """

    alpha: float = 0.5
    floor: float = 0.1
    weights: str = ""

    def __post_init__(self) -> None:
        check_finite(self)
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"draws.alpha is {self.alpha}, expected 0 (environments) to 1 (steps)")
        if not 0 <= self.floor <= 0.5:
            raise ConfigError(f"draws.floor is {self.floor}, expected 0 to 0.5, a part of an equal share")
        _ = self.own  # they are checked

    @property
    def own(self) -> dict[str, float]:
        """The weights, by id or library."""
        found = {}
        for word in filter(None, map(str.strip, self.weights.split(","))):
            name, _, weight = word.rpartition("=")
            try:
                found[name.strip()] = float(weight)
            except ValueError:
                name = ""
            if not name or not 1 / _MOST <= found[name.strip()] <= _MOST:
                raise ConfigError(
                    f"draws.weights has {word!r}, expected name=weight with a number of {1 / _MOST:g} to {_MOST:g}"
                )
        return found


def environment_shares(
    draws: DrawsConfig, ids: collections.abc.Sequence[str], steps: collections.abc.Sequence[int]
) -> np.ndarray:
    """The share of the rows that each environment is to have.

    Args:
      draws: how often they are drawn.
      ids: of the environments.
      steps: n of each, at least 1.

    Returns:
      `float64 [N]`, with sum 1, each at least `floor / N`.

    Raises:
      ConfigError: a weight is given to what is not among them.
    """
    own = draws.own
    if unknown := sorted(own.keys() - {*ids} - {_library(id) for id in ids}):
        raise ConfigError(f"draws.weights names {', '.join(unknown)}, on which nothing is trained")
    factors = np.array([own.get(id, own.get(_library(id), 1.0)) for id in ids])
    weights = np.array(steps, np.float64) ** draws.alpha * factors
    return _at_least(weights / weights.sum(), draws.floor / len(weights))


class Allotted(typing.NamedTuple):
    """A bucket's part of a batch.

    Attributes:
      rows: of every batch.
      shares: of its rows, of each of its environments; `float64`, with sum 1.
    """

    rows: int
    shares: np.ndarray


def allot(
    shares: collections.abc.Sequence[np.ndarray], rows: int, floor: float = 0.0, multiple: int = 1
) -> list[Allotted]:
    """Divides the rows of a batch among buckets, by largest remainders, each at least one.

    Args:
      shares: of all rows, of each environment of each bucket; all of them together have the sum 1.
      rows: of a batch.
      floor: the least share of an environment, as a part of an equal one. Rounding keeps it from two rows a bucket on.
      multiple: that the rows of each bucket are to be.

    Returns:
      Of each bucket. Its rows are its share within one multiple, unless a floor takes them; in it, environments keep
      their ratios. The rows of all are those asked for, or a multiple each if that is more.

    Raises:
      ConfigError: the rows are no multiple.
    """
    if rows % multiple:
        raise ConfigError(f"rows is {rows}, expected a multiple of rows_multiple, {multiple}")
    units, least_share = rows // multiple, floor / sum(map(len, shares))
    quotas = units * np.array([part.sum() for part in shares])
    # Less a little: a product that is a whole number may come out above it.
    needed = np.ceil(units * least_share * np.array([len(part) for part in shares]) - 1e-9)
    counts = np.maximum(needed, 1).astype(np.int64)
    if counts.sum() > units:  # too few rows for the floors
        counts = np.ones(len(shares), np.int64)
    while counts.sum() < units:
        counts[np.argmax(quotas - counts)] += 1
    least = least_share * counts.sum() / counts
    return [
        Allotted(int(count) * multiple, _at_least(part / part.sum(), least))
        for count, part, least in zip(counts, shares, least, strict=True)
    ]


def _at_least(shares: np.ndarray, least: float) -> np.ndarray:
    """Raises shares, with sum 1, to the least one; the others keep their ratios."""
    if least * len(shares) >= 1:
        return np.full(len(shares), 1 / len(shares))
    raised = np.zeros(len(shares), bool)
    while True:
        scaled = shares * ((1 - least * raised.sum()) / shares[~raised].sum())
        if not (low := ~raised & (scaled < least)).any():
            return np.where(raised, least, scaled)
        raised |= low


def _library(id: str) -> str:
    return id.partition("/")[0]

"""z, the place of a policy between random and reference, with an interval by the bootstrap."""

from __future__ import annotations

import math
import typing

import numpy as np

from ldm_jax.errors import LdmError

Floats = np.ndarray
"""A `float64` array."""


class ScoreError(LdmError, ValueError):
    """Returns that no score can be made of."""


class Estimate(typing.NamedTuple):
    """A number with the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


class Interval(typing.NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


class Bootstrap(typing.NamedTuple):
    """A bootstrapped z.

    Attributes:
      estimate: z with its interval.
      samples: `float64 [resamples]`, z of every resample, NaN where a resample has none.
    """

    estimate: Estimate
    samples: Floats


def z_score(random: float, reference: float, model: float) -> float:
    """The place of a mean return between random (0) and reference (1).

    >>> z_score(random=-1200.0, reference=-200.0, model=-400.0)
    0.8

    Args:
      random: mean return of the random policy.
      reference: mean return of the reference policy.
      model: mean return to place.

    Returns:
      z, below 0 where the model is worse than random and above 1 where it is better than the reference.

    Raises:
      ScoreError: a number is not finite, or the reference is not better than random.
    """
    if not all(map(math.isfinite, (random, reference, model))):
        raise ScoreError(f"got mean returns random={random}, reference={reference}, model={model}; expected numbers")
    if reference <= random:
        raise ScoreError(
            f"the reference returns {reference}, no more than random, {random}: z has no meaning here; "
            "check with `admit` first and list the environment as refused"
        )
    return (model - random) / (reference - random)


def bootstrap_z(
    random_returns: np.ndarray,
    reference_returns: np.ndarray,
    model_returns: np.ndarray,
    seed: int | np.random.Generator,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Bootstrap:
    """The z of a model, with an interval that holds the chance in all three returns.

    Args:
      random_returns: `[rows, episodes]` of the random policy; episodes are resampled.
      reference_returns: `[rows, episodes]` of the reference policy; episodes are resampled.
      model_returns: `[rows, episodes]` of the model; whole rows are resampled.
      seed: of the resampling.
      resamples: number of resamples.
      confidence: of the two-sided percentile interval.

    Returns:
      z with its interval and the z of every resample, NaN where the resampled reference is not better than the
      resampled random policy. Such resamples count as -inf at the lower end and inf at the upper.

    Raises:
      ScoreError: a return is NaN or infinite, the reference is not better than random, or there are fewer than two
        episodes (two rows of the model).
    """
    random, reference = episodes_of(random_returns, "random"), episodes_of(reference_returns, "reference")
    rows = row_means(model_returns)
    z = z_score(random.mean(), reference.mean(), rows.mean())
    rng = np.random.default_rng(seed)
    bottom, top, model = (_resampled_means(values, rng, resamples) for values in (random, reference, rows))
    better = top > bottom
    samples = np.where(better, (model - bottom) / np.where(better, top - bottom, 1.0), np.nan)
    low, high = interval(samples, confidence)
    # A skewed distribution can leave the estimate itself outside its percentile interval.
    return Bootstrap(Estimate(float(z), min(low, float(z)), max(high, float(z))), samples)


def interval(samples: Floats, confidence: float) -> Interval:
    """The two-sided percentile interval of a bootstrap distribution; NaN counts as -inf below and as inf above."""
    if not 0 < confidence < 1:
        raise ScoreError(f"confidence is {confidence}, expected a number between 0 and 1")
    tail, undefined = (1 - confidence) / 2, np.isnan(samples)
    low = np.quantile(np.where(undefined, -np.inf, samples), tail, method="lower")
    high = np.quantile(np.where(undefined, np.inf, samples), 1 - tail, method="higher")
    return Interval(float(low), float(high))


def episodes_of(returns: np.ndarray, what: str) -> Floats:
    """All returns of a policy as one `float64` vector.

    Args:
      returns: any shape.
      what: whose they are, for the error.

    Returns:
      The vector, two numbers or more.

    Raises:
      ScoreError: a return is NaN or infinite, or there are fewer than two.
    """
    values = np.asarray(returns, np.float64).ravel()
    if bad := int(np.sum(~np.isfinite(values))):
        raise ScoreError(f"{bad} of {values.size} {what} returns are NaN or infinite, expected finite numbers")
    if values.size < 2:
        raise ScoreError(f"got {values.size} {what} returns, expected at least 2: one says nothing about the spread")
    return values


def row_means(returns: np.ndarray) -> Floats:
    """The mean return of each row of the model, whose episodes depend on one another.

    Args:
      returns: `[rows, episodes]`.

    Returns:
      `float64 [rows]`, two numbers or more.

    Raises:
      ScoreError: another shape, or a return that is NaN or infinite.
    """
    shape = np.shape(returns)
    if len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
        raise ScoreError(
            f"the model's returns have the shape {list(shape)}, expected [rows, episodes] with at least 2 rows: the "
            "context is carried over the episodes of a row, so only rows are independent"
        )
    return episodes_of(returns, "model").reshape(shape).mean(axis=1)


def standard_error_of(values: Floats) -> float:
    """Standard error of the mean of independent values."""
    return float(values.std(ddof=1) / math.sqrt(values.size))


def _resampled_means(values: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    means = np.array([values[rng.integers(values.size, size=values.size)].mean() for _ in range(resamples)])
    # Resampling n values understates the variance of their mean by (n - 1) / n. Source: Hesterberg 2015, What teachers
    # should know about the bootstrap.
    return values.mean() + (means - values.mean()) * math.sqrt(values.size / (values.size - 1))

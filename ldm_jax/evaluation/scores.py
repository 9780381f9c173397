"""Scores: whether an environment may be scored at all, how far a policy gets in it, and how sure that is.

Everything is measured between two anchors of the same environment, the random policy (0) and the reference policy
(1): `z = (J - J_random) / (J_reference - J_random)`. Returns come as `[rows, episodes]`, the same number of episodes in
every row, because the first N episodes to finish are the short ones. The random and the reference policy have no
memory, so their episodes are independent; the model carries its context from episode to episode, so its rows are.
"""

from __future__ import annotations

import dataclasses
import math
import typing
import zlib

import numpy as np

Floats = np.ndarray
"""A `float64` array."""

ADMIT_STANDARD_ERRORS = 3.0
ADMIT_DEVIATIONS = 0.5
ROUNDING = 1e-6
"""Returns are sums of float32 rewards: differences this small, relative to the returns or to 1 in z, are not real."""


@dataclasses.dataclass(frozen=True)
class Admission:
    """Whether an environment may be scored.

    Attributes:
      admitted: the reference is better than random by the rule of `admit`.
      reason: the rule in numbers, for a person.
      difference: J_reference - J_random, in units of return.
      standard_error: of that difference.
      deviation: standard deviation of one episode's return under the random policy.
    """

    admitted: bool
    reason: str
    difference: float
    standard_error: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class EnvironmentScore:
    """What was measured in one environment; `None` stands where nothing was or may be measured.

    Attributes:
      id: the environment's id.
      library: its library.
      domain: what the task is about.
      admitted: z was computed.
      reason: why it was admitted or refused.
      random: mean return of the random policy; its standard error is `random_error`.
      reference: mean return of the reference policy, with `reference_error`; `reference_deviation` is the standard
        deviation of one episode.
      model: mean return of the model over all episodes of all rows, with `model_error`.
      public_target: a published return to compare the raw return with.
      z: (model - random) / (reference - random).
      z_low: lower end of the bootstrap interval of z.
      z_high: upper end.
      z_first_episode: z of the first episode of each row alone, which starts with an empty context.
      reference_distance: (model - reference) / reference_deviation.
      episodes: number of the model's episodes.
      rows: number of independent rows they were run in.
      z_samples: `float64 [resamples]`, bootstrap distribution of z, NaN where a resample has none; empty if refused.
    """

    id: str
    library: str
    domain: str
    admitted: bool
    reason: str
    random: float | None
    random_error: float | None
    reference: float | None
    reference_error: float | None
    reference_deviation: float | None
    model: float | None
    model_error: float | None
    public_target: float | None
    z: float | None
    z_low: float | None
    z_high: float | None
    z_first_episode: float | None
    reference_distance: float | None
    episodes: int
    rows: int
    z_samples: Floats = dataclasses.field(repr=False, compare=False)


class Estimate(typing.NamedTuple):
    """A number with its bootstrap interval."""

    value: float
    low: float
    high: float


def admit(random_returns: np.ndarray, reference_returns: np.ndarray) -> Admission:
    """Decides whether the reference is good enough to score others against it.

    The difference of the means must exceed three of its standard errors and half a standard deviation of the random
    return: it has to be real, and it has to be large enough to see in single episodes.

    Args:
      random_returns: returns of the random policy, any shape, at least two.
      reference_returns: returns of the reference policy, any shape, at least two.

    Returns:
      The decision.

    Raises:
      ValueError: a return is NaN or infinite, or there are fewer than two.
    """
    random, reference = _episodes(random_returns, "random"), _episodes(reference_returns, "reference")
    difference = float(reference.mean() - random.mean())
    standard_error = math.hypot(_standard_error(random), _standard_error(reference))
    deviation = float(random.std(ddof=1))
    rounding = ROUNDING * max(abs(reference.mean()), abs(random.mean()))
    means = f"the reference returns {reference.mean():.4g} and random {random.mean():.4g}"
    if difference <= rounding:
        admitted, reason = False, f"{means}: not better than random"
    elif difference <= ADMIT_STANDARD_ERRORS * standard_error:
        gap = f"{difference / standard_error:.2g} standard errors apart, expected more than {ADMIT_STANDARD_ERRORS:g}"
        admitted, reason = False, f"{means}: {gap}"
    elif difference <= ADMIT_DEVIATIONS * deviation:
        gap = f"{difference / deviation:.2g} standard deviations of random apart, expected more than {ADMIT_DEVIATIONS}"
        admitted, reason = False, f"{means}: {gap}"
    else:
        admitted, reason = True, means
    return Admission(admitted, reason, difference, standard_error, deviation)


def z_score(random: float, reference: float, model: float) -> float:
    """The place of a mean return between random (0) and reference (1).

    Args:
      random: mean return of the random policy.
      reference: mean return of the reference policy.
      model: mean return to place.

    Returns:
      z, below 0 where the model is worse than random and above 1 where it is better than the reference.

    Raises:
      ValueError: a number is not finite, or the reference is not better than random.
    """
    if not all(map(math.isfinite, (random, reference, model))):
        raise ValueError(f"got mean returns random={random}, reference={reference}, model={model}; expected numbers")
    if reference <= random:
        raise ValueError(
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
) -> tuple[Estimate, Floats]:
    """The z of a model, with an interval that holds the chance in all three returns.

    Args:
      random_returns: `[rows, episodes]` of the random policy; episodes are resampled.
      reference_returns: `[rows, episodes]` of the reference policy; episodes are resampled.
      model_returns: `[rows, episodes]` of the model; whole rows are resampled.
      seed: of the resampling.
      resamples: number of resamples.
      confidence: of the two-sided percentile interval.

    Returns:
      z with its interval, and `float64 [resamples]`: the z of every resample, NaN where the resampled reference is not
      better than the resampled random policy. Such resamples count as -inf at the lower end and inf at the upper.

    Raises:
      ValueError: a return is NaN or infinite, the reference is not better than random, or there are fewer than two
        episodes (two rows of the model).
    """
    random, reference = _episodes(random_returns, "random"), _episodes(reference_returns, "reference")
    rows = _row_means(model_returns)
    z = z_score(random.mean(), reference.mean(), rows.mean())
    rng = np.random.default_rng(seed)
    bottom, top, model = (_resampled_means(values, rng, resamples) for values in (random, reference, rows))
    better = top > bottom
    samples = np.where(better, (model - bottom) / np.where(better, top - bottom, 1.0), np.nan)
    low, high = interval(samples, confidence)
    # A skewed distribution can leave the estimate itself outside its percentile interval.
    return Estimate(float(z), min(low, float(z)), max(high, float(z))), samples


def interval(samples: Floats, confidence: float) -> tuple[float, float]:
    """The two-sided percentile interval of a bootstrap distribution; NaN counts as -inf below and as inf above."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1")
    tail, undefined = (1 - confidence) / 2, np.isnan(samples)
    low = np.quantile(np.where(undefined, -np.inf, samples), tail, method="lower")
    high = np.quantile(np.where(undefined, np.inf, samples), 1 - tail, method="higher")
    return float(low), float(high)


def score(
    id: str,
    domain: str,
    random_returns: np.ndarray,
    reference_returns: np.ndarray,
    model_returns: np.ndarray | None,
    public_target: float | None,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> EnvironmentScore:
    """Admits or refuses one environment and, if admitted, scores the model in it.

    Args:
      id: `library/<the library's own id>`; it also seeds the resampling, so that scores do not depend on which other
        environments were scored.
      domain: what the task is about.
      random_returns: `[rows, episodes]` of the random policy.
      reference_returns: `[rows, episodes]` of the reference policy.
      model_returns: `[rows, episodes]` of the model, each row starting with an empty context; None only for an
        environment that is refused.
      public_target: a published return, or None.
      seed: of the resampling.
      resamples: number of resamples.
      confidence: of the interval.

    Returns:
      The score; its z is None if the environment is refused.

    Raises:
      ValueError: what `admit` and `bootstrap_z` raise, with the id in front.
    """
    try:
        admission = admit(random_returns, reference_returns)
        random, reference = _episodes(random_returns, "random"), _episodes(reference_returns, "reference")
        estimate, samples = None, np.empty(0)
        mean = error = first = distance = None
        shape = (0, 0)
        if model_returns is not None:
            rows = _row_means(model_returns)
            mean, error, shape = float(rows.mean()), _standard_error(rows), np.shape(model_returns)
            distance = _distance(mean, reference)
        if admission.admitted:
            if model_returns is None:
                raise ValueError("got no returns of the model in an admitted environment; evaluate it there first")
            rng = np.random.default_rng([seed, zlib.crc32(id.encode())])
            estimate, samples = bootstrap_z(random, reference, model_returns, rng, resamples, confidence)
            first = z_score(random.mean(), reference.mean(), float(np.mean(np.asarray(model_returns)[:, 0])))
    except ValueError as problem:
        raise ValueError(f"{id}: {problem}") from problem
    return EnvironmentScore(
        id=id,
        library=id.split("/", 1)[0],
        domain=domain,
        admitted=admission.admitted,
        reason=admission.reason,
        random=float(random.mean()),
        random_error=_standard_error(random),
        reference=float(reference.mean()),
        reference_error=_standard_error(reference),
        reference_deviation=float(reference.std(ddof=1)),
        model=mean,
        model_error=error,
        public_target=public_target,
        z=estimate and estimate.value,
        z_low=estimate and estimate.low,
        z_high=estimate and estimate.high,
        z_first_episode=None if first is None else float(first),
        reference_distance=distance,
        episodes=math.prod(shape),
        rows=shape[0],
        z_samples=samples,
    )


def unmeasured(id: str, domain: str, reason: str, public_target: float | None) -> EnvironmentScore:
    """An environment that is registered but has no returns, for example because it crashed: refused, and listed."""
    return EnvironmentScore(
        id, id.split("/", 1)[0], domain, False, reason, None, None, None, None, None, None, None, public_target,
        None, None, None, None, None, 0, 0, np.empty(0),
    )  # fmt: skip


def _episodes(returns: np.ndarray, what: str) -> Floats:
    values = np.asarray(returns, np.float64).ravel()
    if bad := int(np.sum(~np.isfinite(values))):
        raise ValueError(f"{bad} of {values.size} {what} returns are NaN or infinite, expected finite numbers")
    if values.size < 2:
        raise ValueError(f"got {values.size} {what} returns, expected at least 2: one says nothing about the spread")
    return values


def _row_means(returns: np.ndarray) -> Floats:
    shape = np.shape(returns)
    if len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
        raise ValueError(
            f"the model's returns have the shape {list(shape)}, expected [rows, episodes] with at least 2 rows: the "
            "context is carried over the episodes of a row, so only rows are independent"
        )
    return _episodes(returns, "model").reshape(shape).mean(axis=1)


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size))


def _distance(mean: float, reference: Floats) -> float | None:
    difference, deviation = mean - float(reference.mean()), float(reference.std(ddof=1))
    if abs(difference) <= ROUNDING * abs(float(reference.mean())):
        return 0.0
    return difference / deviation if deviation > 0 else None


def _resampled_means(values: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    means = np.array([values[rng.integers(values.size, size=values.size)].mean() for _ in range(resamples)])
    # Resampling n values understates the variance of their mean by (n - 1) / n. Source: Hesterberg 2015, What teachers
    # should know about the bootstrap.
    return values.mean() + (means - values.mean()) * math.sqrt(values.size / (values.size - 1))

"""Scores: whether an environment may be scored at all, how far a policy gets in it, and how sure that is.

Everything is measured between two anchors of the same environment, the random policy (0) and the reference policy
(1): `z = (J - J_random) / (J_reference - J_random)`. Returns come as `[rows, episodes]`, the same number of episodes in
every row, because the first N episodes to finish are the short ones. The random and the reference policy have no
memory, so their episodes are independent; the model carries its context from episode to episode, so its rows are.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import typing
import zlib

import numpy as np

from ldm_jax.evaluation.bootstrap import (
    Estimate,
    Floats,
    ScoreError,
    bootstrap_z,
    episodes_of,
    row_means,
    standard_error_of,
    z_score,
)

ADMIT_STANDARD_ERRORS = 3.0
ADMIT_Z_ERROR = 0.1
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
      z_error: standard error of z, see `z_error`; infinite where there is no difference.
    """

    admitted: bool
    reason: str
    difference: float
    standard_error: float
    z_error: float


class Measurement(typing.NamedTuple):
    """What was played in one environment; the returns are undiscounted, `[rows, episodes]`.

    Attributes:
      id: `library/<the library's own id>`; it also seeds the resampling, so that scores do not depend on which other
        environments were scored.
      domain: what the task is about.
      random_returns: of the random policy, or None.
      reference_returns: of the reference policy, or None.
      model_returns: of the model, each row starting with an empty context, or None.
      public_target: a published return to compare the raw return with, or None.
      missing: why returns are None, for a person.
    """

    id: str
    domain: str
    random_returns: np.ndarray | None
    reference_returns: np.ndarray | None
    model_returns: np.ndarray | None
    public_target: float | None = None
    missing: str = ""


class ReturnSummary(typing.NamedTuple):
    """Finished episodes of one policy in one environment.

    Attributes:
      mean: mean return over all episodes.
      standard_error: standard error of that mean; over rows where a policy carries its context from episode to episode.
      std: standard deviation of one episode's return.
      rows: number of parallel rows that the episodes were run in.
      episodes: number of episodes over all rows.
    """

    mean: float
    standard_error: float
    std: float
    rows: int
    episodes: int


@dataclasses.dataclass(frozen=True)
class EnvironmentScore:
    """What was measured in one environment; `None` stands where nothing was or may be measured.

    Attributes:
      id: `library/<the library's own id>`.
      domain: what the task is about.
      reason: why it was admitted or refused, for a person.
      random: returns of the random policy.
      reference: returns of the reference policy.
      model: returns of the model.
      public_target: a published return to compare the raw return with.
      z: (model - random) / (reference - random), None where the environment is refused.
      z_first_episode: z of the first episode of each row alone, which starts with an empty context.
      z_by_episode: z of the first episode of each row, of the second, and so on to the last, on a growing context.
      reference_distance: (model - reference) / standard deviation of one of the reference's episodes.
      z_samples: `float64 [resamples]`, bootstrap distribution of z, NaN where a resample has none; empty if refused.
    """

    id: str
    domain: str
    reason: str
    random: ReturnSummary | None = None
    reference: ReturnSummary | None = None
    model: ReturnSummary | None = None
    public_target: float | None = None
    z: Estimate | None = None
    z_first_episode: float | None = None
    z_by_episode: tuple[float, ...] = ()
    reference_distance: float | None = None
    z_samples: Floats = dataclasses.field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    @property
    def library(self) -> str:
        """The part of the id before its first slash."""
        return self.id.split("/", 1)[0]

    @property
    def admitted(self) -> bool:
        """Whether z was computed."""
        return self.z is not None

    def to_json(self) -> dict[str, typing.Any]:
        """One flat object of JSON values, as `scores.json` has it; null where nothing was measured."""
        random, reference, model, z = self.random, self.reference, self.model, self.z
        return {
            "id": self.id,
            "library": self.library,
            "domain": self.domain,
            "admitted": self.admitted,
            "reason": self.reason,
            "random": random and random.mean,
            "random_error": random and random.standard_error,
            "reference": reference and reference.mean,
            "reference_error": reference and reference.standard_error,
            "reference_std": reference and reference.std,
            "model": model and model.mean,
            "model_error": model and model.standard_error,
            "public_target": self.public_target,
            "z": z and z.value,
            "z_low": z and z.low,
            "z_high": z and z.high,
            "z_first_episode": self.z_first_episode,
            "z_by_episode": [*self.z_by_episode],
            "reference_distance": self.reference_distance,
            "episodes": model.episodes if model else 0,
            "rows": model.rows if model else 0,
        }


def z_error(random_returns: np.ndarray, reference_returns: np.ndarray) -> float:
    """The standard error that z will have of a policy that is played as long, wherever it is between the two.

    It is as noisy as the noisier of the two, and the error of the anchor that it is near to adds to its own.

    Args:
      random_returns: returns of the random policy, any shape, at least two.
      reference_returns: returns of the reference policy, any shape, at least two.

    Returns:
      The error; it does not tell which of the two is better. Infinite where their means are the same, 0 where nothing
      varies.
    """
    return max(_z_errors(random_returns, reference_returns))


def z_error_at_reference(random_returns: np.ndarray, reference_returns: np.ndarray) -> float:
    """The same of a policy that is as good as the reference: the random policy's error hardly tells there."""
    return _z_errors(random_returns, reference_returns)[1]


def _z_errors(random_returns: np.ndarray, reference_returns: np.ndarray) -> tuple[float, float]:
    """The standard errors of z of policies like the random one and like the reference, played as long."""
    random, reference = episodes_of(random_returns, "random"), episodes_of(reference_returns, "reference")
    difference = abs(float(reference.mean() - random.mean()))
    near = [math.sqrt(2) * standard_error_of(returns) for returns in (random, reference)]
    at_random, at_reference = (error / difference if difference > 0 else math.inf for error in near)
    return at_random, at_reference


def admit(random_returns: np.ndarray, reference_returns: np.ndarray) -> Admission:
    """Decides whether the reference is good enough to score others against it.

    The difference of the means must exceed three of its standard errors, so that it is real, and z must be told to a
    tenth by as many episodes; noisy returns need more of them and are not refused for it.

    Args:
      random_returns: returns of the random policy, any shape, at least two.
      reference_returns: returns of the reference policy, any shape, at least two.

    Returns:
      The decision.

    Raises:
      ScoreError: a return is NaN or infinite, or there are fewer than two.
    """
    random, reference = episodes_of(random_returns, "random"), episodes_of(reference_returns, "reference")
    difference = float(reference.mean() - random.mean())
    standard_error = math.hypot(standard_error_of(random), standard_error_of(reference))
    error = z_error(random, reference)
    rounding = ROUNDING * max(abs(reference.mean()), abs(random.mean()))
    means = f"the reference returns {reference.mean():.4g} and random {random.mean():.4g}"
    if difference <= rounding:
        admitted, reason = False, f"{means}: not better than random"
    elif difference <= ADMIT_STANDARD_ERRORS * standard_error:
        gap = f"{difference / standard_error:.2g} standard errors apart, expected more than {ADMIT_STANDARD_ERRORS:g}"
        admitted, reason = False, f"{means}: {gap}"
    elif error > ADMIT_Z_ERROR:
        gap = f"z has a standard error of {error:.2g} with {min(random.size, reference.size)} episodes"
        admitted, reason = False, f"{means}: {gap}, expected at most {ADMIT_Z_ERROR:g}: play more of them"
    else:
        admitted, reason = True, means
    return Admission(admitted, reason, difference, standard_error, error)


def score(measurement: Measurement, seed: int, resamples: int = 2000, confidence: float = 0.95) -> EnvironmentScore:
    """Admits or refuses one environment and, if admitted, scores the model in it.

    Args:
      measurement: the returns; those of the model may be missing in an environment that is refused.
      seed: of the resampling.
      resamples: number of resamples.
      confidence: of the interval.

    Returns:
      The score; its z is None if the environment is refused.

    Raises:
      ScoreError: what `admit` and `bootstrap_z` raise, with the id in front.
    """
    try:
        return _score(measurement, seed, resamples, confidence)
    except ScoreError as problem:
        raise ScoreError(f"{measurement.id}: {problem}") from problem


def score_each(
    measurements: collections.abc.Iterable[Measurement], seed: int, resamples: int = 2000, confidence: float = 0.95
) -> list[EnvironmentScore]:
    """Scores environments each by itself: one without returns, or with some that are not numbers, costs no other.

    Args:
      measurements: of the environments, whatever is known of them.
      seed: of the resampling.
      resamples: number of resamples.
      confidence: of the intervals.

    Returns:
      One score each, in the same order; what cannot be scored is refused, with the reason.
    """
    scores = []
    for measurement in measurements:
        try:
            scores.append(_score(measurement, seed, resamples, confidence))
        except ScoreError as problem:
            scores.append(_refuse(measurement, measurement.missing or str(problem)))
    return scores


def _score(measurement: Measurement, seed: int, resamples: int, confidence: float) -> EnvironmentScore:
    id, domain, random_returns, reference_returns, model_returns, public_target, _ = measurement
    if random_returns is None or reference_returns is None:
        raise ScoreError("got no returns of the random and the reference policy; score the reference first")
    admission = admit(random_returns, reference_returns)
    random, reference = _summarize(random_returns, "random"), _summarize(reference_returns, "reference")
    model = distance = first = estimate = None
    by_episode: tuple[float, ...] = ()
    samples = np.empty(0)
    if model_returns is not None:
        model = _summarize_rows(model_returns)
        distance = _distance(model, reference)
    if admission.admitted:
        if model_returns is None:
            raise ScoreError("got no returns of the model in an admitted environment; evaluate it there first")
        rng = np.random.default_rng([seed, zlib.crc32(id.encode())])
        estimate, samples = bootstrap_z(random_returns, reference_returns, model_returns, rng, resamples, confidence)
        means = np.asarray(model_returns).mean(axis=0).tolist()
        by_episode = tuple(z_score(random.mean, reference.mean, mean) for mean in means)
        first = by_episode[0]
    return EnvironmentScore(
        id=id,
        domain=domain,
        reason=admission.reason,
        random=random,
        reference=reference,
        model=model,
        public_target=public_target,
        z=estimate,
        z_first_episode=first,
        z_by_episode=by_episode,
        reference_distance=distance,
        z_samples=samples,
    )


def _refuse(measurement: Measurement, reason: str) -> EnvironmentScore:
    """A score without z, with what is sound of the returns."""

    def sound(
        summarize: collections.abc.Callable[[np.ndarray], ReturnSummary], returns: np.ndarray | None
    ) -> ReturnSummary | None:
        try:
            return None if returns is None else summarize(returns)
        except ScoreError:
            return None

    return EnvironmentScore(
        id=measurement.id,
        domain=measurement.domain,
        reason=reason,
        random=sound(lambda returns: _summarize(returns, "random"), measurement.random_returns),
        reference=sound(lambda returns: _summarize(returns, "reference"), measurement.reference_returns),
        model=sound(_summarize_rows, measurement.model_returns),
        public_target=measurement.public_target,
    )


def _summarize(returns: np.ndarray, what: str) -> ReturnSummary:
    values = episodes_of(returns, what)
    std = float(values.std(ddof=1))
    return ReturnSummary(float(values.mean()), standard_error_of(values), std, len(returns), values.size)


def _summarize_rows(returns: np.ndarray) -> ReturnSummary:
    rows = row_means(returns)
    std = float(episodes_of(returns, "model").std(ddof=1))
    return ReturnSummary(float(rows.mean()), standard_error_of(rows), std, len(rows), np.size(returns))


def _distance(model: ReturnSummary, reference: ReturnSummary) -> float | None:
    difference = model.mean - reference.mean
    if abs(difference) <= ROUNDING * abs(reference.mean):
        return 0.0
    return difference / reference.std if reference.std > 0 else None

"""Scores of many environments together: the performance-threshold curve, aggregates, `scores.json` and the table."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import typing

import numpy as np

from ldm_jax.evaluation.bootstrap import Estimate, Floats, ScoreError, interval
from ldm_jax.evaluation.scores import ROUNDING, EnvironmentScore

MATCH = 0.95
TAUS = tuple(hundredth / 100 for hundredth in range(121))
"""The thresholds of the curve: 0, 0.01, ... 1.2."""


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The performance-threshold curve at one threshold: how many admitted environments have z >= tau.

    Attributes:
      tau: the threshold.
      count: by the point estimates of z.
      low: lower end of the bootstrap band of `count`.
      high: upper end.
      conservative: by the lower ends of the intervals of z.
    """

    tau: float
    count: int
    low: int
    high: int
    conservative: int


def curve(
    z: np.ndarray,
    z_low: np.ndarray,
    z_samples: np.ndarray,
    taus: collections.abc.Sequence[float] = TAUS,
    confidence: float = 0.95,
) -> list[CurvePoint]:
    """The performance-threshold curve over the admitted environments.

    Args:
      z: `[E]` point estimates.
      z_low: `[E]` lower ends of their intervals.
      z_samples: `[E, resamples]` bootstrap distributions; NaN reaches no threshold.
      taus: thresholds, in ascending order.
      confidence: of the band, which holds for each threshold by itself. The counts of a resample carry its noise on top
        of the estimate's own, so the band is widened to hold `count` where it would not.

    Returns:
      One point for each threshold.
    """
    points, tail = [], (1 - confidence) / 2
    for tau in taus:
        count = int(np.sum(reaches(z, tau)))
        counts = np.sum(reaches(z_samples, tau), axis=0)
        low = int(np.quantile(counts, tail, method="lower"))
        high = int(np.quantile(counts, 1 - tail, method="higher"))
        conservative = int(np.sum(reaches(z_low, tau)))
        points.append(CurvePoint(tau, count, min(low, count), max(high, count), conservative))
    return points


def reaches(z: typing.Any, tau: float) -> np.ndarray:
    """Where z is at least tau: who does exactly what the reference does must not miss 1 by a rounded sum."""
    return np.asarray(z) >= tau - ROUNDING


def interquartile_mean(z: np.ndarray) -> Floats:
    """The mean of the middle half along the first axis, `[E, ...]` to `[...]`.

    Source: Agarwal et al. 2021, Deep RL at the edge of the statistical precipice.
    """
    cut = len(z) // 4
    return np.sort(z, axis=0)[cut : len(z) - cut].mean(axis=0)


def optimality_gap(z: np.ndarray) -> Floats:
    """The mean shortfall from 1 along the first axis, `[E, ...]` to `[...]`; what is above 1 does not make up for it.

    Source: Agarwal et al. 2021, Deep RL at the edge of the statistical precipice.
    """
    return np.maximum(1.0 - np.asarray(z), 0.0).mean(axis=0)


def aggregate(
    statistic: collections.abc.Callable[[np.ndarray], Floats],
    scores: collections.abc.Sequence[EnvironmentScore],
    seed: int,
    confidence: float = 0.95,
) -> Estimate:
    """A statistic over the admitted environments, with a bootstrap stratified by library.

    Each resample draws environments with replacement inside each library and takes for each the z of that resample: so
    both the choice of environments and the noise of the returns are in the interval, and no library can drop out.

    Args:
      statistic: maps `[E, ...]` to `[...]`, as `interquartile_mean` does.
      scores: of the environments; refused ones are left out.
      seed: of the resampling.
      confidence: of the interval.

    Returns:
      The statistic of the point estimates, and its interval.

    Raises:
      ScoreError: no environment is admitted.
    """
    admitted = [item for item in scores if item.admitted]
    if not admitted:
        raise ScoreError("no environment is admitted, so there is nothing to aggregate")
    samples = np.stack([item.z_samples for item in admitted])
    # A resample without a z counts as the worst one that has a z.
    worst = np.nan_to_num(np.fmin.reduce(samples, axis=1, keepdims=True), nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    samples = np.where(np.isnan(samples), worst, samples)
    libraries = np.array([item.library for item in admitted])
    rng, drawn = np.random.default_rng(seed), np.empty(samples.shape, np.int64)
    for library in sorted(set(libraries)):
        members = np.flatnonzero(libraries == library)
        drawn[members] = rng.choice(members, (len(members), samples.shape[1]))
    values = statistic(np.take_along_axis(samples, drawn, axis=0))
    low, high = interval(values, confidence)
    return Estimate(float(statistic(_estimates(admitted)[:, 0])), low, high)


def scores_json(
    scores: collections.abc.Sequence[EnvironmentScore],
    parameters: int,
    decoding: str,
    seed: int,
    confidence: float = 0.95,
) -> dict[str, typing.Any]:
    """Everything an evaluation found, as JSON values: the contents of `scores.json`.

    Args:
      scores: of every registered environment, refused ones included; all with the same number of resamples.
      parameters: number of the model's parameters.
      decoding: the one decoding mode that was used everywhere.
      seed: of the resampling.
      confidence: of the intervals.

    Returns:
      A dict without NaN or infinity: null stands for what is not defined.

    Raises:
      ScoreError: an environment occurs twice.
    """
    ids = [item.id for item in scores]
    if twice := sorted({id for id in ids if ids.count(id) > 1}):
        raise ScoreError(f"got more than one score of {', '.join(twice)}, expected one for each environment")
    admitted = [item for item in scores if item.admitted]
    points = [CurvePoint(tau, 0, 0, 0, 0) for tau in TAUS]
    iqm = gap = None
    matches = 0
    if admitted:
        z, z_low, _ = _estimates(admitted).T
        matches = int(np.sum(reaches(z_low, MATCH)))
        points = curve(z, z_low, np.stack([item.z_samples for item in admitted]), confidence=confidence)
        iqm = aggregate(interquartile_mean, admitted, seed, confidence)._asdict()
        gap = aggregate(optimality_gap, admitted, seed, confidence)._asdict()
    return _finite(
        {
            "registered": len(scores),
            "admitted": len(admitted),
            "matches": matches,
            "parameters": parameters,
            "decoding": decoding,
            "confidence": confidence,
            "iqm": iqm,
            "optimality_gap": gap,
            "environments": [item.to_json() for item in scores],
            "curve": [{"tau": p.tau, "count": p.count, "low": p.low, "high": p.high} for p in points],
            "curve_conservative": [{"tau": p.tau, "count": p.conservative} for p in points],
        }
    )


def count_reaching(scores: dict[str, typing.Any], tau: float) -> int:
    """The number of admitted environments of a `scores.json` with z >= tau."""
    return sum(item["z"] is not None and bool(reaches(item["z"], tau)) for item in scores["environments"])


def table(scores: dict[str, typing.Any]) -> str:
    """The environments of a `scores.json` as plain text, one a line, refused ones last with the reason.

    Args:
      scores: what `scores_json` returned.

    Returns:
      The lines, the last ones saying how many environments were admitted and what was reached in them. Where an
      environment has what was reached in the other form of decoding, there are columns of both forms.
    """
    beside = any(item.get("other") for item in scores["environments"])
    header = ["environment", "random", "reference", "model", "z", "[low, high]", "first", "target"]
    header += ["decoding", "other", "z"] if beside else []
    lines, refused = [], []
    for item in scores["environments"]:
        if item["z"] is None:
            refused.append(f"  {item['id']}: {item['reason']}")
            continue
        interval = f"[{number(item['z_low'], '.2f')}, {number(item['z_high'], '.2f')}]"
        returns = [number(item[name]) for name in ("random", "reference", "model")]
        z, first = number(item["z"], ".2f"), number(item["z_first_episode"], ".2f")
        line = [item["id"], *returns, z, interval, first, number(item["public_target"])]
        lines.append(line + _decodings(item) if beside else line)
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in (header, *lines))
    ]
    text.insert(1, "-" * max(map(len, text)))
    if refused:
        text += ["", "refused, not scored:", *refused]
    reached = f"z >= 0.8 in {count_reaching(scores, 0.8)}, matching the reference in {scores['matches']}"
    return "\n".join([*text, "", f"admitted {scores['admitted']} of {scores['registered']} environments: {reached}"])


def _decodings(item: dict[str, typing.Any]) -> list[str]:
    """In which form an environment is scored, which is the other one, and its z."""
    other = item.get("other") or {"decoding": "-", "z": None}
    return [item.get("decoding", "-"), other["decoding"], number(other["z"], ".2f")]


def number(value: float | None, form: str = ".4g") -> str:
    """A number for people to read; a dash for None."""
    if value is None:
        return "-"
    if form == ".4g" and abs(value) >= 1000:
        return f"{value:.0f}"
    # -0.001 is 0.00, not -0.00
    text = format(value, form)
    return text.lstrip("-") if not float(text) else text


def _estimates(admitted: collections.abc.Sequence[EnvironmentScore]) -> Floats:
    """`[E, 3]`: z and the ends of its interval."""
    return np.array([item.z for item in admitted], np.float64)


def _finite(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The law of scaling: how the loss falls with parameters and data, fitted to finished runs."""

from __future__ import annotations

import itertools
import typing

import numpy as np

from ldm_jax.errors import LdmError
from ldm_jax.types import Array

_HUBER = 1e-3
"""Residuals of the logarithm beyond this count linearly, so that one odd run does not bend the law."""


class ScalingError(LdmError, ValueError):
    """Runs that no law can be fitted to."""


class Law(typing.NamedTuple):
    """L(N, D) = E + A / N^a + B / D^b.

    Attributes:
      floor: E, what neither parameters nor data lower.
      parameters: A.
      parameters_power: a.
      data: B.
      data_power: b.
    """

    floor: float
    parameters: float
    parameters_power: float
    data: float
    data_power: float

    def predict(self, parameters: Array, tokens: Array) -> Array:
        """The loss of models of N parameters after D tokens."""
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        return self.floor + self.parameters * n**-self.parameters_power + self.data * d**-self.data_power

    def best_size(self, flops: Array) -> Array:
        """N of the model that has the lowest loss after so much arithmetic, C = 6 N D (Hoffmann et al. 2022)."""
        a, b = self.parameters_power, self.data_power
        scale = (a * self.parameters / (b * self.data)) ** (1 / (a + b))
        return scale * (np.asarray(flops, np.float64) / 6) ** (b / (a + b))


def fit(parameters: Array, tokens: Array, losses: Array) -> Law:
    """Fits the law by the Huber loss of the logarithm, from many starting points.

    Args:
      parameters: `[R]`, N of each run.
      tokens: `[R]`, D of each run.
      losses: `[R]`, positive.

    Raises:
      ScalingError: too few runs, sizes or budgets, or a number that is not positive and finite.

    Source:
      Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", approach 3.
    """
    from scipy import optimize

    n, d, loss = (np.asarray(values, np.float64) for values in (parameters, tokens, losses))
    if not all(np.isfinite(values).all() and (values > 0).all() for values in (n, d)):
        raise ScalingError(f"got {n.tolist()} parameters and {d.tolist()} tokens, expected positive numbers")
    if len(loss) < 6 or len(set(n)) < 3 or len(set(d)) < 3:
        raise ScalingError(
            f"got {len(loss)} runs of {len(set(n))} sizes and {len(set(d))} budgets, expected at least 6 of 3 and 3: "
            "the law has five constants"
        )
    if not (np.isfinite(loss).all() and (loss > 0).all()):
        raise ScalingError(f"the losses are {loss.tolist()}, expected positive numbers: leave failed runs out")
    # Relative to the middle of the runs the constants do not depend on one another so much.
    middle_n, middle_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    u, v, target = np.log(n / middle_n), np.log(d / middle_d), np.log(loss)

    def residuals(constants: np.ndarray) -> np.ndarray:
        floor, size, amount, a, b = constants
        return np.logaddexp(np.logaddexp(floor, size - a * u), amount - b * v) - target

    low, high = [-30.0, -30.0, -30.0, 0.0, 0.0], [float(target.min()), 10.0, 10.0, 4.0, 4.0]
    best = None
    for share, a, b in itertools.product((0.05, 0.5, 0.9), (0.15, 0.5, 1.0), (0.15, 0.5, 1.0)):
        rest = np.log(max(np.exp(target.mean()) - share * loss.min(), 1e-9) / 2)
        start = np.clip([np.log(share * loss.min()), rest, rest, a, b], np.add(low, 1e-6), np.subtract(high, 1e-6))
        found = optimize.least_squares(residuals, start, bounds=(low, high), loss="huber", f_scale=_HUBER)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    floor, size, amount, a, b = best.x.tolist()
    return Law(
        floor=float(np.exp(floor)),
        parameters=float(np.exp(size) * middle_n**a),
        parameters_power=a,
        data=float(np.exp(amount) * middle_d**b),
        data_power=b,
    )


def leave_one_out(parameters: Array, tokens: Array, losses: Array) -> list[Law]:
    """The laws fitted without each run in turn: how far they differ says how much to trust the one of all runs.

    Args:
      parameters: `[R]`.
      tokens: `[R]`.
      losses: `[R]`; R is one more than `fit` needs.
    """
    columns = [np.asarray(values, np.float64) for values in (parameters, tokens, losses)]
    return [fit(*(np.delete(column, i) for column in columns)) for i in range(len(columns[0]))]

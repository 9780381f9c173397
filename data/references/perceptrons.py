"""Perceptrons: how their layers begin and what they make of numbers; plain lists of dicts of arrays."""

from __future__ import annotations

import collections.abc
import math

import numpy as np

from ldm_jax.types import Array, PyTree


def orthogonal(rng: np.random.Generator, rows: int, columns: int, gain: float) -> np.ndarray:
    """An orthogonal matrix `float32 [rows, columns]` times `gain` (Saxe et al. 2014)."""
    normal = rng.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diag(r))
    return (gain * (q if rows >= columns else q.T)).astype(np.float32)


def init_perceptron(rng: np.random.Generator, widths: tuple[int, ...], last_gain: float) -> PyTree:
    """Layers of these widths, that of the input first; the last one's weights are of the gain."""
    gains = [math.sqrt(2)] * (len(widths) - 2) + [last_gain]
    return [
        {"kernel": orthogonal(rng, rows, columns, gain), "bias": np.zeros(columns, np.float32)}
        for rows, columns, gain in zip(widths[:-1], widths[1:], gains, strict=True)
    ]


def apply_perceptron(layers: PyTree, x: Array, activate: collections.abc.Callable[[Array], Array]) -> Array:
    """The layers one after the other over the last axis of `x`, the last without an activation."""
    for layer in layers[:-1]:
        x = activate(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]

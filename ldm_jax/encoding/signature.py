"""The signature: what the model is told of the spaces it acts in, as one bounded vector."""

from __future__ import annotations

import numpy as np

from ldm_jax.encoding.actions import ActionLayout
from ldm_jax.encoding.observations import ObservationLayout, channels_last_shape
from ldm_jax.spaces import bounds, leaf_shape_dtype
from ldm_jax.types import Array

DESCRIBED = 16
"""Components of an observation, and of an action, that the signature describes one by one."""
SIGNATURE = 12 + 10 * DESCRIBED
"""Length of the signature vector."""


def symlog(x: Array) -> Array:
    """Sign times log(1 + |x|) (Hafner et al. 2023, DreamerV3)."""
    xp = x.__array_namespace__()
    return xp.sign(x) * xp.log1p(xp.abs(x))


def signature_vector(seen: ObservationLayout, acted: ActionLayout) -> np.ndarray:
    """Kinds, sizes and ranges of both spaces; every entry is bounded (infinity is a flag)."""
    lows, highs = [], []
    for leaf in seen.numeric:
        low, high = bounds(leaf.space)
        lows.append(low.ravel())
        highs.append(high.ravel())
    low, high = np.concatenate([np.zeros(0), *lows]), np.concatenate([np.zeros(0), *highs])
    grid_shapes = [channels_last_shape(leaf_shape_dtype(leaf.space).shape) for leaf in seen.grids]
    counts = [
        *(low.size, len(seen.sizes), sum(seen.sizes), max(seen.sizes, default=0)),
        *(max((shape[i] for shape in grid_shapes), default=0) for i in range(3)),
        *(len(seen.texts), acted.categorical, acted.flat_choices, max(acted.sizes, default=0), acted.continuous),
    ]
    observed = [_describe_range(low, high), _describe_sizes(seen.sizes)]
    chosen = [_describe_sizes(acted.sizes), _describe_range(acted.low, acted.high)]
    parts = [np.log2(1.0 + np.array(counts, np.float64)) / 4]
    for rows in (observed, chosen):
        described = np.concatenate(rows)[:DESCRIBED]
        parts.append(np.pad(described, ((0, DESCRIBED - len(described)), (0, 0))).ravel())
    return np.concatenate(parts).astype(np.float32)


def _describe_range(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    ends = [np.isfinite(low), np.isfinite(high)]
    values = [symlog(np.where(finite, end, 0.0)) / 4 for finite, end in zip(ends, (low, high), strict=True)]
    return np.stack([np.ones(low.size), *ends, *values], -1)


def _describe_sizes(sizes: tuple[int, ...]) -> np.ndarray:
    rows = [(-1.0, 1.0, 1.0, np.log2(size) / 4, size / 64 if size < 64 else 1.0) for size in sizes]
    return np.array(rows, np.float64).reshape(-1, 5)

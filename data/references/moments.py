"""Running mean and spread of numbers, whatever their unit: multiply what is seen, and all that follows is the same."""

from __future__ import annotations

import typing

import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array

LARGEST = 1e30
"""Infinite numbers are seen as this one: float32 can still take their mean."""

RESOLUTION = 1e-5
"""A spread below this share of the mean is what float32 makes of a constant."""


class Moments(typing.NamedTuple):
    """Running mean and standard deviation of D numbers; a pytree.

    Attributes:
      seen: `float32 []`, how many rows were seen.
      mean: `float32 [D]`, 0 before the first row.
      std: `float32 [D]`, 0 before the first row.
    """

    seen: Array
    mean: Array
    std: Array


def init_moments(size: int) -> Moments:
    """Moments before anything was seen."""
    return Moments(np.zeros((), np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32))


def first_moments(value_ND: Array) -> Moments:
    """Moments to begin with: all numbers in the unit of the largest of a first look, as good as forgotten at the next.

    Acting on nothing instead, until something was seen, was seen to do lasting harm (to LunarLander and Breakout).
    """
    unit = jnp.abs(value_ND).max(initial=0.0)
    size = value_ND.shape[-1]
    return Moments(
        np.full((), 1e-4, np.float32),
        np.zeros(size, np.float32),
        np.full(size, np.where(unit == 0, 1.0, unit), np.float32),
    )


def add_moments(moments: Moments, value_ND: Array, valid_N: Array) -> Moments:
    """Takes in the valid rows, `float32 [N, D]`; the others may hold anything.

    Squares are taken of numbers scaled to at most 1: those of 1e20 or 1e-20 are beyond float32.

    Source: Chan, Golub and LeVeque (1979), pairwise combination of variances.
    """
    valid_N1 = valid_N[:, None]
    values = jnp.where(valid_N1, value_ND, 0.0)
    unit_D = jnp.maximum(jnp.abs(values).max(0), jnp.maximum(jnp.abs(moments.mean), moments.std))
    unit_D = jnp.where(unit_D == 0, 1.0, unit_D)
    values, old_mean, old_std = values / unit_D, moments.mean / unit_D, moments.std / unit_D
    count = valid_N1.astype(jnp.float32).sum()
    mean = values.sum(0) / jnp.maximum(count, 1)
    spread = jnp.where(valid_N1, (values - mean) ** 2, 0.0).sum(0) / jnp.maximum(count, 1)
    total = moments.seen + count
    share = count / jnp.maximum(total, 1)
    apart = mean - old_mean
    variance = old_std**2 * (1 - share) + spread * share + apart**2 * share * (1 - share)
    return Moments(total, (old_mean + apart * share) * unit_D, jnp.sqrt(variance) * unit_D)


def scale(moments: Moments) -> Array:
    """What numbers are divided by to be about 1, `float32 [D]`: their spread, 1 where nothing but 0 was seen."""
    least = jnp.maximum(moments.std, RESOLUTION * jnp.abs(moments.mean))
    return jnp.where(least == 0, 1.0, least)


def standardize(moments: Moments, value: Array) -> Array:
    """Numbers `[..., D]` by how many of their spreads they are from their mean, clipped to +-10.

    Before anything was seen all are 0: what has no unit yet says nothing.
    """
    return jnp.where(moments.seen > 0, jnp.clip((value - moments.mean) / scale(moments), -10, 10), 0.0)

"""Uniform samples of a space, under jit too."""

from __future__ import annotations

import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.spaces.structure import SpaceError, choices, first_value, leaves, unflatten
from ldm_jax.spaces.values import bounds, clip_box, leaf_shape_dtype
from ldm_jax.types import Array, Key, PyTree


def sample(key: Key, space: gymnasium.Space, batch_size: int, action_mask: Array | None = None) -> PyTree:
    """Samples a batch uniformly, under jit too: the random policy.

    Unbounded sides of a Box follow Gymnasium: normal where both are unbounded, exponential where one is.

    Args:
      key: typed key.
      space: a space without Text.
      batch_size: B.
      action_mask: `bool [B, M]` over the categorical choices (see `TimeStep`), or None.

    Returns:
      The batch, each leaf `[B, ...]`.
    """
    values, offset = [], 0
    for path, leaf in leaves(space):
        key, leaf_key = jax.random.split(key)
        struct = leaf_shape_dtype(leaf)
        shape = (batch_size, *struct.shape)
        if isinstance(leaf, spaces.Box):
            sampled = _sample_reals if np.issubdtype(struct.dtype, np.floating) else _sample_whole_numbers
            values.append(sampled(leaf_key, leaf, shape).astype(struct.dtype))
        elif sizes := choices(leaf):
            columns = []
            for slot_key, size in zip(jax.random.split(leaf_key, len(sizes)), sizes, strict=True):
                if action_mask is None:
                    columns.append(jax.random.randint(slot_key, (batch_size,), 0, np.uint32(size), np.uint32))
                else:
                    logits = jnp.where(action_mask[:, offset : offset + size], np.float32(0), np.float32(-np.inf))
                    columns.append(jax.random.categorical(slot_key, logits).astype(np.uint32))
                offset += size
            index = jnp.stack(columns, -1).reshape(shape)
            values.append((index + _as_uint32(first_value(leaf))).astype(struct.dtype))
        else:
            raise SpaceError(f"cannot sample the part {path} of kind {type(leaf).__name__}")
    return unflatten(space, values)


def _as_uint32(values: typing.Any) -> np.ndarray:
    """Whole numbers modulo 2^32: sums wrap, so that they are exact for every type of 32 bits or less."""
    return np.asarray(values).astype(np.int64).astype(np.uint32)


def _sample_whole_numbers(key: Key, space: spaces.Box, shape: tuple[int, ...]) -> Array:
    """`uint32`, modulo 2^32; every number of the range as likely as every other, to 2^-32."""
    span = space.high.astype(np.int64) - space.low.astype(np.int64) + 1
    whole = span == 2**32  # all that 32 bits can be: the span itself does not fit
    below = jax.random.randint(key, shape, 0, np.where(whole, 1, span).astype(np.uint32), np.uint32)
    if whole.any():
        below = jnp.where(whole, jax.random.bits(jax.random.fold_in(key, 1), shape, np.uint32), below)
    return below + _as_uint32(space.low)


def _sample_reals(key: Key, space: spaces.Box, shape: tuple[int, ...]) -> Array:
    """`float32`, rounded where the space holds whole numbers that are too large for 32 bits."""
    low, high = bounds(space)
    bounded_low, bounded_high = np.isfinite(low), np.isfinite(high)
    finite_low, finite_high = np.where(bounded_low, low, 0.0), np.where(bounded_high, high, 0.0)
    uniform_key, normal_key, exponential_key = jax.random.split(key, 3)
    exponential = jax.random.exponential(exponential_key, shape, np.float32)
    value = jax.random.normal(normal_key, shape, np.float32)
    value = jnp.where(bounded_low, finite_low.astype(np.float32) + exponential, value)
    value = jnp.where(bounded_high & ~bounded_low, finite_high.astype(np.float32) - exponential, value)
    width = (finite_high - finite_low).astype(np.float32)
    uniform = finite_low.astype(np.float32) + jax.random.uniform(uniform_key, shape, np.float32) * width
    value = jnp.where(bounded_low & bounded_high, uniform, value)
    return clip_box(space, value if np.issubdtype(space.dtype, np.floating) else jnp.round(value))

"""Boxes with rows and columns seen through convolutions: images by ever larger patches, grids cell by cell.

Everything is a product of matrices: on CPUs, a convolution in a loop is far slower.
Source: Mnih et al. 2013 (images); Young and Tian 2019, MinAtar (grids).
"""

from __future__ import annotations

import math
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.encoding.observations import channels_last, channels_last_shape
from ldm_jax.spaces import bounds
from ldm_jax.types import Array, PyTree

from .moments import LARGEST
from .perceptrons import init_perceptron, orthogonal

IMAGE_FEATURES, GRID_FEATURES = 256, 128

IMAGE_SIDE = 32
"""A Box with two axes at least this long is an image."""

IMAGE_LAYERS = ((4, 16), (2, 32))
"""Stride and channels of each layer; the kernel is twice the stride, the padding valid."""

GRID_SIDE, GRID_CHANNELS = 3, 16
"""The shortest side of a grid, which is that of the kernel, too; its stride is 1 and its padding valid."""

CELL_KINDS = 16
"""Whole numbers of a grid are names as well, of so many kinds of cells; higher ones are of the last kind."""


def is_image(space: gymnasium.Space) -> bool:
    """Whether a leaf space holds images: a Box of rank 2 or 3 with two axes of `IMAGE_SIDE` or more."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    return sorted(space.shape)[-2] >= IMAGE_SIDE


def is_grid(space: gymnasium.Space) -> bool:
    """Whether a leaf space holds cells in rows and columns, a board or a view of a map, too small for an image."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3) or is_image(space):
        return False
    return min(channels_last_shape(space.shape)[:2]) >= GRID_SIDE


def features(space: spaces.Box) -> int:
    """How many features an image or a grid has."""
    return IMAGE_FEATURES if is_image(space) else GRID_FEATURES


def init_convolutions(rng: np.random.Generator, space: spaces.Box) -> PyTree:
    """The layers that see an image or a grid."""
    height, width, channels = channels_last_shape(space.shape)
    if is_image(space):
        layers = []
        for stride, wide in IMAGE_LAYERS:
            layers.append(_layer(rng, 4 * stride * stride * channels, wide))
            height, width, channels = height // stride - 1, width // stride - 1, wide
        return layers + init_perceptron(rng, (height * width * channels, IMAGE_FEATURES), math.sqrt(2))
    layers = []
    if _has_kinds(space):
        layers.append(_layer(rng, (1 + CELL_KINDS) * channels, GRID_CHANNELS))
        channels = GRID_CHANNELS
    layers.append(_layer(rng, GRID_SIDE * GRID_SIDE * channels, GRID_CHANNELS))
    cells = (height - GRID_SIDE + 1) * (width - GRID_SIDE + 1)
    return layers + init_perceptron(rng, (cells * GRID_CHANNELS, GRID_FEATURES), math.sqrt(2))


def apply_convolutions(layers: PyTree, value: Array, space: spaces.Box) -> Array:
    """The features `[B, features]` of images or grids `[B, *shape]`."""
    if is_image(space):
        x = _scaled(value, space) if value_range(space) is None else 2 * _scaled(value, space) - 1
        for layer, (stride, _) in zip(layers[:-1], IMAGE_LAYERS, strict=True):
            x = _dense(layer, _large_patches(x, stride))
    else:
        x = _scaled(value, space)
        for layer in layers[:-2]:
            kinds = channels_last(value, space.shape) - int(bounds(space)[0].min())
            kinds = jax.nn.one_hot(jnp.clip(kinds, 0, CELL_KINDS - 1), CELL_KINDS)
            x = _dense(layer, jnp.concatenate([x, kinds.reshape(*x.shape[:3], -1)], -1))
        x = _dense(layers[-2], _patches(x))
    return _dense(layers[-1], x.reshape(x.shape[0], -1))


def value_range(space: spaces.Box) -> tuple[np.float32, np.float32] | None:
    """The lowest and the highest number of an image or a grid, None where it declares none."""
    low, high = (np.float32(side) for side in (bounds(space)[0].min(), bounds(space)[1].max()))
    return (low, high) if np.isfinite(low) and np.isfinite(high) and high > low else None


def level(rows: Array) -> tuple[Array, Array]:
    """Mean and spread `[B]` of each row, whatever its unit."""
    unit = jnp.abs(rows).max(-1, keepdims=True)
    unit = jnp.where(unit == 0, 1.0, unit)
    return (rows / unit).mean(-1) * unit[:, 0], (rows / unit).std(-1) * unit[:, 0]


def _has_kinds(space: spaces.Box) -> bool:
    """Whether cells hold whole numbers that may be names; of two, one number tells them apart."""
    return np.issubdtype(typing.cast(np.dtype, space.dtype), np.integer) and value_range(space) not in (None, (0, 1))


def _scaled(value: Array, space: spaces.Box) -> Array:
    """To float `[B, height, width, channels]`, 0 to 1 or, where no bounds are declared, each standardized by itself."""
    if (ends := value_range(space)) is not None:
        return channels_last((value.astype(jnp.float32) - ends[0]) / (ends[1] - ends[0]), space.shape)
    rows = jnp.clip(value.reshape(value.shape[0], -1).astype(jnp.float32), -LARGEST, LARGEST)
    mean, spread = (part[:, None] for part in level(rows))
    scaled = ((rows - mean) / jnp.where(spread == 0, 1.0, spread)).reshape(value.shape)
    return channels_last(scaled, space.shape)


def _layer(rng: np.random.Generator, rows: int, columns: int) -> dict[str, np.ndarray]:
    return {"kernel": orthogonal(rng, rows, columns, math.sqrt(2)), "bias": np.zeros(columns, np.float32)}


def _dense(layer: PyTree, x: Array) -> Array:
    return jax.nn.relu(x @ layer["kernel"] + layer["bias"])


def _large_patches(x: Array, stride: int) -> Array:
    """Windows `[B, rows, columns, window]` of twice the stride."""
    batch, height, width, channels = x.shape
    rows, columns = height // stride, width // stride
    x = x[:, : rows * stride, : columns * stride].reshape(batch, rows, stride, columns, stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
    return jnp.concatenate([x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]], -1)


def _patches(x: Array) -> Array:
    """Windows `[B, rows, columns, window]` around each cell that has all neighbours."""
    rows, columns = x.shape[1] - GRID_SIDE + 1, x.shape[2] - GRID_SIDE + 1
    moved = [x[:, i : i + rows, j : j + columns] for i in range(GRID_SIDE) for j in range(GRID_SIDE)]
    return jnp.concatenate(moved, -1)

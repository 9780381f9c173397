"""The small networks of reference policies: any observation in, action slots and a value out; plain dicts of arrays."""

from __future__ import annotations

import math
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.encoding.actions import ActionLayout
from ldm_jax.spaces import UNBOUNDED, bounds, choices, get, leaf_shape_dtype, leaves, start, text_bytes
from ldm_jax.types import Array, PyTree

MASKED = -1e4
"""The logit of a choice that is not allowed: its probability is 0 in float32, and float16 can hold it."""

ONE_HOT_LIMIT = 1024
"""A categorical component with more choices than this is embedded instead of written as one-hot numbers."""

EMBEDDING_WIDTH = 64
IMAGE_FEATURES = 256
IMAGE_SIDE = 32
"""A Box with two axes at least this long is an image, seen through convolutions; smaller grids are flattened."""

CONVOLUTIONS = ((4, 16), (2, 32))
"""Stride and channels of each layer; the kernel is twice the stride, the padding valid (Mnih et al. 2013)."""


class Moments(typing.NamedTuple):
    """Running mean and variance of numbers.

    Attributes:
      count: `float32 []`, how many rows were seen.
      mean: `float32 [D]`.
      variance: `float32 [D]`.
    """

    count: Array
    mean: Array
    variance: Array


class Network(typing.NamedTuple):
    """Policy and value as pure functions.

    Attributes:
      init: `init(rng) -> params`, on the host; `rng` is NumPy's generator.
      apply: `apply(params, moments, observation, action_mask) -> (logits [B, M], mean [B, C], value [B])`; the mean in
        normalized units, where a slot's range is -1 to 1.
      numbers: `numbers(observation) -> float32 [B, D]`, what `moments` are taken of.
      size: D.
    """

    init: typing.Callable[[np.random.Generator], PyTree]
    apply: typing.Callable[[PyTree, Moments, PyTree, Array | None], tuple[Array, Array, Array]]
    numbers: typing.Callable[[PyTree], Array]
    size: int


def init_moments(size: int) -> Moments:
    """Moments before anything was seen: mean 0, variance 1."""
    return Moments(np.float32(1e-4), np.zeros(size, np.float32), np.ones(size, np.float32))


def add_moments(moments: Moments, value_ND: Array, valid_N: Array) -> Moments:
    """Takes in the valid rows.

    Source: Chan, Golub and LeVeque (1979), pairwise combination of variances.
    """
    weight_N1 = valid_N[:, None].astype(jnp.float32)
    value_ND = jnp.where(valid_N[:, None], value_ND, 0.0)
    count = weight_N1.sum()
    mean = value_ND.sum(0) / jnp.maximum(count, 1)
    variance = (weight_N1 * (value_ND - mean) ** 2).sum(0) / jnp.maximum(count, 1)
    total = moments.count + count
    share = count / total
    apart = mean - moments.mean
    variance = moments.variance * (1 - share) + variance * share + apart**2 * share * (1 - share)
    return Moments(total, moments.mean + apart * share, variance)


def is_image(space: gymnasium.Space) -> bool:
    """Whether a leaf space holds images: a Box of rank 2 or 3 with two axes of `IMAGE_SIDE` or more."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    return sorted(space.shape)[-2] >= IMAGE_SIDE


def network(
    observation_space: gymnasium.Space, layout: ActionLayout, hidden: tuple[int, ...], activation: str
) -> Network:
    """Builds separate policy and value perceptrons over one encoding of the observation.

    Numbers are standardized by running moments and clipped to +-10; categories are one-hot, or embedded where there are
    many; images go through convolutions that policy and value share; a text is told from others by 32 bits of its hash,
    and not read.

    Args:
      observation_space: of one environment.
      layout: of the action space.
      hidden: widths of the hidden layers.
      activation: a name in `jax.nn`.
    """
    parts = leaves(observation_space)
    images = [leaf for leaf in parts if is_image(leaf.space)]
    texts = [leaf for leaf in parts if isinstance(leaf.space, spaces.Text)]
    numeric = [leaf for leaf in parts if isinstance(leaf.space, spaces.Box) and not is_image(leaf.space)]
    categories = [leaf for leaf in parts if choices(leaf.space)]
    sizes = [size for leaf in categories for size in choices(leaf.space)]
    large = [size for size in sizes if size > ONE_HOT_LIMIT]
    size = sum(math.prod(leaf.space.shape) for leaf in numeric)
    width = size + sum(n for n in sizes if n <= ONE_HOT_LIMIT) + EMBEDDING_WIDTH * len(large)
    width += 32 * len(texts) + IMAGE_FEATURES * len(images)
    outputs = {"actor": layout.flat_choices + layout.continuous, "critic": 1}
    activate = getattr(jax.nn, activation)

    def init(rng: np.random.Generator) -> PyTree:
        params: dict[str, typing.Any] = {
            # A small last layer of the policy starts it near uniform (Andrychowicz et al. 2021, What Matters).
            name: _init_perceptron(rng, (width, *hidden, out), 0.01 if name == "actor" else 1.0)
            for name, out in outputs.items()
        }
        params["embeddings"] = [rng.normal(0, 1, (n, EMBEDDING_WIDTH)).astype(np.float32) for n in large]
        params["images"] = [_init_convolutions(rng, _image_shape(leaf.space)) for leaf in images]
        return params

    def numbers(observation: PyTree) -> Array:
        return _concatenate(observation, [_rows(get(observation, leaf.path), leaf.space) for leaf in numeric])

    def encode(params: PyTree, moments: Moments, observation: PyTree) -> Array:
        standard = (numbers(observation) - moments.mean) / jnp.sqrt(moments.variance + 1e-8)
        columns, embeddings = [jnp.clip(standard, -10, 10)], iter(params["embeddings"])
        for leaf in categories:
            value = get(observation, leaf.path) - start(leaf.space)
            value = value.reshape(value.shape[0], -1)
            components = choices(leaf.space)
            if len(set(components)) == 1 and components[0] <= ONE_HOT_LIMIT:  # at once: boards have hundreds
                columns.append(jax.nn.one_hot(value, components[0]).reshape(value.shape[0], -1))
                continue
            for k, n in enumerate(components):
                index = value[:, k]
                columns.append(jax.nn.one_hot(index, n) if n <= ONE_HOT_LIMIT else next(embeddings)[index])
        columns += [_text_bits(get(observation, leaf.path), text_bytes(leaf.space)) for leaf in texts]
        for leaf, layers in zip(images, params["images"], strict=True):
            columns.append(_apply_convolutions(layers, _as_image(get(observation, leaf.path), leaf.space)))
        return jnp.concatenate(columns, -1)

    def apply(params: PyTree, moments: Moments, observation: PyTree, action_mask: Array | None):
        encoded = encode(params, moments, observation)
        policy = _apply_perceptron(params["actor"], encoded, activate)
        value = _apply_perceptron(params["critic"], encoded, activate)[:, 0]
        logits = policy[:, : layout.flat_choices]
        if action_mask is not None:
            logits = jnp.where(_allow_something(layout, action_mask), logits, MASKED)
        return logits, policy[:, layout.flat_choices :], value

    return Network(init, apply, numbers, size)


def _allow_something(layout: ActionLayout, action_mask: Array) -> Array:
    # After an end some games allow nothing at all; any choice will do there.
    columns, offset = [], 0
    for n in layout.sizes:
        slot = action_mask[:, offset : offset + n]
        columns.append(slot | ~slot.any(-1, keepdims=True))
        offset += n
    return jnp.concatenate(columns, -1)


def _concatenate(observation: PyTree, columns: list[Array]) -> Array:
    rows = jax.tree.leaves(observation)[0].shape[0]
    return jnp.concatenate([jnp.zeros((rows, 0), jnp.float32), *columns], -1)


def _rows(value: Array, space: gymnasium.Space) -> Array:
    width = math.prod(leaf_shape_dtype(space).shape)
    return jnp.clip(value.reshape(value.shape[0], width).astype(jnp.float32), -UNBOUNDED, UNBOUNDED)


def _text_bits(value: Array, length: int) -> Array:
    powers = np.array([pow(0x01000193, i + 1, 1 << 32) for i in range(length)], np.uint32)
    code = (value.astype(jnp.uint32) * powers).sum(-1)
    code = (code ^ (code >> 15)) * jnp.uint32(0x2C1B3C6D)
    code = (code ^ (code >> 12)) * jnp.uint32(0x297A2D39)
    bits = (code[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 2.0 * bits.astype(jnp.float32) - 1.0


def _orthogonal(rng: np.random.Generator, rows: int, columns: int, gain: float) -> np.ndarray:
    normal = rng.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diag(r))
    return (gain * (q if rows >= columns else q.T)).astype(np.float32)


def _init_perceptron(rng: np.random.Generator, widths: tuple[int, ...], last_gain: float) -> PyTree:
    gains = [math.sqrt(2)] * (len(widths) - 2) + [last_gain]
    return [
        {"kernel": _orthogonal(rng, rows, columns, gain), "bias": np.zeros(columns, np.float32)}
        for rows, columns, gain in zip(widths[:-1], widths[1:], gains, strict=True)
    ]


def _apply_perceptron(layers: PyTree, x: Array, activate: typing.Callable[[Array], Array]) -> Array:
    for layer in layers[:-1]:
        x = activate(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def _image_shape(space: spaces.Box) -> tuple[int, int, int]:
    first, second, third = (*space.shape, 1)[:3]
    return (second, third, first) if first < third else (first, second, third)


def _as_image(value: Array, space: spaces.Box) -> Array:
    """To float `[B, height, width, channels]`, about -1 to 1 where the bounds are finite."""
    low, high = (np.float32(side) for side in (bounds(space)[0].min(), bounds(space)[1].max()))
    value = value[..., None] if len(space.shape) == 2 else value
    value = jnp.moveaxis(value, 1, -1) if value.shape[1] < value.shape[3] else value
    value = value.astype(jnp.float32)
    if np.isfinite(low) and np.isfinite(high) and high > low:
        value = (value - low) * (2 / (high - low)) - 1
    return value


def _init_convolutions(rng: np.random.Generator, shape: tuple[int, int, int]) -> PyTree:
    height, width, channels = shape
    layers = []
    for stride, features in CONVOLUTIONS:
        kernel = _orthogonal(rng, 4 * stride * stride * channels, features, math.sqrt(2))
        layers.append({"kernel": kernel, "bias": np.zeros(features, np.float32)})
        height, width, channels = height // stride - 1, width // stride - 1, features
    return layers + _init_perceptron(rng, (height * width * channels, IMAGE_FEATURES), math.sqrt(2))


def _apply_convolutions(layers: PyTree, x: Array) -> Array:
    for layer, (stride, _) in zip(layers[:-1], CONVOLUTIONS, strict=True):
        x = jax.nn.relu(_patches(x, stride) @ layer["kernel"] + layer["bias"])
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ layers[-1]["kernel"] + layers[-1]["bias"])


def _patches(x: Array, stride: int) -> Array:
    """Windows `[B, rows, columns, window]` of twice the stride: on CPUs, convolving in a loop is far slower."""
    batch, height, width, channels = x.shape
    rows, columns = height // stride, width // stride
    x = x[:, : rows * stride, : columns * stride].reshape(batch, rows, stride, columns, stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
    return jnp.concatenate([x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]], -1)

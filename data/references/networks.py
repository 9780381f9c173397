"""The small networks of reference policies: any observation in, action slots and a value out; plain dicts of arrays."""

from __future__ import annotations

import collections.abc
import functools
import math
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16, ActionLayout
from ldm_jax.encoding.observations import channels_last, channels_last_shape
from ldm_jax.spaces import Leaf, bounds, choices, first_value, get, leaf_shape_dtype, leaves, text_bytes
from ldm_jax.types import Array, PyTree

from .moments import Moments, standardize

LARGEST = 1e30
"""Infinite numbers are seen as this one: float32 can still take their mean."""

ONE_HOT_LIMIT = 1024
"""A categorical component with more choices than this is embedded instead of written as one-hot numbers."""

EMBEDDING_WIDTH = 64
IMAGE_FEATURES = 256
IMAGE_SIDE = 32
"""A Box with two axes at least this long is an image, seen through convolutions; smaller grids are flattened."""

CONVOLUTIONS = ((4, 16), (2, 32))
"""Stride and channels of each layer; the kernel is twice the stride, the padding valid (Mnih et al. 2013)."""


class Network(typing.NamedTuple):
    """Policy and value as pure functions.

    Attributes:
      init: `init(rng) -> params`, on the host; `rng` is NumPy's generator.
      apply: `apply(params, moments, observation, action_mask) -> (logits [B, M], mean [B, C], value [B])`; the mean in
        normalized units, where a slot's range is -1 to 1.
      encode: `encode(params, moments, observation) -> [B, E]`, the observation as `apply` sees it.
      decide: `decide(params, features, action_mask)`, what `apply` says, of `features` `[B, E + extra]`.
      numbers: `numbers(observation) -> float32 [B, D]`, what `moments` are taken of.
      size: D.
      width: E.
    """

    init: collections.abc.Callable[[np.random.Generator], PyTree]
    apply: collections.abc.Callable[[PyTree, Moments, PyTree, Array | None], tuple[Array, Array, Array]]
    encode: collections.abc.Callable[[PyTree, Moments, PyTree], Array]
    decide: collections.abc.Callable[[PyTree, Array, Array | None], tuple[Array, Array, Array]]
    numbers: collections.abc.Callable[[PyTree], Array]
    size: int
    width: int


def is_image(space: gymnasium.Space) -> bool:
    """Whether a leaf space holds images: a Box of rank 2 or 3 with two axes of `IMAGE_SIDE` or more."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    return sorted(space.shape)[-2] >= IMAGE_SIDE


def network(
    observation_space: gymnasium.Space,
    layout: ActionLayout,
    hidden: tuple[int, ...],
    activation: str,
    *,
    extra: int = 0,
    layer_norm: bool = False,
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
      extra: how many features `decide` is given beyond those of the observation.
      layer_norm: whether the hidden layers are normalized before their activation (Ba et al. 2016).
    """
    parts = _sort(observation_space)
    outputs = {"actor": layout.flat_choices + layout.continuous, "critic": 1}
    function = getattr(jax.nn, activation)
    activate = (lambda x: function(jax.nn.standardize(x, epsilon=1e-6))) if layer_norm else function

    def init(rng: np.random.Generator) -> PyTree:
        params: dict[str, typing.Any] = {
            # A small last layer of the policy starts it near uniform (Andrychowicz et al. 2021, What Matters).
            name: init_perceptron(rng, (parts.width + extra, *hidden, out), 0.01 if name == "actor" else 1.0)
            for name, out in outputs.items()
        }
        params["embeddings"] = [rng.normal(0, 1, (n, EMBEDDING_WIDTH)).astype(np.float32) for n in parts.large]
        params["images"] = [_init_convolutions(rng, channels_last_shape(leaf.space.shape)) for leaf in parts.images]
        return params

    encode = functools.partial(_encode, parts)

    def decide(params: PyTree, features: Array, action_mask: Array | None) -> tuple[Array, Array, Array]:
        policy = apply_perceptron(params["actor"], features, activate)
        value = apply_perceptron(params["critic"], features, activate)[..., 0]
        logits = policy[..., : layout.flat_choices]
        if action_mask is not None:
            logits = jnp.where(action_mask, logits, NOT_ALLOWED_FLOAT16)
        return logits, policy[..., layout.flat_choices :], value

    def apply(
        params: PyTree, moments: Moments, observation: PyTree, action_mask: Array | None
    ) -> tuple[Array, Array, Array]:
        return decide(params, encode(params, moments, observation), action_mask)

    return Network(init, apply, encode, decide, functools.partial(_numbers, parts), parts.numbers, parts.width)


class _Parts(typing.NamedTuple):
    """The leaves of an observation space by how they are seen, in canonical order."""

    numeric: tuple[Leaf, ...]
    categories: tuple[Leaf, ...]
    texts: tuple[Leaf, ...]
    images: tuple[Leaf, ...]

    @property
    def numbers(self) -> int:
        """How many numbers are standardized; an image without bounds has two, see `_numbers`."""
        unbounded = sum(_range(leaf.space) is None for leaf in self.images)
        return sum(math.prod(leaf.space.shape) for leaf in self.numeric) + 2 * unbounded

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of choices of each categorical component."""
        return tuple(size for leaf in self.categories for size in choices(leaf.space))

    @property
    def large(self) -> tuple[int, ...]:
        """Those that are embedded."""
        return tuple(size for size in self.sizes if size > ONE_HOT_LIMIT)

    @property
    def width(self) -> int:
        """The length of the encoded observation."""
        one_hot = sum(size for size in self.sizes if size <= ONE_HOT_LIMIT)
        rest = EMBEDDING_WIDTH * len(self.large) + 32 * len(self.texts) + IMAGE_FEATURES * len(self.images)
        return self.numbers + one_hot + rest


def _sort(observation_space: gymnasium.Space) -> _Parts:
    parts = leaves(observation_space)
    return _Parts(
        numeric=tuple(leaf for leaf in parts if isinstance(leaf.space, spaces.Box) and not is_image(leaf.space)),
        categories=tuple(leaf for leaf in parts if choices(leaf.space)),
        texts=tuple(leaf for leaf in parts if isinstance(leaf.space, spaces.Text)),
        images=tuple(leaf for leaf in parts if is_image(leaf.space)),
    )


def _numbers(parts: _Parts, observation: PyTree) -> Array:
    """What moments are taken of: all plain numbers, and mean and spread of the images that declare no bounds."""
    rows = jax.tree.leaves(observation)[0].shape[0]
    columns: list[Array] = [jnp.zeros((rows, 0), jnp.float32)]
    columns += [_rows(get(observation, leaf.path), leaf.space) for leaf in parts.numeric]
    for leaf in parts.images:
        if _range(leaf.space) is None:
            columns.append(jnp.stack(_level(_rows(get(observation, leaf.path), leaf.space)), -1))
    return jnp.concatenate(columns, -1)


def _encode(parts: _Parts, params: PyTree, moments: Moments, observation: PyTree) -> Array:
    columns: list[Array] = [standardize(moments, _numbers(parts, observation))]
    embeddings = iter(params["embeddings"])
    for leaf in parts.categories:
        value = get(observation, leaf.path) - first_value(leaf.space)
        value = value.reshape(value.shape[0], -1)
        components = choices(leaf.space)
        if len(set(components)) == 1 and components[0] <= ONE_HOT_LIMIT:  # at once: boards have hundreds
            columns.append(jax.nn.one_hot(value, components[0]).reshape(value.shape[0], -1))
            continue
        for k, n in enumerate(components):
            index = value[:, k]
            columns.append(jax.nn.one_hot(index, n) if n <= ONE_HOT_LIMIT else next(embeddings)[index])
    columns += [_text_bits(get(observation, leaf.path), text_bytes(leaf.space)) for leaf in parts.texts]
    for leaf, layers in zip(parts.images, params["images"], strict=True):
        columns.append(_apply_convolutions(layers, _as_image(get(observation, leaf.path), leaf.space)))
    return jnp.concatenate(columns, -1)


def _rows(value: Array, space: gymnasium.Space) -> Array:
    width = math.prod(leaf_shape_dtype(space).shape)
    return jnp.clip(value.reshape(value.shape[0], width).astype(jnp.float32), -LARGEST, LARGEST)


def _text_bits(value: Array, length: int) -> Array:
    powers = np.array([pow(0x01000193, i + 1, 1 << 32) for i in range(length)], np.uint32)
    code = (value.astype(jnp.uint32) * powers).sum(-1)
    code = (code ^ (code >> 15)) * jnp.uint32(0x2C1B3C6D)
    code = (code ^ (code >> 12)) * jnp.uint32(0x297A2D39)
    bits = (code[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 2.0 * bits.astype(jnp.float32) - 1.0


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


def _as_image(value: Array, space: spaces.Box) -> Array:
    """To float `[B, height, width, channels]`, about -1 to 1."""
    if (limits := _range(space)) is not None:
        low, high = limits
        image = (value.astype(jnp.float32) - low) * (2 / (high - low)) - 1
    else:
        rows = _rows(value, space)
        mean, spread = (level[:, None] for level in _level(rows))
        image = ((rows - mean) / jnp.where(spread == 0, 1.0, spread)).reshape(value.shape)
    return channels_last(image, space.shape)


def _range(space: spaces.Box) -> tuple[np.float32, np.float32] | None:
    """The lowest and the highest number of an image, None where it declares none."""
    low, high = (np.float32(side) for side in (bounds(space)[0].min(), bounds(space)[1].max()))
    return (low, high) if np.isfinite(low) and np.isfinite(high) and high > low else None


def _level(rows: Array) -> tuple[Array, Array]:
    """Mean and spread `[B]` of each row, whatever its unit."""
    unit = jnp.abs(rows).max(-1, keepdims=True)
    unit = jnp.where(unit == 0, 1.0, unit)
    return (rows / unit).mean(-1) * unit[:, 0], (rows / unit).std(-1) * unit[:, 0]


def _init_convolutions(rng: np.random.Generator, shape: tuple[int, int, int]) -> PyTree:
    height, width, channels = shape
    layers = []
    for stride, features in CONVOLUTIONS:
        kernel = orthogonal(rng, 4 * stride * stride * channels, features, math.sqrt(2))
        layers.append({"kernel": kernel, "bias": np.zeros(features, np.float32)})
        height, width, channels = height // stride - 1, width // stride - 1, features
    return layers + init_perceptron(rng, (height * width * channels, IMAGE_FEATURES), math.sqrt(2))


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

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
from ldm_jax.spaces import Leaf, choices, first_value, get, leaf_shape_dtype, leaves, text_bytes
from ldm_jax.types import Array, PyTree

from .convolutions import apply_convolutions, features, init_convolutions, is_grid, is_image, level, value_range
from .moments import LARGEST, Moments, standardize
from .perceptrons import apply_perceptron, init_perceptron

ONE_HOT_LIMIT = 1024
"""A categorical component with more choices than this is embedded instead of written as one-hot numbers."""

EMBEDDING_WIDTH = 64


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


def network(
    observation_space: gymnasium.Space,
    layout: ActionLayout,
    hidden: tuple[int, ...],
    activation: str,
    *,
    extra: int = 0,
    layer_norm: bool = False,
    convolved: bool = False,
) -> Network:
    """Builds separate policy and value perceptrons over one encoding of the observation.

    Numbers are standardized by running moments and clipped to +-10; categories are one-hot, or embedded where there are
    many; images, and small grids where asked for, go through convolutions that policy and value share; a text is told
    from others by 32 bits of its hash, and not read.

    Args:
      observation_space: of one environment.
      layout: of the action space.
      hidden: widths of the hidden layers.
      activation: a name in `jax.nn`.
      extra: how many features `decide` is given beyond those of the observation.
      layer_norm: whether the hidden layers are normalized before their activation (Ba et al. 2016).
      convolved: whether small grids are seen through convolutions, too, and not number by number.
    """
    parts = _sort(observation_space, convolved=convolved)
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
        params["images"] = [init_convolutions(rng, leaf.space) for leaf in parts.images]
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
        unbounded = sum(value_range(leaf.space) is None for leaf in self.images)
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
        seen = sum(features(leaf.space) for leaf in self.images)
        return self.numbers + one_hot + EMBEDDING_WIDTH * len(self.large) + 32 * len(self.texts) + seen


def _sort(observation_space: gymnasium.Space, *, convolved: bool) -> _Parts:
    parts = leaves(observation_space)

    def has_cells(leaf: Leaf) -> bool:
        return is_image(leaf.space) or (convolved and is_grid(leaf.space))

    return _Parts(
        numeric=tuple(leaf for leaf in parts if isinstance(leaf.space, spaces.Box) and not has_cells(leaf)),
        categories=tuple(leaf for leaf in parts if choices(leaf.space)),
        texts=tuple(leaf for leaf in parts if isinstance(leaf.space, spaces.Text)),
        images=tuple(leaf for leaf in parts if has_cells(leaf)),
    )


def _numbers(parts: _Parts, observation: PyTree) -> Array:
    """What moments are taken of: all plain numbers, and mean and spread of the images that declare no bounds."""
    rows = jax.tree.leaves(observation)[0].shape[0]
    columns: list[Array] = [jnp.zeros((rows, 0), jnp.float32)]
    columns += [_rows(get(observation, leaf.path), leaf.space) for leaf in parts.numeric]
    for leaf in parts.images:
        if value_range(leaf.space) is None:
            columns.append(jnp.stack(level(_rows(get(observation, leaf.path), leaf.space)), -1))
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
        columns.append(apply_convolutions(layers, get(observation, leaf.path), leaf.space))
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

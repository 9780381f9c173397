"""The decoder: a Llama-style transformer over tokens, with attention to the last W of them (Touvron et al. 2023)."""

from __future__ import annotations

import collections.abc
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ldm_jax.model.config import ModelConfig
from ldm_jax.model.kernels import attend
from ldm_jax.model.layers import Linear, Norm
from ldm_jax.types import Array, PyTree


class Cache(typing.NamedTuple):
    """Keys and values of the last S = W steps of each row, a ring buffer; a pytree whose leaves have B in front.

    Attributes:
      keys: of each layer `[B, G, S, K]`, rotated by their own position; G key-value heads.
      values: of each layer `[B, G, S, K]`.
      length: `int32 [B]`, steps that each row remembers, at most S; a row whose length is set to 0 begins anew.
      slot: `int32 [B]`, where the next step goes.
      position: `uint32 [B]`, of the next step; wraps around.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    slot: Array
    position: Array


class Projected(typing.NamedTuple):
    """What attention makes of tokens: queries `[B, T, H, K]`, keys and values `[B, T, G, K]`, before rotation."""

    query: Array
    key: Array
    value: Array


class Ring(typing.NamedTuple):
    """One layer's part of a cache, read while the layers are scanned.

    Each layer's arrays are read where they lie: what a scan cuts out of stacked ones is copied first.

    Attributes:
      cache: of all layers.
      layer: which of them, `int32 []`.
    """

    cache: Cache
    layer: Array

    def score(self, query_BGRK: Array) -> Array:
        """Products of queries and keys, `[B, G, R, S]`, at least float32."""
        wide = jnp.promote_types(query_BGRK.dtype, jnp.float32)
        product = functools.partial(jnp.einsum, "bgsk,bgrk->bgrs", preferred_element_type=wide)
        return self._of_layer(product, self.cache.keys, query_BGRK)

    def mix(self, weights_BGRS: Array) -> Array:
        """The values' sums by weights, `[B, G, R, K]`."""
        return self._of_layer(functools.partial(jnp.einsum, "bgsk,bgrs->bgrk"), self.cache.values, weights_BGRS)

    def _of_layer(
        self, product: collections.abc.Callable[..., Array], arrays: tuple[Array, ...], operand: Array
    ) -> Array:
        return jax.lax.switch(self.layer, [functools.partial(product, array) for array in arrays], operand)


class Stepped(typing.NamedTuple):
    """One step of a layer: its output `[B, 1, D]`, and what its part of the cache is to keep, `[B, G, K]` each."""

    x: Array
    key: Array
    value: Array


def init_cache(cfg: ModelConfig, batch_size: int) -> Cache:
    """An empty cache for rows that have seen nothing; no two of its arrays share memory, so that it can be donated.

    Args:
      cfg: shapes of the model.
      batch_size: B.

    Returns:
      The cache, in the dtype of the computation.
    """
    shape = (batch_size, cfg.kv_heads, cfg.window, cfg.head_width)
    keys, values = (tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.layers)) for _ in range(2))
    length, slot = (jnp.zeros(batch_size, jnp.int32) for _ in range(2))
    return Cache(keys, values, length, slot, jnp.zeros(batch_size, jnp.uint32))


@jax.jit
def clear(cache: Cache, rows: Array) -> Cache:
    """Makes some rows as `init_cache` makes them, whatever they held; costs nothing where there are none.

    Args:
      cache: of B rows.
      rows: `bool [B]`, true for those to clear.

    Returns:
      The cache.
    """
    # One after the other, in place: to select would read and write all rows.
    order = jnp.argsort(~rows)

    def clear_row(i: Array, arrays: PyTree) -> PyTree:
        def clear_leaf(leaf: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(leaf, jnp.zeros_like(leaf[0]), order[i], 0)

        return jax.tree.map(clear_leaf, arrays)

    keys, values = jax.lax.fori_loop(0, rows.sum(dtype=jnp.int32), clear_row, (cache.keys, cache.values))
    return Cache(keys, values, *(jnp.where(rows, jnp.zeros_like(leaf), leaf) for leaf in cache[2:]))


def _append(cache: Cache, keys_NBGK: Array, values_NBGK: Array) -> Cache:
    """The cache with one more step of each row, written in place where the cache is donated or carried in a loop."""
    size, rows = cache.keys[0].shape[2], jnp.arange(len(cache.slot))

    def write(layers: tuple[Array, ...], new_NBGK: Array) -> tuple[Array, ...]:
        return tuple(
            jnp.asarray(layer).at[rows, :, cache.slot].set(new, mode="promise_in_bounds", unique_indices=True)
            for layer, new in zip(layers, new_NBGK, strict=True)
        )

    length, slot = jnp.minimum(cache.length + 1, size), (cache.slot + 1) % size
    return Cache(
        write(cache.keys, keys_NBGK), write(cache.values, values_NBGK), length, slot, cache.position + np.uint32(1)
    )


_TURN = 2**32
"""One turn of a rotation, as angles are counted: in uint32, which wraps where a turn ends."""


class Rotation(typing.NamedTuple):
    """Cosines and sines of the angles that the pairs of a head are turned by, `float32 [..., T, 1, K / 2]`."""

    cosine: Array
    sine: Array


def rotation(position_BT: Array, width: int, base: float) -> Rotation:
    """The angles of steps, once for all heads, layers and passes: they take longer than all that is done with them.

    Angles are whole multiples of 2^-32 of a turn, and products of whole numbers that wrap are exact: two steps are
    rotated against each other by their distance alone, however far along a row they are.

    Args:
      position_BT: `int32` or `uint32`, may be negative or wrap around; `[T]` where all rows have the same.
      width: K, of a head, even.
      base: of the frequencies.
    """
    half = width // 2
    frequency = (np.rint(base ** (-np.arange(half) / half) * _TURN / (2 * np.pi)) % _TURN).astype(np.uint32)
    turned = position_BT[..., None, None].astype(jnp.uint32) * frequency
    angle = turned.astype(jnp.int32).astype(jnp.float32) * (2 * np.pi / _TURN)
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x_BTHK: Array, by: Rotation) -> Array:
    """Rotary position embedding (Su et al. 2021), in the layout that pairs the two halves of a head, as Llama's.

    Args:
      x_BTHK: queries or keys, K even.
      by: the angles of their steps.

    Returns:
      The rotated array.
    """
    cos, sin = by
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHK.dtype)


class Attention(nnx.Module):
    """Grouped-query attention to the last W steps."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.query = Linear(cfg.width, cfg.heads * cfg.head_width, cfg, rngs)
        self.key = Linear(cfg.width, cfg.kv_heads * cfg.head_width, cfg, rngs)
        self.value = Linear(cfg.width, cfg.kv_heads * cfg.head_width, cfg, rngs)
        self.out = Linear(cfg.heads * cfg.head_width, cfg.width, cfg, rngs)
        if cfg.qk_norm:
            self.query_norm = Norm(cfg.head_width)
            self.key_norm = Norm(cfg.head_width)

    def project(self, x_BTD: Array) -> Projected:
        """Queries, keys and values of tokens."""
        cfg, (batch, time, _) = self.cfg, x_BTD.shape
        query = self.query(x_BTD).reshape(batch, time, cfg.heads, cfg.head_width)
        key = self.key(x_BTD).reshape(batch, time, cfg.kv_heads, cfg.head_width)
        value = self.value(x_BTD).reshape(batch, time, cfg.kv_heads, cfg.head_width)
        if cfg.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return Projected(query, key, value)

    def __call__(self, x_BTD: Array, by: Rotation) -> Array:
        """Attends within a window of steps, rotated by their places."""
        query, key, value = self.project(x_BTD)
        query, key = rotate(query, by), rotate(key, by)
        attended = attend(query, key, value, self.cfg.window, self.cfg.attention)
        return self.out(attended.reshape(*x_BTD.shape[:2], -1))

    def step(self, x_B1D: Array, ring: Ring) -> Stepped:
        """Attends to the one new step and those in the ring buffer; reads keys and values once and writes none."""
        cfg, (cache, _) = self.cfg, ring
        query, key, value = self.project(x_B1D)
        by = rotation(cache.position[:, None], cfg.head_width, cfg.rope_base)
        query, key = rotate(query, by), rotate(key, by)
        query_BGRK = query.reshape(-1, cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_width)
        key_BG1K, value_BG1K = key.swapaxes(1, 2), value.swapaxes(1, 2)
        scores = ring.score(query_BGRK)
        own = jnp.einsum("bgrk,bgsk->bgrs", query_BGRK, key_BG1K, preferred_element_type=scores.dtype)
        age = (cache.slot[:, None] - jnp.arange(cfg.window)) % cfg.window
        new, seen = (mask[:, None, None] for mask in (age == 0, age <= cache.length[:, None]))
        # The new step stands in for what its slot still holds.
        scores = jnp.where(new, own, jnp.where(seen, scores, -jnp.inf)) * cfg.head_width**-0.5
        weights = jax.nn.softmax(scores, -1).astype(value.dtype)
        attended = ring.mix(jnp.where(new, 0, weights)) + jnp.where(new, weights, 0).sum(-1, keepdims=True) * value_BG1K
        return Stepped(self.out(attended.reshape(*x_B1D.shape[:2], -1)), key[:, 0], value[:, 0])


class Block(nnx.Module):
    """Attention and SwiGLU (Shazeer 2020), each normalized before and added to the stream."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(cfg.width)
        self.attention = Attention(cfg, rngs)
        self.feed_forward_norm = Norm(cfg.width)
        self.gate = Linear(cfg.width, cfg.feed_forward, cfg, rngs)
        self.up = Linear(cfg.width, cfg.feed_forward, cfg, rngs)
        self.down = Linear(cfg.feed_forward, cfg.width, cfg, rngs)

    def feed_forward(self, x: Array) -> Array:
        """SwiGLU."""
        normed = self.feed_forward_norm(x)
        return self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))

    def __call__(self, x_BTD: Array, by: Rotation) -> Array:
        """A window of steps, and what they are rotated by."""
        x = x_BTD + self.attention(self.attention_norm(x_BTD), by)
        return x + self.feed_forward(x)

    def step(self, x_B1D: Array, ring: Ring) -> Stepped:
        """One step, with this layer's part of the cache."""
        attended, key, value = self.attention.step(self.attention_norm(x_B1D), ring)
        x = x_B1D + attended
        return Stepped(x + self.feed_forward(x), key, value)


_POLICIES = jax.checkpoint_policies
_REMAT_POLICIES = {
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names("attended", "features")
    ),
    "full": None,
}


_Function = typing.TypeVar("_Function", bound=collections.abc.Callable)


def rematerialize(function: _Function, cfg: ModelConfig) -> _Function:
    """The same function, of whose forward pass only what the policy says is kept for the backward pass."""
    if cfg.remat == "none":
        return function
    return typing.cast(_Function, jax.checkpoint(function, policy=_REMAT_POLICIES[cfg.remat]))


class Decoder(nnx.Module):
    """N blocks, their parameters stacked on a leading axis and scanned: compile time does not grow with depth."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg

        @nnx.split_rngs(splits=cfg.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(cfg, rngs)

        self.blocks = stack(rngs)

    def __call__(self, x_BTD: Array, cache: Cache | None) -> tuple[Array, Cache | None]:
        """Runs all blocks over a window (no cache), or over one more step of each row."""
        graph, stacked = nnx.split(self.blocks)
        if cache is None:
            by = rotation(jnp.arange(x_BTD.shape[1]), self.cfg.head_width, self.cfg.rope_base)

            def window(x: Array, parameters: nnx.State) -> tuple[Array, None]:
                return nnx.merge(graph, parameters)(x, by), None

            return jax.lax.scan(rematerialize(window, self.cfg), x_BTD, stacked)[0], None
        if x_BTD.shape[:2] != (*cache.length.shape, 1):
            raise ValueError(
                f"got {x_BTD.shape[1]} steps of {x_BTD.shape[0]} rows with a cache of {cache.length.size} rows, "
                "expected one step at a time of the cache's rows"
            )
        # What a row left in its slots may be NaN, which a weight of 0 would let pass.
        ready = clear(cache, cache.length == 0)

        def step(x: Array, layer: tuple[nnx.State, Array]) -> tuple[Array, tuple[Array, Array]]:
            parameters, n = layer
            stepped = nnx.merge(graph, parameters).step(x, Ring(ready, n))
            return stepped.x, (stepped.key, stepped.value)

        x, (keys, values) = jax.lax.scan(step, x_BTD, (stacked, jnp.arange(self.cfg.layers)))
        return x, _append(ready, keys, values)

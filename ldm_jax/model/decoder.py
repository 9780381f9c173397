"""The decoder: a Llama-style transformer over tokens, with attention to the last W of them (Touvron et al. 2023)."""

from __future__ import annotations

import collections.abc
import typing

import jax
import jax.numpy as jnp
from flax import nnx

from ldm_jax.model.config import ModelConfig
from ldm_jax.model.kernels import attend
from ldm_jax.model.layers import Linear, Norm
from ldm_jax.types import Array


class Cache(typing.NamedTuple):
    """Keys and values of the last S = W steps of each row, a ring buffer; a pytree.

    Keys are stored before rotation and rotated by their age when read, so that positions never grow.

    Attributes:
      keys: `[N, B, S, G, K]`, of each layer; G key-value heads.
      values: `[N, B, S, G, K]`.
      length: `int32 [B]`, steps seen by each row; the next one goes to slot `length % S`.
    """

    keys: Array
    values: Array
    length: Array


class Projected(typing.NamedTuple):
    """What attention makes of tokens: queries `[B, T, H, K]`, keys and values `[B, T, G, K]`, before rotation."""

    query: Array
    key: Array
    value: Array


class Stepped(typing.NamedTuple):
    """One step of a layer: its output `[B, 1, D]`, and its part of the cache, `[B, S, G, K]` each."""

    x: Array
    keys: Array
    values: Array


def init_cache(cfg: ModelConfig, batch_size: int) -> Cache:
    """An empty cache for rows that have seen nothing.

    Args:
      cfg: shapes of the model.
      batch_size: B.

    Returns:
      The cache, in the dtype of the computation.
    """
    shape = (cfg.layers, batch_size, cfg.window, cfg.kv_heads, cfg.head_width)
    zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype))
    return Cache(zeros, zeros, jnp.zeros(batch_size, jnp.int32))


def rotate(x_BTHK: Array, position_BT: Array, base: float) -> Array:
    """Rotary position embedding (Su et al. 2021), in the layout that pairs the two halves of a head, as Llama's.

    Args:
      x_BTHK: queries or keys, K even.
      position_BT: `int32`, may be negative.
      base: of the frequencies.

    Returns:
      The rotated array.
    """
    half = x_BTHK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
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

    def __call__(self, x_BTD: Array) -> Array:
        """Attends within a window of steps, from its beginning."""
        query, key, value = self.project(x_BTD)
        position = jnp.arange(x_BTD.shape[1])[None]
        query, key = (rotate(x, position, self.cfg.rope_base) for x in (query, key))
        attended = attend(query, key, value, self.cfg.window, self.cfg.attention)
        return self.out(attended.reshape(*x_BTD.shape[:2], -1))

    def step(self, x_B1D: Array, keys_BSGK: Array, values_BSGK: Array, length_B: Array) -> Stepped:
        """Attends to the ring buffer, after putting the one new step into it."""
        query, key, value = self.project(x_B1D)
        size = keys_BSGK.shape[1]
        slots, slot = jnp.arange(size)[None], (length_B % size)[:, None]
        age = (slot - slots) % size
        seen = age <= length_B[:, None]
        # What a forgotten row left in a slot may be NaN, which a weight of 0 would let pass.
        kept = (jnp.where(seen[..., None, None], old, 0) for old in (keys_BSGK, values_BSGK))
        keys, values = (
            jnp.where((age == 0)[..., None, None], new, old) for new, old in zip((key, value), kept, strict=True)
        )
        attended = jax.nn.dot_product_attention(
            query,
            rotate(keys, -age, self.cfg.rope_base),
            values,
            mask=seen[:, None, None],
        )
        return Stepped(self.out(attended.reshape(*x_B1D.shape[:2], -1)), keys, values)


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

    def __call__(self, x_BTD: Array) -> Array:
        """A window of steps."""
        x = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x + self.feed_forward(x)

    def step(self, x_B1D: Array, keys: Array, values: Array, length_B: Array) -> Stepped:
        """One step, with this layer's part of the cache."""
        attended, keys, values = self.attention.step(self.attention_norm(x_B1D), keys, values, length_B)
        x = x_B1D + attended
        return Stepped(x + self.feed_forward(x), keys, values)


_POLICIES = jax.checkpoint_policies
_REMAT_POLICIES = {
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names("attended")
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

            def window(x: Array, parameters: nnx.State) -> tuple[Array, None]:
                return nnx.merge(graph, parameters)(x), None

            return jax.lax.scan(rematerialize(window, self.cfg), x_BTD, stacked)[0], None
        if x_BTD.shape[:2] != (*cache.length.shape, 1):
            raise ValueError(
                f"got {x_BTD.shape[1]} steps of {x_BTD.shape[0]} rows with a cache of {cache.length.size} rows, "
                "expected one step at a time of the cache's rows"
            )

        def step(x: Array, layer: tuple[nnx.State, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            parameters, keys, values = layer
            stepped = nnx.merge(graph, parameters).step(x, keys, values, cache.length)
            return stepped.x, (stepped.keys, stepped.values)

        x, (keys, values) = jax.lax.scan(step, x_BTD, (stacked, cache.keys, cache.values))
        return x, Cache(keys, values, cache.length + 1)

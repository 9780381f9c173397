"""What is written for speed: attention to the last W steps, and matrix products with fast gradients.

Attention is computed block by block, so that its scores never leave the processor's cache.

Only the blocks inside the causal band are computed, and the backward pass computes their probabilities again from the
logarithm of their sum instead of keeping them: memory grows with T, not with T squared.
"""

from __future__ import annotations

import functools
import typing

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ldm_jax.errors import ConfigError
from ldm_jax.types import Array

_MASKED = -1e30


def _wide(x: Array) -> jnp.dtype:
    """The dtype of scores and sums: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


class _Block(typing.NamedTuple):
    """Queries `start` to `stop`, and the first key that they see, rounded down to a block."""

    start: int
    stop: int
    first_key: int


def _blocks(time: int, window: int) -> list[_Block]:
    size = min(time, max(32, min(128, window // 2)))
    return [
        _Block(start, min(start + size, time), max(0, (start - window + 1) // size * size))
        for start in range(0, time, size)
    ]


Implementation = typing.Literal["blocks", "cudnn", "xla"]
"""What computes attention: the blocks of this file, or one of those of `jax.nn.dot_product_attention`."""


def attend(
    query_BTHK: Array, key_BTGK: Array, value_BTGK: Array, window: int, implementation: Implementation = "blocks"
) -> Array:
    """Scaled dot-product attention of each step to itself and the `window - 1` steps before it.

    Args:
      query_BTHK: H query heads.
      key_BTGK: G key heads, a divisor of H; head h reads group `h // (H // G)`.
      value_BTGK: G value heads.
      window: W, in steps.
      implementation: what computes it.

    Returns:
      `[B, T, H, K]` in the queries' dtype.

    Raises:
      ConfigError: `"cudnn"` where there is no such GPU.

    Source:
      Dao et al. 2022, FlashAttention, without its running maximum: a block sees all of its keys at once.
    """
    chex.assert_equal_shape([key_BTGK, value_BTGK])
    chex.assert_equal_shape_prefix([query_BTHK, key_BTGK], 2)
    if implementation != "blocks":
        return _attend_by_jax(query_BTHK, key_BTGK, value_BTGK, window, implementation)
    batch, time, heads, width = query_BTHK.shape
    groups = key_BTGK.shape[2]
    # Heads before steps: every product below is then one batch of plain matrix products.
    query = query_BTHK.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    key, value = key_BTGK.transpose(0, 2, 1, 3), value_BTGK.transpose(0, 2, 1, 3)
    attended = _attend(window, query, key, value)
    return attended.transpose(0, 3, 1, 2, 4).reshape(query_BTHK.shape)


def _attend_by_jax(
    query: Array, key: Array, value: Array, window: int, implementation: typing.Literal["cudnn", "xla"]
) -> Array:
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise ConfigError(
            f"attention is 'cudnn', which needs a CUDA GPU, and the default device is a {jax.default_backend()}: set "
            "attention=blocks"
        )
    attended = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=(window - 1, 0), implementation=implementation
    )
    return checkpoint_name(attended, "attended")


class _Saved(typing.NamedTuple):
    """What the backward pass of attention needs."""

    query: Array
    key: Array
    value: Array
    output: Array
    log_sum: Array


@functools.partial(jax.custom_vjp, nondiff_argnames=("window",))
def _attend(window: int, query_BGRTK: Array, key_BGTK: Array, value_BGTK: Array) -> Array:
    return _forward(window, query_BGRTK, key_BGTK, value_BGTK)[0]


def _forward(window: int, query: Array, key: Array, value: Array) -> tuple[Array, _Saved]:
    attended, log_sums = [], []
    for block in _blocks(query.shape[3], window):
        scores = _scores(block, window, query, key)
        largest = jnp.max(scores, -1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, -1, keepdims=True)
        # Divided by their sum afterwards: there are fewer outputs than weights.
        mixed = jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(value.dtype), value[:, :, block.first_key : block.stop])
        attended.append((mixed / total).astype(value.dtype))
        log_sums.append(largest + jnp.log(total))
    output, log_sum = jnp.concatenate(attended, 3), jnp.concatenate(log_sums, 3)
    output, log_sum = checkpoint_name(output, "attended"), checkpoint_name(log_sum, "attended")
    return output, _Saved(query, key, value, output, log_sum)


def _backward(window: int, saved: _Saved, gradient: Array) -> tuple[Array, Array, Array]:
    query, key, value, output, log_sum = saved
    blocks = _blocks(query.shape[3], window)
    wide = _wide(query)
    # As a product with ones: XLA's sum over so short an axis takes ten times as long on a CPU.
    ones = jnp.ones((query.shape[-1], 1), wide)
    mean = jnp.matmul(gradient.astype(wide) * output.astype(wide), ones, precision=jax.lax.Precision.HIGHEST)
    d_query: list[Array] = []
    d_key: list[list[Array]] = [[] for _ in blocks]
    d_value: list[list[Array]] = [[] for _ in blocks]
    for block in blocks:
        queries, keys = slice(block.start, block.stop), slice(block.first_key, block.stop)
        own = gradient[..., queries, :]
        weights = jnp.exp(_scores(block, window, query, key) - log_sum[..., queries, :])
        d_weights = jnp.einsum("bgrtk,bgsk->bgrts", own, value[:, :, keys], preferred_element_type=wide)
        d_scores = weights * (d_weights - mean[..., queries, :]) * query.shape[-1] ** -0.5
        weights, d_scores = weights.astype(value.dtype), d_scores.astype(value.dtype)
        d_query.append(jnp.einsum("bgrts,bgsk->bgrtk", d_scores, key[:, :, keys]))
        for parts, left, right in ((d_key, d_scores, query[..., queries, :]), (d_value, weights, own)):
            # To each block of keys its share, so that no sum runs over keys that a block does not see.
            total = jnp.einsum("bgrts,bgrtk->bgsk", left, right, preferred_element_type=wide)
            for i, other in enumerate(blocks):
                if block.first_key <= other.start and other.stop <= block.stop:
                    start = other.start - block.first_key
                    parts[i].append(total[:, :, start : start + other.stop - other.start])
    return (
        jnp.concatenate(d_query, 3),
        jnp.concatenate([sum(parts) for parts in d_key], 2).astype(key.dtype),
        jnp.concatenate([sum(parts) for parts in d_value], 2).astype(value.dtype),
    )


_attend.defvjp(_forward, _backward)


def _scores(block: _Block, window: int, query_BGRTK: Array, key_BGTK: Array) -> Array:
    """`[B, G, R, t, s]`, at least float32, of a block's queries and the keys that they may see, the others masked."""
    query = query_BGRTK[..., block.start : block.stop, :]
    key = key_BGTK[:, :, block.first_key : block.stop]
    scores = jnp.einsum("bgrtk,bgsk->bgrts", query, key, preferred_element_type=_wide(query))
    age = jnp.arange(block.start, block.stop)[:, None] - jnp.arange(block.first_key, block.stop)
    return jnp.where((age >= 0) & (age < window), scores * query.shape[-1] ** -0.5, _MASKED)


@jax.custom_vjp
def matrix_product(x_ND: Array, kernel_DF: Array) -> Array:
    """`x @ kernel`, whose gradients are products that XLA computes fast on a CPU."""
    return x_ND @ kernel_DF


def _product_forward(x_ND: Array, kernel_DF: Array) -> tuple[Array, tuple[Array, Array]]:
    return x_ND @ kernel_DF, (x_ND, kernel_DF)


def _product_backward(saved: tuple[Array, Array], gradient_NF: Array) -> tuple[Array, Array]:
    x_ND, kernel_DF = saved
    d_kernel = jax.lax.platform_dependent(
        x_ND, gradient_NF, cpu=_transposed_product_on_cpu, default=lambda x_ND, gradient_NF: x_ND.T @ gradient_NF
    )
    return gradient_NF @ kernel_DF.T, d_kernel


def _transposed_product_on_cpu(x_ND: Array, y_NF: Array) -> Array:
    """`x.T @ y`, with the narrower one transposed by itself: folded into the product, it takes twice as long."""
    barrier = jax.lax.optimization_barrier
    if x_ND.shape[1] <= y_NF.shape[1]:
        return barrier(barrier(x_ND).T) @ y_NF
    return barrier(barrier(barrier(y_NF).T) @ x_ND).T


matrix_product.defvjp(_product_forward, _product_backward)

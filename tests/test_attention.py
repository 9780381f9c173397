"""Attention by blocks against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import ConfigError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.kernels import attend


def plain(query_BTHK, key_BTGK, value_BTGK, window):
    """The formula, in float64 where that is on, over all pairs of steps."""
    time, width = query_BTHK.shape[1], query_BTHK.shape[-1]
    heads_per_group = query_BTHK.shape[2] // key_BTGK.shape[2]
    key, value = (jnp.repeat(x, heads_per_group, 2) for x in (key_BTGK, value_BTGK))
    age = np.arange(time)[:, None] - np.arange(time)
    scores = jnp.einsum("bthk,bshk->bhts", query_BTHK, key) / np.sqrt(width)
    weights = jax.nn.softmax(jnp.where((age >= 0) & (age < window), scores, -jnp.inf), -1)
    return jnp.einsum("bhts,bshk->bthk", weights, value)


# Windows shorter and longer than the row, than a block, and no multiple of it; one head and groups of heads.
@pytest.mark.parametrize(
    ("time", "heads", "groups", "window"),
    [(200, 4, 2, 64), (300, 2, 1, 200), (96, 2, 2, 256), (33, 3, 1, 8), (1, 2, 2, 4)],
)
def test_values_and_gradients_are_those_of_the_formula(time, heads, groups, window):
    keys = jax.random.split(jax.random.key(time), 4)
    query, key, value, gradient = (
        jax.random.normal(k, (2, time, count, 16))
        for k, count in zip(keys, (heads, groups, groups, heads), strict=True)
    )

    @jax.jit
    def both(query, key, value, gradient):
        results = []
        for function in (attend, plain):
            output, pull = jax.vjp(lambda *args, function=function: function(*args, window), query, key, value)
            results.append((output, *pull(gradient)))
        return results

    by_blocks, by_formula = both(query, key, value, gradient)
    for one, other in zip(by_blocks, by_formula, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_the_implementations_of_jax_attend_to_the_same_steps():
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, gradient = (
        jax.random.normal(k, (2, 100, count, 16)) for k, count in zip(keys, (4, 2, 2, 4), strict=True)
    )
    results = []
    for implementation in ("blocks", "xla"):
        output, pull = jax.vjp(lambda *args, how=implementation: attend(*args, 40, how), query, key, value)
        results.append((output, *pull(gradient)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_the_fused_kernel_of_gpus_says_where_it_cannot_run():
    x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"needs a CUDA GPU.* set attention=blocks"):
        attend(x, x, x, 4, "cudnn")
    with pytest.raises(ConfigError, match="set dtype=bfloat16"):
        ModelConfig(attention="cudnn")


def test_half_precision_keeps_its_dtype_and_its_digits():
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 100, 2, 16)) for i in range(3))
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    output = attend(*half, 40)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(jnp.float32), plain(query, key, value, 40), atol=0.05)

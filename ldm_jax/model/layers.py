"""The small layers that everything else is made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ldm_jax.model.config import ModelConfig
from ldm_jax.model.kernels import matrix_product
from ldm_jax.types import Array


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter, normally distributed around 0."""
    # A NumPy float would make it float64 where JAX allows that.
    return nnx.Param(float(std) * jax.random.normal(rngs.params(), shape, jnp.float32))


def project(x: Array, kernel_DF: Array) -> Array:
    """The product of the last axis with a matrix, in the matrix's dtype: plain products, forward and backward."""
    y = matrix_product(x.reshape(-1, x.shape[-1]).astype(kernel_DF.dtype), kernel_DF)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class Linear(nnx.Module):
    """A linear layer over the last axis: one plain matrix product, and two for its gradients."""

    def __init__(self, inputs: int, outputs: int, cfg: ModelConfig, rngs: nnx.Rngs, *, bias: bool = False):
        self.dtype = jnp.dtype(cfg.dtype)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: Array) -> Array:
        y = project(x, self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype) if hasattr(self, "bias") else y


def rms_normalize(x: Array) -> Array:
    """Scales the last axis to a root mean square of 1, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


class Film(nnx.Module):
    """Normalizes, then scales and shifts by the signature (Perez et al. 2018, FiLM)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.condition = Linear(cfg.width, 2 * cfg.width, cfg, rngs, bias=True)

    def __call__(self, x_RTD: Array, signature_RD: Array) -> Array:
        scale, shift = jnp.split(self.condition(signature_RD)[:, None], 2, -1)
        return rms_normalize(x_RTD) * (1.0 + scale) + shift


class Norm(nnx.Module):
    """RMSNorm with a learned scale (Zhang and Sennrich 2019)."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Array) -> Array:
        return rms_normalize(x) * self.scale[...].astype(x.dtype)

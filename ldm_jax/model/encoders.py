"""One token per time step: encoders of observations, rewards, endings and previous actions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ldm_jax.encoding.buckets import GRID_CELLS
from ldm_jax.encoding.codec import Features, Signature
from ldm_jax.encoding.signature import SIGNATURE, symlog
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.layers import Film, Linear, normal
from ldm_jax.types import Array

_PERIODS = (3.0, 7.0, 16.0)
"""Of the waves that tell the small whole numbers of a grid apart (object kinds, colours)."""


class CategoryEncoder(nnx.Module):
    """Embeds (component position, value) pairs and adds them up.

    A hidden layer stands between the two sums: without it the total would not tell which component has which value.
    """

    def __init__(self, components: int, values: int, cfg: ModelConfig, rngs: nnx.Rngs):
        self.values = values
        self.position = normal(rngs, (components, cfg.width), 1.0)
        self.low = normal(rngs, (values, cfg.width), 1.0)
        self.high = normal(rngs, (values, cfg.width), 0.1)
        self.mix = Linear(cfg.width, cfg.width, cfg, rngs)

    def __call__(self, index_RTP: Array, mask_RP: Array) -> Array:
        index_RTP = jnp.where(mask_RP[:, None] > 0, index_RTP, 0)
        embedded = self.low[...][index_RTP % self.values] + self.high[...][index_RTP // self.values]
        embedded = embedded + self.position[: index_RTP.shape[-1]]
        hidden = jax.nn.gelu(self.mix(embedded))
        weights = mask_RP / jnp.sqrt(jnp.maximum(mask_RP.sum(-1, keepdims=True), 1.0))
        return jnp.einsum("rtpd,rp->rtd", hidden, weights.astype(hidden.dtype))


class GridEncoder(nnx.Module):
    """A small convolutional encoder: cells or image patches, then two strides of 2, then all positions at once."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        width, quarter, half = cfg.width, cfg.width // 4, cfg.width // 2
        patch = cfg.image_side // GRID_CELLS
        features = 1 + 2 * len(_PERIODS)
        self.dtype = jnp.dtype(cfg.dtype)
        self.cell = normal(rngs, (cfg.channels, features, quarter), 1.0 / math.sqrt(4 * features))
        self.inside = normal(rngs, (quarter,), 0.1)
        self.patch = normal(rngs, (patch, patch, cfg.channels, quarter), 1.0)
        self.first = Linear(4 * quarter, half, cfg, rngs, bias=True)
        self.second = Linear(4 * half, half, cfg, rngs, bias=True)
        side = GRID_CELLS // 4
        self.gather = normal(rngs, (side, side, half, width), 1.0 / math.sqrt(side * side * half))

    def __call__(self, grid_RTHWC: Array, mask_RHW: Array) -> Array:
        # where, not a product: a NaN in the padding must not pass, here and below.
        grid_RTHWC = jnp.where(mask_RHW[:, None, ..., None] > 0, grid_RTHWC, 0)
        small = grid_RTHWC.shape[-2] <= GRID_CELLS
        x = self._cells(grid_RTHWC, mask_RHW) if small else self._patches(grid_RTHWC)
        x = jax.nn.gelu(self.first(_join_2x2(jax.nn.gelu(x))))
        x = jax.nn.gelu(self.second(_join_2x2(x)))
        height, width = x.shape[-3:-1]
        return jnp.einsum("rthwc,hwcd->rtd", x, self.gather[:height, :width].astype(x.dtype))

    def _cells(self, grid_RTHWC: Array, mask_RHW: Array) -> Array:
        waves = [2 * math.pi / period * grid_RTHWC for period in _PERIODS]
        features = jnp.stack([symlog(grid_RTHWC), *map(jnp.sin, waves), *map(jnp.cos, waves)], -1).astype(self.dtype)
        x = jnp.einsum("rthwcf,cfe->rthwe", features, self.cell[: grid_RTHWC.shape[-1]].astype(self.dtype))
        return jnp.where(mask_RHW[:, None, ..., None] > 0, x + self.inside[...].astype(self.dtype), 0)

    def _patches(self, image_RTHWC: Array) -> Array:
        *lead, side, _, channels = image_RTHWC.shape
        size = side // GRID_CELLS
        value = image_RTHWC.astype(self.dtype)
        scaled = value / 127.5 - 1.0 if image_RTHWC.dtype == jnp.uint8 else symlog(value)
        patches = scaled.reshape(*lead, GRID_CELLS, size, GRID_CELLS, size, channels)
        kernel = self.patch[:size, :size, :channels] / math.sqrt(size * size * channels)
        return jnp.einsum("rthpwqc,pqce->rthwe", patches, kernel.astype(self.dtype))


def _join_2x2(x: Array) -> Array:
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    return jnp.moveaxis(x, -4, -3).reshape(*lead, height // 2, width // 2, 4 * channels)


class TextEncoder(nnx.Module):
    """The mean over the bytes of a text, each embedded with its position."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        quarter = cfg.width // 4
        self.byte = normal(rngs, (256, quarter), 1.0)
        self.position = normal(rngs, (cfg.text, quarter), 1.0)
        self.mix = Linear(quarter, cfg.width // 2, cfg, rngs)
        self.out = Linear(cfg.width // 2, cfg.width, cfg, rngs)

    def __call__(self, text_RTL: Array) -> Array:
        hidden = jax.nn.gelu(self.mix(self.byte[...][text_RTL] + self.position[: text_RTL.shape[-1]]))
        inside = (text_RTL != 0).astype(hidden.dtype)
        mean = jnp.einsum("rtle,rtl->rte", hidden, inside) / jnp.maximum(inside.sum(-1, keepdims=True), 1.0)
        return self.out(mean)


class StepEncoder(nnx.Module):
    """Turns the features of R rows and T steps into tokens `[R, T, D]`.

    With two tokens per step, `[R, 2T, D]`: that of the previous action, then that of what came of it.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        width = cfg.width
        self.per_step = cfg.tokens_per_step
        self.dtype = jnp.dtype(cfg.dtype)
        self.numeric = normal(rngs, (cfg.numeric, 2, width), 2.0**-0.5)
        self.categories = CategoryEncoder(cfg.categorical, cfg.values, cfg, rngs)
        self.grid = GridEncoder(cfg, rngs)
        self.text = TextEncoder(cfg, rngs)
        self.part = normal(rngs, (cfg.parts, width), 0.1)
        self.film = Film(cfg, rngs)
        self.hidden = Linear(width, 2 * width, cfg, rngs)
        self.out = Linear(2 * width, width, cfg, rngs)
        self.reward = normal(rngs, (2, width), 0.5)
        self.flags = normal(rngs, (3, width), 0.5)
        self.previous_choice = CategoryEncoder(cfg.choice_slots, min(cfg.choices, cfg.values), cfg, rngs)
        self.previous_number = normal(rngs, (cfg.continuous_slots, width), 1.0)
        self.no_previous = normal(rngs, (width,), 0.5)

    def __call__(self, features: Features, signature: Signature, signature_RD: Array) -> Array:
        x = self.film(self._observation(features, signature), signature_RD)
        x = x + self.out(jax.nn.gelu(self.hidden(x)))
        x = x + features.reward.astype(self.dtype) @ self.reward[...].astype(self.dtype)
        x = x + features.flags.astype(self.dtype) @ self.flags[...].astype(self.dtype)
        previous = self._previous(features, signature)
        if self.per_step == 1:
            return x + previous
        return jnp.stack([previous, x], 2).reshape(x.shape[0], -1, x.shape[-1])

    def _observation(self, features: Features, signature: Signature) -> Array:
        lead = features.reward.shape[:2]
        x = jnp.zeros((*lead, self.part.shape[-1]), self.dtype)
        if width := features.numeric.shape[-2]:
            mask = signature.numeric_mask[:, None, :, None]
            numbers = jnp.where(mask > 0, features.numeric, 0.0).astype(self.dtype)
            numbers = numbers / jnp.sqrt(jnp.maximum(mask.sum(-2, keepdims=True), 1.0))
            x = x + jnp.einsum("rtwf,wfd->rtd", numbers, self.numeric[:width].astype(self.dtype))
        if features.categorical.shape[-1]:
            x = x + self.categories(features.categorical, signature.categorical_mask)
        # Grids are counted from the front of the table of parts, texts from its back: `check_fits` keeps them apart.
        for i, (grid, mask) in enumerate(zip(features.grids, signature.grid_masks, strict=True)):
            x = x + self.grid(grid, mask) + self.part[i].astype(self.dtype)
        for i, text in enumerate(features.texts):
            x = x + self.text(text) + self.part[-1 - i].astype(self.dtype)
        return x

    def _previous(self, features: Features, signature: Signature) -> Array:
        x = jnp.zeros((), self.dtype)
        # What stands where there was no previous action is never read, forward or backward: it may be NaN.
        present = features.has_previous[..., None] > 0
        if features.previous.categorical.shape[-1]:
            choice = jnp.where(present, features.previous.categorical, 0)
            x = x + self.previous_choice(choice, signature.choice_slots)
        if slots := features.previous.continuous.shape[-1]:
            mask = signature.continuous_slots[:, None]
            numbers = jnp.where((mask > 0) & present, features.previous.continuous, 0.0)
            numbers = (numbers / jnp.sqrt(jnp.maximum(mask.sum(-1, keepdims=True), 1.0))).astype(self.dtype)
            x = x + numbers @ self.previous_number[:slots].astype(self.dtype)
        return jnp.where(present, x, self.no_previous[...].astype(self.dtype))


class SignatureEncoder(nnx.Module):
    """Embeds the signature vector, once per row."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(cfg.dtype)
        self.hidden = Linear(SIGNATURE, cfg.width, cfg, rngs, bias=True)
        self.out = Linear(cfg.width, cfg.width, cfg, rngs, bias=True)

    def __call__(self, vector_RF: Array) -> Array:
        return jax.nn.gelu(self.out(jax.nn.gelu(self.hidden(vector_RF.astype(self.dtype)))))

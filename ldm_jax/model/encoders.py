"""One token per time step: encoders of observations, rewards, endings and previous actions."""

from __future__ import annotations

import math
import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ldm_jax.encoding.buckets import GRID_CELLS
from ldm_jax.encoding.codec import Features, Signature
from ldm_jax.encoding.signature import SIGNATURE, symlog
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.layers import Film, Linear, normal, project
from ldm_jax.types import Array

_PERIODS = (3.0, 7.0, 16.0)
"""Of the waves that tell the small whole numbers of a grid apart (object kinds, colours)."""

_IMAGES = 64
"""That are encoded at once on a CPU."""

_SMALL, _FEW = 16, 4
"""Categories of so few values are looked up by pairs of component and value, from so many components on."""


class CategoryEncoder(nnx.Module):
    """Embeds (component position, value) pairs and adds them up.

    A hidden layer stands between the two sums: without it the total would not tell which component has which value.
    """

    def __init__(self, components: int, values: int, cfg: ModelConfig, rngs: nnx.Rngs):
        self.values, self.small = values, min(values, _SMALL)
        self.position = normal(rngs, (components, cfg.width), 1.0)
        self.low = normal(rngs, (values, cfg.width), 1.0)
        self.high = normal(rngs, (values, cfg.width), 0.1)
        self.mix = Linear(cfg.width, cfg.width, cfg, rngs)

    def __call__(self, index_RTP: Array, mask_RP: Array) -> Array:
        index_RTP = jnp.where(mask_RP[:, None] > 0, index_RTP, 0)
        weights_RP = mask_RP / jnp.sqrt(jnp.maximum(mask_RP.sum(-1, keepdims=True), 1.0))
        weights_RP = weights_RP.astype(self.mix.dtype)
        rows, steps, components = index_RTP.shape
        if components < _FEW or rows * steps <= self.small:
            return self._each(index_RTP, weights_RP)
        # Most categories have few values: then there are fewer pairs than components in the batch.
        return jax.lax.cond(jnp.all(index_RTP < self.small), self._by_pair, self._each, index_RTP, weights_RP)

    def _each(self, index_RTP: Array, weights_RP: Array) -> Array:
        """Every component of every step goes through the hidden layer."""
        embedded = self.low[...][index_RTP % self.values] + self.high[...][index_RTP // self.values]
        hidden = jax.nn.gelu(self.mix(embedded + self.position[: index_RTP.shape[-1]]))
        return jnp.sum(hidden * weights_RP[:, None, :, None], -2)

    def _by_pair(self, index_RTP: Array, weights_RP: Array) -> Array:
        """Each pair of a component and a small value goes through it once, and a product picks and adds them up."""
        components = index_RTP.shape[-1]
        embedded = self.low[: self.small] + self.high[0] + self.position[:components, None]
        hidden = jax.nn.gelu(self.mix(embedded)).reshape(components * self.small, -1)
        chosen = jnp.where(index_RTP[..., None] == jnp.arange(self.small), weights_RP[:, None, :, None], 0)
        return project(chosen.reshape(*index_RTP.shape[:2], -1), hidden)


class GridEncoder(nnx.Module):
    """A small convolutional encoder: patches of cells or pixels, strides of 2, then all positions at once.

    Positions are in the order of the blocks that the strides join, so that joining them moves nothing.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        width, quarter, half = cfg.width, cfg.width // 4, cfg.width // 2
        patch = cfg.image_side // GRID_CELLS
        features = 1 + 2 * len(_PERIODS)
        self.dtype = jnp.dtype(cfg.dtype)
        self.cells = normal(rngs, (features, 4, cfg.channels, half), 1.0 / math.sqrt(16 * features))
        self.inside = normal(rngs, (4, half), 0.1)
        self.patch = normal(rngs, (patch, patch, cfg.channels, quarter), 1.0)
        self.first = Linear(4 * quarter, half, cfg, rngs, bias=True)
        self.second = Linear(4 * half, half, cfg, rngs, bias=True)
        side = GRID_CELLS // 4
        self.gather = normal(rngs, (side, side, half, width), 1.0 / math.sqrt(side * side * half))

    def __call__(self, grid_RTHWC: Array, mask_RHW: Array) -> Array:
        rows, steps, side, _, _ = grid_RTHWC.shape
        x = (self._cells if side <= GRID_CELLS else self._patches)(grid_RTHWC, mask_RHW)
        x = jax.nn.gelu(self.second(_join_four(jax.nn.gelu(x))))
        blocks = min(side, GRID_CELLS) // 4
        gather = self.gather[:blocks, :blocks].reshape(-1, self.gather.shape[-1])
        return project(x.reshape(rows, steps, -1), gather.astype(x.dtype))

    def _cells(self, grid_RTHWC: Array, mask_RHW: Array) -> Array:
        """What is in each 2 x 2 patch of cells, `[R, T, patches, half]`."""
        channels = grid_RTHWC.shape[-1]
        cells = _in_blocks(_inside(grid_RTHWC, mask_RHW), 1)[..., 0, :]
        inside = _in_blocks(mask_RHW[:, None, ..., None], 1)[..., 0, :]
        cells, inside = (x.reshape(*x.shape[:2], -1, 4, x.shape[-1]) for x in (cells, inside))
        features: list[Array] = [jnp.sign(cells) * jnp.log(1 + jnp.abs(cells))]
        for period in _PERIODS:
            wave = _wave(cells / period)
            features += [wave.sine, jnp.where(inside > 0, wave.cosine, 0)]
        flat = jnp.concatenate([x.reshape(*x.shape[:3], -1).astype(self.dtype) for x in features], -1)
        flat = checkpoint_name(flat, "features")
        kernel = self.cells[:, :, :channels].reshape(flat.shape[-1], -1).astype(self.dtype)
        return project(flat, kernel) + inside[..., 0].astype(self.dtype) @ self.inside[...].astype(self.dtype)

    def _patches(self, image_RTHWC: Array, mask_RHW: Array) -> Array:
        """What is in each 2 x 2 patches of pixels, `[R, T, patches / 4, half]`."""
        rows, steps, side, _, channels = image_RTHWC.shape
        # Four bytes at once: XLA moves one element after the other.
        packed = image_RTHWC.dtype == jnp.uint8 and channels % 4 == 0
        pixels = _inside(_pack(image_RTHWC) if packed else image_RTHWC, mask_RHW)
        blocks = checkpoint_name(_in_blocks(pixels, side // GRID_CELLS), "features")

        def embed(blocks: Array) -> Array:
            return self._embed_pixels(_unpack(blocks) if packed else blocks)

        run = _run(rows, steps)
        if run == steps:
            return embed(blocks)
        # As numbers the pixels take four times the bytes: a few images at once stay in the cache, here and backward.
        part = jax.checkpoint(lambda start: embed(jax.lax.dynamic_slice_in_dim(blocks, start, run, 1)))
        x = jnp.moveaxis(jax.lax.map(part, jnp.arange(0, steps, run)), 0, 1)
        return x.reshape(rows, steps, *x.shape[3:])

    def _embed_pixels(self, blocks: Array) -> Array:
        pixels, channels = blocks.shape[-2:]
        size = math.isqrt(pixels)
        value = blocks.astype(self.dtype)
        scaled = value / 127.5 - 1.0 if blocks.dtype == jnp.uint8 else symlog(value)
        kernel = self.patch[:size, :size, :channels] / math.sqrt(pixels * channels)
        x = project(scaled.reshape(*scaled.shape[:3], -1), kernel.reshape(-1, kernel.shape[-1]).astype(self.dtype))
        return self.first(_join_four(jax.nn.gelu(x)))


def _inside(grid_RTHWC: Array, mask_RHW: Array) -> Array:
    # where, not a product: a NaN in the padding must not pass.
    return jnp.where(mask_RHW[:, None, ..., None] > 0, grid_RTHWC, 0)


def _run(rows: int, steps: int) -> int:
    """How many steps of all rows are encoded at once: the images that a CPU's cache holds, on other devices all."""
    if jax.default_backend() != "cpu":
        return steps
    return max(run for run in range(1, steps + 1) if steps % run == 0 and (run == 1 or rows * run <= _IMAGES))


def _pack(image: Array) -> Array:
    """Bytes `[..., C]` as words `[..., C / 4]`."""
    return jax.lax.bitcast_convert_type(image.reshape(*image.shape[:-1], -1, 4), jnp.uint32)


def _unpack(words: Array) -> Array:
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)


class _Wave(typing.NamedTuple):
    sine: Array
    cosine: Array


def _wave(turns: Array) -> _Wave:
    """Sine and cosine of a number of whole turns, to 1e-6, by a tenth of the work that the library's take on a CPU."""
    half = math.pi * (turns - jnp.round(turns))  # of the angle, so that Taylor's series are short
    square = half * half
    sine = half * _series(square, [(-1) ** i / math.factorial(2 * i + 1) for i in range(6)])
    cosine = _series(square, [(-1) ** i / math.factorial(2 * i) for i in range(7)])
    return _Wave(2 * sine * cosine, 1 - 2 * sine * sine)


def _series(x: Array, coefficients: list[float]) -> Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _in_blocks(image_RTHWC: Array, size: int) -> Array:
    """Patches of `size` x `size` pixels, `[R, T, patches, pixels, C]`, four of each 2 x 2 together, and so on."""
    rows, steps, side, _, channels = image_RTHWC.shape
    count = side // (4 * size)
    x = image_RTHWC.reshape(rows, steps, count, 2, 2, size, count, 2, 2, size, channels)
    x = x.transpose(0, 1, 2, 6, 3, 7, 4, 8, 5, 9, 10)
    return x.reshape(rows, steps, 16 * count * count, size * size, channels)


def _join_four(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] // 4, 4 * x.shape[-1])


class TextEncoder(nnx.Module):
    """The mean over the groups of four bytes of a text, each embedded with its position."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        quarter, half = cfg.width // 4, cfg.width // 2
        self.byte = normal(rngs, (256, quarter), 1.0)
        self.position = normal(rngs, (-(-cfg.text // 4), half), 1.0)
        self.mix = Linear(4 * quarter, half, cfg, rngs)
        self.out = Linear(half, cfg.width, cfg, rngs)

    def __call__(self, text_RTL: Array) -> Array:
        text_RTL = jnp.pad(text_RTL, ((0, 0), (0, 0), (0, -text_RTL.shape[-1] % 4)))
        inside = text_RTL != 0
        embedded = jnp.where(inside[..., None], self.byte[...].astype(self.mix.dtype)[text_RTL], 0)
        mixed = self.mix(embedded.reshape(*text_RTL.shape[:2], text_RTL.shape[-1] // 4, -1))
        hidden = jax.nn.gelu(mixed + self.position[: mixed.shape[-2]].astype(mixed.dtype))
        any_inside = inside.reshape(*mixed.shape[:-1], 4).any(-1).astype(hidden.dtype)
        total = jnp.sum(hidden * any_inside[..., None], -2)
        return self.out(total / jnp.maximum(any_inside.sum(-1, keepdims=True), 1.0))


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
        outcome = jnp.concatenate([features.reward, features.flags], -1)
        x = x + project(outcome, jnp.concatenate([self.reward[...], self.flags[...]]).astype(self.dtype))
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
            kernel = self.numeric[:width].reshape(2 * width, -1).astype(self.dtype)
            x = x + project(numbers.reshape(*lead, -1), kernel)
        if features.categorical.shape[-1]:
            x = x + self.categories(features.categorical, signature.categorical_mask)
        # Grids are counted from the front of the table of parts, texts from its back: `check_fits` keeps them apart.
        for i, (grid, mask) in enumerate(zip(features.grids, signature.grid_masks, strict=True)):
            has_grid = jnp.any(mask > 0, (-2, -1))[:, None, None]
            x = x + jnp.where(has_grid, self.grid(grid, mask) + self.part[i].astype(self.dtype), 0)
        for i, text in enumerate(features.texts):
            has_text = signature.text_mask[:, i, None, None] > 0
            x = x + jnp.where(has_text, self.text(text) + self.part[-1 - i].astype(self.dtype), 0)
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
            x = x + project(numbers, self.previous_number[:slots].astype(self.dtype))
        return jnp.where(present, x, self.no_previous[...].astype(self.dtype))


class SignatureEncoder(nnx.Module):
    """Embeds the signature vector, once per row."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(cfg.dtype)
        self.hidden = Linear(SIGNATURE, cfg.width, cfg, rngs, bias=True)
        self.out = Linear(cfg.width, cfg.width, cfg, rngs, bias=True)

    def __call__(self, vector_RF: Array) -> Array:
        return jax.nn.gelu(self.out(jax.nn.gelu(self.hidden(vector_RF.astype(self.dtype)))))

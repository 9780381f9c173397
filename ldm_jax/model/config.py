"""Shapes of the model: one frozen dataclass and the named sizes."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import math
import numbers
import operator
import typing

import numpy as np

from ldm_jax.encoding.buckets import GRID_CELLS, Bucket
from ldm_jax.errors import ConfigError, check_finite


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes of the model; NumPy's numbers are taken as the plain ones that they are equal to.

    Attributes:
      width: D, of the residual stream.
      layers: N.
      heads: H, query heads.
      kv_heads: key and value heads; divides `heads` (grouped-query attention).
      feed_forward: F, hidden width of SwiGLU.
      window: W, attention sees the last W steps, this one included.
      bins: of a continuous action slot; more than six times `sigma_bins`.
      sigma_bins: standard deviation of HL-Gauss targets, in bin widths.
      qk_norm: RMSNorm on queries and keys.
      rope_base: of the rotary position embedding.
      numeric: largest numeric vector of an observation.
      categorical: most categorical components of an observation.
      values: rows of the tables of category values and of previous choices; larger ones use two digits, so that the
        square of this is the most that a category may have.
      channels: most channels of a grid or image.
      image_side: largest side of an image, in pixels.
      text: most bytes of a text.
      parts: most grids, images and texts of an observation together.
      choice_slots: most categorical action slots.
      choices: largest number of choices of a slot.
      continuous_slots: most continuous action slots.
      dtype: of the computation; parameters are float32.
      remat: what the backward pass recomputes: `"none"`, `"dots"` (all but matrix products and attention, which is
        also the fastest where memory is slow) or `"full"`.
      attention: what computes it in training: `"blocks"`, blocks inside the causal band, on any device; `"cudnn"`, the
        fused kernel of CUDA GPUs, in bfloat16; `"xla"`, all pairs of steps and a mask, the plain form to compare with.
      tokens_per_step: 1, or 2 as an ablation: the previous action as a token of its own before the observation's (the
        interleaved encoding of JAT, Gallouedec et al. 2024). It trains, at twice the tokens, and does not act.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    feed_forward: int = 256
    window: int = 32
    bins: int = 256
    sigma_bins: float = 2.0
    qk_norm: bool = True
    rope_base: float = 10_000.0
    numeric: int = 128
    categorical: int = 64
    values: int = 512
    channels: int = 4
    image_side: int = 96
    text: int = 128
    parts: int = 8
    choice_slots: int = 16
    choices: int = 32
    continuous_slots: int = 32
    dtype: typing.Literal["float32", "bfloat16"] = "float32"
    remat: typing.Literal["none", "dots", "full"] = "dots"
    attention: typing.Literal["blocks", "cudnn", "xla"] = "blocks"
    tokens_per_step: typing.Literal[1, 2] = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(field, getattr(self, field.name)))
        check_finite(self)
        for field in dataclasses.fields(self):
            if field.type in ("int", "float") and not getattr(self, field.name) > 0:
                raise ConfigError(
                    f"ModelConfig.{field.name} is {getattr(self, field.name)}, expected a positive number"
                )
        self._check_choices()
        if self.width % (2 * self.heads):
            raise ConfigError(f"width {self.width} is not a multiple of twice the {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads: expected a divisor")
        if self.bins <= 6 * self.sigma_bins:
            raise ConfigError(
                f"{self.bins} bins with sigma_bins={self.sigma_bins:g} leave none for the range of an action, as they "
                f"reach three sigma beyond it: expected more than {6 * self.sigma_bins:g} bins"
            )
        if self.choices > self.values**2:
            raise ConfigError(
                f"{self.choices} choices do not fit two digits of {self.values} values: "
                f"expected at least {_digits(self.choices)} values"
            )

    def _check_choices(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}, expected float32 or bfloat16")
        if self.remat not in ("none", "dots", "full"):
            raise ConfigError(f"remat is {self.remat!r}, expected none, dots or full")
        if self.attention not in ("blocks", "cudnn", "xla"):
            raise ConfigError(f"attention is {self.attention!r}, expected blocks, cudnn or xla")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ConfigError(f"attention is 'cudnn' with dtype {self.dtype}: set dtype=bfloat16, or attention=blocks")
        if self.tokens_per_step not in (1, 2):
            raise ConfigError(f"tokens_per_step is {self.tokens_per_step}, expected 1 or 2")

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.width // self.heads

    @property
    def bin_width(self) -> float:
        """Of a continuous slot scaled to -1..1; the bins reach three standard deviations of the target beyond."""
        return 2.0 / (self.bins - 6.0 * self.sigma_bins)

    def narrowed(self, buckets: collections.abc.Iterable[Bucket], categories: int = 0) -> ModelConfig:
        """The same model with no more rows in its tables than some buckets need.

        A row that is never read learns nothing, but its gradient, moments and the pass over them cost as much as any.

        Args:
          buckets: that are to fit.
          categories: of the largest categorical component of the observations.

        Raises:
          ConfigError: a bucket does not fit this model as it is.
        """
        widths = collections.Counter[str]()
        for bucket in buckets:
            self.check_fits(bucket, f"the bucket {bucket.name}", categories)
            widths |= collections.Counter(_needs(bucket))
        # A digit for each value where there is room for it.
        widths["values"] = min(self.values, max(categories, widths["choices"]))
        widths |= collections.Counter(image_side=GRID_CELLS)
        tables: dict[str, typing.Any] = {name: max(widths[name], 1) for name in (*_TABLES, "values")}
        return dataclasses.replace(self, **tables)

    def check_fits(self, bucket: Bucket, what: str, categories: int = 0) -> None:
        """Checks that environments of a bucket can be put into a model of these shapes.

        Args:
          bucket: the padded widths.
          what: whose they are, for the error.
          categories: of the largest categorical component of the observations, which buckets do not tell apart.

        Raises:
          ConfigError: names the widths that are too large and what to raise.
        """
        needs = _needs(bucket) | {"values": _digits(categories)}
        too_large = {name: need for name, need in needs.items() if need > getattr(self, name)}
        if too_large:
            wanted = ", ".join(
                f"{name}={need} (the model has {getattr(self, name)})" for name, need in too_large.items()
            )
            raise ConfigError(f"{what} needs {wanted}: make the model with these values or leave the environment out")


_TABLES = (
    *("numeric", "categorical", "channels", "image_side", "text", "parts"),
    *("choice_slots", "choices", "continuous_slots"),
)
"""The widths that buckets need."""


def _needs(bucket: Bucket) -> dict[str, int]:
    grids, texts = bucket.grids, bucket.texts
    derived = {
        "channels": max((grid.channels for grid in grids), default=0),
        "image_side": max((grid.side for grid in grids if grid.side > GRID_CELLS), default=0),
        "text": max(texts, default=0),
        "parts": len(grids) + len(texts),
    }
    return {name: derived[name] if name in derived else getattr(bucket, name) for name in _TABLES}


def _digits(count: int) -> int:
    """The fewest digits of which two tell so many things apart."""
    return math.isqrt(max(count - 1, 0)) + 1


def _plain(field: dataclasses.Field, value: typing.Any) -> typing.Any:
    """The value as Python's own kind of number, which JSON carries and which compares by value."""
    kind = "int" if field.name == "tokens_per_step" else field.type
    truth = isinstance(value, bool | np.bool_)
    if kind == "bool" and truth:
        return bool(value)
    if kind == "int" and isinstance(value, numbers.Integral) and not truth:
        return operator.index(value)
    if kind == "float" and isinstance(value, numbers.Real) and not truth:
        return float(value)
    if kind in ("bool", "int", "float"):
        expected = {"bool": "True or False", "int": "a whole number", "float": "a number"}[kind]
        raise ConfigError(f"ModelConfig.{field.name} is {value!r}, expected {expected}")
    return value


_sized = functools.partial(
    ModelConfig,
    numeric=8192,
    categorical=1024,
    values=1024,
    channels=128,
    image_side=320,
    text=512,
    parts=16,
    choice_slots=320,
    choices=8192,
    continuous_slots=320,
)

SIZES: dict[str, ModelConfig] = {
    "nano": ModelConfig(width=32, layers=2, heads=2, kv_heads=2, feed_forward=64, window=8, bins=64),
    "micro": _sized(),
    "32m": _sized(width=512, layers=10, heads=8, kv_heads=8, feed_forward=1408, window=256),
    "70m": _sized(width=768, layers=10, heads=12, kv_heads=12, feed_forward=2048, window=512),
    "308m": _sized(width=1024, layers=24, heads=16, kv_heads=16, feed_forward=2816, window=1024),
    "736m": _sized(width=1536, layers=26, heads=24, kv_heads=24, feed_forward=4096, window=1024),
}
"""Named sizes; from `micro` on they take nearly all of the catalog, and training narrows their tables to what it needs.

The backbones of `32m` to `736m` have the parameter counts of LDM-v0 (Kulak 2026, arXiv 2606.24962)."""

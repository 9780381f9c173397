"""Decoding: from the distributions that a model predicts to an action."""

from __future__ import annotations

import math
import typing

import chex
import jax
import jax.numpy as jnp

from ldm_jax.cards import EnvironmentCard
from ldm_jax.encoding.actions import Slots
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.heads import Predictions, bin_centers
from ldm_jax.types import Array

Decoding = typing.Literal["greedy", "mode", "sample", "card"]
"""How an action is taken from its distribution: `greedy` takes the most likely choice and the mean of the bins, `mode`
the most likely choice and bin, `sample` draws both; `card` is as the reference on the environment's card was scored."""


def check_decoding(decoding: str) -> None:
    """Checks that a decoding is one that agents know.

    Args:
      decoding: what was asked for.

    Raises:
      ConfigError: it is none of `Decoding`.
    """
    known = typing.get_args(Decoding)
    if decoding not in known:
        raise ConfigError(f"decoding is {decoding!r}, expected one of {', '.join(known)}")


def resolve_decoding(decoding: Decoding, card: EnvironmentCard) -> Decoding:
    """What a decoding means in the environment of a card: one of `greedy`, `mode` and `sample`."""
    return card.reference.decoding if decoding == "card" else decoding


def decode(
    cfg: ModelConfig, predictions: Predictions, decoding: Decoding, key: Array, temperature: float = 1.0
) -> Slots:
    """Takes an action from the predicted distributions.

    Args:
      cfg: the bins.
      predictions: logits `[..., K, V]` and `[..., C, bins]`.
      decoding: how, `greedy`, `mode` or `sample`.
      key: typed keys `[...]`, one for each row, whose draw then does not depend on the other rows; or one for all,
        which is folded with the number of each row. Used by `sample`.
      temperature: what `sample` divides the logits by; below 1 it draws what is likely more often.

    Returns:
      Slots `[..., K]` and `[..., C]`, the continuous ones within -1..1.
    """
    chex.assert_equal_shape_prefix([predictions.choice_logits, predictions.bin_logits], -2)
    centers = jnp.asarray(bin_centers(cfg))
    if decoding == "sample":
        drawn = _draw(predictions, key, temperature)
        choices, numbers = drawn.choices, centers[drawn.bins]
    else:
        choices = _argmax(predictions.choice_logits)
        if decoding == "greedy":
            numbers = jax.nn.softmax(predictions.bin_logits, -1) @ centers
        else:
            numbers = centers[_argmax(predictions.bin_logits)]
    return Slots(choices.astype(jnp.int32), jnp.clip(numbers, -1.0, 1.0))


class _Drawn(typing.NamedTuple):
    """Choices `[..., K]` and bins `[..., C]`."""

    choices: Array
    bins: Array


def _draw(predictions: Predictions, key: Array, temperature: float) -> _Drawn:
    """Draws from the distributions of each row with a key of its own."""
    rows = predictions.choice_logits.shape[:-2]
    if key.shape != rows:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(math.prod(rows))).reshape(rows)

    def draw(row: Predictions, key: Array) -> _Drawn:
        # The Gumbel-max trick, as in `jax.random.categorical`, which does not take slots without choices.
        return _Drawn(
            *(
                _argmax(logits / temperature + jax.random.gumbel(key, logits.shape, logits.dtype))
                for logits, key in zip(row, jax.random.split(key), strict=True)
            )
        )

    for _ in rows:
        draw = jax.vmap(draw)
    return draw(predictions, key)


def _argmax(logits: Array) -> Array:
    """The most likely of each slot; 0 where there is nothing to choose from."""
    return logits.argmax(-1) if logits.shape[-1] else jnp.zeros(logits.shape[:-1], jnp.int32)

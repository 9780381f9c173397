"""Action slots decoded in parallel from a token's state, and the continuous slots' bins."""

from __future__ import annotations

import math
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ldm_jax.encoding.actions import NOT_ALLOWED
from ldm_jax.encoding.codec import Features, Signature
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.layers import Film, Linear, normal, project
from ldm_jax.types import Array


class Predictions(typing.NamedTuple):
    """What the model says of the next action, of the slots that were asked for; a pytree.

    Attributes:
      choice_logits: `float32 [R, T, K or S, V]`, `NOT_ALLOWED` where a choice does not exist or is not allowed.
      bin_logits: `float32 [R, T, C or S, bins]`, over the bins of each continuous slot.
    """

    choice_logits: Array
    bin_logits: Array


class DrawnSlots(typing.NamedTuple):
    """Which of an action's many slots are predicted; a pytree.

    The steps of a row are cut into Q runs of equal length, and the steps of a run have the same slots.

    Attributes:
      choices: `int32 [R, Q, S]`, places among the categorical slots; None for all of them.
      numbers: `int32 [R, Q, S]`, places among the continuous slots; None for all of them.
    """

    choices: Array | None = None
    numbers: Array | None = None


def take_slots(x_RTA: Array, drawn_RQS: Array | None) -> Array:
    """Those of the slots `[R, T, A, ...]` that are drawn, `[R, T, S, ...]`; without a draw all of them."""
    if drawn_RQS is None:
        return x_RTA
    (rows, steps), (_, runs, count), rest = x_RTA.shape[:2], drawn_RQS.shape, x_RTA.shape[3:]
    by_run = x_RTA.reshape(rows, runs, steps // runs, *x_RTA.shape[2:])
    taken = jnp.take_along_axis(by_run, drawn_RQS.reshape(rows, runs, 1, count, *[1] * len(rest)), 3)
    return taken.reshape(rows, steps, count, *rest)


class Head(nnx.Module):
    """One hidden layer on state plus slot embedding, then one matrix for choices and one for bins."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        width = cfg.width
        self.film = Film(cfg, rngs)
        self.choice_slot = normal(rngs, (cfg.choice_slots, width), 0.5)
        self.continuous_slot = normal(rngs, (cfg.continuous_slots, width), 0.5)
        self.hidden = Linear(width, 2 * width, cfg, rngs)
        self.out = Linear(2 * width, width, cfg, rngs)
        self.choices = normal(rngs, (width, cfg.choices), 0.2 / math.sqrt(width))
        self.bins = normal(rngs, (width, cfg.bins), 0.2 / math.sqrt(width))

    def __call__(
        self, x_RTD: Array, features: Features, signature: Signature, signature_RD: Array, drawn: DrawnSlots
    ) -> Predictions:
        x = self.film(x_RTD, signature_RD)
        slots, width = features.action_mask.shape[-2:]
        allowed = take_slots(features.action_mask & signature.choice_mask[:, None], drawn.choices)
        logits = self._slots(x, self.choice_slot[:slots], self.choices[:, :width], drawn.choices)
        count = features.previous.continuous.shape[-1]
        return Predictions(
            choice_logits=jnp.where(allowed, logits, NOT_ALLOWED),
            bin_logits=self._slots(x, self.continuous_slot[:count], self.bins[...], drawn.numbers),
        )

    def _slots(self, x_RTD: Array, slot_AD: Array, kernel_DV: Array, drawn_RQS: Array | None = None) -> Array:
        """Logits `[R, T, A or S, V]` of `(y + out(gelu(hidden(y)))) @ kernel`, y being token plus slot."""
        slot_AD, kernel_DV = slot_AD.astype(x_RTD.dtype), kernel_DV.astype(x_RTD.dtype)
        rows, steps, width = x_RTD.shape
        runs = 1 if drawn_RQS is None else drawn_RQS.shape[1]
        x = x_RTD.reshape(rows, runs, steps // runs, 1, width)

        def by_run(table_AF: Array) -> Array:
            return table_AF if drawn_RQS is None else table_AF[drawn_RQS][:, :, None]

        # The first layer is linear: tokens and slots go through it apart, only what is bent is by token and slot.
        hidden = jax.nn.gelu(self.hidden(x) + by_run(self.hidden(slot_AD)))
        count, values = hidden.shape[-2], kernel_DV.shape[-1]
        if rows * steps * count * (2 * width - values) > 2 * width * values:
            # So are the last two: the product of their matrices is the cheaper way through both.
            joined = (self.out.kernel[...] @ kernel_DV.astype(jnp.float32)).astype(x.dtype)
            logits = project(x, kernel_DV) + by_run(slot_AD @ kernel_DV) + project(hidden, joined)
        else:
            logits = project(x + by_run(slot_AD) + self.out(hidden), kernel_DV)
        return logits.reshape(rows, steps, count, values).astype(jnp.float32)


def bin_edges(cfg: ModelConfig) -> np.ndarray:
    """`float32 [bins + 1]`, edges of the bins of a slot scaled to -1..1; they reach three sigma beyond it."""
    reach = 1.0 + 3.0 * cfg.sigma_bins * cfg.bin_width
    return np.linspace(-reach, reach, cfg.bins + 1, dtype=np.float32)


def bin_centers(cfg: ModelConfig) -> np.ndarray:
    """`float32 [bins]`, centers of the bins."""
    edges = bin_edges(cfg)
    return (edges[1:] + edges[:-1]) / 2


def bin_probabilities(cfg: ModelConfig, mean: Array, scale: Array) -> Array:
    """Soft targets of continuous slots.

    Args:
      cfg: bins and sigma.
      mean: `[...]`, scaled to -1..1.
      scale: `[...]`, standard deviation of the label itself; 0 for a point.

    Returns:
      `float32 [..., bins]`, non-negative, with sum 1: mass beyond the range lies in the outermost bins, as an action
      that is clipped.

    Source:
      Imani and White 2018; Farebrother et al. 2024, HL-Gauss.
    """
    chex.assert_equal_shape([mean, scale])
    sigma = jnp.sqrt(jnp.square(scale) + (cfg.sigma_bins * cfg.bin_width) ** 2)[..., None]
    edges = bin_edges(cfg)
    edges[[0, -1]] = -np.inf, np.inf
    lower, upper = (
        jax.lax.erf((side - mean[..., None]) / (sigma * math.sqrt(2.0))) for side in (edges[:-1], edges[1:])
    )
    # Rounding can make a difference of a saturated function negative.
    return jnp.maximum((upper - lower) / 2, 0.0)

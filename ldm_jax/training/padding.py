"""How much of a batch is real and how much is padding."""

from __future__ import annotations

import collections.abc
import typing

import jax
import numpy as np

from ldm_jax.training.loss import Example


class Useful(typing.NamedTuple):
    """Real elements as fractions of all that is computed with, 0 to 1; 1 where there is nothing of a kind.

    Attributes:
      steps: time steps with a label.
      inputs: numbers, categorical components, cells and bytes of observations.
      slots: action slots, each of which goes through the head.
      choices: logits of categorical slots.
    """

    steps: float
    inputs: float
    slots: float
    choices: float


def measure_useful(batch: collections.abc.Mapping[str, Example]) -> Useful:
    """Measures a batch on the host: padding to the widths of buckets, and steps that teach nothing.

    Args:
      batch: by bucket name, NumPy arrays; the rows of this process.

    Returns:
      The fractions over all buckets together.
    """
    real, all = np.zeros(4), np.zeros(4)
    for example in batch.values():
        (features, signature, _), targets, _ = jax.tree.map(np.asarray, example)
        rows, steps = targets.weight.shape
        masks = (signature.numeric_mask, signature.categorical_mask, *signature.grid_masks)
        slots = (signature.choice_slots, signature.continuous_slots)
        texts = sum(np.count_nonzero(text) for text in features.texts)
        real += (
            targets.weight.sum(),
            steps * sum(mask.sum() for mask in masks) + texts,
            steps * sum(mask.sum() for mask in slots),
            steps * np.count_nonzero(signature.choice_mask),
        )
        all += (
            rows * steps,
            steps * sum(mask.size for mask in masks) + sum(text.size for text in features.texts),
            steps * sum(mask.size for mask in slots),
            steps * signature.choice_mask.size,
        )
    return Useful(*np.where(all > 0, real / np.maximum(all, 1), 1.0).tolist())

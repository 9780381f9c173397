"""What a training step reports, on the device and on the host."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from ldm_jax.training.loss import RowMetrics
from ldm_jax.types import Array


class StepMetrics(typing.NamedTuple):
    """What one training step reports; a pytree.

    Attributes:
      loss: `float32 []`, mean over labelled steps, in nats.
      gradient_norm: `float32 []`, before clipping.
      learning_rate: `float32 []`, that the step was taken with.
      rows: sums by row of each bucket, the rows of all processes.
    """

    loss: Array
    gradient_norm: Array
    learning_rate: Array
    rows: dict[str, RowMetrics]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """One step's metrics on the host.

    Attributes:
      loss: nats, mean over labelled steps.
      kl: the loss less the targets' own entropy: what is left to learn.
      accuracy: share of labelled steps whose most likely action is the label's.
      changed_accuracy: the same where the label differs from the one before.
      gradient_norm: before clipping.
      learning_rate: of AdamW or of Muon's matrices.
      kl_by_environment: `kl` of each environment index in the batch.
      labelled_by_environment: its steps that have a label.
      useful_tokens: tokens of the batch that have a label.
    """

    loss: float
    kl: float
    accuracy: float
    changed_accuracy: float
    gradient_norm: float
    learning_rate: float
    kl_by_environment: dict[int, float]
    labelled_by_environment: dict[int, int]
    useful_tokens: int


def summarize(rows: dict[str, RowMetrics]) -> dict[str, typing.Any]:
    """Sums the metrics of rows up to those of a batch.

    Args:
      rows: by bucket name, NumPy arrays.

    Returns:
      The fields of `Metrics` that follow from them.
    """
    names = sorted(rows)
    joined = RowMetrics(
        *(np.concatenate([getattr(rows[name], field) for name in names]) for field in RowMetrics._fields)
    )
    kl, labelled = {}, {}
    for index in np.unique(joined.environment).tolist():
        own = joined.environment == index
        labelled[index] = int(joined.weight[own].sum())
        kl[index] = float((joined.loss[own] - joined.entropy[own]).sum() / max(labelled[index], 1))
    weight, changed = max(joined.weight.sum(), 1.0), max(joined.changed_weight.sum(), 1.0)
    return {
        "kl": float((joined.loss.sum() - joined.entropy.sum()) / weight),
        "accuracy": float(joined.correct.sum() / weight),
        "changed_accuracy": float(joined.changed_correct.sum() / changed),
        "kl_by_environment": kl,
        "labelled_by_environment": labelled,
        "useful_tokens": int(joined.weight.sum()),
    }

"""What led to a step that is not finite: a second look at it."""

from __future__ import annotations

import functools
import typing

import jax
import numpy as np
import optax

from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Model, Params
from ldm_jax.training.loss import Example, RowMetrics
from ldm_jax.training.optimizer import TrainingConfig
from ldm_jax.training.step import TrainState, apply_gradients, loss_and_gradients
from ldm_jax.types import Array, PyTree


class BadRow(typing.NamedTuple):
    """A row of a batch whose loss is not finite.

    Attributes:
      bucket: name of its bucket.
      row: position in the bucket.
      environment: index of the environment it is from.
    """

    bucket: str
    row: int
    environment: int


class Diagnosis(typing.NamedTuple):
    """What a step finds on a batch, and what in it is NaN or infinite.

    Attributes:
      loss: nats, mean over labelled steps.
      gradient_norm: before clipping.
      leaves: names of the batch's leaves that are not finite.
      rows: the rows whose loss is not finite.
      parameters: paths of the parameters that were not finite before the step.
      gradients: paths of the parameters whose gradient is not finite.
      updates: paths in the new parameters and the new state of the optimizer that are not finite.
    """

    loss: float
    gradient_norm: float
    leaves: list[str]
    rows: list[BadRow]
    parameters: list[str]
    gradients: list[str]
    updates: list[str]


def diagnose(
    model: Model, model_cfg: ModelConfig, cfg: TrainingConfig, state: TrainState, batch: dict[str, Example]
) -> Diagnosis:
    """Computes what the training step that follows a state computes, and says where it is not finite.

    Args:
      model: the pure functions.
      model_cfg: shapes of the model.
      cfg: how it is trained.
      state: as it was before the step.
      batch: that the step was taken on.
    """
    (loss, rows), gradients, kept = jax.device_get(
        _repeat(model=model, model_cfg=model_cfg, cfg=cfg, state=state, batch=batch)
    )
    bad_rows = [
        BadRow(bucket, int(row), int(metrics.environment[row]))
        for bucket, metrics in sorted(rows.items())
        for row in np.flatnonzero(~np.isfinite(metrics.loss))
    ]
    return Diagnosis(
        loss=float(loss),
        gradient_norm=float(optax.global_norm(gradients)),
        leaves=_not_finite(batch),
        rows=bad_rows,
        parameters=_not_finite(jax.device_get(state.params)),
        gradients=_not_finite(gradients),
        updates=_not_finite({"parameters": kept[0], "optimizer": kept[1]}),
    )


@functools.partial(jax.jit, static_argnames=("model", "model_cfg", "cfg"))
def _repeat(
    *, model: Model, model_cfg: ModelConfig, cfg: TrainingConfig, state: TrainState, batch: dict[str, Example]
) -> tuple[tuple[Array, dict[str, RowMetrics]], Params, tuple[Params, PyTree]]:
    found, gradients = loss_and_gradients(model, model_cfg, cfg, state, batch)
    return found, gradients, apply_gradients(cfg, state, gradients)


def _not_finite(tree: PyTree) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not np.isfinite(np.asarray(leaf, np.float64)).all()
    ]

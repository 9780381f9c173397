"""What led to a loss that is not finite: the batch as a file, and a second look at it."""

from __future__ import annotations

import os
import pathlib
import typing

import jax
import numpy as np
import optax

from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.codec import Features, Signature, Targets
from ldm_jax.errors import LdmError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Inputs, Model
from ldm_jax.training.loss import Example
from ldm_jax.training.optimizer import TrainingConfig
from ldm_jax.training.step import TrainState, loss_and_gradients
from ldm_jax.types import PyTree

_NODES: dict[str, type] = {
    "inputs": Inputs,
    "features": Features,
    "previous": Slots,
    "signature": Signature,
    "targets": Targets,
}
_TUPLES = ("grids", "texts", "grid_masks")


class DiagnosisError(LdmError, ValueError):
    """A file that holds no batch."""


def save_batch(path: str | os.PathLike[str], batch: dict[str, Example]) -> None:
    """Writes a batch as one `.npz`, an array for each leaf under its path; folders are made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    named: dict[str, typing.Any] = {name: np.asarray(leaf) for name, leaf in _leaves(batch).items()}
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        np.savez_compressed(file, **named)
    os.replace(aside, path)


def load_batch(path: str | os.PathLike[str]) -> dict[str, Example]:
    """Reads what `save_batch` wrote.

    Raises:
      DiagnosisError: there is no such file, or it holds something else.
    """
    tree: dict[str, typing.Any] = {}
    try:
        with np.load(path) as file:
            for name in file.files:
                *parents, last = name.split("/")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = file[name]
        return {bucket: _build(Example, leaves) for bucket, leaves in sorted(tree.items())}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DiagnosisError(
            f"cannot read a batch from {path}: {error}; expected a file that save_batch wrote"
        ) from error


def _build(kind: typing.Any, tree: dict[str, typing.Any]) -> typing.Any:
    fields = {}
    for name in kind._fields:
        if name in _TUPLES:
            leaves = tree.get(name, {})
            fields[name] = tuple(leaves[str(i)] for i in range(len(leaves)))
        else:
            fields[name] = _build(_NODES[name], tree[name]) if name in _NODES else tree[name]
    return kind(**fields)


class Diagnosis(typing.NamedTuple):
    """What a step finds on a batch.

    Attributes:
      loss: nats, mean over labelled steps.
      gradient_norm: before clipping.
      leaves: names of the batch's leaves that hold a NaN or an infinity.
      rows: for each row whose loss is not finite, its bucket, position, and environment index.
      parameters: paths of the parameters that are not finite themselves.
      gradients: paths of the parameters whose gradient is not finite.
    """

    loss: float
    gradient_norm: float
    leaves: list[str]
    rows: list[tuple[str, int, int]]
    parameters: list[str]
    gradients: list[str]


def diagnose(
    model: Model, model_cfg: ModelConfig, cfg: TrainingConfig, state: TrainState, batch: dict[str, Example]
) -> Diagnosis:
    """Computes loss and gradient as the training step that follows a state does, and says where they are not finite.

    Args:
      model: the pure functions.
      model_cfg: shapes of the model.
      cfg: how it is trained.
      state: as it was before the step.
      batch: that the step was taken on.
    """
    (loss, rows), gradients = jax.device_get(
        jax.jit(loss_and_gradients, static_argnums=(0, 1, 2))(model, model_cfg, cfg, state, batch)
    )
    bad_rows = [
        (bucket, int(row), int(metrics.environment[row]))
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
    )


def _leaves(tree: PyTree) -> dict[str, typing.Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _not_finite(tree: PyTree) -> list[str]:
    return [name for name, leaf in _leaves(tree).items() if not np.isfinite(np.asarray(leaf, np.float64)).all()]

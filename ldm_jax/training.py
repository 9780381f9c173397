"""Training: the optimiser, one pure step, and the loop around it."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from ldm_jax import objective, sharding
from ldm_jax.config import ConfigError, ModelConfig
from ldm_jax.model import Model, Params
from ldm_jax.objective import Example, RowMetrics
from ldm_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
      steps: optimiser steps.
      optimiser: `"adamw"`, or `"muon"` (orthogonalised momentum for the matrices, Adam for the rest; Jordan 2024).
      learning_rate: peak, of AdamW or of Muon's matrices.
      adam_learning_rate: peak, of what Muon leaves to Adam.
      warmup: steps of linear warm-up; a cosine to a tenth follows.
      weight_decay: of matrices only.
      clip_norm: global gradient norm that is not exceeded.
      drop_previous: probability of hiding the previous action in a window.
      seed: of parameters, batches and dropping.
    """

    steps: int = 1200
    optimiser: typing.Literal["adamw", "muon"] = "muon"
    learning_rate: float = 2e-2
    adam_learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    drop_previous: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if self.optimiser not in ("adamw", "muon"):
            raise ConfigError(f"optimiser is {self.optimiser!r}, expected adamw or muon")
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup is {self.warmup}, expected 0 or more and less than the {self.steps} steps")
        if not 0 <= self.drop_previous <= 1:
            raise ConfigError(f"drop_previous is {self.drop_previous}, expected a probability")
        for name in ("learning_rate", "adam_learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a positive number")


class TrainState(typing.NamedTuple):
    """All that a training step changes; a pytree.

    Attributes:
      params: the model's parameters.
      optimiser: the optimiser's state.
      step: `int32 []`, steps done; also the number of the next batch.
      key: typed key; never changes, steps fold their number into it.
    """

    params: Params
    optimiser: PyTree
    step: Array
    key: Array


def is_matrix(path: tuple[typing.Any, ...]) -> bool:
    """Whether a parameter path ends at the kernel of a linear layer (its last two axes map inputs to outputs)."""
    return path[-1].key == "kernel"


def _learning_rate(peak: float, cfg: TrainingConfig) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, cfg.warmup, cfg.steps, peak / 10)


def make_optimiser(cfg: TrainingConfig) -> optax.GradientTransformation:
    """Builds the gradient transformation of a configuration."""

    def matrices(params: Params) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)

    def dimensions(params: Params) -> PyTree:
        numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree_util.tree_map_with_path(lambda path, _: numbers if is_matrix(path) else None, params)

    rate = _learning_rate(cfg.learning_rate, cfg)
    if cfg.optimiser == "muon":
        update = contrib.muon(
            rate,
            weight_decay=cfg.weight_decay,
            weight_decay_mask=matrices,
            adam_learning_rate=_learning_rate(cfg.adam_learning_rate, cfg),
            muon_weight_dimension_numbers=dimensions,
        )
    else:
        update = optax.adamw(rate, weight_decay=cfg.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), update)


def init_state(model: Model, cfg: TrainingConfig, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """Fresh parameters and optimiser state, a pure function of the seed; split over the mesh if there is one."""
    init = functools.partial(_init_state, model, cfg)
    shardings = _shardings(state_shapes(model, cfg, mesh)) if mesh else None
    # Hundreds of small arrays: one program compiles faster than each of them.
    return jax.jit(init, out_shardings=shardings)()


def state_shapes(model: Model, cfg: TrainingConfig, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """Shapes and, on a mesh, shardings of the state that `init_state` makes; allocates nothing.

    Raises:
      ConfigError: the model does not divide over the mesh.
    """
    shapes = jax.eval_shape(functools.partial(_init_state, model, cfg))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )


def _init_state(model: Model, cfg: TrainingConfig) -> TrainState:
    key = jax.random.key(cfg.seed)
    params = model.init(jax.random.fold_in(key, 0))
    state = make_optimiser(cfg).init(params)
    return TrainState(params, state, jnp.zeros((), jnp.int32), jax.random.fold_in(key, 1))


def _shardings(shapes: TrainState) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


class StepMetrics(typing.NamedTuple):
    """What one training step reports; a pytree.

    Attributes:
      loss: `float32 []`, mean over labelled steps, in nats.
      gradient_norm: `float32 []`, before clipping.
      rows: sums by row of each bucket.
    """

    loss: Array
    gradient_norm: Array
    rows: dict[str, RowMetrics]


TrainStep = typing.Callable[[TrainState, dict[str, Example]], tuple[TrainState, StepMetrics]]
"""One step of training, see `make_train_step`."""


def make_train_step(
    model: Model, model_cfg: ModelConfig, cfg: TrainingConfig, mesh: jax.sharding.Mesh | None = None
) -> TrainStep:
    """Compiles `train_step(state, batch) -> (state, metrics)`; the state passed in is donated.

    Args:
      model: the pure functions.
      model_cfg: shapes of the model.
      cfg: how it is trained.
      mesh: what `init_state` split the state over, and `sharding.place_batch` the batch; None for one device.

    Raises:
      ConfigError: the model does not divide over the mesh.
    """
    optimiser = make_optimiser(cfg)

    def train_step(state: TrainState, batch: dict[str, Example]) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        batch = objective.drop_previous_actions(key, batch, cfg.drop_previous)
        gradient = jax.value_and_grad(functools.partial(objective.loss, model, model_cfg), has_aux=True)
        (loss, rows), gradients = gradient(state.params, batch)
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(loss, optax.global_norm(gradients), rows)
        return TrainState(params, optimiser_state, state.step + 1, state.key), metrics

    out_shardings = (_shardings(state_shapes(model, cfg, mesh)), None) if mesh else None
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


class TrainingError(RuntimeError):
    """Training cannot go on."""


def train(
    train_step: TrainStep,
    state: TrainState,
    batches: collections.abc.Iterable[dict[str, Example]],
    steps: int,
    mesh: jax.sharding.Mesh | None = None,
) -> collections.abc.Iterator[tuple[int, TrainState, Metrics]]:
    """Runs training steps up to number `steps`, reporting each one while the next is already under way.

    Args:
      train_step: from `make_train_step`.
      state: from `init_state` or a checkpoint.
      batches: the batch numbered `state.step` and all after it.
      steps: the step to stop before.
      mesh: what the state is split over; None for one device.

    Yields:
      The number of steps done, the newest state (one step ahead of the metrics until the last), and the metrics.

    Raises:
      TrainingError: the loss is not finite.
    """
    start = int(state.step)
    pending: tuple[int, dict[str, np.ndarray], StepMetrics] | None = None
    for number, batch in zip(range(start, steps), batches, strict=False):
        environments = {name: np.asarray(example.environment) for name, example in batch.items()}
        state, metrics = train_step(state, sharding.place_batch(mesh, batch) if mesh else batch)
        if pending:
            yield pending[0], state, _fetch(*pending)
        pending = number + 1, environments, metrics
    if pending:
        yield pending[0], state, _fetch(*pending)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """One step's metrics on the host.

    Attributes:
      loss: nats, mean over labelled steps.
      excess_loss: the loss less the targets' own entropy: what is left to learn.
      accuracy: share of labelled steps whose most likely action is the label's.
      changed_accuracy: the same where the label differs from the one before.
      gradient_norm: before clipping.
      excess_by_environment: the excess loss of each environment index in the batch.
      useful_tokens: tokens of the batch that have a label.
    """

    loss: float
    excess_loss: float
    accuracy: float
    changed_accuracy: float
    gradient_norm: float
    excess_by_environment: dict[int, float]
    useful_tokens: int


def _fetch(number: int, environments: dict[str, np.ndarray], metrics: StepMetrics) -> Metrics:
    loss, gradient_norm, rows = jax.device_get(metrics)
    if not np.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {number}: lower the learning rate, or look for NaN in the data"
        )
    names = sorted(rows)
    joined = RowMetrics(
        *(np.concatenate([getattr(rows[name], field) for name in names]) for field in RowMetrics._fields)
    )
    environment = np.concatenate([environments[name] for name in names])
    by_environment = {}
    for index in np.unique(environment).tolist():
        own = environment == index
        excess = (joined.loss[own] - joined.entropy[own]).sum() / max(joined.weight[own].sum(), 1.0)
        by_environment[index] = float(excess)
    weight, changed = max(joined.weight.sum(), 1.0), max(joined.changed_weight.sum(), 1.0)
    return Metrics(
        loss=float(loss),
        excess_loss=float((joined.loss.sum() - joined.entropy.sum()) / weight),
        accuracy=float(joined.correct.sum() / weight),
        changed_accuracy=float(joined.changed_correct.sum() / changed),
        gradient_norm=float(gradient_norm),
        excess_by_environment=by_environment,
        useful_tokens=int(joined.weight.sum()),
    )

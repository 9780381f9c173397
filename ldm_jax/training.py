"""Training: one pure step, and the loop around it."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax import objective, sharding
from ldm_jax.config import ModelConfig
from ldm_jax.model import Model, Params
from ldm_jax.objective import Example, RowMetrics
from ldm_jax.optimiser import TrainingConfig, make_optimiser, make_schedule
from ldm_jax.types import Array, PyTree


class TrainState(typing.NamedTuple):
    """All that a training step changes; a pytree.

    Attributes:
      params: the model's parameters.
      optimiser: the optimiser's state.
      step: `int32 []`, steps done; also the number of the next batch.
      key: typed key; never changes, steps fold their number into it.
      finite: `bool []`, whether loss and gradient were finite in all steps; once they were not, no step changes
        anything any more, so that what led there can be looked at.
    """

    params: Params
    optimiser: PyTree
    step: Array
    key: Array
    finite: Array


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
    params = model.init(jax.random.fold_in(jax.random.key(cfg.seed), 0))
    return state_with(params, make_optimiser(cfg).init(params), cfg, 0)


def state_with(params: Params, optimiser: PyTree, cfg: TrainingConfig, step: int) -> TrainState:
    """The state after a number of steps, from what the steps changed."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), 1)
    return TrainState(params, optimiser, jnp.asarray(step, jnp.int32), key, jnp.ones((), bool))


def _shardings(shapes: TrainState) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


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


TrainStep = typing.Callable[[TrainState, dict[str, Example]], tuple[TrainState, StepMetrics]]
"""One step of training, see `make_train_step`."""


def make_train_step(
    model: Model, model_cfg: ModelConfig, cfg: TrainingConfig, mesh: jax.sharding.Mesh | None = None
) -> TrainStep:
    """Compiles `train_step(state, batch) -> (state, metrics)`; the state passed in is donated.

    Args:
      model: the pure functions; made for the same mesh.
      model_cfg: shapes of the model.
      cfg: how it is trained.
      mesh: what `init_state` split the state over, and `sharding.place_batch` the batch; None for one device.

    Raises:
      ConfigError: the model does not divide over the mesh.
    """
    optimiser, rate = make_optimiser(cfg), make_schedule(cfg, cfg.learning_rate)

    def train_step(state: TrainState, batch: dict[str, Example]) -> tuple[TrainState, StepMetrics]:
        (loss, rows), gradients = loss_and_gradients(model, model_cfg, cfg, state, batch, mesh)
        norm = optax.global_norm(gradients)
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm)
        params, optimiser_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, optimiser_state), (state.params, state.optimiser)
        )
        metrics = StepMetrics(loss, norm, jnp.asarray(rate(state.step), jnp.float32), rows)
        return TrainState(params, optimiser_state, state.step + finite, state.key, finite), metrics

    out_shardings = None
    if mesh:  # every process reads all the metrics
        out_shardings = (_shardings(state_shapes(model, cfg, mesh)), sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def loss_and_gradients(
    model: Model,
    model_cfg: ModelConfig,
    cfg: TrainingConfig,
    state: TrainState,
    batch: dict[str, Example],
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[tuple[Array, dict[str, RowMetrics]], Params]:
    """What the step that follows a state starts from; see `objective.loss`.

    Returns:
      The loss and the metrics by row, and the gradient of the parameters, before clipping.
    """
    key = jax.random.fold_in(state.key, state.step)
    batch = objective.drop_previous_actions(key, batch, cfg.drop_previous)
    # Of the whole batch: pieces with fewer labels then count for less.
    labelled = objective.labelled_steps(batch)
    gradient = jax.value_and_grad(functools.partial(objective.loss, model, model_cfg), has_aux=True)
    if cfg.accumulation == 1:
        return gradient(state.params, batch, labelled)

    def accumulate(sums, piece):
        (loss, rows), gradients = gradient(state.params, piece, labelled)
        return jax.tree.map(jnp.add, sums, (loss, gradients)), rows

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
    pieces = sharding.split_batch(mesh, batch, cfg.accumulation)
    (loss, gradients), rows = jax.lax.scan(accumulate, zeros, pieces)
    return (loss, sharding.join_batch(rows)), gradients


class TrainingError(RuntimeError):
    """Training cannot go on."""


class NotFiniteError(TrainingError):
    """The loss or the gradient of a step is not finite.

    Attributes:
      step: number of the step, counted from 1.
      state: as it was before that step.
      batch: that the step was taken on, the rows of this process.
    """

    def __init__(self, message: str, step: int, state: TrainState, batch: dict[str, Example]):
        super().__init__(message)
        self.step, self.state, self.batch = step, state, batch


def train(
    train_step: TrainStep,
    state: TrainState,
    batches: collections.abc.Iterable[dict[str, Example]],
    steps: int,
    mesh: jax.sharding.Mesh | None = None,
    stop: typing.Callable[[int], typing.Any] = lambda step: False,
) -> collections.abc.Iterator[tuple[int, TrainState, Metrics]]:
    """Runs training steps up to number `steps`, reporting each one while the next is already under way.

    Args:
      train_step: from `make_train_step`.
      state: from `init_state` or a checkpoint.
      batches: the batch numbered `state.step` and all after it.
      steps: the step to stop before.
      mesh: what the state is split over; None for one device.
      stop: is asked of each step under way, by its number, whether it is the last one.

    Yields:
      The number of steps done, the newest state (one step ahead of the metrics until the last), and the metrics.

    Raises:
      NotFiniteError: the loss or the gradient is not finite.
      TrainingError: a device has not enough memory for a step.
    """
    try:
        yield from _train(train_step, state, batches, steps, mesh, stop)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            "a device has not enough memory for a step: train on fewer rows at once (rows, or more pieces by "
            "accumulation), keep less (remat='full'), or split the model over more devices along fsdp; "
            f"{str(error).splitlines()[0]}"
        ) from error


def _train(train_step, state, batches, steps, mesh, stop):
    start = int(state.step)
    pending: tuple[int, dict[str, Example], StepMetrics] | None = None
    for number, batch in zip(range(start, steps), batches, strict=False):
        state, metrics = train_step(state, sharding.place_batch(mesh, batch) if mesh else batch)
        last = stop(number + 1)
        if pending:
            yield pending[0], state, _fetch(*pending, state)
        pending = number + 1, batch, metrics
        if last:
            break
    if pending:
        yield pending[0], state, _fetch(*pending, state)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """One step's metrics on the host.

    Attributes:
      loss: nats, mean over labelled steps.
      excess_loss: the loss less the targets' own entropy: what is left to learn.
      accuracy: share of labelled steps whose most likely action is the label's.
      changed_accuracy: the same where the label differs from the one before.
      gradient_norm: before clipping.
      learning_rate: of AdamW or of Muon's matrices.
      excess_by_environment: the excess loss of each environment index in the batch.
      labelled_by_environment: its steps that have a label.
      useful_tokens: tokens of the batch that have a label.
    """

    loss: float
    excess_loss: float
    accuracy: float
    changed_accuracy: float
    gradient_norm: float
    learning_rate: float
    excess_by_environment: dict[int, float]
    labelled_by_environment: dict[int, int]
    useful_tokens: int


def _fetch(number: int, batch: dict[str, Example], metrics: StepMetrics, state: TrainState) -> Metrics:
    loss, gradient_norm, learning_rate, rows = jax.device_get(metrics)
    if not (np.isfinite(loss) and np.isfinite(gradient_norm)):
        raise NotFiniteError(
            f"the loss is {loss} and the norm of its gradient {gradient_norm} at step {number}: look for NaN in the "
            "data, or lower the learning rate",
            number,
            state._replace(finite=~state.finite),  # an operation on what all processes hold
            batch,
        )
    return Metrics(
        gradient_norm=float(gradient_norm), learning_rate=float(learning_rate), loss=float(loss), **summarise(rows)
    )


def summarise(rows: dict[str, RowMetrics]) -> dict[str, typing.Any]:
    """The fields of `Metrics` that follow from the metrics by row, NumPy arrays, of a batch."""
    names = sorted(rows)
    joined = RowMetrics(
        *(np.concatenate([getattr(rows[name], field) for name in names]) for field in RowMetrics._fields)
    )
    excess, labelled = {}, {}
    for index in np.unique(joined.environment).tolist():
        own = joined.environment == index
        labelled[index] = int(joined.weight[own].sum())
        excess[index] = float((joined.loss[own] - joined.entropy[own]).sum() / max(labelled[index], 1))
    weight, changed = max(joined.weight.sum(), 1.0), max(joined.changed_weight.sum(), 1.0)
    return {
        "excess_loss": float((joined.loss.sum() - joined.entropy.sum()) / weight),
        "accuracy": float(joined.correct.sum() / weight),
        "changed_accuracy": float(joined.changed_correct.sum() / changed),
        "excess_by_environment": excess,
        "labelled_by_environment": labelled,
        "useful_tokens": int(joined.weight.sum()),
    }

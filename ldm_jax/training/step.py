"""One training step, a pure function from state and batch to state and metrics."""

from __future__ import annotations

import collections.abc
import functools
import typing

import jax
import jax.numpy as jnp
import optax

from ldm_jax import sharding
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Model, Params
from ldm_jax.training.loss import (
    Example,
    RowMetrics,
    draw_slots,
    drop_previous_actions,
    imitation_loss,
    labelled_steps,
)
from ldm_jax.training.metrics import StepMetrics
from ldm_jax.training.optimizer import TrainingConfig, make_optimizer, make_schedule
from ldm_jax.types import Array, PyTree

KEY_IMPL = "threefry2x32"
"""The kind of all keys of training: a run draws the same whatever kind the process has for its default."""


_IN_HASTE: dict[str, typing.Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For a CPU's programs that take longer to be optimized than they run."""


class TrainState(typing.NamedTuple):
    """All that a training step changes; a pytree.

    Attributes:
      params: the model's parameters.
      optimizer: the optimizer's state.
      step: `int32 []`, steps done; also the number of the next batch.
      key: typed key; never changes, steps fold their number into it.
      finite: `bool []`, whether loss, gradient and all that was made of them were finite in all steps; once they were
        not, no step changes anything any more, so that what led there can be looked at.
    """

    params: Params
    optimizer: PyTree
    step: Array
    key: Array
    finite: Array


def init_state(model: Model, cfg: TrainingConfig, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """Fresh parameters and optimizer state, a pure function of the seed; split over the mesh if there is one."""
    init = functools.partial(_init_state, model, cfg)
    shardings = _shardings(state_shapes(model, cfg, mesh)) if mesh else None
    # Hundreds of small arrays: one program compiles faster than each of them. It runs once.
    options = _IN_HASTE if jax.default_backend() == "cpu" else None
    # Lowered apart, since a function with options cannot be traced inside another one.
    return jax.jit(init, out_shardings=shardings).lower().compile(options)()


def state_shapes(model: Model, cfg: TrainingConfig, mesh: sharding.AnyMesh | None = None) -> TrainState:
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
    params = model.init(jax.random.fold_in(jax.random.key(cfg.seed, impl=KEY_IMPL), 0))
    return state_with(params, make_optimizer(cfg).init(params), cfg, 0)


def state_with(params: Params, optimizer: PyTree, cfg: TrainingConfig, step: int) -> TrainState:
    """The state after a number of steps, from what the steps changed."""
    key = jax.random.fold_in(jax.random.key(cfg.seed, impl=KEY_IMPL), 1)
    return TrainState(params, optimizer, jnp.asarray(step, jnp.int32), key, jnp.ones((), bool))


def _shardings(shapes: TrainState) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


TrainStep = collections.abc.Callable[[TrainState, dict[str, Example]], tuple[TrainState, StepMetrics]]
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
    rate = make_schedule(cfg, cfg.learning_rate)

    def train_step(state: TrainState, batch: dict[str, Example]) -> tuple[TrainState, StepMetrics]:
        (loss, rows), gradients = loss_and_gradients(model, model_cfg, cfg, state, batch, mesh)
        norm = optax.global_norm(gradients)
        kept = apply_gradients(cfg, state, gradients)
        # Of all that is kept: a finite gradient can move parameters to where they are not.
        finite = state.finite & _all_finite((loss, norm, kept))
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), kept, (state.params, state.optimizer)
        )
        metrics = StepMetrics(loss, norm, jnp.asarray(rate(state.step), jnp.float32), rows)
        return TrainState(params, optimizer_state, state.step + finite, state.key, finite), metrics

    out_shardings = None
    if mesh:  # every process reads all the metrics
        out_shardings = (_shardings(state_shapes(model, cfg, mesh)), sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnames="state", out_shardings=out_shardings)


def _all_finite(tree: PyTree) -> Array:
    return functools.reduce(jnp.logical_and, (jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)))


def apply_gradients(cfg: TrainingConfig, state: TrainState, gradients: Params) -> tuple[Params, PyTree]:
    """What a gradient makes of the parameters and the optimizer's state, finite or not.

    Args:
      cfg: how it is trained.
      state: that the gradient was taken at.
      gradients: of its parameters, before clipping.

    Returns:
      The next parameters, and the next state of the optimizer.
    """
    updates, optimizer_state = make_optimizer(cfg).update(gradients, state.optimizer, state.params)
    return typing.cast(Params, optax.apply_updates(state.params, updates)), optimizer_state


def loss_and_gradients(
    model: Model,
    model_cfg: ModelConfig,
    cfg: TrainingConfig,
    state: TrainState,
    batch: dict[str, Example],
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[tuple[Array, dict[str, RowMetrics]], Params]:
    """What the step that follows a state starts from; see `imitation_loss`.

    Returns:
      The loss and the metrics by row, and the gradient of the parameters, before clipping.
    """
    key = jax.random.fold_in(state.key, state.step)
    batch = drop_previous_actions(key, batch, cfg.drop_previous)
    batch = draw_slots(jax.random.fold_in(key, len(batch)), batch, cfg.drawn_slots)
    # Of the whole batch: pieces with fewer labels then count for less.
    labelled = labelled_steps(batch)
    gradient = jax.value_and_grad(functools.partial(imitation_loss, model, model_cfg), has_aux=True)
    if cfg.accumulation == 1:
        return gradient(state.params, batch, labelled)

    def accumulate(
        sums: tuple[jax.Array, Params], piece: dict[str, Example]
    ) -> tuple[tuple[jax.Array, Params], dict[str, RowMetrics]]:
        (loss, rows), gradients = gradient(state.params, piece, labelled)
        return jax.tree.map(jnp.add, sums, (loss, gradients)), rows

    zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params)
    pieces = sharding.split_batch(mesh, batch, cfg.accumulation)
    (loss, gradients), rows = jax.lax.scan(accumulate, zeros, pieces)
    return (loss, sharding.join_batch(rows)), gradients

"""The loop around the training step."""

from __future__ import annotations

import collections.abc
import typing

import jax
import numpy as np

from ldm_jax import sharding
from ldm_jax.errors import LdmError
from ldm_jax.training.loss import Example
from ldm_jax.training.metrics import Metrics, StepMetrics, summarize
from ldm_jax.training.step import TrainState, TrainStep


class TrainingError(LdmError, RuntimeError):
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
        gradient_norm=float(gradient_norm), learning_rate=float(learning_rate), loss=float(loss), **summarize(rows)
    )

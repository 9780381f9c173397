"""The loop around the training step."""

from __future__ import annotations

import collections.abc
import typing

import jax

from ldm_jax import sharding
from ldm_jax.errors import LdmError
from ldm_jax.training.loss import Example
from ldm_jax.training.metrics import Metrics, StepMetrics, summarize
from ldm_jax.training.step import TrainState, TrainStep


class TrainingError(LdmError, RuntimeError):
    """Training cannot go on."""


class NotFiniteError(TrainingError):
    """The loss of a step, its gradient, or what it would have made of the state is not finite.

    Attributes:
      step: number of the step, counted from 1; its batch is number `step - 1`.
      state: as it was before that step.
    """

    def __init__(self, message: str, step: int, state: TrainState):
        super().__init__(message)
        self.step, self.state = step, state


class TrainingProgress(typing.NamedTuple):
    """Where training has come to, with no step under way.

    Attributes:
      step: how many steps are done.
      state: after the last of them; its memory is taken over by the next one.
      metrics: of the last of them.
    """

    step: int
    state: TrainState
    metrics: Metrics


def train(
    train_step: TrainStep,
    state: TrainState,
    batches: collections.abc.Iterable[dict[str, Example]],
    steps: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
    pause: collections.abc.Callable[[int], bool] = lambda step: True,
) -> collections.abc.Iterator[TrainingProgress]:
    """Runs training steps up to number `steps`, and says now and then how far it is.

    Between two pauses one step is prepared while another one runs. To end early, leave the iterator alone.

    Args:
      train_step: from `make_train_step`.
      state: from `init_state` or a checkpoint.
      batches: the batch numbered `state.step` and all after it.
      steps: the number of the last step.
      mesh: what the state is split over; None for one device.
      pause: is asked of each step under way, once, by its number, whether to wait for it; there is a pause after the
        last step in any case.

    Yields:
      The progress, at each pause.

    Raises:
      NotFiniteError: a step since the last pause was not finite; the steps after it changed nothing.
      TrainingError: a device has not enough memory for a step.
    """
    try:
        yield from _train(train_step, state, batches, steps, mesh, pause)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            "a device has not enough memory for a step: train on fewer rows at once (rows, or more pieces by "
            "accumulation), keep less (remat='full'), or split the model over more devices along fsdp; "
            f"{str(error).splitlines()[0]}"
        ) from error


def _train(
    train_step: TrainStep,
    state: TrainState,
    batches: collections.abc.Iterable[dict[str, Example]],
    steps: int,
    mesh: jax.sharding.Mesh | None,
    pause: collections.abc.Callable[[int], bool],
) -> collections.abc.Iterator[TrainingProgress]:
    under_way: StepMetrics | None = None
    for number, batch in zip(range(int(state.step), steps), batches, strict=False):
        state, metrics = train_step(state, sharding.place_batch(mesh, batch) if mesh else batch)
        step = number + 1
        if pause(step) or step == steps:
            yield TrainingProgress(step, state, _read(state, metrics))
        elif under_way is not None:
            jax.block_until_ready(under_way)  # else batches would pile up on the device
        under_way = metrics


def _read(state: TrainState, metrics: StepMetrics) -> Metrics:
    finite, done, found = jax.device_get((state.finite, state.step, metrics))
    if not finite:
        step = int(done) + 1
        raise NotFiniteError(
            f"the loss, its gradient or what they make of the parameters is not finite at step {step}: look for NaN in "
            "the data, or lower the learning rate",
            step,
            state._replace(finite=~state.finite),  # an operation on what all processes hold
        )
    return Metrics(
        gradient_norm=float(found.gradient_norm),
        learning_rate=float(found.learning_rate),
        loss=float(found.loss),
        **summarize(found.rows),
    )

"""The loop of a training run: it logs, evaluates and saves, and ends in order."""

from __future__ import annotations

import pathlib
import typing

import jax

from data.mixture import Mixture
from experiments.harness import progress, signals
from experiments.harness.metrics_log import Meter, RunLog
from experiments.harness.validation import Validation
from ldm_jax import training
from ldm_jax.training import diagnosis
from ldm_jax.training.checkpoints import Checkpoints

FAILURE = "failure"
"""Folder in the workdir for the batches of steps that were not finite."""


class Pace(typing.NamedTuple):
    """How many steps there are, and how many from one checkpoint, and from one row of metrics, to the next."""

    steps: int
    checkpoint_steps: int
    log_steps: int


def follow(
    train_step: training.TrainStep,
    state: training.TrainState,
    mixture: Mixture,
    pace: Pace,
    meter: Meter,
    log: RunLog,
    validate: Validation,
    checkpoints: Checkpoints,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
) -> training.TrainState:
    """Trains from a state to the last step.

    Args:
      train_step: from `training.make_train_step`.
      state: to go on from; its memory is taken over.
      mixture: of the batches.
      pace: what to do when.
      meter: makes the rows of metrics.
      log: takes them.
      validate: evaluates parameters.
      checkpoints: take the states.
      workdir: for what is left of a failure.
      mesh: what the state is split over.

    Returns:
      The last state, saved.

    Raises:
      TrainingError: the loss or the gradient is not finite; the state before that step and the batch are saved.
      Interrupted: a signal asked for the end; the state is saved.
    """
    clock = progress.clock()
    begun = done = newest = int(state.step)
    evaluated, unsaid = dict[int, dict[str, typing.Any]](), dict[str, typing.Any]()

    def tell() -> None:
        # What the log says is saved is on the disk.
        if unsaid and not checkpoints.busy:
            progress.log("pretrain", **unsaid)
            unsaid.clear()

    with progress.bar("pretrain", pace.steps, "step", begun) as advance, signals.deferred() as received:

        def stop(step: int) -> bool:
            nonlocal newest
            newest = step
            return received(step)

        trained = training.train(train_step, state, mixture.batches(begun), pace.steps, mesh, stop)
        try:
            for done, newest_state, metrics in trained:
                advance(1)
                state = newest_state  # after step `newest`, most often the one after `done`
                if validate.due(newest, pace.steps) and newest not in evaluated:
                    evaluated[newest] = validate(state.params)
                if done % pace.log_steps == 0 or done == pace.steps or done in evaluated:
                    log.write(meter.row(done, metrics) | evaluated.pop(done, {}))
                due = newest % pace.checkpoint_steps == 0 or newest == pace.steps or received.number
                # The newest state is not known to be sound before its own metrics are.
                if due and newest != checkpoints.latest and bool(state.finite):
                    checkpoints.wait()
                    tell()
                    checkpoints.save(state)
                    unsaid = {"step": newest, "loss": metrics.loss, "excess": metrics.kl, "seconds": clock()}
                tell()
        except training.NotFiniteError as error:
            raise training.TrainingError(f"{error}. {_keep(error, checkpoints, workdir)}") from error
        checkpoints.wait()
        tell()
        if received.number and done < pace.steps:
            raise signals.Interrupted(received.number, step=done)
    return state


def _keep(error: training.NotFiniteError, checkpoints: Checkpoints, workdir: pathlib.Path) -> str:
    """Saves what led to a failure, and says where."""
    before = error.step - 1
    if before != checkpoints.latest:
        checkpoints.save(error.state)
        checkpoints.wait()
    path = workdir / FAILURE / f"step-{error.step:08d}-process-{jax.process_index()}.npz"
    diagnosis.save_batch(path, error.batch)
    return (
        f"The batch is in {path} and the state before it is checkpoint {before}: "
        f"`python -m experiments.diagnose --workdir={workdir}` says where it is not finite"
    )

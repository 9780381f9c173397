"""The loop of a training run: it logs, evaluates and saves, and ends in order."""

from __future__ import annotations

import typing

import jax

from data.mixture import Mixture
from experiments.harness import progress, signals
from experiments.harness.metrics_log import RunLog
from experiments.harness.validation import Validation
from ldm_jax import training
from ldm_jax.training.checkpoints import Checkpoints


class Pace(typing.NamedTuple):
    """How many steps there are, and how many from one checkpoint, and from one row of metrics, to the next."""

    steps: int
    checkpoint_steps: int
    log_steps: int

    def logs(self, step: int) -> bool:
        """Whether there is a row of metrics after a step."""
        return step % self.log_steps == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after a step."""
        return step % self.checkpoint_steps == 0 or step == self.steps


class TrainingRun(typing.NamedTuple):
    """The parts of a training run.

    Attributes:
      train_step: from `training.make_train_step`.
      mixture: of the batches.
      pace: what to do when.
      validate: evaluates parameters.
      checkpoints: take the states.
      mesh: what the state is split over, or None.
    """

    train_step: training.TrainStep
    mixture: Mixture
    pace: Pace
    validate: Validation
    checkpoints: Checkpoints
    mesh: jax.sharding.Mesh | None


class _Saver:
    """Saves states while training goes on; what the log says is saved is on the disk."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints, self._clock = checkpoints, progress.clock()
        self._pending_log: dict[str, typing.Any] = {}

    def save(self, step: int, state: training.TrainState, **facts: typing.Any) -> None:
        self.flush_log(wait=True)
        if step != self._checkpoints.latest:
            self._checkpoints.save(state)
            self._pending_log = {"step": step, **facts, "seconds": self._clock()}

    def flush_log(self, *, wait: bool = False) -> None:
        if self._pending_log and (wait or not self._checkpoints.busy):
            self._checkpoints.wait()  # raises what went wrong
            progress.log("pretrain", **self._pending_log)
            self._pending_log = {}


def follow(run: TrainingRun, state: training.TrainState, log: RunLog) -> training.TrainState:
    """Trains from a state to the last step.

    Args:
      run: its parts.
      state: to go on from; its memory is taken over.
      log: takes the metrics.

    Returns:
      The last state, saved.

    Raises:
      TrainingError: a step is not finite; the state before it is saved.
      CheckpointError: a state cannot be saved.
      WorkdirError: the metrics cannot be written.
      Interrupted: a signal asked for the end; the state is saved.
    """
    start_step, pace, saver = int(state.step), run.pace, _Saver(run.checkpoints)
    with progress.bar("pretrain", pace.steps, "step", start_step) as advance, signals.deferred() as asked:

        def pause(step: int) -> bool:
            advance(1)
            log.flush()  # while the step is under way
            return asked(step) or pace.logs(step) or pace.saves(step) or run.validate.due(step, pace.steps)

        batches = run.mixture.batches(start_step)
        trained = training.train(run.train_step, state, batches, pace.steps, mesh=run.mesh, pause=pause)
        try:
            for step, newest, metrics in trained:
                state = newest
                evaluated = run.validate(state.params) if run.validate.due(step, pace.steps) else {}
                if evaluated or pace.logs(step):
                    log.write(step, metrics, evaluated)
                if asked.number or pace.saves(step):
                    log.flush()  # a run that goes on from here has the rows up to here
                    saver.save(step, state, loss=metrics.loss, kl=metrics.kl)
                saver.flush_log()
                if asked.number and step < pace.steps:
                    saver.flush_log(wait=True)
                    raise signals.Interrupted(asked.number, step=step)
        except training.NotFiniteError as error:
            saver.save(error.step - 1, error.state)
            saver.flush_log(wait=True)
            raise training.TrainingError(
                f"{error}. The state before it is the newest checkpoint: experiments.diagnose on this workdir repeats "
                "the step and says where it is not finite"
            ) from error
        saver.flush_log(wait=True)
    return state

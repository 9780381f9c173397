"""Checkpoints: of a training run, to go on from bit for bit, and of parameters alone."""

from __future__ import annotations

import collections.abc
import contextlib
import logging
import pathlib
import shutil
import sys
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ldm_jax.errors import LdmError, differences
from ldm_jax.training.step import KEY_IMPL, TrainState
from ldm_jax.types import PyTree

Configuration = collections.abc.Mapping[str, typing.Any]
"""JSON values by name, nested or not."""


_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")


class CheckpointError(LdmError, ValueError):
    """A checkpoint that cannot be written, is damaged, or belongs to something else."""


def settings() -> dict[str, typing.Any]:
    """The settings of the process that decide what a training step computes: a run goes on under the same ones."""
    return {name: getattr(jax.config, name) for name in _SETTINGS}


class Checkpoints:
    """The checkpoints of one training run, in one folder; use as a context manager.

    A checkpoint is written aside by a thread and then renamed: what a crash leaves behind is never taken for one. On
    several processes all call the same methods, and the folder is one that all of them see.
    """

    def __init__(
        self, directory: str | pathlib.Path, configuration: Configuration, max_to_keep: int = 2, keep_period: int = 0
    ):
        """Opens the folder, or makes it.

        Args:
          directory: of the run.
          configuration: all that a checkpoint must agree with to be resumed from: model, training, mixture. The
            `settings` of the process are added.
          max_to_keep: how many of the newest checkpoints stay.
          keep_period: those of steps that this divides stay too; 0 for none.
        """
        self.directory = pathlib.Path(directory).absolute()
        self._quiet = contextlib.ExitStack()
        self.configuration = {**configuration, "settings": settings()}
        kept: list[typing.Any] = [checkpoint_managers.LatestN(max_to_keep)]
        if keep_period:
            kept.append(checkpoint_managers.EveryNSteps(keep_period))
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "state": ocp.StandardCheckpointHandler(),
                "configuration": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept), enable_async_checkpointing=True
            ),
        )

    def __enter__(self) -> Checkpoints:
        _say_once(self._quiet)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, CheckpointError)
        with contextlib.ExitStack() if failed else self._quiet:  # threads that failed print until the process ends
            try:
                with self._writing():
                    self._manager.close()
            except CheckpointError:
                if kind is None:  # what is under way already says more
                    raise

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, the one being written included."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None; it may still be on its way to the disk, see `wait`."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Copies a state and writes it while training goes on; waits for the one before to be complete.

        Raises:
          CheckpointError: this one or the one before cannot be written.
        """
        rest = _without_key_type(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(rest.pop("params")),
            state=ocp.args.StandardSave(rest),
            configuration=ocp.args.JsonSave(self.configuration),
        )
        with self._writing():
            self._check_room(state)
            self._manager.save(int(state.step), args=items, force=True)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still on its way to the disk."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Returns when all that was saved is on the disk.

        Raises:
          CheckpointError: it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def _check_room(self, state: TrainState) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.optimizer)))
        free = shutil.disk_usage(self.directory)[2]
        if needed > free:
            raise OSError(f"it takes {needed / 1e6:.1f} MB, and the file system has room for {free / 1e6:.1f} MB")

    @contextlib.contextmanager
    def _writing(self) -> collections.abc.Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever orbax and the file systems below it raise
            raise CheckpointError(
                f"cannot write a checkpoint to {self.directory}: {_reason(error)}. Those that were whole before are "
                "still there: make room, or make it writable, and start again with the same flags"
            ) from error

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """Reads a checkpoint.

        Args:
          like: a state, or the shapes of one (`training.state_shapes`), of the run that resumes; on whatever mesh.
          step: which checkpoint; default: the newest.

        Returns:
          The state, or None where there is no checkpoint.

        Raises:
          CheckpointError: the checkpoint is of another configuration or other settings, or cannot be read.
        """
        self.wait()
        step = self.latest if step is None else step
        if step is None:
            return None
        if found := differences(self.read_configuration(step), self.configuration):
            raise CheckpointError(
                f"the checkpoint {self._path(step)} is of another run: {'; '.join(found)}. "
                "Resume with the same configuration and settings (JAX_ENABLE_X64 is settings.jax_enable_x64), or "
                "choose another folder"
            )
        params = self.restore_params(like.params, step)
        wanted = _without_key_type(like)
        del wanted["params"]
        self._check(step, "state", wanted)
        rest = self._read(step, state=ocp.args.StandardRestore(jax.tree.map(_with_device, wanted))).state
        state = TrainState(params=params, **jax.tree.map(_placed, wanted, rest))
        key = typing.cast(jax.Array, state.key)
        return state._replace(key=jax.random.wrap_key_data(key, impl=KEY_IMPL))

    def read_configuration(self, step: int) -> Configuration:
        """The configuration that a checkpoint was saved with, and the settings; raises CheckpointError."""
        return self._read(step, configuration=ocp.args.JsonRestore()).configuration

    def restore_params(self, like: PyTree, step: int | None = None) -> PyTree:
        """Reads the parameters of a checkpoint and nothing else, as acting needs them.

        Args:
          like: their shapes (`jax.eval_shape` of the model's `init`), with shardings where they go onto a mesh.
          step: which checkpoint; default: the newest.

        Returns:
          The parameters.

        Raises:
          CheckpointError: there is none, it is of another model, or it is damaged.
        """
        self.wait()
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self.directory}: train first")
        self._check(step, "params", like)
        read = self._read(step, params=ocp.args.StandardRestore(jax.tree.map(_with_device, like))).params
        return jax.tree.map(_placed, like, read)

    def _path(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _check(self, step: int, item: str, like: PyTree) -> None:
        try:
            saved = self._manager.item_metadata(step)[item]
        except Exception as error:  # whatever orbax raises for damaged files
            raise CheckpointError(self._unreadable(step, error)) from error
        _check_shapes(self._path(step), saved, like)

    def _read(self, step: int, **items: typing.Any) -> typing.Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever orbax raises for damaged files
            raise CheckpointError(self._unreadable(step, error)) from error

    def _unreadable(self, step: int, error: Exception) -> str:
        before = max((other for other in self.steps if other < step), default=None)
        go_on = "train anew" if before is None else f"go on from checkpoint {before}"
        return f"{_unreadable(self._path(step), error)}. If it is damaged, move that folder away to {go_on}"


def _say_once(until: contextlib.ExitStack) -> None:
    """Keeps threads of Orbax and TensorStore from printing errors that are raised, too, where one waits for them."""
    hook = sys.unraisablehook

    def is_news(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname

    def was_awaited(record: logging.LogRecord) -> bool:
        return "never retrieved" not in record.getMessage()  # of writes beside the one that failed first

    def ignored(unraisable: typing.Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # a write ended after the one that failed
            hook(unraisable)

    for name, told in (("absl", is_news), ("asyncio", was_awaited)):
        logging.getLogger(name).addFilter(told)
        until.callback(logging.getLogger(name).removeFilter, told)
    sys.unraisablehook = ignored
    until.callback(setattr, sys, "unraisablehook", hook)
    # Not within `catch_warnings`: what the interpreter collects when it ends asks the first list of filters alone.
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.*' was never awaited", RuntimeWarning)


def save_params(directory: pathlib.Path, params: PyTree) -> None:
    """Writes parameters alone; the folder must not exist."""
    with _alone() as checkpointer:
        checkpointer.save(directory.absolute(), params)
    # Orbax's word for object stores; it names the folder of whoever saved, which is nobody's concern in a release.
    (directory / "commit_success.txt").unlink(missing_ok=True)


def load_params(directory: pathlib.Path, like: PyTree) -> PyTree:
    """Reads what `save_params` wrote.

    Args:
      directory: the folder.
      like: shapes and dtypes expected (`jax.eval_shape` of the model's `init`).

    Returns:
      The parameters.

    Raises:
      CheckpointError: other shapes, or a damaged folder.
    """
    if not directory.is_dir():
        raise CheckpointError(f"there is no folder {directory} with parameters")
    with _alone() as checkpointer:
        try:
            saved = checkpointer.metadata(directory.absolute()).item_metadata
        except Exception as error:
            raise CheckpointError(_unreadable(directory, error)) from error
        _check_shapes(directory, saved, like)
        try:
            return checkpointer.restore(directory.absolute(), jax.tree.map(_with_device, like))
        except Exception as error:
            raise CheckpointError(_unreadable(directory, error)) from error


def _alone() -> ocp.StandardCheckpointer:
    # Of several processes the one that calls this does not wait for the others.
    index = jax.process_index()
    return ocp.StandardCheckpointer(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process-{index}"
        )
        if jax.process_count() > 1
        else ocp.options.MultiprocessingOptions()
    )


def _check_shapes(path: pathlib.Path, saved: typing.Any, wanted: PyTree) -> None:
    """Raises CheckpointError with every parameter that is not the same there and here."""

    def shapes(tree: PyTree) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
        return {
            jax.tree_util.keystr(name, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
            for name, leaf in leaves
        }

    if found := differences(shapes(getattr(saved, "tree", saved)), shapes(wanted)):
        shown = "; ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise CheckpointError(
            f"what is in {path} is not of this model: {shown}. "
            "Use the configuration and the settings of JAX it was saved with, or another folder"
        )


def _unreadable(path: pathlib.Path, error: Exception) -> str:
    return f"cannot read {path}, which is damaged or not open to this user: {_reason(error)}"


def _reason(error: Exception) -> str:
    """The one line of an error that says what is wrong; those of file systems have many."""
    lines = [line.strip() for line in str(error).split(" [source locations")[0].splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line.rstrip(".") if len(line) < 300 else f"{line[:100]} ... {line[-150:]}"


def _without_key_type(state: TrainState) -> dict[str, typing.Any]:
    # Orbax stores plain arrays; a typed key is its data.
    fields = state._asdict()
    if _abstract(state.key):
        data = jax.eval_shape(jax.random.key_data, state.key)
        fields["key"] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=getattr(state.key, "sharding", None))
    else:
        fields["key"] = jax.random.key_data(typing.cast(jax.Array, state.key))
    return fields


def _abstract(leaf: typing.Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _placed(like: typing.Any, leaf: jax.Array) -> jax.Array:
    # Orbax commits arrays to a device; a state that was bound to none would compile its step anew.
    bound = like.sharding is not None if _abstract(like) else like.committed
    return leaf if bound else jnp.asarray(np.asarray(leaf))


def _with_device(leaf: typing.Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)

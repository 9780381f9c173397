"""Checkpoints: of a training run, to go on from bit for bit, and of parameters alone."""

from __future__ import annotations

import collections.abc
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ldm_jax.training import TrainState
from ldm_jax.types import PyTree

Configuration = collections.abc.Mapping[str, typing.Any]
"""JSON values by name, nested or not."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to something else."""


class Checkpoints:
    """The checkpoints of one training run, in one folder; use as a context manager.

    A checkpoint is written aside and then renamed: what a crash leaves behind is never taken for one.
    """

    def __init__(self, directory: str | pathlib.Path, configuration: Configuration, keep: int = 2):
        """Opens the folder, or makes it.

        Args:
          directory: of the run.
          configuration: all that a checkpoint must agree with to be resumed from: model, training, mixture.
          keep: how many of the newest checkpoints stay.

        Raises:
          CheckpointError: the folder holds checkpoints of another configuration.
        """
        self.directory = pathlib.Path(directory).absolute()
        self.configuration = dict(configuration)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep), enable_async_checkpointing=False
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint of a state; returns when it is complete."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_without_key_type(state)), configuration=ocp.args.JsonSave(self.configuration)
        )
        self._manager.save(int(state.step), args=items, force=True)
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState | None:
        """Reads the newest checkpoint.

        Args:
          like: a state, or the shapes of one (`jax.eval_shape`), of the run that resumes.

        Returns:
          The state, or None where there is no checkpoint.

        Raises:
          CheckpointError: the checkpoint is of another configuration or cannot be read.
        """
        step = self.latest
        if step is None:
            return None
        try:
            saved = self._manager.restore(step, args=ocp.args.Composite(configuration=ocp.args.JsonRestore()))
        except Exception as error:  # whatever orbax raises for damaged files
            raise CheckpointError(_damaged(self.directory / str(step), error)) from error
        if differences := differing(saved.configuration, self.configuration):
            raise CheckpointError(
                f"the checkpoint {self.directory / str(step)} is of another run: {'; '.join(differences)}. "
                "Resume with the same configuration, or choose another folder"
            )
        wanted = _without_key_type(like)
        abstract = jax.tree.map(_with_device, wanted)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except Exception as error:
            raise CheckpointError(_damaged(self.directory / str(step), error)) from error
        state = TrainState(**jax.tree.map(_placed, wanted, restored.state))
        return state._replace(key=jax.random.wrap_key_data(state.key))


def save_params(directory: pathlib.Path, params: PyTree) -> None:
    """Writes parameters alone; the folder must not exist."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), params)


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
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(directory.absolute(), jax.tree.map(_with_device, like))
        except Exception as error:
            raise CheckpointError(_damaged(directory, error)) from error


def differing(saved: Configuration, wanted: Configuration, prefix: str = "") -> list[str]:
    """Names every value in which two nested configurations differ, with both."""
    found = []
    for name in sorted({*saved, *wanted}):
        old, new = saved.get(name, "absent"), wanted.get(name, "absent")
        if isinstance(old, dict) and isinstance(new, dict):
            found += differing(old, new, f"{prefix}{name}.")
        elif _plain(old) != _plain(new):
            found.append(f"{prefix}{name} is {old} there and {new} here")
    return found


def _plain(value: typing.Any) -> typing.Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _damaged(path: pathlib.Path, error: Exception) -> str:
    return f"cannot read the checkpoint {path}: {error}. It is damaged or not of this model: remove it to go on without"


def _without_key_type(state: TrainState) -> dict[str, typing.Any]:
    # Orbax stores plain arrays; a typed key is its data.
    fields = state._asdict()
    fields["key"] = (
        jax.eval_shape(jax.random.key_data, state.key) if _abstract(state.key) else jax.random.key_data(state.key)
    )
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

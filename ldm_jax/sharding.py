"""How parameters and batches lie on a mesh of devices: one table of rules, outside the layers.

A mesh has three axes: `data` (own rows), `fsdp` (own rows, and the parameters split too) and `tensor`
(heads and hidden units split). The functions take a mesh that a script made; without one, everything just works.
"""

from __future__ import annotations

import collections.abc
import itertools
import math
import re
import typing

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ldm_jax.errors import ConfigError
from ldm_jax.types import Array, PyTree

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or one that says how many there would be: enough for shapes and shardings."""

AXES = ("data", "fsdp", "tensor")
"""Names of the mesh axes."""

ROWS = ("data", "fsdp")
"""The mesh axes that rows are split over."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/(query|key|value)/kernel$", ("layers", "width", "heads")),
    (r"attention/out/kernel$", ("layers", "heads", "width")),
    (r"blocks/(gate|up)/kernel$", ("layers", "width", "hidden")),
    (r"blocks/down/kernel$", ("layers", "hidden", "width")),
    (r"(tokens|head)/hidden/kernel$", ("width", "hidden")),
    (r"(tokens|head)/out/kernel$", ("hidden", "width")),
    (r"(low|high)$", (None, "width")),
    (r"numeric$", (None, None, "width")),
    (r"grid/(cells|patch|gather)$", (None, None, None, "width")),
    (r"head/(choices|bins)$", ("width", None)),
)
"""Logical axes of each parameter, by the first pattern found in its path; what no pattern finds is replicated."""

MESH_AXES: dict[str | None, str | None] = {
    None: None,
    "layers": None,
    "width": "fsdp",
    "heads": "tensor",
    "hidden": "tensor",
}
"""The mesh axis that each logical axis is split over."""


def partition(path: str) -> PartitionSpec:
    """How the parameter of this path (keys with `/` between) is split; the rules as a function."""
    for pattern, axes in RULES:
        if re.search(pattern, path):
            return PartitionSpec(*(MESH_AXES[axis] for axis in axes))
    return PartitionSpec()


def state_shardings(mesh: AnyMesh, state: PyTree) -> PyTree:
    """Shardings of parameters, or of anything that holds arrays of their shapes under their paths.

    Optimizer states do, so moments are split as the parameters they belong to.

    Args:
      mesh: with the axes `AXES`.
      state: arrays or their shapes (`jax.eval_shape`).

    Returns:
      A tree of the same structure.

    Raises:
      ConfigError: an axis of a parameter does not divide by the mesh axis it is split over.
    """

    def shard(path: tuple[typing.Any, ...], leaf: typing.Any) -> NamedSharding:
        name = _name(path)
        spec = partition(name)
        if len(spec) > leaf.ndim:  # a scalar that an optimizer keeps under the parameter's path
            spec = PartitionSpec()
        for axis, (size, mesh_axis) in enumerate(zip(leaf.shape, spec, strict=False)):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise ConfigError(
                    f"axis {axis} of {name}, {size} long, does not divide by the {mesh.shape[mesh_axis]} devices along "
                    f"{mesh_axis!r}: choose fewer along it, or a size of the model that divides"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(shard, state)


def gather(mesh: Mesh | None, params: PyTree) -> PyTree:
    """Parameters as they are computed with: whole along `fsdp`, but for the blocks, which are gathered one by one.

    Left to itself the compiler would move the activations of an embedding to where its parameters are instead. The
    transpose of this function sums a gradient and splits it in one go.
    """
    if mesh is None:
        return params

    def whole(path: tuple[typing.Any, ...], leaf: Array) -> Array:
        name = _name(path)
        axes = partition(name)
        if "fsdp" not in axes or "/blocks/" in name:
            return leaf
        return _constrain(mesh, leaf, *(None if axis == "fsdp" else axis for axis in axes))

    return jax.tree_util.tree_map_with_path(whole, params)


def join_rows(mesh: Mesh | None, parts: collections.abc.Sequence[Array]) -> Array:
    """Joins rows `[R, ...]` of several buckets; on a mesh each device joins its own, so that nothing moves."""
    if mesh is None:
        return jnp.concatenate(parts, 0)
    joined = jnp.concatenate([_by_device(mesh, part) for part in parts], 1)
    return _constrain(mesh, joined.reshape(-1, *joined.shape[2:]), ROWS)


def split_rows(mesh: Mesh | None, joined: Array, counts: collections.abc.Sequence[int]) -> list[jax.Array]:
    """Undoes `join_rows`; `counts` are the numbers of rows that were joined."""
    ends = list(itertools.accumulate(counts))[:-1]
    if mesh is None:
        return jnp.split(joined, ends)
    parts = jnp.split(_by_device(mesh, joined), [end // row_shards(mesh) for end in ends], 1)
    return [_constrain(mesh, part.reshape(-1, *part.shape[2:]), ROWS) for part in parts]


def row_shards(mesh: AnyMesh | None) -> int:
    """The number of pieces that the rows of a batch are split into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def _by_device(mesh: Mesh, rows: Array) -> jax.Array:
    return _constrain(mesh, rows.reshape(row_shards(mesh), -1, *rows.shape[1:]), ROWS)


def _constrain(mesh: Mesh, leaf: Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*axes)))


def _name(path: tuple[typing.Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh | None, batch: PyTree, count: int) -> PyTree:
    """Cuts leaves `[R, ...]` into `[count, R / count, ...]`, every device's own rows into as many pieces."""

    def split(leaf: Array) -> Array:
        # Row r goes to piece r % count: a run of rows would lie on one device.
        pieces = jnp.moveaxis(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0)
        return pieces if mesh is None else _constrain(mesh, pieces, None, ROWS)

    return jax.tree.map(split, batch)


def join_batch(pieces: PyTree) -> PyTree:
    """Undoes `split_batch`."""
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(math.prod(leaf.shape[:2]), *leaf.shape[2:]), pieces
    )


def share_of_rows(mesh: Mesh | None) -> tuple[int, int]:
    """Which of how many equal, contiguous shares of a batch's rows this process has to bring.

    Processes whose devices differ along `tensor` alone bring the same rows.

    Raises:
      ConfigError: the rows of this process are not contiguous.
    """
    if mesh is None:
        return 0, 1
    pieces = row_shards(mesh)
    devices = mesh.devices.reshape(pieces, -1)
    own = [i for i, row in enumerate(devices) if any(device.process_index == jax.process_index() for device in row)]
    if own != list(range(own[0], own[0] + len(own))) or own[0] % len(own) or pieces % len(own):
        raise ConfigError(
            f"this process has pieces {own} of the {pieces} that data x fsdp cut the rows into, expected neighbours: "
            "let the devices of a process lie along the last axes of the mesh, for example by more fsdp and less data"
        )
    return own[0] // len(own), pieces // len(own)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts this process's rows of a batch on its devices: rows are split over `data` and `fsdp` together.

    Args:
      mesh: with the axes `AXES`.
      batch: NumPy arrays, each leaf `[rows of this process, ...]`.

    Returns:
      Global arrays with the rows of all processes.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def check_rows(mesh: AnyMesh | None, rows: collections.abc.Mapping[str, int], accumulation: int = 1) -> None:
    """Checks that every bucket's rows divide over the devices and the pieces that split them.

    Raises:
      ConfigError: names the bucket and what to do.
    """
    ways = row_shards(mesh) * accumulation
    for name, count in rows.items():
        if count % ways:
            raise ConfigError(
                f"the {count} rows of bucket {name} do not divide by data x fsdp x accumulation = {ways}: "
                f"choose rows that are a multiple of {ways}, in pretraining by rows_multiple={ways}"
            )

"""How parameters and batches lie on a mesh of devices: one table of rules, outside the layers.

A mesh has three axes: `data` (own rows), `fsdp` (own rows, and the parameters split too) and `tensor`
(heads and hidden units split). The functions take a mesh that a script made; without one, everything just works.
"""

from __future__ import annotations

import re
import typing

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.config import ConfigError
from ldm_jax.types import PyTree

AXES = ("data", "fsdp", "tensor")
"""Names of the mesh axes."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/(query|key|value)/kernel$", ("layers", "width", "heads")),
    (r"attention/out/kernel$", ("layers", "heads", "width")),
    (r"blocks/(gate|up)/kernel$", ("layers", "width", "hidden")),
    (r"blocks/down/kernel$", ("layers", "hidden", "width")),
    (r"(tokens|head)/hidden/kernel$", ("width", "hidden")),
    (r"(tokens|head)/out/kernel$", ("hidden", "width")),
    (r"(low|high)$", (None, "width")),
    (r"numeric$", (None, None, "width")),
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


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Shardings of parameters, or of anything that holds arrays of their shapes under their paths.

    Optimiser states do, so moments are split as the parameters they belong to.

    Args:
      mesh: with the axes `AXES`.
      state: arrays or their shapes (`jax.eval_shape`).

    Returns:
      A tree of the same structure.

    Raises:
      ConfigError: an axis of a parameter does not divide by the mesh axis it is split over.
    """

    def shard(path: tuple[typing.Any, ...], leaf: typing.Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        spec = partition(name)
        if len(spec) > leaf.ndim:  # a scalar that an optimiser keeps under the parameter's path
            spec = PartitionSpec()
        for axis, (size, mesh_axis) in enumerate(zip(leaf.shape, spec, strict=False)):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise ConfigError(
                    f"axis {axis} of {name}, {size} long, does not divide by the {mesh.shape[mesh_axis]} devices along "
                    f"{mesh_axis!r}: choose fewer along it, or a size of the model that divides"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(shard, state)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts this process's rows of a batch on its devices: rows are split over `data` and `fsdp` together.

    Args:
      mesh: with the axes `AXES`.
      batch: NumPy arrays, each leaf `[rows of this process, ...]`.

    Returns:
      Global arrays with the rows of all processes.
    """
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def check_rows(mesh: Mesh, rows: typing.Mapping[str, int]) -> None:
    """Checks that every bucket's rows divide over the devices that split them.

    Raises:
      ConfigError: names the bucket and what to do.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, count in rows.items():
        if count % ways:
            raise ConfigError(
                f"the {count} rows of bucket {name} do not divide by data x fsdp = {ways}: "
                f"choose a number of rows per environment that is a multiple of {ways}"
            )

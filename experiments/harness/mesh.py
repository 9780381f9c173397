"""The processes and devices that a script runs on."""

from __future__ import annotations

import collections.abc
import dataclasses
import logging
import math
import os

import jax
from jax.experimental import multihost_utils

from experiments.harness.progress import logger
from ldm_jax.errors import ConfigError
from ldm_jax.sharding import AXES


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; see `ldm_jax.sharding`. All 1: no mesh.

    Attributes:
      data: each has its own rows.
      fsdp: each has its own rows, and the parameters are split.
      tensor: heads and hidden units are split.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if not size >= 1:
                raise ConfigError(f"mesh.{name} is {size}, expected at least 1 device along it")


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """The processes of a run, one per host; each is started with the same flags but for `process`.

    Attributes:
      coordinator: `address:port` of process 0; empty for one process alone; `"auto"` where the cluster says all of it
        (Slurm, Open MPI, Kubernetes, TPU pods).
      processes: how many there are.
      process: which of them this is.
    """

    coordinator: str = ""
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"hosts.process is {self.process}, expected 0 to {self.processes - 1}")
        if self.processes > 1 and not self.coordinator:
            raise ConfigError(
                f"hosts.processes is {self.processes} but hosts.coordinator is empty: give process 0's address:port"
            )


def parse_mesh(axes: collections.abc.Sequence[str]) -> MeshConfig:
    """A mesh from `data=2`, `fsdp=4` and the like, or from three numbers in the order data, fsdp, tensor.

    Raises:
      ConfigError: an unknown axis, one given twice, or a size that is not a positive number.
    """
    if len(axes) == len(AXES) and all(axis.isdecimal() for axis in axes):
        axes = [f"{name}={size}" for name, size in zip(AXES, axes, strict=True)]
    sizes: dict[str, int] = {}
    for axis in axes:
        name, _, size = axis.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"got the mesh axis {axis!r}, expected data=N, fsdp=N or tensor=N, each once, or three numbers: 1,8,1"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def connect(config: HostsConfig) -> None:
    """Joins the processes of a run; must come before anything is computed. Does nothing for one process alone.

    Raises:
      ConfigError: they cannot be joined.
    """
    try:
        if config.coordinator == "auto":
            jax.distributed.initialize()
        elif config.coordinator:
            jax.distributed.initialize(config.coordinator, config.processes, config.process)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot join the processes by hosts.coordinator={config.coordinator!r}: {str(error).splitlines()[0]}. "
            "Give the address:port of process 0, one that all of them reach, or auto where the cluster tells it"
        ) from error
    if config.coordinator and jax.process_index():
        logger.setLevel(logging.WARNING)  # one of them talks


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh | None:
    """Arranges the devices of all processes in a mesh; None where none is asked for.

    Raises:
      ConfigError: the product of the axes is not the number of devices.
    """
    devices, shape = jax.device_count(), dataclasses.astuple(config)
    if config == MeshConfig() and jax.process_count() == 1:
        return None
    if math.prod(shape) != devices:
        raise ConfigError(
            f"a mesh of {config.data} x {config.fsdp} x {config.tensor} (data x fsdp x tensor) needs "
            f"{math.prod(shape)} devices, there are {devices}: choose three numbers whose product is {devices}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def device_bytes() -> int:
    """Memory of one device; devices of the host share what it has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit") or host // jax.local_device_count()

"""The mesh of devices that a script runs on."""

from __future__ import annotations

import dataclasses
import math

import jax

from ldm_jax.config import ConfigError
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


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh | None:
    """Arranges the devices of all processes in a mesh; None where none is asked for.

    Raises:
      ConfigError: the product of the axes is not the number of devices.
    """
    if config == MeshConfig():
        return None
    devices, shape = jax.device_count(), dataclasses.astuple(config)
    if math.prod(shape) != devices:
        raise ConfigError(
            f"a mesh of {config.data} x {config.fsdp} x {config.tensor} (data x fsdp x tensor) needs "
            f"{math.prod(shape)} devices, there are {devices}: choose three numbers whose product is {devices}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))

"""Describes a model without making it: `python -m experiments.describe --size=308m --mesh=fsdp=8`.

Prints parameters by part, memory per device for each policy of rematerialization, and arithmetic per token. All of it
is told from shapes, so that it takes a laptop a few seconds for any size and any mesh.
"""

from __future__ import annotations

import dataclasses
import sys
import typing

import gymnasium
import jax
import numpy as np
from absl import app, flags, logging

from experiments.harness.mesh import MeshConfig, parse_mesh
from ldm_jax.encoding.buckets import Bucket, bucket_for
from ldm_jax.errors import LdmError
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.sharding import AXES
from ldm_jax.training import cost
from ldm_jax.training.optimizer import TrainingConfig

_REMATS: tuple[typing.Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class DescribeConfig:
    """What is described.

    Attributes:
      name: of the size, for the first line.
      model: shapes of the model.
      training: its optimizer.
      mesh: the devices, which need not be there.
      rows: of one step, over all devices.
      steps: T of a row.
      bucket: the padded widths of the rows.
    """

    name: str
    model: ModelConfig
    training: TrainingConfig
    mesh: MeshConfig
    rows: int
    steps: int
    bucket: Bucket


def describe(config: DescribeConfig) -> str:
    """The description, some lines of text.

    Raises:
      ConfigError: the model or the rows do not divide over the mesh, or the bucket does not fit the model.
    """
    cfg, mesh = config.model, jax.sharding.AbstractMesh(dataclasses.astuple(config.mesh), AXES)
    counts, tokens = cost.count_parts(cfg), config.steps * cfg.tokens_per_step
    total = sum(counts.values())
    flops = cost.flops_per_token(cfg, tokens)
    outside = cost.bucket_flops(cfg, config.bucket, config.rows, config.steps) / cfg.tokens_per_step
    memory = {
        remat: cost.estimate_memory(
            dataclasses.replace(cfg, remat=remat), config.training, {config.bucket: config.rows}, config.steps, mesh
        )
        for remat in _REMATS
    }
    devices = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, dataclasses.astuple(config.mesh), strict=True))
    lines = [
        f"{config.name}: {cfg.layers} layers of width {cfg.width}, {cfg.heads} heads on {cfg.kv_heads} keys, "
        f"feed-forward {cfg.feed_forward}, window {cfg.window}, {cfg.dtype}",
        "",
        "parameters",
        *(f"  {part:28}{count:15,}{count / total:8.1%}" for part, count in counts.items()),
        f"  {'all':28}{total:15,}",
        f"  {'N, matrices of the decoder':28}{cost.backbone_parameters(cfg):15,}",
        "",
        f"MFLOP per token, rows of {tokens:,} tokens",
        f"  {'':28}{'forward':>15}{'training':>15}",
        *(
            f"  {what:28}{value / 1e6:15,.1f}{3 * value / 1e6:15,.1f}"
            for what, value in (
                ("2N and 6N", flops.matrices),
                ("attention within the mask", flops.attention),
                ("encoders and head", outside),
            )
        ),
        f"  encoders and head are those of the bucket {config.bucket.name}; what is recomputed does not count",
        "",
        f"MB per device, {devices}, {config.rows} rows of {config.steps:,} steps, {config.training.optimizer}",
        f"  {'remat':28}" + "".join(f"{remat:>15}" for remat in _REMATS),
        *(
            f"  {field:28}" + "".join(f"{getattr(memory[remat], field) / 1e6:15,.1f}" for remat in _REMATS)
            for field in cost.MemoryEstimate._fields
        ),
        f"  {'all':28}" + "".join(f"{sum(memory[remat]) / 1e6:15,.1f}" for remat in _REMATS),
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Prints what the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"got {argv[1:]}, expected flags only")
    logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators are not there
    values = flags.FLAGS
    try:
        cfg = SIZES[values.size]
        changes: dict[str, typing.Any] = {
            name: values[name].value for name in ("dtype", "tokens_per_step") if values[name].value is not None
        }
        cfg = dataclasses.replace(cfg, **changes)
        seen = gymnasium.spaces.Box(-1, 1, (values.numbers,), np.float32)
        actions: dict[str, gymnasium.Space] = {}
        if values.continuous:
            actions["continuous"] = gymnasium.spaces.Box(-1, 1, (values.continuous,), np.float32)
        if values.choices:
            actions["choices"] = gymnasium.spaces.Discrete(values.choices)
        config = DescribeConfig(
            name=values.size,
            model=cfg,
            training=TrainingConfig(optimizer=values.optimizer),
            mesh=parse_mesh(values.mesh),
            rows=values.rows,
            steps=values.steps or 2 * cfg.window,
            bucket=bucket_for(seen, gymnasium.spaces.Dict(actions)),
        )
        print(describe(config))
    except LdmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_enum("size", "micro", list(SIZES), "which model")
    flags.DEFINE_list("mesh", [], "devices along each axis: data=2,fsdp=4 or three numbers; they need not be there")
    flags.DEFINE_integer("rows", 8, "rows of one step, over all devices", lower_bound=1)
    flags.DEFINE_integer("steps", 0, "time steps of a row; 0: twice what attention sees", lower_bound=0)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the computation; default: that of the size")
    flags.DEFINE_integer("tokens_per_step", None, "default: that of the size")
    flags.DEFINE_enum("optimizer", "adamw", ["adamw", "muon"], "whose state is counted")
    flags.DEFINE_integer("numbers", 32, "numbers of an observation", lower_bound=0)
    flags.DEFINE_integer("continuous", 8, "continuous slots of an action", lower_bound=0)
    flags.DEFINE_integer("choices", 0, "choices of a categorical slot beside; 0: there is none", lower_bound=0)
    app.run(main)

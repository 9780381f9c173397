"""Trains several sizes on several token budgets and fits the law: `python -m experiments.scaling --workdir=runs/mine`.

Reads `dataset/` of the workdir and writes `scaling/`: a folder for each run, `scaling.json` and `scaling.png`. Killed
and started again with the same flags, it goes on where it was. A size is a name (`32m`) or `WIDTHxLAYERS`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import typing

import numpy as np

from data.store import open_dataset
from experiments import pretrain
from experiments.harness import progress, validation
from experiments.harness.stage import stage
from experiments.harness.workdir import pin_config
from experiments.report import figures
from ldm_jax import files
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation import scaling_law
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.training.cost import backbone_parameters


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """Which runs.

    Attributes:
      sizes: with commas between; a named size brings its own window.
      tokens: budgets, with commas between.
      batches: of the held-out loss after the last step.
      pretrain: everything else; `WIDTHxLAYERS` changes its model.
    """

    sizes: str = "32x1,48x2,64x3,96x4,128x4"
    tokens: str = "1e5,3e5,1e6,3e6"
    batches: int = 32
    pretrain: pretrain.PretrainConfig = dataclasses.field(default_factory=pretrain.PretrainConfig)

    def __post_init__(self):
        if not self.pretrain.held_out:
            raise ConfigError("pretrain.held_out is 0, expected 2 or more: the law is fitted to the held-out loss")
        shaped = [shape(name, self.pretrain.model) for name in self.sizes.split(",")]
        try:
            budgets = [float(word) for word in self.tokens.split(",")]
        except ValueError as error:
            raise ConfigError(f"tokens is {self.tokens!r}, expected numbers with commas between") from error
        if len(set(shaped)) < 3 or len(set(budgets)) < 3:
            raise ConfigError(f"got {len(shaped)} sizes and {len(budgets)} budgets, expected 3 or more of each")


def shape(name: str, base: ModelConfig) -> ModelConfig:
    """The model of a size.

    Args:
      name: of `ldm_jax.SIZES`, or `WIDTHxLAYERS`: heads are 32 wide, SwiGLU twice the width.
      base: the rest of the latter.

    Raises:
      ConfigError: no such size.
    """
    if name in SIZES:
        return SIZES[name]
    if not (found := re.fullmatch(r"(\d+)x(\d+)", name)):
        raise ConfigError(f"{name!r} is no size: give WIDTHxLAYERS or one of {', '.join(SIZES)}")
    width, layers = map(int, found.groups())
    heads = max(1, width // 32)
    return dataclasses.replace(base, width=width, layers=layers, heads=heads, kv_heads=heads, feed_forward=2 * width)


@stage("scaling")
def run(config: ScalingConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> dict[str, typing.Any]:
    """Trains what is missing, and fits.

    Args:
      config: which runs.
      workdir: has `dataset/`.
      environments: ids to train on; empty for all in the dataset.

    Returns:
      The contents of `scaling.json`.

    Raises:
      WorkdirError: the workdir cannot be used.
      ScalingError: a law cannot be fitted to the runs.
    """
    ids = environments or open_dataset(workdir / "dataset").ids
    folder = workdir / "scaling"
    pin_config(folder, "scaling_config", config, owns=("*",))
    points = []
    for budget in sorted(float(word) for word in config.tokens.split(",")):  # the cheap runs first
        for name in config.sizes.split(","):
            model = shape(name, config.pretrain.model)
            own = _one(config, model, budget, len(ids))
            place = folder / f"{name}-{budget:.0f}"
            pretrain.run(own, place, ids, workdir / "dataset")
            last = json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])
            point = {
                "size": name,
                "parameters": backbone_parameters(model),
                "tokens": last["tokens"],
                **{f"held_out_{key}": last["held_out"][key] for key in ("loss", "kl", "accuracy")},
            }
            points.append(point)
            progress.log("scaling", **point)
    found = {"points": points, **_fit(points)}
    files.write(folder / "scaling.json", json.dumps(found, indent=1) + "\n")
    (folder / "scaling.png").write_bytes(figures.scaling_picture(found, "png"))
    print(_table(found), f"figure: {folder / 'scaling.png'}", sep="\n")
    return found


def _one(config: ScalingConfig, model: ModelConfig, budget: float, environments: int) -> pretrain.PretrainConfig:
    base = config.pretrain
    window = max(base.window, 2 * model.window)
    steps = max(2, math.ceil(budget / (base.rows * environments * window)))
    cfg = dataclasses.replace(base.training, steps=steps, warmup=min(base.training.warmup, steps // 5))
    evaluated = validation.ValidationConfig(steps=steps, batches=config.batches)
    return dataclasses.replace(base, model=model, window=window, training=cfg, evaluation=evaluated)


def _fit(points: list[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    columns = [np.array([point[key] for point in points]) for key in ("parameters", "tokens", "held_out_kl")]
    law = scaling_law.fit(*columns)
    others = scaling_law.leave_one_out(*columns) if len(points) > 6 else [law]
    spread = {
        name: [min(values), max(values)] for name, values in zip(law._fields, zip(*others, strict=True), strict=True)
    }
    error = np.log(law.predict(*columns[:2]) / columns[2])
    return {"law": law._asdict(), "leave_one_out": spread, "rms_log_error": float(np.sqrt(np.mean(error**2)))}


def _table(found: dict[str, typing.Any]) -> str:
    law = scaling_law.Law(**found["law"])
    lines = [f"{'size':>10} {'N':>12} {'D':>12} {'held-out excess':>16} {'law':>8}"]
    for point in found["points"]:
        n, d = point["parameters"], point["tokens"]
        lines.append(f"{point['size']:>10} {n:12,} {d:12,} {point['held_out_kl']:16.4f} {law.predict(n, d):8.4f}")
    spread = {name: f"{low:.3g} to {high:.3g}" for name, (low, high) in found["leave_one_out"].items()}
    return "\n".join(
        [
            *lines,
            f"excess loss = {law.floor:.4g} + {law.parameters:.4g} / N^{law.parameters_power:.3f}"
            f" + {law.data:.4g} / D^{law.data_power:.3f}, rms error of its logarithm {found['rms_log_error']:.3f}",
            f"without one run: floor {spread['floor']}, powers {spread['parameters_power']}; {spread['data_power']}",
        ]
    )


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"cpu": ScalingConfig(), "published": ScalingConfig("32m,70m,308m,736m", "1e9,3e9,1e10,3e10")})

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

from data.store import Dataset, open_dataset
from experiments import pretrain
from experiments.harness import progress
from experiments.harness.law import fit_points, law_table
from experiments.harness.metrics_log import read_rows
from experiments.harness.stage import stage
from experiments.harness.workdir import WorkdirError, pin_config
from experiments.report import figures
from ldm_jax import files
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation.aggregates import interquartile_mean
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.training.cost import backbone_parameters


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """Which runs.

    Attributes:
      sizes: with commas between; a named size brings its own window.
      tokens: budgets, with commas between.
      batches: of the held-out loss after the last step.
      pretrain: everything else; `WIDTHxLAYERS` changes its model. In `pretrain.evaluation.environments` each model acts
        in the end, and the interquartile mean of its z there is beside its loss.
    """

    sizes: str = "32x1,48x2,64x3,96x4,128x4"
    tokens: str = "1e5,3e5,1e6,3e6"
    batches: int = 32
    pretrain: pretrain.PretrainConfig = dataclasses.field(default_factory=pretrain.PretrainConfig)

    def __post_init__(self) -> None:
        if not self.pretrain.held_out:
            raise ConfigError("pretrain.held_out is 0, expected 2 or more: the law is fitted to the held-out loss")
        if not self.batches >= 1:
            raise ConfigError(f"batches is {self.batches}, expected at least 1: the law is fitted to the held-out loss")
        shaped = [shape(name, self.pretrain.model) for name in self.names]
        if len(set(shaped)) < 3 or len(set(self.budgets)) < 3:
            raise ConfigError(f"got {len(shaped)} sizes and {len(self.budgets)} budgets, expected 3 or more of each")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sizes."""
        return tuple(dict.fromkeys(word.strip() for word in self.sizes.split(",")))

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets in tokens, the smallest first."""
        try:
            budgets = {float(word) for word in self.tokens.split(",")}
        except ValueError as error:
            raise ConfigError(f"tokens is {self.tokens!r}, expected numbers with commas between") from error
        if not all(0 < budget < math.inf for budget in budgets):
            raise ConfigError(f"tokens is {self.tokens!r}, expected positive numbers")
        return tuple(sorted(budgets))


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


@stage("scaling", among=lambda config, workdir: open_dataset(workdir / "dataset").ids)
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
    folder, dataset = workdir / "scaling", open_dataset(workdir / "dataset")
    ids = _fitting(config, dataset, environments)
    # All of them before the first: one that contradicts itself is found now.
    runs = {(name, budget): _one(config, name, budget) for budget in config.budgets for name in config.names}
    pin_config(folder, "scaling_config", config, owns=("*",))
    points = []
    for (name, budget), own in runs.items():
        place = folder / f"{name}-{budget:.0f}"
        pretrain.run(own, place, ids, workdir / "dataset")
        last = _last_row(place / "metrics.jsonl", own.training.steps)
        point = {
            "size": name,
            "parameters": backbone_parameters(own.model),
            "tokens": last["tokens"],
            **{f"held_out_{key}": last["held_out"][key] for key in ("loss", "kl", "accuracy")},
        }
        if z := [played["z"] for played in last.get("evaluation", {}).values()]:
            point["z"] = float(interquartile_mean(np.array(z)))
        points.append(point)
        progress.log("scaling", **point)
    found = {"points": points, **fit_points(points)}
    files.write(folder / "scaling.json", json.dumps(found, indent=1) + "\n")
    (folder / "scaling.png").write_bytes(figures.scaling_picture(found))
    print(law_table(found), f"figure: {folder / 'scaling.png'}", sep="\n")
    return found


def _fitting(config: ScalingConfig, dataset: Dataset, ids: tuple[str, ...]) -> tuple[str, ...]:
    """The environments that every size can be trained on: a law compares what was trained on the same data."""
    for name in config.names:
        batches = pretrain.prepare(_one(config, name, config.budgets[0]), dataset, ids).batches
        ids = tuple(codec.card.id for codec in batches.codecs)
    return ids


def _last_row(path: pathlib.Path, steps: int) -> dict[str, typing.Any]:
    rows = [row for row in read_rows(path) if row["step"] == steps and "held_out" in row]
    if not rows:
        raise WorkdirError(f"{path} has no row of the last step, {steps}: move that folder away to train it anew")
    return rows[-1]


def _one(config: ScalingConfig, name: str, budget: float) -> pretrain.PretrainConfig:
    model = shape(name, config.pretrain.model)
    base = config.pretrain
    window = max(base.window, 2 * model.window)
    steps = max(2, math.ceil(budget / (base.rows * window)))
    cfg = dataclasses.replace(base.training, steps=steps, warmup=min(base.training.warmup, steps // 5))
    evaluated = dataclasses.replace(base.evaluation, steps=steps, batches=config.batches)
    return dataclasses.replace(base, model=model, window=window, training=cfg, evaluation=evaluated)


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"cpu": ScalingConfig(), "published": ScalingConfig("32m,70m,308m,736m", "1e9,3e9,1e10,3e10")})

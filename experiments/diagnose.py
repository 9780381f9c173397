"""Repeats the step that pretraining failed at: `python -m experiments.diagnose --workdir=runs/mine`.

Prints a table of what in it is NaN or infinite. The state is that of the newest checkpoint, which pretraining left as
it was before the step; the batch is a function of the step and is drawn from the dataset again.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import pathlib
import typing

from data.store import open_dataset
from experiments import pretrain
from experiments.harness.batches import make_batches
from experiments.harness.flags import rebuild
from experiments.harness.stage import stage
from experiments.harness.workdir import WorkdirError
from ldm_jax import training
from ldm_jax.errors import ConfigError
from ldm_jax.model.network import make_model
from ldm_jax.training import diagnosis
from ldm_jax.training.checkpoints import CheckpointError, Checkpoints


@dataclasses.dataclass(frozen=True)
class DiagnoseConfig:
    """What is repeated.

    Attributes:
      step: that follows a checkpoint, counted from 1; 0 for the one that follows the newest.
      dataset: the folder; empty for `dataset/` in the workdir.
    """

    step: int = 0
    dataset: str = ""

    def __post_init__(self) -> None:
        if not self.step >= 0:
            raise ConfigError(f"step is {self.step}, expected 1 or more, or 0 for the one after the newest checkpoint")


@stage("diagnose")
def run(config: DiagnoseConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> diagnosis.Diagnosis:
    """Repeats the step, on one device.

    Args:
      config: which step.
      workdir: of the pretraining.
      environments: not used.

    Raises:
      CheckpointError: there is no checkpoint of before the step, or it cannot be read.
      StoreError: there is no dataset.
      WorkdirError: there are no checkpoints, or the dataset is no longer the one that was trained on.
    """
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise WorkdirError(f"there is no {folder}: give the --workdir of a pretraining")
    with Checkpoints(folder, {}) as checkpoints:
        steps = checkpoints.steps
        step = config.step or max(steps, default=-1) + 1
        if step - 1 not in steps:
            raise CheckpointError(f"there is no checkpoint {step - 1} in {folder}: choose a step after one of {steps}")
        saved = checkpoints.read_configuration(step - 1)
    known = _over(dataclasses.asdict(pretrain.PretrainConfig()), saved["pretrain"])
    trained = rebuild(pretrain.PretrainConfig(), known)
    # One device takes the whole batch at once, unless memory forbids it.
    cfg = dataclasses.replace(trained.training, accumulation=1)
    dataset = open_dataset(pathlib.Path(config.dataset).expanduser() if config.dataset else workdir / "dataset")
    drawn = trained.training.drawn_slots
    batches = make_batches(dataset, saved["environments"], trained.model, trained.shape, drawn, trained.held_out)
    if batches.train.fingerprint != saved["data"]:
        raise WorkdirError(f"{dataset.url} is no longer the data that was trained on: the batch cannot be drawn")
    model_cfg = trained.fitted(batches.codecs)
    model = make_model(model_cfg)
    with Checkpoints(folder, saved) as checkpoints:
        state = checkpoints.restore(training.state_shapes(model, cfg), step - 1)
    assert state is not None  # it is among the steps
    found = diagnosis.diagnose(model, model_cfg, cfg, state, batches.train[step - 1])
    print(_table(found, step, saved["environments"]))
    return found


def _over(defaults: dict[str, typing.Any], values: collections.abc.Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    return {
        name: _over(value, values.get(name, {})) if isinstance(value, dict) else values.get(name, value)
        for name, value in defaults.items()
    }


def _table(found: diagnosis.Diagnosis, step: int, environments: list[str]) -> str:
    rows = [f"{bucket} row {row} of {environments[index]}" for bucket, row, index in found.rows]
    lines = [f"step {step}: loss {found.loss:.6g}, gradient norm {found.gradient_norm:.6g}"]
    for title, names in (
        ("inputs and targets not finite", found.leaves),
        ("rows whose loss is not finite", rows),
        ("parameters not finite", found.parameters),
        ("gradients not finite", found.gradients),
        ("of what the step would keep, not finite", found.updates),
    ):
        lines += [f"{title}: {len(names)}", *(f"  {name}" for name in names[:12])]
    return "\n".join(lines)


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": DiagnoseConfig()})

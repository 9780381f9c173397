"""Repeats the step that pretraining failed at: `python -m experiments.diagnose --workdir=runs/mine`.

Prints a table. The batch is the one that pretraining left in `failure/`, or any other that
`ldm_jax.training.diagnosis` wrote, the parameters are those of the checkpoint before it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import typing

import jax

from experiments import pretrain
from experiments.harness.flags import rebuild
from experiments.harness.stage import stage
from experiments.harness.training_loop import FAILURE
from ldm_jax import training
from ldm_jax.model.network import make_model
from ldm_jax.training import diagnosis
from ldm_jax.training.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class DiagnoseConfig:
    """What is repeated.

    Attributes:
      batch: the file; empty for the newest in `failure/`.
    """

    batch: str = ""


@stage("diagnose")
def run(config: DiagnoseConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> diagnosis.Diagnosis:
    """Repeats the step.

    Args:
      config: which batch.
      workdir: of the pretraining.
      environments: not used.

    Raises:
      DiagnosisError: there is no such batch.
      CheckpointError: there is no checkpoint of before it.
    """
    path = pathlib.Path(config.batch) if config.batch else _newest(workdir / FAILURE)
    batch = diagnosis.load_batch(path)
    with Checkpoints(workdir / "checkpoints", {}) as checkpoints:
        named = re.match(r"step-(\d+)", path.name)
        step = int(named[1]) - 1 if named else max(checkpoints.steps, default=0)
        saved = checkpoints.read_configuration(step)
        known = _over(dataclasses.asdict(pretrain.PretrainConfig()), saved["pretrain"])
        trained = rebuild(pretrain.PretrainConfig(), known)
        model = make_model(trained.model)
        params = checkpoints.restore_params(jax.eval_shape(model.init, jax.random.key(0)), step)
    # One device takes the whole batch at once, unless memory forbids it.
    cfg = dataclasses.replace(trained.training, accumulation=1)
    state = training.state_with(params, None, cfg, step)
    found = diagnosis.diagnose(model, trained.model, cfg, state, batch)
    print(_table(found, path, step, saved["environments"]))
    return found


def _newest(folder: pathlib.Path) -> pathlib.Path:
    paths = sorted(folder.glob("step-*.npz"))
    if not paths:
        raise diagnosis.DiagnosisError(
            f"there is no batch in {folder}: no step of this run failed; name one by --config.batch"
        )
    return paths[-1]


def _over(defaults: dict[str, typing.Any], values: typing.Mapping[str, typing.Any]) -> dict[str, typing.Any]:
    return {
        name: _over(value, values.get(name, {})) if isinstance(value, dict) else values.get(name, value)
        for name, value in defaults.items()
    }


def _table(found: diagnosis.Diagnosis, path: pathlib.Path, step: int, environments: list[str]) -> str:
    rows = [f"{bucket} row {row} of {environments[index]}" for bucket, row, index in found.rows]
    lines = [f"{path} on checkpoint {step}: loss {found.loss:.6g}, gradient norm {found.gradient_norm:.6g}"]
    for title, names in (
        ("inputs and targets not finite", found.leaves),
        ("rows whose loss is not finite", rows),
        ("parameters not finite", found.parameters),
        ("gradients not finite", found.gradients),
    ):
        lines += [f"{title}: {len(names)}", *(f"  {name}" for name in names[:12])]
    return "\n".join(lines)


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": DiagnoseConfig()})

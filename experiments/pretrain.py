"""Pretrains one model on all environments of a dataset: `python -m experiments.pretrain --workdir=runs/mine`.

Writes `checkpoints/`, `metrics.jsonl` (one row per logged step), the same as `tensorboard/`, and at the end `policy/`.
Killed and started again with the same flags, it goes on from the last checkpoint bit for bit as if it had never
stopped. SIGTERM and SIGINT save a checkpoint first; the exit code is then 143 or 130 (see
`experiments.harness.signals`). A loss or gradient that is not finite ends it with code 1, and `experiments.diagnose`
says what was not.
"""

from __future__ import annotations

import dataclasses
import pathlib
import typing

import jax

from data.batches import make_codecs, mix
from data.mixture import Streams
from data.store import open_dataset
from experiments.harness import training_loop, validation
from experiments.harness.mesh import HostsConfig, MeshConfig, barrier, connect, device_bytes, make_mesh
from experiments.harness.metrics_log import Meter, RunLog
from experiments.harness.stage import stage
from experiments.harness.workdir import FREE, WorkdirError, pin_config, resolved
from ldm_jax import policy, sharding, training
from ldm_jax.acting import Decoding
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import make_model
from ldm_jax.training import cost
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.optimizer import TrainingConfig

_free: typing.Any = {FREE: True}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """What is trained, on how much.

    Attributes:
      model: shapes of the model.
      training: how it is trained.
      window: T, steps of a training window; at least twice the model's attention window.
      rows: windows per environment in a batch, on average.
      held_out: each so-many-th stream of the data is kept from training, for the held-out loss; 0 for none.
      checkpoint_steps: steps between two checkpoints.
      max_to_keep: how many of the newest checkpoints stay.
      keep_period: checkpoints of steps that this divides stay too; 0 for none.
      log_steps: steps between two rows of metrics.
      decoding: how the saved policy takes its actions.
      evaluation: what is evaluated on the way.
      mesh: over which devices; a run may go on over others.
      hosts: over which processes.
      peak_flops: floating-point operations per second of one device, to compare with; 0 to measure a matrix product.
    """

    model: ModelConfig = SIZES["micro"]
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    window: int = 64
    rows: int = 4
    held_out: int = 16
    checkpoint_steps: int = 100
    max_to_keep: int = dataclasses.field(default=2, metadata=_free)
    keep_period: int = dataclasses.field(default=0, metadata=_free)
    log_steps: int = 10
    decoding: Decoding = "greedy"
    evaluation: validation.ValidationConfig = dataclasses.field(
        default_factory=validation.ValidationConfig, metadata=_free
    )
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, metadata=_free)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig, metadata=_free)
    peak_flops: float = dataclasses.field(default=0.0, metadata=_free)

    def __post_init__(self):
        if self.window < 2 * self.model.window:
            raise ConfigError(
                f"window is {self.window} steps, expected at least {2 * self.model.window}, twice what attention sees: "
                "else the model is asked for more history than it was trained on"
            )
        for name in ("rows", "checkpoint_steps", "max_to_keep", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.held_out < 0 or self.held_out == 1:
            raise ConfigError(f"held_out is {self.held_out}, expected 2 or more, or 0 for none")
        if self.keep_period % self.checkpoint_steps:
            raise ConfigError(
                f"keep_period is {self.keep_period}, expected a multiple of checkpoint_steps, {self.checkpoint_steps}"
            )


@stage("pretrain")
def run(
    config: PretrainConfig, workdir: pathlib.Path, environments: tuple[str, ...] = (), data: pathlib.Path | None = None
) -> None:
    """Trains up to the last step, from the newest checkpoint if there is one, and saves the policy.

    Args:
      config: what to train.
      workdir: where everything is written.
      environments: ids to train on; empty for all in the dataset.
      data: the dataset; default: `dataset/` in the workdir.

    Raises:
      WorkdirError: the workdir cannot be used.
      StoreError: there is no dataset, or one that is damaged.
      CheckpointError: the checkpoints are of another configuration or other data.
      TrainingError: the loss or the gradient is not finite, or a device has not enough memory.
      Interrupted: a signal asked for the end.
    """
    connect(config.hosts)
    dataset = open_dataset(data or workdir / "dataset")
    ids = environments or dataset.ids
    if not ids:
        raise WorkdirError(f"the dataset {dataset.url} has no environment: collect first, or see why all were refused")
    codecs = make_codecs(dataset, ids, config.model)
    mesh = make_mesh(config.mesh)
    share, size = sharding.share_of_rows(mesh), (config.window, config.rows, config.training.seed)
    mixture = mix(dataset, codecs, *size, Streams(config.held_out), share)
    rows = {name: bucket.rows for name, bucket in mixture.buckets.items()}
    sharding.check_rows(mesh, rows, config.training.accumulation)
    model = make_model(config.model, mesh)
    # Shapes are enough to restore, and parameters take seconds to make.
    shapes = training.state_shapes(model, config.training, mesh)
    cost.check_state_fits(shapes, device_bytes())
    held_out = mix(dataset, codecs, *size, Streams(config.held_out, held_out=True), share) if config.held_out else None
    validate = validation.Validation(config.evaluation, model, config.model, codecs, held_out, config.decoding, mesh)
    pin_config(workdir, "pretrain", config, owns=("checkpoints", "metrics.jsonl", "tensorboard", "policy"))
    barrier("claimed")
    configuration = {"pretrain": resolved(config), "environments": list(ids), "data": mixture.fingerprint}
    with (
        validate,
        Checkpoints(workdir / "checkpoints", configuration, config.max_to_keep, config.keep_period) as checkpoints,
    ):
        state = checkpoints.restore(shapes) or training.init_state(model, config.training, mesh)
        begun = int(state.step)
        if begun < config.training.steps:
            train_step = training.make_train_step(model, config.model, config.training, mesh)
            domains = [codec.card.domain for codec in codecs]
            meter = Meter(config.model, config.window, sum(rows.values()), ids, domains, config.peak_flops)
            pace = training_loop.Pace(config.training.steps, config.checkpoint_steps, config.log_steps)
            with RunLog(workdir, begun) as log:
                state = training_loop.follow(
                    train_step, state, mixture, pace, meter, log, validate, checkpoints, workdir, mesh
                )
        params = validate.whole(state.params)
    if jax.process_index() == 0 and (begun < config.training.steps or not (workdir / "policy").exists()):
        cards = {codec.card.id: codec.card for codec in codecs}
        policy.Policy(config.model, params, cards, config.decoding).save(workdir / "policy")
    barrier("saved")


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(
        run,
        {
            "micro": PretrainConfig(),
            **{size: PretrainConfig(model=SIZES[size], window=2 * SIZES[size].window) for size in SIZES},
        },
    )

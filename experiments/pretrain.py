"""Pretrains one model on all environments of a dataset: `python -m experiments.pretrain --workdir=runs/mine`.

Writes `checkpoints/`, `metrics.jsonl` (one row per logged step) and, at the end, `policy/`. Killed and started again
with the same flags, it goes on from the last checkpoint bit for bit as if it had never stopped.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
import typing

import jax
import numpy as np

from data.mixture import Bucket, Mixture, WindowSource
from data.store import Dataset, open_dataset
from experiments import progress
from experiments.mesh import MeshConfig, make_mesh
from experiments.workdir import FREE, WorkdirError, claim, resolved, write
from ldm_jax import policy, sharding, training
from ldm_jax.acting import Decoding
from ldm_jax.checkpoints import Checkpoints
from ldm_jax.codec import Codec
from ldm_jax.config import SIZES, ConfigError, ModelConfig
from ldm_jax.model import Inputs, make_model
from ldm_jax.objective import Example
from ldm_jax.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, on how much.

    Attributes:
      model: shapes of the model.
      training: how it is trained.
      window: T, steps of a training window; at least twice the model's attention window.
      rows: windows per environment in a batch, on average.
      checkpoint_steps: steps between two checkpoints.
      log_steps: steps between two rows of metrics.
      decoding: how the saved policy takes its actions.
      mesh: over which devices; a run may go on over others.
    """

    model: ModelConfig = SIZES["micro"]
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    window: int = 64
    rows: int = 4
    checkpoint_steps: int = 100
    log_steps: int = 10
    decoding: Decoding = "greedy"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, metadata={FREE: True})

    def __post_init__(self):
        if self.window < 2 * self.model.window:
            raise ConfigError(
                f"window is {self.window} steps, expected at least {2 * self.model.window}, twice what attention sees: "
                "else the model is asked for more history than it was trained on"
            )
        for name in ("rows", "checkpoint_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")


def run(config: Config, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> None:
    """Trains up to the last step, from the newest checkpoint if there is one, and saves the policy.

    Args:
      config: what to train.
      workdir: has `dataset/`.
      environments: ids to train on; empty for all in the dataset.

    Raises:
      WorkdirError: the workdir cannot be used.
      StoreError: there is no dataset, or one that is damaged.
      CheckpointError: the checkpoints are of another configuration or other data.
    """
    dataset = open_dataset(workdir / "dataset")
    ids = environments or dataset.ids
    if not ids:
        raise WorkdirError(f"the dataset {dataset.url} has no environment: collect first, or see why all were refused")
    claim(workdir, "pretrain", config, owns=("checkpoints", "metrics.jsonl", "policy"))
    codecs = [Codec(dataset.card(id)) for id in ids]
    for codec in codecs:
        config.model.check_fits(codec.bucket, codec.card.id)
    mixture = mix(dataset, codecs, config)
    model, steps = make_model(config.model), config.training.steps
    mesh = make_mesh(config.mesh)
    if mesh:
        sharding.check_rows(mesh, {name: bucket.rows for name, bucket in mixture.buckets.items()})
    configuration = {"pretrain": resolved(config), "environments": list(ids), "data": mixture.fingerprint}
    trained = False
    with Checkpoints(workdir / "checkpoints", configuration) as checkpoints:
        # Shapes are enough to restore, and parameters take seconds to make.
        shapes = training.state_shapes(model, config.training, mesh)
        state = checkpoints.restore(shapes) or training.init_state(model, config.training, mesh)
        if int(state.step) < steps:
            train_step = training.make_train_step(model, config.model, config.training, mesh)
            state = _train(config, train_step, state, mixture, checkpoints, ids, workdir, mesh)
            trained = True
    if trained or not (workdir / "policy").exists():
        cards = {codec.card.id: codec.card for codec in codecs}
        policy.save(workdir / "policy", policy.Policy(config.model, state.params, cards, config.decoding))


def mix(dataset: Dataset, codecs: typing.Sequence[Codec], config: Config) -> Mixture:
    """The batches: one bucket of rows for each set of padded widths, its share that of its environments.

    Args:
      dataset: where the windows lie.
      codecs: of all environments; a row's `environment` is the position in this list.
      config: `window`, `rows` and the seed.
    """
    members = collections.defaultdict(list)
    for index, codec in enumerate(codecs):
        members[codec.bucket].append(index)

    def source(indices: list[int]) -> WindowSource:
        def encode(environment_index: int, leaves: dict[str, np.ndarray], seed: int) -> Example:
            index = indices[environment_index]
            features, targets = codecs[index].window(leaves)
            return Example(Inputs(features, codecs[index].signature), targets, np.int32(index))

        ids = [codecs[index].card.id for index in indices]
        return WindowSource(dataset, ids, [1.0] * len(ids), config.window, config.training.seed, encode)

    return Mixture(
        {
            bucket.name: Bucket(source(indices), config.rows * len(indices))
            for bucket, indices in sorted(members.items())
        }
    )


def _train(
    config: Config,
    train_step: training.TrainStep,
    state: training.TrainState,
    mixture: Mixture,
    checkpoints: Checkpoints,
    ids: typing.Sequence[str],
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh | None,
) -> training.TrainState:
    steps, begun, clock = config.training.steps, int(state.step), progress.clock()
    tokens = config.window * sum(bucket.rows for bucket in mixture.buckets.values())
    metrics_path = workdir / "metrics.jsonl"
    if metrics_path.exists():  # what came after the checkpoint is about to be measured again
        kept = itertools.takewhile(
            lambda line: json.loads(line)["step"] <= begun, metrics_path.read_text().splitlines()
        )
        write(metrics_path, "".join(f"{line}\n" for line in kept))
    with (
        progress.bar("pretrain", steps, "step", begun) as advance,
        metrics_path.open("a") as file,
    ):
        for done, newest_state, metrics in training.train(train_step, state, mixture.batches(begun), steps, mesh):
            advance(1)
            state = newest_state
            if done % config.log_steps == 0 or done == steps:
                row = {"step": done, **dataclasses.asdict(metrics), "tokens": done * tokens, "seconds": clock()}
                row["excess_by_environment"] = {ids[i]: x for i, x in metrics.excess_by_environment.items()}
                file.write(json.dumps(row) + "\n")
                file.flush()
            # The newest state is one step ahead of what is known of it, but for the last.
            newest = min(done + 1, steps)
            if (newest % config.checkpoint_steps == 0 or newest == steps) and newest != checkpoints.latest:
                checkpoints.save(state)
                progress.log("pretrain", step=newest, loss=metrics.loss, excess=metrics.excess_loss, seconds=clock())
    return state


if __name__ == "__main__":
    from experiments.flags import launch

    launch(
        run, {"micro": Config(), **{size: Config(model=SIZES[size], window=2 * SIZES[size].window) for size in SIZES}}
    )

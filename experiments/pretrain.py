"""Pretrains one model on all environments of a dataset: `python -m experiments.pretrain --workdir=runs/mine`.

Writes `checkpoints/`, `metrics.jsonl` (one row per logged step), the same as `tensorboard/`, and at the end `policy/`.
Killed and started again with the same flags, it goes on from the last checkpoint bit for bit as if it had never
stopped. SIGTERM and SIGINT save a checkpoint first; the exit code is then 143 or 130 (see
`experiments.harness.signals`). A step that is not finite ends it with code 1, and `experiments.diagnose` says what in
it was not. Environments that do not fit the model are left out, with a word in the log.
"""

from __future__ import annotations

import pathlib

import jax

from data.store import open_dataset
from experiments.harness.batches import log_padding
from experiments.harness.mesh import barrier, connect
from experiments.harness.metrics_log import Meter, RunLog
from experiments.harness.preparation import PretrainConfig, prepare
from experiments.harness.stage import stage
from experiments.harness.training_loop import Pace, TrainingRun, follow
from experiments.harness.validation import Validation
from experiments.harness.workdir import pin_config, resolved
from ldm_jax import policy, training
from ldm_jax.model.config import SIZES
from ldm_jax.training.checkpoints import Checkpoints


@stage("pretrain", among=lambda config, workdir: open_dataset(config.dataset or workdir / "dataset").ids)
def run(
    config: PretrainConfig, workdir: pathlib.Path, environments: tuple[str, ...] = (), data: pathlib.Path | None = None
) -> None:
    """Trains up to the last step, from the newest checkpoint if there is one, and saves the policy.

    Args:
      config: what to train.
      workdir: where everything is written.
      environments: ids to train on; empty for all in the dataset. Those that do not fit the model are left out.
      data: the dataset; default: the one that the configuration names.

    Raises:
      WorkdirError: the workdir cannot be used.
      StoreError: there is no dataset, or one that is damaged.
      ConfigError: the configuration does not fit the devices, or no environment fits the model.
      CheckpointError: the checkpoints are of another configuration, other settings or other data, or cannot be written.
      TrainingError: a step is not finite, or a device has not enough memory.
      Interrupted: a signal asked for the end.
    """
    connect(config.hosts)
    dataset = open_dataset(data or config.dataset or workdir / "dataset")
    mesh, batches, cfg, model, shapes = prepare(config, dataset, environments)
    with Validation(config.evaluation, model, cfg, batches, config.decoding, mesh) as validate:
        pin_config(workdir, "pretrain", config, owns=("checkpoints", "metrics.jsonl", "tensorboard", "policy"))
        barrier("pinned")
        cards = {codec.card.id: codec.card for codec in batches.codecs}
        buckets = {codec.card.id: codec.bucket for codec in batches.codecs}
        known = {
            "pretrain": resolved(config),
            "environments": list(cards),
            "buckets": {id: bucket.name for id, bucket in buckets.items()},
            "data": batches.train.fingerprint,
        }
        with Checkpoints(workdir / "checkpoints", known, config.max_to_keep, config.keep_period) as checkpoints:
            state = checkpoints.restore(shapes) or training.init_state(model, config.training, mesh)
            start_step = int(state.step)
            if start_step < config.training.steps:
                pace = Pace(config.training.steps, config.checkpoint_steps, config.log_steps)
                train_step = training.make_train_step(model, cfg, config.training, mesh)
                parts = TrainingRun(train_step, batches.train, pace, validate, checkpoints, mesh)
                meter = Meter(cfg, config.window, batches, config.peak_flops)
                log_padding(batches.train, start_step)
                with RunLog(workdir, start_step, meter) as log:
                    state = follow(parts, state, log)
        params = validate.whole(state.params)
        if jax.process_index() == 0 and (start_step < config.training.steps or not (workdir / "policy").exists()):
            saved = policy.Policy(cfg, params, cards, config.decoding, buckets)
            saved.save(workdir / "policy", config.weights_dtype)
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

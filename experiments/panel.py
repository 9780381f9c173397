"""One policy in two hundred tasks, from the zoo: `python -m experiments.panel --workdir=runs/panel200`.

Takes the references of `data/zoo`, collects, pretrains one model and evaluates it, as the quickstart does with
references of its own. The tasks are those of `experiments/panels/panel200.txt`, which were drawn before anything was
trained on them (`experiments.draw_panel`); of those that have no reference the report says why. Killed and started
again, it goes on where it was.
"""

from __future__ import annotations

import pathlib

from data import collect as collecting
from experiments import collect, evaluate, pretrain, quickstart, references
from experiments.harness.ids import read_ids
from ldm_jax.model.config import SIZES
from ldm_jax.training.optimizer import TrainingConfig

PANELS = pathlib.Path(__file__).parent / "panels"
"""The lists that were drawn."""

ZOO = "data/zoo"
"""The references that were made for them, of a checkout."""


def panel_config(name: str) -> quickstart.QuickstartConfig:
    """What is trained on a panel; docs/results says what else was tried.

    Args:
      name: of the panel, the stem of its list.
    """
    return quickstart.QuickstartConfig(
        environments=read_ids(PANELS / f"{name}.txt"),
        references=references.ReferencesConfig(zoo=ZOO, num_envs=16, least_episodes=32),
        collect=collect.CollectStageConfig(data=collecting.CollectConfig(streams=24, steps=1024)),
        pretrain=pretrain.PretrainConfig(
            model=SIZES["micro"],
            training=TrainingConfig(steps=6000, warmup=100),
            rows=64,
            narrow=False,
            log_steps=25,
            weights_dtype="bfloat16",
        ),
        evaluate=evaluate.EvaluateConfig(num_envs=16, episodes=2, workers=2),
    )


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(quickstart.run, {"panel200": panel_config("panel200")})

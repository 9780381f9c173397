"""From nothing to a measured policy: `python -m experiments.quickstart --workdir=runs/quickstart`.

Trains references, collects, pretrains one model and evaluates it, one stage after the other. Killed and started again
with the same flags, it goes on where it was. An environment that fails does not stop the others: the report says why.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import pathlib
import typing

from data import collect as collecting
from experiments import collect, evaluate, pretrain, references
from experiments.harness import progress
from experiments.harness.dry_run import TO_DO, Planned
from experiments.harness.ids import find_unfit, parse_ids
from experiments.harness.mesh import make_mesh
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import LOCAL, Engine
from experiments.harness.workdir import pin_config
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.training.optimizer import TrainingConfig

ENVIRONMENTS = (
    "gymnax/CartPole-v1",
    "gymnax/Acrobot-v1",
    "gymnax/Pendulum-v1",
    "gymnax/MountainCarContinuous-v0",
    "gymnax/Catch-bsuite",
    "gymnax/Breakout-MinAtar",
    "gymnax/Reacher-misc",
    "gymnax/PointRobot-misc",
    "envpool/FrozenLake-v1",
    "envpool/Taxi-v3",
    "envpool/CliffWalking-v1",
    "envpool/LunarLander-v3",
    "envpool/MiniGrid-Empty-5x5-v0",
)
"""Fixed before anything was trained: vectors, categories and grids, discrete and continuous, no task twice."""


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """The four stages.

    Attributes:
      environments: what to train in and to report, unless the flag `--environments` says otherwise.
      references: see `experiments.references`.
      collect: see `experiments.collect`.
      pretrain: see `experiments.pretrain`; of more steps than these the scores here do not rise.
      evaluate: see `experiments.evaluate`.
    """

    environments: tuple[str, ...] = ENVIRONMENTS
    references: references.ReferencesConfig = dataclasses.field(default_factory=references.ReferencesConfig)
    collect: collect.CollectStageConfig = dataclasses.field(default_factory=collect.CollectStageConfig)
    pretrain: pretrain.PretrainConfig = dataclasses.field(
        default_factory=lambda: pretrain.PretrainConfig(training=TrainingConfig(steps=500))
    )
    evaluate: evaluate.EvaluateConfig = dataclasses.field(default_factory=evaluate.EvaluateConfig)


SMOKE = QuickstartConfig(
    environments=("gymnax/Catch-bsuite", "gymnax/CartPole-v1", "envpool/FrozenLake-v1"),
    references=references.ReferencesConfig(budget=0.2, num_envs=32, episodes=2),
    collect=collect.CollectStageConfig(data=collecting.CollectConfig(streams=16, steps=256)),
    pretrain=pretrain.PretrainConfig(
        model=SIZES["nano"],
        training=TrainingConfig(steps=60, warmup=5),
        window=16,
        rows=12,
        checkpoint_steps=20,
        weights_dtype="bfloat16",
    ),
    evaluate=evaluate.EvaluateConfig(num_envs=50, episodes=2),
)
"""Small enough for a test: it shows that all parts fit, not what they can do."""


def foresee(config: QuickstartConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> list[Planned]:
    """What references and collection would do: they take most of the steps."""
    ids = environments or parse_ids(config.environments)
    trained = references.foresee(config.references, workdir, ids)
    collected = collect.foresee(config.collect, workdir, ids)
    planned = []
    for first, second in zip(trained, collected, strict=True):
        if first.state == TO_DO:
            planned.append(first._replace(steps=first.steps + second.steps))
        else:
            planned.append(second if first.state == "admitted" else first)
    return planned


@stage("quickstart", plan=foresee, retries=True)
def run(
    config: QuickstartConfig, workdir: pathlib.Path, environments: tuple[str, ...] = (), *, engine: Engine = LOCAL
) -> dict[str, typing.Any]:
    """Runs all stages.

    Args:
      config: of the stages.
      workdir: everything is written there; it must be empty, or begun with the same configuration.
      environments: overrides `config.environments`; empty for those.
      engine: where environments are worked on; what is trained is trained here.

    Returns:
      The contents of `report/scores.json`.

    Raises:
      UnknownEnvironmentError: an id that is not known; nothing has been done then.
      WorkdirError: the workdir cannot be used.
    """
    ids = environments or parse_ids(config.environments)
    _check(config, ids)
    failed = find_unfit(ids, config.pretrain.model)
    for id, reason in failed.items():
        progress.log("refused", id=id, reason=reason)
    if len(failed) == len(ids):
        raise UnitsFailedError(failed)
    pin_config(workdir, "quickstart", dataclasses.replace(config, environments=ids), owns=("*",))
    with _going_on(failed):
        references.run(config.references, workdir, tuple(id for id in ids if id not in failed), engine=engine)
    with _going_on(failed):
        collect.run(config.collect, workdir, tuple(id for id in ids if id not in failed), engine=engine)
    pretrain.run(config.pretrain, workdir)
    return evaluate.run(config.evaluate, workdir, ids, failed, engine=engine)


def _check(config: QuickstartConfig, ids: tuple[str, ...]) -> None:
    """Checks what one stage would find out only after another one."""
    data, pretraining = config.collect.data, config.pretrain
    if pretraining.window > data.steps:
        raise ConfigError(
            f"pretrain.window is {pretraining.window}, expected at most collect.data.steps, {data.steps}: collect "
            "longer streams or shorten the window"
        )
    if pretraining.held_out > data.streams:
        raise ConfigError(
            f"pretrain.held_out is {pretraining.held_out}, expected at most collect.data.streams, {data.streams}: "
            "collect more streams or hold out more of them"
        )
    if pretraining.model.tokens_per_step != 1:
        raise ConfigError(f"pretrain.model.tokens_per_step is {pretraining.model.tokens_per_step}, expected 1, to act")
    if unknown := sorted({*pretraining.evaluation.ids} - {*ids}):
        raise ConfigError(f"pretrain.evaluation.environments names {', '.join(unknown)}, expected some of {ids}")
    make_mesh(pretraining.mesh)  # it says if there are not so many devices


@contextlib.contextmanager
def _going_on(failed: dict[str, str]) -> collections.abc.Iterator[None]:
    """Goes on without the environments that fail in the block, and notes the reasons."""
    try:
        yield
    except UnitsFailedError as error:
        failed |= error.reasons


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"full": QuickstartConfig(), "smoke": SMOKE})

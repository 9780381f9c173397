"""What labels of live experts cost, and what is learned from them.

    python -m benchmarks.experts

compares collecting with an expert beside the environment to the same collecting with random labels. Both take the same
random actions in one worker and virtual environment, as `data.collect` does. Its last line is one JSON object: for each
environment the rate with the expert, 1 being that with random labels, and what a label took.

    python -m benchmarks.experts --train=runs/experts

trains one `micro` on two environments of each of two experts, from references on, and says what it reaches: 1 is the
expert, 0 the random policy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import typing

import jax
import numpy as np

import environments
from data import collect as collecting
from data.references.expert import ExpertConfig, expert_policy
from data.references.policy import with_decoding
from environments.isolation import Isolation
from experiments import collect, evaluate, pretrain, quickstart, references
from ldm_jax import rollout, spaces
from ldm_jax.environment import Environment
from ldm_jax.training.optimizer import TrainingConfig
from ldm_jax.types import ExpertLabel, Key, PyTree, TimeStep

from .timing import compare

CASES = {
    "bsuite/cartpole/0": "rule",
    "open_spiel/kuhn_poker": "best-response",
    "controlgym/he1": "lqr",
    "minigrid/BabyAI-GoToLocal-v0": "babyai-bot",
}
"""An expert for each environment: from a few microseconds to a millisecond."""

TRAINED = {
    "babyai-bot": ("minigrid/BabyAI-GoToRedBallNoDists-v0", "minigrid/BabyAI-GoToObjS4-v0"),
    "best-response": ("open_spiel/kuhn_poker", "open_spiel/leduc_poker"),
}
"""Two environments of each of two experts."""

ROWS, STEPS, DRAWN = 16, 64, 64

Step = typing.Callable[[], object]


class _RandomlyLabelled:
    """An environment whose time steps have labels that were drawn before."""

    def __init__(self, environment: Environment):
        self.spec, self._inner, self._at = environment.spec, environment, 0
        space, rows = self.spec.action_space, self.spec.batch_size
        self._drawn = [jax.tree.map(np.array, spaces.sample(jax.random.key(i), space, rows)) for i in range(DRAWN)]

    def _label(self, state: PyTree, timestep: TimeStep) -> tuple[PyTree, TimeStep]:
        self._at += 1
        label = ExpertLabel(self._drawn[self._at % DRAWN], ~np.asarray(timestep.last))
        return state, timestep._replace(expert=label)

    def reset(self, key: Key) -> tuple[PyTree, TimeStep]:
        return self._label(*self._inner.reset(key))

    def step(self, state: PyTree, action: PyTree) -> tuple[PyTree, TimeStep]:
        return self._label(*self._inner.step(state, action))

    def close(self) -> None:
        self._inner.close()


@contextlib.contextmanager
def collecting_in(id: str, expert: str) -> typing.Iterator[tuple[Step, Environment]]:
    """Steps with random actions, each with a label for each row, of the expert or of none."""
    made = environments.make(id, ROWS, expert=expert, isolation=Isolation("venv", workers=1))
    environment = made if expert else _RandomlyLabelled(made)
    with contextlib.closing(environment):
        policy = expert_policy(environment.spec, ExpertConfig(CASES[id]))
        params = with_decoding(policy.params["policy"], "random")
        loop = rollout.start(environment, policy.agent, jax.random.key(0))
        at = 0

        def steps() -> object:
            nonlocal loop, at
            at += 1
            loop, block = rollout.rollout(environment, policy.agent, params, loop, jax.random.key(at), STEPS)
            return block

        yield steps, made


def compare_rates(ids: typing.Sequence[str], repetitions: int, seconds: float) -> dict[str, typing.Any]:
    """Prints a line for each environment.

    Args:
      ids: of environments, among `CASES`.
      repetitions: rounds that medians are taken over.
      seconds: of each contender in each round.
    """
    result = {}
    print(f"{'environment':>30} {'expert':>14} {'random labels':>14} {'rate':>6} {'a label':>10}")
    for id in ids:
        with contextlib.ExitStack() as stack:
            made = {name: stack.enter_context(collecting_in(id, name)) for name in ("", CASES[id])}
            times = compare({name: steps for name, (steps, _) in made.items()}, repetitions, seconds)
            told: typing.Any = made[CASES[id]][1]
            label_us = 1e6 * told.expert_report.label_seconds
        rate, plain = times.speed(CASES[id], ""), ROWS * STEPS / times.median("")
        result[id] = {"expert": CASES[id], "rate": rate, "label_us": label_us}
        print(f"{id:>30} {CASES[id]:>14} {plain:>11,.0f} /s {rate:>6.2f} {label_us:>7.0f} us")
    return result


def train(workdir: pathlib.Path, steps: int) -> dict[str, typing.Any]:
    """Makes references of experts, collects, trains a model for each expert, and evaluates it.

    Args:
      workdir: where everything is written; what is there already is not done again.
      steps: of the optimizer.
    """
    result = {}
    for expert, ids in TRAINED.items():
        config = quickstart.QuickstartConfig(
            environments=ids,
            references=references.ReferencesConfig(algorithms="expert", least_episodes=4096),
            collect=collect.CollectStageConfig(data=collecting.CollectConfig(streams=96, steps=512)),
            pretrain=pretrain.PretrainConfig(training=TrainingConfig(steps=steps)),
            evaluate=evaluate.EvaluateConfig(num_envs=256, episodes=16),
        )
        report = quickstart.run(config, workdir / expert)
        for found in report["environments"]:
            result[found["id"]] = {"expert": expert, "z": found["z"]}
            print(f"{found['id']:>45} {expert:>14} z {found['z']:.3f}")
    return result


def main(arguments: typing.Sequence[str] | None = None) -> None:
    """Prints a table, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description="What experts cost and teach.")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds that medians are taken over")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contender in each round")
    parser.add_argument("--environments", nargs="*", default=list(CASES), help="of the ones that are listed here")
    parser.add_argument("--train", type=pathlib.Path, help="trains in this folder, and compares no rates")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    options = parser.parse_args(arguments)
    if options.train:
        result = train(options.train, options.steps)
    else:
        result = compare_rates(options.environments, options.repetitions, options.seconds)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()

"""What labels of live experts cost: the same steps with an expert beside the environment, and with random labels.

Both take the same random actions in one worker and virtual environment. Where there is no expert, the label of each row
is a random one that was drawn before; where there is one, its label is taken from the time step.

    python -m benchmarks.experts

Its last line is one JSON object: for each environment the rate with the expert, 1 being that with random labels, and
what a label took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import typing

import jax
import numpy as np

import environments
from environments.isolation import Isolation
from ldm_jax import spaces

from .timing import compare

CASES = {
    "bsuite/cartpole/0": "rule",
    "open_spiel/kuhn_poker": "best-response",
    "controlgym/he1": "lqr",
    "minigrid/BabyAI-GoToLocal-v0": "babyai-bot",
}
"""An expert for each environment: from a few microseconds to a millisecond."""

ROWS, STEPS, DRAWN = 16, 20, 64

Step = typing.Callable[[], object]


@contextlib.contextmanager
def collecting(id: str, expert: str) -> typing.Iterator[Step]:
    """Steps with random actions, each with a label for each row."""
    environment = environments.make(id, ROWS, expert=expert, isolation=Isolation("venv", workers=1))
    with contextlib.closing(environment):
        space = environment.spec.action_space
        draws = [jax.tree.map(np.array, spaces.sample(jax.random.key(i), space, ROWS)) for i in range(DRAWN)]
        state, time_step = environment.reset(jax.random.key(0))
        at = 0

        def steps() -> list[object]:
            nonlocal state, time_step, at
            labels: list[object] = []
            for _ in range(STEPS):
                at += 1
                state, time_step = environment.step(state, draws[at % DRAWN])
                labels.append(time_step.expert.action if time_step.expert else draws[-at % DRAWN])
            return labels

        yield steps


def main(arguments: typing.Sequence[str] | None = None) -> None:
    """Prints a table, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description="What labels of experts cost.")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds that medians are taken over")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contender in each round")
    parser.add_argument("--environments", nargs="*", default=list(CASES), help="of the ones that are listed here")
    options = parser.parse_args(arguments)
    result = {}
    print(f"{'environment':>30} {'expert':>14} {'random labels':>14} {'rate':>6} {'a label':>10}")
    for id in options.environments:
        with contextlib.ExitStack() as stack:
            contenders = {name: stack.enter_context(collecting(id, name)) for name in ("", CASES[id])}
            times = compare(contenders, options.repetitions, options.seconds)
        rate = times.speed(CASES[id], "")
        label_us = 1e6 * (times.median(CASES[id]) - times.median("")) / (ROWS * STEPS)
        result[id] = {"expert": CASES[id], "rate": rate, "label_us": label_us}
        plain = ROWS * STEPS / times.median("")
        print(f"{id:>30} {CASES[id]:>14} {plain:>11,.0f} /s {rate:>6.2f} {label_us:>7.0f} us")
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()

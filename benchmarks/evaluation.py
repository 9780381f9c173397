"""A whole evaluation of many environments together, against the sum of their own raw loops.

  evaluation: `ldm_jax.acting.play_trials`, from making the environments to the last episode, in shared batches;
  raw: each environment alone, one after the other: the same policy, compiled for it, and nothing but `step` in a loop,
    of as many rows, after everything is compiled (`ldm_jax.rollout`; `benchmarks.rollout` holds that against the
    libraries' own loops);
  stepping: each environment alone with actions that were drawn beforehand: no policy at all.

What is counted are steps of rows that still play; a raw loop has no others. The bar is held against `raw`, as in
`benchmarks.rollout`: an evaluation runs the policy once a step whatever its engine does, and beside even `micro`
simulators such as these take next to nothing. `stepping` says what the policy costs.

    python -m benchmarks.evaluation

Its last line is one JSON object: `evaluation_to_raw` and `evaluation_to_stepping`, the time of the raw loops for the
steps that were played over the time of the evaluation; `programs`, those that the policy acted with, at most one for
each of `buckets`; `compiled`, all that was compiled beside them, most of it steps of environments in JAX; `table`.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import contextlib
import dataclasses
import functools
import json
import time
import typing

import jax
import numpy as np

import environments
from experiments.quickstart import ENVIRONMENTS
from ldm_jax import acting, cards, rollout
from ldm_jax.acting import playing, rows
from ldm_jax.encoding.actions import action_layout
from ldm_jax.encoding.buckets import join_buckets
from ldm_jax.encoding.codec import Codec
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.environment import Environment
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import Params
from ldm_jax.spaces import sample
from ldm_jax.training.bucket_work import bucket_work

from .acting import make_params
from .timing import compare

IDS = (*ENVIRONMENTS, "envpool/FrozenLake8x8-v1", "envpool/CartPole-v1", "envpool/Pendulum-v1")
"""The quickstart's environments and three more."""

BUCKETS = 4
"""To join the environments' own to, as `experiments.evaluate` does."""
STEPS = 32
"""Of one portion of a raw loop."""


def make_codecs(ids: collections.abc.Iterable[str], cfg: ModelConfig) -> dict[str, Codec]:
    """Codecs with plain statistics, in the buckets that an evaluation would choose."""
    own = {}
    for id in ids:
        with contextlib.closing(environments.make(id)) as environment:
            spec = environment.spec
        numbers = observation_layout(spec.observation_space).numbers
        slots = action_layout(spec.action_space, low=-1.0, high=1.0).continuous
        statistics = cards.Statistics((0.0,) * numbers, (1.0,) * numbers, 1.0, (-1.0,) * slots, (1.0,) * slots, 1000)
        returns = cards.Returns.of(np.array([[0.0, 1.0], [1.0, 0.0]]))
        reference = cards.Reference(algorithm="none", decoding="sample", budget_steps=0, seed=0)
        card = cards.EnvironmentCard.of(
            spec, statistics=statistics, random_returns=returns, reference_returns=returns, reference=reference
        )
        own[id] = Codec(card)
    counts = collections.Counter(codec.bucket for codec in own.values())
    joined = join_buckets(counts, BUCKETS, bucket_work(cfg))
    return {id: Codec(codec.card, joined[codec.bucket]) for id, codec in own.items()}


class Evaluation(typing.NamedTuple):
    """A whole evaluation.

    Attributes:
      seconds: that it took.
      steps: by id, of rows that still played.
      programs: that the policy acted with.
      compiled: beside those.
    """

    seconds: float
    steps: dict[str, int]
    programs: int
    compiled: int


def evaluate(cfg: ModelConfig, params: Params, codecs: dict[str, Codec], options: argparse.Namespace) -> Evaluation:
    """Plays the episodes of all environments together."""
    trials = [
        playing.Trial(
            codec=codec,
            make=functools.partial(environments.make, id, options.rows),
            rows=options.rows,
            episodes=options.episodes,
            key=jax.random.key(0),
        )
        for id, codec in codecs.items()
    ]
    steps: dict[str, int] = {}
    with _compilations() as compiled:
        before, start = rows.act_packed._cache_size(), time.perf_counter()
        for played in playing.play_trials(cfg, params, trials, 2 * options.rows):
            assert played.episodes is not None, played.error
            lengths = played.episodes.lengths
            # Each episode but the first begins with a step that resets.
            steps[played.trial.codec.card.id] = int(lengths.sum()) + lengths.size - lengths.shape[0]
        seconds = time.perf_counter() - start
    programs = rows.act_packed._cache_size() - before
    return Evaluation(seconds, steps, programs, len(compiled) - programs)


@contextlib.contextmanager
def _compilations() -> collections.abc.Iterator[list[str]]:
    """Gives what is compiled meanwhile, or found compiled in the cache of this machine."""
    names: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def raw_loop(environment: Environment, cfg: ModelConfig, codec: Codec, params: Params) -> collections.abc.Callable:
    """A portion of an environment's own loop with the policy."""
    agent = acting.make_agent(cfg, codec, "card")
    loop = rollout.start(environment, agent, jax.random.key(0))

    def portion() -> None:
        nonlocal loop
        loop, trajectory = rollout.rollout(environment, agent, params, loop, jax.random.key(1), STEPS)
        jax.block_until_ready(trajectory.timestep.reward)

    return portion


def stepping_loop(environment: Environment) -> collections.abc.Callable:
    """A portion of an environment's own loop without a policy."""
    spec, keys = environment.spec, jax.random.split(jax.random.key(0), STEPS)
    drawn = [sample(key, spec.action_space, spec.batch_size) for key in keys]
    actions = jax.tree.map(np.asarray, drawn)
    state, _ = rollout.reset_from_host(environment, jax.random.key(0))

    def portion() -> None:
        nonlocal state
        for action in actions:
            state, timestep = rollout.step_from_host(environment, state, action)
        jax.block_until_ready(timestep.reward)

    return portion


def raw_rates(id: str, cfg: ModelConfig, params: Params, codec: Codec, options: argparse.Namespace) -> dict[str, float]:
    """Steps of rows a second of both loops of an environment."""
    loops: dict[str, collections.abc.Callable] = {}
    with contextlib.closing(environments.make(id, options.rows)) as one:
        loops["raw"] = raw_loop(one, cfg, codec, params)
        with contextlib.closing(environments.make(id, options.rows)) as other:
            loops["stepping"] = stepping_loop(other)
            times = compare(loops, options.repetitions, options.seconds)
    return {name: options.rows * STEPS / times.median(name) for name in loops}


def main(arguments: collections.abc.Sequence[str] | None = None) -> None:
    """Prints a table, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description="Speed of an evaluation.")
    parser.add_argument("--size", default="micro", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--window", type=int, default=0, help="W, in steps; 0 for the size's own")
    parser.add_argument("--rows", type=int, default=64, help="of each environment")
    parser.add_argument("--episodes", type=int, default=4, help="of each row")
    parser.add_argument("--environments", default=",".join(IDS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each raw loop in each repetition, about")
    options = parser.parse_args(arguments)
    cfg = SIZES[options.size]
    cfg = dataclasses.replace(cfg, window=options.window or cfg.window)
    params, codecs = make_params(cfg), make_codecs(options.environments.split(","), cfg)
    whole = evaluate(cfg, params, codecs, options)
    print(f"{'environment':>32} {'steps':>8} {'raw /s':>9} {'stepping /s':>12}")
    table, spent = [], dict.fromkeys(("raw", "stepping"), 0.0)
    for id, codec in codecs.items():
        rates = raw_rates(id, cfg, params, codec, options)
        for name, rate in rates.items():
            spent[name] += whole.steps[id] / rate
        table.append({"environment": id, "steps": whole.steps[id], **rates})
        print(f"{id:>32} {whole.steps[id]:>8} {rates['raw']:>9,.0f} {rates['stepping']:>12,.0f}", flush=True)
    result = {f"evaluation_to_{name}": round(seconds / whole.seconds, 3) for name, seconds in spent.items()}
    result |= {"programs": whole.programs, "buckets": len({codec.bucket for codec in codecs.values()})}
    print(json.dumps({**result, **whole._asdict(), "spent": spent, "table": table}))


if __name__ == "__main__":
    main()

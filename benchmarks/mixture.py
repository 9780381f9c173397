"""How fast the real mixture trains: against the plain step, kind by kind of space, and against the matrix product.

    python -m benchmarks.mixture [--size=micro]

All ratios are of tokens per second, the contenders in turn in one process, medians over the rounds. "Plain" is the
whole training step with Muon on as many tokens of four numbers and three choices (as CartPole's), its batch ready. The
last line is one JSON object:

  mixture_to_plain: the whole pretraining loop (loader, step, rows of metrics) on random data of the quickstart's
    environments, made by the benchmark itself, over plain;
  kinds: the training step on each kind of space alone, over plain;
  loader_steps_per_s: windows that the loader's one thread encodes, in time steps per second, by length of window;
  loop_to_step: time of a step in the loop over that of the step on one of the loop's own batches;
  loader_to_step: the loader's rate over that of the step on the same batches;
  <size>_to_matmul: FLOP/s of the plain step over the best float32 product, only 6N and causal attention counting;
  compile_s, programs: seconds of compilation of the loop, and how many programs it compiles.

`--only=kinds`, `--only=mixture` (the loop) or `--only=loader` measures that part alone, and `--kinds=text` one kind, in
less than a minute each once the programs are compiled. With `--data=FOLDER` the data are kept and used again.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import dataclasses
import itertools
import json
import pathlib
import tempfile
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np

import environments
from data import collect
from data.references.policy import ReferencePolicy, SlotPolicy, slot_agent, with_decoding
from data.store import Dataset, append_part, create_dataset
from experiments.harness import allocator
from experiments.harness.metrics_log import Meter, RunLog
from experiments.harness.preparation import Prepared, PretrainConfig, prepare
from experiments.quickstart import ENVIRONMENTS
from ldm_jax import training
from ldm_jax.cards import EnvironmentCard, Reference, Returns
from ldm_jax.encoding.actions import ActionLayout, action_layout
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import make_model
from ldm_jax.training import cost
from ldm_jax.training.loss import Example
from ldm_jax.types import PyTree, TimeStep

from .kinds import KINDS, PLAIN, make_codec, make_example
from .timing import PRODUCTS, Contenders, Times, compare, matrix_products

_STREAMS, _LONG_WINDOW = 32, 1024
_LOOP_STEPS = 20
"""Of the loop in one call: many beside the batches that the loader holds ready when it begins."""


@dataclasses.dataclass(frozen=True)
class _Uniform:
    """A policy that prefers nothing."""

    layout: ActionLayout

    def __call__(self, params: PyTree, timestep: TimeStep) -> SlotPolicy:
        zeros = jnp.zeros((len(timestep.reward), self.layout.continuous))
        return SlotPolicy(jnp.zeros((len(timestep.reward), self.layout.flat_choices)), zeros, zeros + 0.5)


def make_dataset(folder: pathlib.Path) -> Dataset:
    """The quickstart's environments with labels of a random policy; only what is missing in the folder is collected."""
    dataset = create_dataset(folder)
    config = collect.CollectConfig(streams=_STREAMS, steps=_LONG_WINDOW + 64, block=(_LONG_WINDOW + 64) // 8)
    for id in ENVIRONMENTS:
        if id in dataset.ids:
            continue
        with contextlib.closing(environments.make(id, batch_size=_STREAMS)) as environment:
            spec = environment.spec
            layout = action_layout(spec.action_space, low=-1.0, high=1.0)
            reference = Reference("uniform", "sample", 0, 0)
            agent, params = slot_agent(layout, _Uniform(layout)), with_decoding((), "sample")
            policy = ReferencePolicy(agent, params, reference, spec, None)
            collected = collect.collect(environment, policy, 0, config)
        returns = Returns.of(np.zeros((1, 1)))
        card = EnvironmentCard.of(
            spec,
            statistics=collected.statistics,
            random_returns=returns,
            reference_returns=returns,
            reference=reference,
        )
        dataset = append_part(dataset, card, collected.leaves, collected.episodes)
    return dataset


def step_contender(
    cfg: ModelConfig, config: PretrainConfig, batch: dict[str, Example]
) -> collections.abc.Callable[[], object]:
    """A function that trains by one step on a batch that is ready, and waits for it."""
    model = make_model(cfg)
    state = training.init_state(model, config.training)
    train_step = training.make_train_step(model, cfg, config.training)

    def step() -> object:
        nonlocal state
        state, metrics = train_step(state, batch)
        return jax.block_until_ready((state, metrics))

    return step


def measure_kinds(config: PretrainConfig, tokens: int, arguments: argparse.Namespace) -> dict[str, typing.Any]:
    """What each kind costs, and what the plain step makes of the machine."""
    names = [PLAIN, *(name for name in KINDS if name != PLAIN and arguments.kinds in name)]
    codecs = {name: make_codec(*spaces, name) for name, spaces in KINDS.items()}
    rows = tokens // config.window
    contenders: dict[str, collections.abc.Callable[[], object]] = {}
    for name in names:
        codec = codecs[name]
        batch = jax.device_put({codec.bucket.name: make_example(codec, rows, config.window)})
        contenders[name] = step_contender(config.fitted([codec]), config, batch)
    products = matrix_products("float32")
    times = compare(contenders | products, arguments.repetitions, seconds=0.0)
    work = rows * config.window * cost.flops_per_token(config.model, config.window).training
    gflops = {PLAIN: work / times.median(PLAIN) / 1e9}
    gflops |= {f"jax {size}": 2e-9 * size**3 / times.median(f"jax {size}") for size in PRODUCTS}
    _print(times, gflops)
    best = max(products, key=gflops.__getitem__)
    return {
        f"{arguments.size}_to_matmul": gflops[PLAIN] / gflops[best],
        "kinds": {name: times.speed(name, PLAIN) for name in names if name != PLAIN},
    }


def loop_contender(
    config: PretrainConfig, prepared: Prepared, folder: pathlib.Path, opened: contextlib.ExitStack
) -> collections.abc.Callable[[], object]:
    """A function that trains on by `_LOOP_STEPS` steps, with loader and rows of metrics."""
    mesh, batches, cfg, model, _ = prepared
    state = training.init_state(model, config.training, mesh)
    train_step = training.make_train_step(model, cfg, config.training, mesh)
    log = opened.enter_context(RunLog(folder, 0, Meter(cfg, config.window, batches, 1.0)))

    def pause(step: int) -> bool:
        log.flush()
        return step % config.log_steps == 0

    loaded = opened.enter_context(contextlib.closing(batches.train.batches()))
    trained = training.train(train_step, state, loaded, config.training.steps, mesh=mesh, pause=pause)

    def steps() -> object:
        for step, _, metrics in itertools.islice(trained, _LOOP_STEPS // config.log_steps):
            log.write(step, metrics, {})
        return step

    return steps


def measure_mixture(
    config: PretrainConfig, dataset: Dataset, folder: pathlib.Path, repetitions: int
) -> dict[str, float]:
    """The loop against the step on its own batches and against the plain step."""
    prepared = prepare(config, dataset)
    rows = sum(prepared.batches.rows.values())
    codec = make_codec(*KINDS[PLAIN], PLAIN)
    plain = jax.device_put({codec.bucket.name: make_example(codec, rows, config.window)})
    compiled: list[float] = []
    with contextlib.ExitStack() as opened:
        loop = loop_contender(config, prepared, folder, opened)
        with _compilations(compiled):
            loop()
        contenders: Contenders = {
            PLAIN: step_contender(prepared.cfg, config, plain),
            "step": step_contender(prepared.cfg, config, jax.device_put(prepared.batches.train[0])),
            "loop": loop,
        }
        times = compare(contenders, repetitions, seconds=0.0)
    times.seconds["loop"][:] = [seconds / _LOOP_STEPS for seconds in times.seconds["loop"]]
    _print(times, {})
    return {
        "mixture_to_plain": times.speed("loop", PLAIN),
        "step_to_plain": times.speed("step", PLAIN),
        "loop_to_step": 1 / times.speed("loop", "step"),
        "tokens": rows * config.window,
        "step_s": times.median("step"),
        "compile_s": sum(compiled),
        "programs": len(compiled),
    }


def measure_loader(config: PretrainConfig, dataset: Dataset, window: int) -> float:
    """Time steps per second of batches that are read and encoded one after the other in this thread."""
    batches = prepare(dataclasses.replace(config, window=window), dataset).batches
    steps = sum(batches.rows.values()) * window

    def rate(number: int) -> float:
        begin = time.perf_counter()
        batches.train[number]
        return steps / (time.perf_counter() - begin)

    return float(np.median([rate(number) for number in range(20)][5:]))


@contextlib.contextmanager
def _compilations(seconds: list[float]) -> collections.abc.Iterator[None]:
    """Collects how long each program takes to compile, or to be found in the cache of compiled ones."""

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _print(times: Times, gflops: dict[str, float]) -> None:
    for name in times.seconds:
        rate = f"{gflops[name]:8.1f} GFLOP/s" if name in gflops else ""
        print(f"  {name:14}{1e3 * times.median(name):10.1f} ms  {rate}", flush=True)


def _rounded(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="micro", choices=sorted(SIZES))
    parser.add_argument("--only", default="", choices=("", "kinds", "mixture", "loader"))
    parser.add_argument("--kinds", default="", help="only kinds with this in their name")
    parser.add_argument("--window", type=int, default=64, help="T; attention sees half of it")
    parser.add_argument("--tokens", type=int, default=3328, help="of a batch of one kind")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--data", type=pathlib.Path, help="where the data are kept; default: nowhere")
    arguments = parser.parse_args()
    allocator.keep_freed_memory()  # as the scripts do
    model = dataclasses.replace(SIZES[arguments.size], window=arguments.window // 2)
    config = PretrainConfig(model=model, window=arguments.window)
    result: dict[str, typing.Any] = {"size": arguments.size}
    if arguments.only in ("", "kinds"):
        result |= measure_kinds(config, arguments.tokens, arguments)
    if arguments.only != "kinds":
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.data or pathlib.Path(temporary)
            dataset = make_dataset(folder / "dataset")
            if arguments.only != "loader":
                result |= measure_mixture(config, dataset, folder, arguments.repetitions)
            if arguments.only != "mixture":
                rates = {
                    str(window): measure_loader(config, dataset, window) for window in (config.window, _LONG_WINDOW)
                }
                result["loader_steps_per_s"] = rates
                if "step_s" in result:
                    steps_per_s = result["tokens"] / result["step_s"]
                    result["loader_to_step"] = rates[str(config.window)] / steps_per_s
    print(json.dumps(_rounded(result)))


if __name__ == "__main__":
    main()

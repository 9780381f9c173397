"""Acting with a history: decisions per second, against recomputing the window and against the memory that a step reads.

Three are timed side by side for each size, window and number of rows, all rows with a full history:

  step: one step of `ldm_jax.acting`'s agent, its memory donated: features, encoder, decoder, head, the action taken;
  reading: one reading of the decoder's weights and of the cache, by the largest of their numbers;
  recompute: what a policy without a cache does, the model over the whole window, a few rows at a time.

    python -m benchmarks.acting
    python -m benchmarks.acting --sizes=308m --windows=1024 --rows=16,64 --dtype=bfloat16    # on a GPU

Its last line is one JSON object: `cached_to_recompute` and `acting_to_memory`, the least of those named in `headline`,
1 being as fast as recomputing and as fast as memory; `growth`, the time of a step after ten million steps over that
of a first one; `table` with all, latency in milliseconds. Whole evaluations are measured by `benchmarks.evaluation`.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import json
import math
import os
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import acting, cards
from ldm_jax.acting import AgentState
from ldm_jax.encoding.codec import Codec
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import Inputs, Params, make_model
from ldm_jax.training import cost
from ldm_jax.types import TimeStep

from .timing import Times, compare

NUMBERS, CHOICES = 8, 4
"""Of an observation and of an action: of a task in which encoder and head are as small as they come."""

PIECE = 4
"""Rows of which the window is recomputed at a time."""

HEADLINE_ROWS = (16, 64)
LONG = 10_000_000
"""Steps of a long life."""


def make_codec() -> Codec:
    """Of a task with a few numbers and a few choices."""
    returns = cards.Returns.of(np.array([[0.0, 1.0], [1.0, 0.0]]))
    card = cards.EnvironmentCard(
        id="benchmark/Task-v0",
        library="benchmark",
        version="1",
        domain="benchmark",
        observation_space=gymnasium.spaces.Box(-1, 1, (NUMBERS,)),
        action_space=gymnasium.spaces.Discrete(CHOICES),
        time_limit=1000,
        statistics=cards.Statistics((0.0,) * NUMBERS, (1.0,) * NUMBERS, 1.0, (), (), 1000),
        random_returns=returns,
        reference_returns=returns,
        reference=cards.Reference(algorithm="none", decoding="sample", budget_steps=0, seed=0),
    )
    return Codec(card)


def make_params(cfg: ModelConfig) -> Params:
    """Parameters of a plausible size, the decoder's matrices in the dtype of the computation, as acting reads them."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[typing.Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = rng.standard_normal(leaf.shape, np.float32) / np.float32(math.sqrt(leaf.shape[-2:][0]))
        matrix = path[0].key == "decoder" and path[-1].key == "kernel"
        return jnp.array(drawn, jnp.dtype(cfg.dtype if matrix else leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(make_model(cfg).init, jax.random.key(0)))


def aged(state: AgentState, steps: int) -> AgentState:
    """The memory of rows that have acted so many steps."""
    rows, window = len(state.cache.slot), state.cache.keys[0].shape[2]
    counts = (min(steps, window), steps % window, steps)
    small = (jnp.full(rows, count, leaf.dtype) for count, leaf in zip(counts, state.cache[2:], strict=True))
    return state._replace(cache=state.cache._replace(**dict(zip(("length", "slot", "position"), small, strict=True))))


class Steps:
    """Steps of all rows, one a call; the memory that it is made with is used up.

    Attributes:
      state: the memory after the last call.
    """

    def __init__(self, cfg: ModelConfig, codec: Codec, params: Params, steps: int, rows: int):
        agent = acting.make_agent(cfg, codec, "sample")
        self.state, self._params = aged(agent.init(rows), steps), params
        self._step = jax.jit(agent.step, donate_argnums=1)
        self._key, no = jax.random.key(0), np.zeros(rows, bool)
        observation = np.random.default_rng(0).uniform(-1, 1, (rows, NUMBERS)).astype(np.float32)
        self._timestep = TimeStep(
            observation=observation, reward=np.zeros(rows, np.float32), terminated=no, truncated=no, first=no
        )

    def __call__(self) -> object:
        self.state, action, _ = self._step(self._params, self.state, self._timestep, self._key)
        return jax.block_until_ready(action)

    @property
    def read(self) -> typing.Any:
        """What a step cannot do without: the decoder's weights, keys and values."""
        return self._params["decoder"], self.state.cache.keys, self.state.cache.values


@jax.jit
def read(tree: typing.Any) -> jax.Array:
    """Reads all arrays once."""
    return sum(leaf.max().astype(jnp.float32) for leaf in jax.tree.leaves(tree))


def recomputing(cfg: ModelConfig, codec: Codec, params: Params, rows: int) -> collections.abc.Callable[[], object]:
    """The window of some rows, and what is predicted for its last step."""
    shapes = cost.example_shapes(codec.bucket, rows, cfg.window).inputs
    inputs: Inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    apply = jax.jit(
        lambda params, inputs: make_model(cfg).apply(params, {"rows": inputs})[0]["rows"].choice_logits[:, -1]
    )
    return lambda: jax.block_until_ready(apply(params, inputs))


class Line(typing.NamedTuple):
    """What was measured of a size, a window and a number of rows."""

    size: str
    window: int
    rows: int
    latency_ms: float
    decisions_per_s: float
    read_mb: float
    acting_to_memory: float
    cached_to_recompute: float


def measure(name: str, cfg: ModelConfig, rows: int, options: argparse.Namespace) -> Line:
    """Times step, reading and recomputing in turn."""
    codec, params = make_codec(), make_params(cfg)
    step, piece = Steps(cfg, codec, params, LONG, rows), min(rows, PIECE)
    contenders = {
        "step": step,
        # Of the arrays that the steps read, wherever they are by now.
        "reading": lambda: read(step.read).block_until_ready(),
        "recompute": recomputing(cfg, codec, params, piece),
    }
    times: Times = compare(contenders, options.repetitions, options.seconds)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(step.read))
    return Line(
        name,
        cfg.window,
        rows,
        round(times.median("step") * 1e3, 3),
        round(rows / times.median("step"), 1),
        round(size / 1e6, 1),
        round(times.speed("step", "reading"), 3),
        round(times.speed("step", "recompute") * rows / piece, 1),
    )


def measure_growth(cfg: ModelConfig, rows: int, options: argparse.Namespace) -> float:
    """The time of a step after `LONG` steps over the time of one of the first."""
    codec, params = make_codec(), make_params(cfg)
    contenders = {name: Steps(cfg, codec, params, steps, rows) for name, steps in (("young", 1), ("old", LONG))}
    return round(1 / compare(contenders, options.repetitions, options.seconds).speed("old", "young"), 3)


def _settings(options: argparse.Namespace) -> collections.abc.Iterator[tuple[str, ModelConfig, int]]:
    """Sizes, windows and rows that were asked for; those too large for the machine are said to be left out."""
    for name in options.sizes.split(","):
        for window in map(int, options.windows.split(",")):
            cfg = dataclasses.replace(SIZES[name], window=window, dtype=options.dtype)
            for rows in map(int, options.rows.split(",")):
                shapes = jax.eval_shape(lambda cfg=cfg, rows=rows: make_model(cfg).init_cache(rows))
                size_gb = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / 1e9
                if size_gb > options.memory_gb:
                    print(f"{name}, {window} steps, {rows} rows: left out, its cache takes {size_gb:.1f} GB")
                    continue
                yield name, cfg, rows


def _free_gb() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def main(arguments: collections.abc.Sequence[str] | None = None) -> None:
    """Prints a table, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acting", description="Speed of acting with a history.")
    parser.add_argument("--sizes", default="micro,32m", help=f"of {', '.join(SIZES)}, with commas between")
    parser.add_argument("--windows", default="256,1024", help="W, in steps")
    parser.add_argument("--rows", default="1,16,64,256", help="B")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--memory_gb", type=float, default=_free_gb() / 2, help="the most that a cache may take")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contender in each repetition, about")
    options = parser.parse_args(arguments)
    print("  size  window  rows  ms a step  decisions/s        MB   memory  recompute")
    table: list[Line] = []
    for name, cfg, rows in _settings(options):
        table.append(line := measure(name, cfg, rows, options))
        print(
            f"{line.size:>6} {line.window:>7} {line.rows:>5} {line.latency_ms:>10} {line.decisions_per_s:>12} "
            f"{line.read_mb:>9} {line.acting_to_memory:>8} {line.cached_to_recompute:>10}",
            flush=True,
        )
    longest = max(line.window for line in table)
    headline = [line for line in table if line.window == longest and line.rows in HEADLINE_ROWS] or table
    growth_cfg = dataclasses.replace(SIZES[table[0].size], window=longest, dtype=options.dtype)
    print()
    print(
        json.dumps(
            {
                "cached_to_recompute": min(line.cached_to_recompute for line in headline),
                "acting_to_memory": min(line.acting_to_memory for line in headline),
                "growth": measure_growth(growth_cfg, min(headline[0].rows, 16), options),
                "headline": [f"{line.size}, {line.window} steps, {line.rows} rows" for line in headline],
                "table": [line._asdict() for line in table],
            }
        )
    )


if __name__ == "__main__":
    main()

"""What depth costs: compile time, program size and memory of a training step, for 2 to 32 layers.

The layers are scanned, so the program is the same at every depth; memory grows by what a layer keeps for the backward
pass and by its parameters.

    python -m benchmarks.depth

Its last line is one JSON object: `compile_deepest_to_shallowest` and `program_deepest_to_shallowest`, where 1 is flat,
and `table`, with each depth.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import json
import statistics
import time
import typing

import jax

from ldm_jax import training
from ldm_jax.encoding.buckets import Bucket
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.training import cost
from ldm_jax.training.optimizer import TrainingConfig

BUCKET = Bucket(numeric=8, categorical=0, grids=(), texts=(), choice_slots=1, choices=8, continuous_slots=0)


def measure(size: str, layers: int, rows: int, repetitions: int) -> dict[str, typing.Any]:
    """Compiles the step of a depth several times, and runs it never."""
    cfg = dataclasses.replace(SIZES[size], layers=layers)
    training_cfg = TrainingConfig(optimizer="adamw")
    model = make_model(cfg)
    state = training.state_shapes(model, training_cfg)
    batch = {BUCKET.name: cost.example_shapes(BUCKET, rows, cfg.window)}
    seconds = []
    for _ in range(repetitions):
        jax.clear_caches()
        start = time.perf_counter()
        lowered = training.make_train_step(model, cfg, training_cfg).lower(state, batch)
        compiled = lowered.compile()
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return {
        "layers": layers,
        "compile_s": round(statistics.median(seconds), 2),
        "operations": lowered.as_text().count("\n"),
        "state_mb": round(memory.argument_size_in_bytes / 1e6, 1),
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
    }


def main(arguments: collections.abc.Sequence[str] | None = None) -> None:
    """Prints a table, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth", description="Cost of depth.")
    parser.add_argument("--size", default="32m", choices=SIZES)
    parser.add_argument("--layers", default="2,4,8,16,32", help="depths, with commas between")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"{options.size} at other depths, {options.rows} rows of {SIZES[options.size].window} steps\n")
    print(f"{'layers':>8} {'compile s':>10} {'operations':>11} {'state MB':>10} {'temporary MB':>13}")
    table = []
    for layers in map(int, options.layers.split(",")):
        table.append(line := measure(options.size, layers, options.rows, options.repetitions))
        print(
            f"{layers:>8} {line['compile_s']:>10} {line['operations']:>11} {line['state_mb']:>10} "
            f"{line['temporary_mb']:>13}",
            flush=True,
        )
    first, last = table[0], table[-1]
    print()
    print(
        json.dumps(
            {
                "compile_deepest_to_shallowest": round(last["compile_s"] / first["compile_s"], 2),
                "program_deepest_to_shallowest": round(last["operations"] / first["operations"], 2),
                "size": options.size,
                "table": table,
            }
        )
    )


if __name__ == "__main__":
    main()

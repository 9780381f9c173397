"""The metrics of a training run: one row of JSON per logged step, the same for TensorBoard, and how fast it went."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import itertools
import json
import pathlib
import time
import typing

import jax
import jax.numpy as jnp

from experiments.harness import progress
from ldm_jax import files
from ldm_jax.model.config import ModelConfig
from ldm_jax.training.cost import flops_per_token
from ldm_jax.training.metrics import Metrics


class RunLog:
    """Rows of `metrics.jsonl` and events of `tensorboard/`; use as a context manager. Process 0 alone writes."""

    def __init__(self, workdir: pathlib.Path, begun: int):
        """Opens both, and forgets what was logged after the step that the run goes on from.

        Args:
          workdir: where they lie.
          begun: steps that were done before.
        """
        self._file, self._events = None, None
        if jax.process_index():
            return
        import tensorboardX  # it takes half a second

        path = workdir / "metrics.jsonl"
        if path.exists():  # what came after the checkpoint is about to be measured again
            rows = path.read_text().splitlines()
            files.write(path, "".join(f"{row}\n" for row in itertools.takewhile(lambda row: _step(row) <= begun, rows)))
        self._file = path.open("a")
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=begun + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file and self._events:
            self._file.close()
            self._events.close()

    def write(self, row: dict[str, typing.Any]) -> None:
        """Writes a row: `step` and numbers, or mappings of names to numbers."""
        if self._file and self._events:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for name, value in _flat(row):
                self._events.add_scalar(name, value, row["step"])


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line that a crash cut off
        return float("inf")


def _flat(row: dict[str, typing.Any], prefix: str = "") -> collections.abc.Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, float(value)


class Meter:
    """Turns the metrics of steps into rows, with tokens per second and the share of the machine's arithmetic used."""

    def __init__(
        self,
        model: ModelConfig,
        window: int,
        rows: int,
        environments: collections.abc.Sequence[str],
        domains: collections.abc.Sequence[str],
        peak_flops: float,
    ):
        """Starts the clock.

        Args:
          model: shapes of the model.
          window: T, steps of a window.
          rows: of a batch, over all buckets and processes.
          environments: the id of each environment index.
          domains: the domain of each.
          peak_flops: floating-point operations per second of one device; 0 to measure a matrix product's.
        """
        self._environments, self._domains, self._tokens = environments, domains, window * rows
        self._flops = flops_per_token(model, window).training
        self._peak = (peak_flops or measured_peak(model.dtype)) * jax.device_count()
        self._clock, self._last = progress.clock(), (0, 0.0)

    def row(self, step: int, metrics: Metrics) -> dict[str, typing.Any]:
        """The row of a step. Rates are over the steps since the last row; the first row has none: it was compiling."""
        now = time.monotonic()
        row = {"step": step, **dataclasses.asdict(metrics), "tokens": step * self._tokens, "seconds": self._clock()}
        excess, labelled = row.pop("kl_by_environment"), row.pop("labelled_by_environment")
        row["useful_fraction"] = metrics.useful_tokens / self._tokens
        row["kl_by_environment"] = {self._environments[i]: value for i, value in excess.items()}
        row["kl_by_domain"] = mean_by(self._domains, excess, labelled)
        last, then = self._last
        if last and now > then:
            row["tokens_per_s"] = (step - last) * self._tokens / (now - then)
            row["flop_utilization"] = row["tokens_per_s"] * self._flops / self._peak
        self._last = step, now
        return row


def mean_by(
    domains: collections.abc.Sequence[str], excess: dict[int, float], labelled: dict[int, int]
) -> dict[str, float]:
    """Mean excess loss of each domain, over its labelled steps."""
    total, count = collections.Counter[str](), collections.Counter[str]()
    for index, value in excess.items():
        total[domains[index]] += value * labelled[index]  # type: ignore[assignment]
        count[domains[index]] += labelled[index]
    return {domain: total[domain] / max(count[domain], 1) for domain in sorted(total)}


def measured_peak(dtype: str, side: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a large square matrix product on one device, the best of a few."""
    x = jnp.ones((side, side), jnp.dtype(dtype), device=jax.local_devices()[0])
    product, best = jax.jit(jnp.matmul), float("inf")
    product(x, x).block_until_ready()
    for _ in range(repeats):
        begun = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * side**3 / best

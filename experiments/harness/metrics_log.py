"""The metrics of a training run: one row of JSON per logged step, the same for TensorBoard, and how fast it went."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import io
import json
import pathlib
import time
import typing

import jax
import jax.numpy as jnp

from experiments.harness import progress
from experiments.harness.batches import Batches
from experiments.harness.workdir import WorkdirError
from ldm_jax import files
from ldm_jax.model.config import ModelConfig
from ldm_jax.training.cost import flops_per_token
from ldm_jax.training.metrics import Metrics

_FLUSH_SECONDS = 10.0
"""From one write of TensorBoard's events to the disk to the next."""


def read_rows(path: pathlib.Path) -> list[dict[str, typing.Any]]:
    """The rows of a `metrics.jsonl`, none where there is no file; a line that a crash cut off is left out, with a word.

    Raises:
      WorkdirError: the file cannot be read.
    """
    rows: list[dict[str, typing.Any]] = []
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise WorkdirError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] + 0  # a number, in every whole row
            rows.append(row)
        except (ValueError, LookupError, TypeError):
            progress.logger.warning("line %d of %s was not written to its end; it is left out", number, path)
    return rows


class RunLog:
    """Rows of `metrics.jsonl` and events of `tensorboard/`; use as a context manager. Process 0 alone writes."""

    def __init__(self, workdir: pathlib.Path, start_step: int, meter: Meter):
        """Opens both, and forgets what was logged after the step that the run goes on from.

        Args:
          workdir: where they lie.
          start_step: steps that were done before.
          meter: makes rows of metrics.

        Raises:
          WorkdirError: they cannot be written.
        """
        self._meter, self._path = meter, workdir / "metrics.jsonl"
        self._pending = list[dict[str, typing.Any]]()
        self._file: io.FileIO | None = None
        if jax.process_index():
            return
        if self._path.exists():  # what came after the checkpoint is about to be measured again
            rows = [row for row in read_rows(self._path) if row["step"] <= start_step]
            with self._writing():
                files.write(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        with self._writing(workdir / "tensorboard"):
            self._events = _Events(workdir / "tensorboard", start_step)
        with self._writing():
            self._file = self._path.open("ab", buffering=0)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file:
            self._file.close()
            try:
                with self._writing(self._path.with_name("tensorboard")):
                    self._events.close()
            except WorkdirError:
                if kind is None:  # what is under way already says more
                    raise

    def write(self, step: int, metrics: Metrics, evaluated: collections.abc.Mapping[str, typing.Any]) -> None:
        """Makes a row, which `flush` writes.

        Args:
          step: that the metrics are of.
          metrics: of the step.
          evaluated: numbers, or mappings of names to numbers, that belong beside them.
        """
        row = self._meter.row(step, metrics) | dict(evaluated)
        if self._file:
            self._pending.append(row)

    def flush(self) -> None:
        """Writes the rows; with many environments it takes longer than making them.

        Raises:
          WorkdirError: there is no room left, or the like.
        """
        while self._file and self._pending:
            row = self._pending.pop(0)
            with self._writing():
                self._file.write(json.dumps(row).encode() + b"\n")
            with self._writing(self._path.with_name("tensorboard")):
                self._events.write(row)

    @contextlib.contextmanager
    def _writing(self, path: pathlib.Path | None = None) -> collections.abc.Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkdirError(
                f"cannot write {path or self._path}: {error.strerror}. Make room, or let it be written, and start "
                "again with the same flags: training goes on from its newest checkpoint"
            ) from error


class _Events:
    """Events for TensorBoard, one a row, written by the thread that asks: another one could not say what went wrong."""

    def __init__(self, folder: pathlib.Path, start_step: int):
        from tensorboardX import event_file_writer  # it takes half a second
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{start_step}")
        # What another run wrote of the steps that follow is hidden.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(step=start_step + 1, file_version="brain.Event:2"))
        self._writer.write_event(event_pb2.Event(step=start_step + 1, session_log=started))
        self._flushed = time.monotonic()

    def write(self, row: dict[str, typing.Any]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _flat(row)]
        summary = self._summary(value=values)
        self._writer.write_event(self._event(wall_time=time.time(), step=row["step"], summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


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
        batches: Batches,
        peak_flops: float,
    ):
        """Starts the clock.

        Args:
          model: shapes of the model.
          window: T, steps of a window.
          batches: whose metrics they are.
          peak_flops: floating-point operations per second of one device; 0 to measure a matrix product's.
        """
        self._batches = batches
        self._environments = [codec.card.id for codec in batches.codecs]
        self._domains = [codec.card.domain for codec in batches.codecs]
        self._tokens = window * sum(batches.rows.values())
        self._flops = flops_per_token(model, window).training
        self._peak = (peak_flops or measured_peak(model.dtype)) * jax.device_count()
        self._clock, self._last = progress.clock(), (0, 0.0)

    def row(self, step: int, metrics: Metrics) -> dict[str, typing.Any]:
        """The row of a step. Rates are over the steps since the last row; the first row has none: it was compiling."""
        now = time.monotonic()
        row = {"step": step, **dataclasses.asdict(metrics), "tokens": step * self._tokens, "seconds": self._clock()}
        kl, labelled = row.pop("kl_by_environment"), row.pop("labelled_by_environment")
        row["useful_fraction"] = metrics.useful_tokens / self._tokens
        row["kl_by_environment"] = {self._environments[i]: value for i, value in kl.items()}
        row["kl_by_domain"] = mean_by(self._domains, kl, labelled)
        row["share_by_environment"] = self._batches.shares(step)
        last, then = self._last
        if last and now > then:
            row["tokens_per_s"] = (step - last) * self._tokens / (now - then)
            row["flop_utilization"] = row["tokens_per_s"] * self._flops / self._peak
        self._last = step, now
        return row


def mean_by(
    domains: collections.abc.Sequence[str], values: dict[int, float], labelled: dict[int, int]
) -> dict[str, float]:
    """Means by domain, over labelled steps.

    Args:
      domains: of each environment index.
      values: of environment indices.
      labelled: the steps of each that have a label.
    """
    total, count = collections.defaultdict[str, float](float), collections.Counter[str]()
    for index, value in values.items():
        total[domains[index]] += value * labelled[index]
        count[domains[index]] += labelled[index]
    return {domain: total[domain] / max(count[domain], 1) for domain in sorted(total)}


def measured_peak(dtype: str, side: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a large square matrix product on one device, the best of a few."""
    x = jnp.ones((side, side), jnp.dtype(dtype), device=jax.local_devices()[0])
    product, best = jax.jit(jnp.matmul), float("inf")
    product(x, x).block_until_ready()
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best

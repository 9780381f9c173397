"""Environments of libraries that live in an interpreter of their own, behind the one interface.

Rows are split among worker processes, which step in parallel. The host trusts none of them: what a worker returns is
checked, how long it takes is limited, and one that breaks the rules is replaced while the run goes on. Arrays are in a
file without a name, control bytes on a socket without a name, and the kernel ends the workers when the host is gone, so
that nothing can be left behind.
"""

from __future__ import annotations

import collections
import itertools
import logging
import mmap
import os
import pathlib
import tempfile
import time
import typing
import weakref

import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import EnvironmentFaultError
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

from .. import checks, conversion
from ..cores import available_cores
from ..tokens import Token, check_newest, draw_seeds
from .host import IDLE, REMAKE, RESET, SEED, STEP, LocalProcess, Process, Worker, WorkerFaultError
from .program import Isolation, WorkerSpec
from .scratch import make_scratch
from .venvs import normal

DEFAULT_TIME_LIMIT = 1000
"""Steps, where neither the caller nor the library names a limit."""
_ALIGNMENT = 64  # bytes
_REPORTS = 16

_log = logging.getLogger(__name__)


class Fault(typing.NamedTuple):
    """One fault that was survived: what kind, in which rows, and what was seen."""

    kind: str
    rows: tuple[int, ...]
    text: str


class IsolatedEnvironment:
    """B parallel environments in worker processes; see `ldm_jax.environment.Environment`.

    Attributes:
      spec: what is known before stepping.
      faults: how often each kind of fault was survived since `make`. `crash`, `hang`, `garbage`, `memory` and `start`
        cost a worker, whose rows all restart; `exception`, `nan`, `shape` and `category` cost one row its episode.
      reports: the newest faults, the last one last.
      rows_outside: rows since `make` with a number outside the declared bounds: some libraries return those.
    """

    spec: EnvironmentSpec
    faults: collections.Counter[str]
    reports: collections.deque[Fault]
    rows_outside: int

    def __init__(self, spec: WorkerSpec, batch_size: int, time_limit: int | None, isolation: Isolation):
        self._worker_spec, self._isolation = spec, isolation
        self.faults, self.reports, self.rows_outside = collections.Counter(), collections.deque(maxlen=_REPORTS), 0
        count = min(batch_size, isolation.workers or available_cores())
        edges = np.linspace(0, batch_size, count + 1).round().astype(int)
        self._shares = [range(*map(int, pair)) for pair in itertools.pairwise(edges)]
        self._workers: list[Worker | None] = [None] * count
        self._token: Token | None = None
        self._values: list[np.ndarray] = []
        self._scratch, remove_scratch = make_scratch()
        self._finalize = weakref.finalize(self, _end, self._workers, remove_scratch)
        try:
            self._workers[0] = first = self._start()
            about = first.handshake(isolation.start_timeout_s)
            self.spec = self._describe(about, batch_size, time_limit)
            self._lay_out(about["mask"])
            self._attach(0)
        except WorkerFaultError as error:
            fault = self._lose(0, error)
            self.close()
            raise EnvironmentFaultError(f"{spec.id} cannot be made: {fault.text}") from None
        except BaseException:
            self.close()
            raise

    def reset(self, key: Array) -> tuple[Token, TimeStep]:
        if not self._finalize.alive:
            self._scratch, remove_scratch = make_scratch()
            self._finalize = weakref.finalize(self, _end, self._workers, remove_scratch)
        batch_size = self.spec.batch_size
        self._seeds_B = draw_seeds(key, batch_size).astype(np.uint32)
        self._restarts_B = np.zeros(batch_size, np.int64)
        self._survived = self._step_count = 0
        self._elapsed_B = np.zeros(batch_size, np.int64)
        self._remake_B = np.zeros(batch_size, bool)
        self._arrays["seed"][:] = self._seeds_B
        return self._advance(np.full(batch_size, SEED, np.uint8))

    def step(self, state: Token, action: PyTree) -> tuple[Token, TimeStep]:
        check_newest(self.spec.id, state, self._token)
        for i, leaf in enumerate(self._action_leaves):
            value, slots = np.asarray(spaces.get(action, leaf.path)), self._arrays[f"action/{i}"]
            if value.shape != slots.shape:
                raise ValueError(
                    f"{self.spec.id}: the action, part {leaf.name!r}, has shape {list(value.shape)}, "
                    f"expected {list(slots.shape)}"
                )
            slots[:] = value
        self._token = None  # a step that fails leaves no state to go on from
        self._step_count += 1
        command_B = np.full(self.spec.batch_size, STEP, np.uint8)
        if np.count_nonzero(self._last_B):
            command_B[self._last_B] = RESET
            command_B[self._last_B & self._remake_B] = REMAKE
        return self._advance(command_B)

    def close(self) -> None:
        self._token = None
        self._finalize()

    def _advance(self, command_B: np.ndarray) -> tuple[Token, TimeStep]:
        """Lets the workers obey, sees to their faults, and makes a time step of what came of it."""
        first_B, cut_B = command_B != STEP, np.zeros(self.spec.batch_size, bool)
        self._remake_B &= ~first_B
        todo_B = command_B
        while np.count_nonzero(todo_B):  # IDLE is 0
            self._arrays["command"][:] = todo_B
            faults = [*self._exchange(todo_B)]
            failed = {row for fault in faults for row in fault.rows}
            faults += [fault for fault in self._find_faults(todo_B != IDLE) if not failed.issuperset(fault.rows)]
            todo_B = np.full_like(todo_B, IDLE)
            for fault in faults:
                self._survive(fault)
                rows = list(fault.rows)
                # A row at its start tries again under another seed; one on its way ends here, and restarts next.
                cut_B[rows] = ~first_B[rows]
                todo_B[rows] = np.where(first_B[rows], REMAKE, IDLE)
                self._remake_B[rows] = ~first_B[rows]
                self._reseed(rows)
        return self._receive(first_B, cut_B)

    def _receive(self, first_B: np.ndarray, cut_B: np.ndarray) -> tuple[Token, TimeStep]:
        arrays = self._arrays
        neither_B = ~(first_B | cut_B)
        self._elapsed_B += 1
        self._elapsed_B[first_B] = 0
        terminated_B = arrays["terminated"] & neither_B
        truncated_B = (arrays["truncated"] & neither_B) | cut_B | (self._elapsed_B >= self.spec.time_limit)
        self._last_B = terminated_B | truncated_B
        values = [value.copy() for value in self._observed]
        if np.count_nonzero(cut_B):
            for value, before in zip(values, self._values, strict=True):
                value[cut_B] = before[cut_B]
        self._values = values
        self.rows_outside += checks.count_outside(self._observations.violations(values))
        self._token = Token()
        return self._token, TimeStep(
            observation=spaces.unflatten(self.spec.observation_space, values),
            reward=np.where(neither_B, arrays["reward"], np.float32(0)),
            terminated=terminated_B,
            truncated=truncated_B,
            first=first_B,
            action_mask=arrays["mask"].copy() if "mask" in arrays else None,
        )

    def _exchange(self, todo_B: np.ndarray) -> typing.Iterator[Fault]:
        """Asks every worker that has rows to do, and yields what went wrong."""
        busy = [i for i, rows in enumerate(self._shares) if np.count_nonzero(todo_B[rows.start : rows.stop])]
        for i in [i for i in busy if self._workers[i] is None]:
            try:
                self._workers[i] = self._start()
            except WorkerFaultError as error:
                yield self._lose(i, error)
        waiting, heartbeats = [], self._arrays["heartbeat"]
        for i in busy:
            if (worker := self._workers[i]) is None:
                continue
            try:
                if not worker.attached:
                    about = worker.handshake(self._isolation.start_timeout_s)
                    self._check_alike(about)
                    self._attach(i)
                heartbeat = int(heartbeats[i])
                worker.send(b"G")
                waiting.append((i, worker, time.monotonic(), heartbeat))
            except WorkerFaultError as error:
                yield self._lose(i, error)
        for i, worker, sent, heartbeat in waiting:
            try:
                kind, content = worker.receive(self._isolation.call_timeout_s, heartbeats[i : i + 1], (sent, heartbeat))
                if kind == b"F":
                    yield from self._read_faults(i, content)
            except WorkerFaultError as error:
                yield self._lose(i, error)

    def _read_faults(self, i: int, content: dict[str, typing.Any]) -> typing.Iterator[Fault]:
        try:
            faults = [(int(row), str(kind), str(text)) for row, kind, text in content["faults"]]
        except (KeyError, TypeError, ValueError):
            raise WorkerFaultError("garbage", f"the worker sent {str(content)[:200]}, expected faults") from None
        for row, kind, text in faults:
            if row not in self._shares[i]:
                raise WorkerFaultError(kind if row == -1 else "garbage", text)
        yield from (Fault(kind, (row,), text) for row, kind, text in faults)

    def _find_faults(self, asked_B: np.ndarray) -> typing.Iterator[Fault]:
        """Looks through the arrays for numbers that no environment may return."""
        finite_B = np.isfinite(self._arrays["reward"])
        if not checks.every(finite_B):
            rows = np.flatnonzero(~finite_B & asked_B)
            yield from (Fault("nan", (int(row),), "the reward is not finite") for row in rows)
        for leaf, value in self._observations.violations(self._observed):
            for row, kind, text in leaf.faults(value, asked_B):
                yield Fault(kind, (row,), text)

    def _survive(self, fault: Fault) -> None:
        """Counts a fault, or raises when there were too many."""
        self.faults[fault.kind] += 1
        self.reports.append(fault)
        self._survived += 1
        where = f"{self.spec.id}, step {self._step_count} after the reset, rows {list(fault.rows)[:8]}"
        if self._survived > self._isolation.max_faults:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
            self.close()
            raise EnvironmentFaultError(
                f"{where}: {fault.kind}: {fault.text} (fault {self._survived} since the reset, expected at most "
                f"{self._isolation.max_faults}; since it was made: {counts})"
            )
        _log.warning("%s: %s: %s; these rows restart", where, fault.kind, fault.text)

    def _reseed(self, rows: list[int]) -> None:
        self._restarts_B[rows] += 1
        for row in rows:
            entropy = [int(self._seeds_B[row]), int(self._restarts_B[row])]
            self._arrays["seed"][row] = np.random.SeedSequence(entropy).generate_state(1)[0] >> 1

    def _lose(self, i: int, error: WorkerFaultError) -> Fault:
        """Ends a worker; another takes its place when its rows are reset."""
        if (worker := self._workers[i]) is not None:
            worker.kill()
        self._workers[i] = None
        return Fault(error.kind, tuple(self._shares[i]), str(error))

    def _start(self) -> Worker:
        return _start(self._worker_spec, self._isolation, self._scratch)

    def _attach(self, i: int) -> None:
        worker, rows = self._workers[i], self._shares[i]
        assert worker is not None
        content = {"worker": i, "first": rows.start, "rows": len(rows), "arrays": self._layout, "size": self._size}
        worker.attach(content, self._file.fileno(), self._isolation.start_timeout_s)

    def _describe(self, about: dict[str, typing.Any], batch_size: int, time_limit: int | None) -> EnvironmentSpec:
        spec = self._worker_spec
        try:
            self._declared = about["observation_space"], about["action_space"]
            observation_space = conversion.observation_space(spaces.from_json(self._declared[0]))
            action_space = conversion.action_space(spaces.from_json(self._declared[1]))
        except (KeyError, TypeError, ValueError) as error:
            raise EnvironmentFaultError(f"{spec.id} declares spaces that are not supported: {error}") from error
        versions = {normal(name): version for name, version in about["versions"].items()}
        return EnvironmentSpec(
            id=spec.id,
            library=spec.library,
            version=versions.get(normal(spec.distribution), "unknown"),
            observation_space=observation_space,
            action_space=action_space,
            batch_size=batch_size,
            time_limit=time_limit or spec.time_limit or about["time_limit"] or DEFAULT_TIME_LIMIT,
            domain=spec.domain,
            jittable=False,
            image_digest=spec.digest,
        )

    def _check_alike(self, about: dict[str, typing.Any]) -> None:
        if (about.get("observation_space"), about.get("action_space")) != self._declared:
            raise WorkerFaultError("start", "a worker declares other spaces than the first one")

    def _lay_out(self, choices: int) -> None:
        """Makes the file of arrays and a view of each."""
        batch_size = self.spec.batch_size
        self._observations = checks.Observations(self.spec.observation_space, batch_size)
        self._action_leaves = spaces.leaves(self.spec.action_space)
        wanted: dict[str, tuple[tuple[int, ...], typing.Any]] = {
            "command": ((), np.uint8),
            "seed": ((), np.uint32),
            "reward": ((), np.float32),
            "terminated": ((), np.bool_),
            "truncated": ((), np.bool_),
        }
        for prefix, leaves in (("observation", self._observations.leaves), ("action", self._action_leaves)):
            structs = [spaces.leaf_shape_dtype(leaf.space) for leaf in leaves]
            wanted |= {f"{prefix}/{i}": (struct.shape, struct.dtype) for i, struct in enumerate(structs)}
        if choices:
            wanted["mask"] = ((choices,), np.bool_)
        arrays = {name: ((batch_size, *shape), np.dtype(dtype)) for name, (shape, dtype) in wanted.items()}
        arrays["heartbeat"] = ((len(self._shares),), np.dtype(np.uint64))
        self._layout, self._size = [], 0
        for name, (shape, dtype) in arrays.items():
            self._layout.append((name, shape, dtype.str, self._size))
            self._size += -(-max(1, int(np.prod(shape)) * dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT
        shared = pathlib.Path("/dev/shm")
        folder = shared if os.access(shared, os.W_OK) else None
        # No other process can find it, and it is gone with the last descriptor.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 it lives as long as the environment
        self._file.truncate(self._size)
        memory = mmap.mmap(self._file.fileno(), self._size)
        self._arrays = {name: np.ndarray(shape, dtype, memory, place) for name, shape, dtype, place in self._layout}
        self._observed = [self._arrays[f"observation/{i}"] for i in range(len(self._observations.leaves))]


def registered(spec: WorkerSpec, isolation: Isolation) -> dict[str, str]:
    """What the imports of a worker put into the registry.

    Args:
      spec: of a worker without a name.
      isolation: where it runs and how long that may take.

    Returns:
      The module that each id's environment comes from, by id.

    Raises:
      EnvironmentFaultError: the libraries cannot be imported.
    """
    scratch, remove_scratch = make_scratch()
    try:
        worker = _start(spec, isolation, scratch)
        try:
            return worker.handshake(isolation.start_timeout_s)["ids"]
        finally:
            worker.kill()
    except WorkerFaultError as error:
        raise EnvironmentFaultError(f"the environments of {spec.library} cannot be listed: {error}") from None
    finally:
        remove_scratch()


def _start(spec: WorkerSpec, limits: Isolation, scratch: str) -> Worker:
    def launch(log: typing.IO[bytes]) -> Process:
        if not spec.image:
            return LocalProcess(spec.python, scratch, spec.variables, log)
        from .containers import ContainerProcess

        readable = (*spec.path, *filter(None, [spec.bridge]))
        place = (spec.image, scratch, spec.variables, readable)
        return ContainerProcess(*place, limits.memory_limit_bytes, limits.start_timeout_s)

    return Worker(launch, spec.job(limits.memory_limit_bytes))


def _end(workers: list[Worker | None], remove_scratch: typing.Callable[[], None]) -> None:
    for i, worker in enumerate(workers):
        if worker is not None:
            worker.close()
        workers[i] = None
    remove_scratch()

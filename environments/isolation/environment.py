"""Environments of libraries that live in an interpreter of their own, behind the one interface.

Rows are split among worker processes, which step in parallel. The host trusts none of them: what a worker returns is
checked, how long it takes is limited, and one that breaks the rules is replaced while the run goes on. Arrays are in a
file without a name, control bytes on a socket without a name, and the kernel ends the workers when the host is gone, so
that nothing can be left behind.
"""

from __future__ import annotations

import collections
import collections.abc
import itertools
import logging
import mmap
import operator
import time
import typing
import weakref

import numpy as np

from ldm_jax.environment import EnvironmentFaultError, TooManyRowsError
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

from .. import checks
from ..cores import available_cores
from ..tokens import Token, check_newest
from .batch import EnvironmentBatch, Fault, find_limit, read_spaces
from .host import Sent, Worker, start_worker
from .labels import ExpertReport, Labels
from .program import Isolation, WorkerFaultError, WorkerSpec
from .scratch import NoRoomError, make_scratch, make_shared_file
from .venvs import normalize_name
from .worker.gym_api import IDLE, REMAKE, STEP

_REPORTS = 16
_ROOM = 0.8  # of the environments that filled the memory of a worker when they were new

_log = logging.getLogger(__name__)


class IsolatedEnvironment:
    """B parallel environments in worker processes; see `ldm_jax.environment.Environment`.

    Args:
      spec: what the workers run.
      batch_size: B.
      time_limit: steps after which an episode is truncated; None takes that of the spec, or the library's own.
      isolation: how many workers there are and what they may cost.

    Attributes:
      spec: what is known before stepping.
      faults: how often each kind of fault was survived since `make`. `crash`, `hang`, `garbage`, `memory` and `start`
        cost a worker, whose rows all restart; `exception`, `nan`, `shape` and `category` cost one row its episode.
      reports: the newest faults, the last one last.

    Raises:
      EnvironmentFaultError: the library cannot make the environment, or there is no room for its arrays. `reset` and
        `step` raise TooManyRowsError where there is none for the environments of all rows.
    """

    spec: EnvironmentSpec
    faults: collections.Counter[str]
    reports: collections.deque[Fault]

    def __init__(self, spec: WorkerSpec, batch_size: int, time_limit: int | None, isolation: Isolation):
        batch_size = operator.index(batch_size)
        self._worker_spec, self._isolation = spec, isolation
        self._job = spec.job(isolation, time_limit)
        self.faults, self.reports = collections.Counter(), collections.deque(maxlen=_REPORTS)
        count = min(batch_size, isolation.workers or available_cores())
        edges = np.linspace(0, batch_size, count + 1).round().astype(int)
        self._shares = [range(*map(int, pair)) for pair in itertools.pairwise(edges)]
        self._workers: list[Worker | None] = [None] * count
        self._token: Token | None = None
        self._labels: Labels | None = None
        self._scratch, self._finalize = self._prepare()
        try:
            self._workers[0] = first = self._start()
            about = first.handshake(isolation.start_timeout_s)
            self.spec = self._describe(about, batch_size)
            self._batch = EnvironmentBatch(self.spec, about["mask"], len(self._shares), has_expert=bool(spec.expert))
            self._labels = self._batch.labels
            self._file = make_shared_file(self._batch.size)
            self._batch.place(mmap.mmap(self._file.fileno(), self._batch.size))
            self._attach(0)
        except WorkerFaultError as error:
            fault = self._lose(0, error)
            self.close()
            raise EnvironmentFaultError(f"{spec.id} cannot be made: {fault.text}") from None
        except NoRoomError as error:
            self.close()
            raise EnvironmentFaultError(f"{spec.id} with {batch_size} rows cannot be made: {error}") from None
        except BaseException:
            self.close()
            raise

    @property
    def rows_outside(self) -> int:
        """Rows since `make` with a number outside the declared bounds: some libraries return those."""
        return self._batch.rows_outside

    @property
    def expert_report(self) -> ExpertReport | None:
        """How the expert has done since `make`; None without one."""
        return self._labels.report() if self._labels else None

    @property
    def solved(self) -> np.ndarray | None:
        """`bool [B]`, whether the task was solved at the last step; None without an expert, or where nobody tells."""
        return self._labels.solved if self._labels else None

    def reset(self, key: Array) -> tuple[Token, TimeStep]:
        if not self._finalize.alive:
            self._scratch, self._finalize = self._prepare()
        batch_size = self.spec.batch_size
        self._restarts_B = np.zeros(batch_size, np.int64)
        self._remake_B = np.zeros(batch_size, bool)
        self._survived = self._step_count = 0
        command_B = self._batch.start(key)
        self._seeds_B = self._batch.arrays["seed"].copy()
        return self._advance(command_B)

    def step(self, state: Token, action: PyTree) -> tuple[Token, TimeStep]:
        check_newest(self.spec.id, state, self._token)
        command_B = self._batch.act(action)
        self._token = None  # a step that fails leaves no state to go on from
        self._step_count += 1
        if np.count_nonzero(self._remake_B):
            command_B[self._remake_B & (command_B != STEP)] = REMAKE
        return self._advance(command_B)

    def close(self) -> None:
        self._token = None
        self._finalize()

    def _advance(self, command_B: np.ndarray) -> tuple[Token, TimeStep]:
        """Lets the workers obey, sees to their faults, and makes a time step of what came of it."""
        first_B, lost_B = command_B != STEP, np.zeros(self.spec.batch_size, bool)
        self._remake_B &= ~first_B
        todo_B = command_B
        while np.count_nonzero(todo_B):  # IDLE is 0
            self._batch.arrays["command"][:] = todo_B
            faults = [*self._exchange(todo_B)]
            failed = {row for fault in faults for row in fault.rows}
            faults += [fault for fault in self._batch.collect(todo_B != IDLE) if not failed.issuperset(fault.rows)]
            todo_B = np.full_like(todo_B, IDLE)
            for fault in faults:
                self._survive(fault)
                rows = list(fault.rows)
                # A row at its start tries again under another seed; one on its way ends here, and restarts next.
                lost_B[rows] = ~first_B[rows]
                todo_B[rows] = np.where(first_B[rows], REMAKE, IDLE)
                self._remake_B[rows] = ~first_B[rows]
                self._reseed(rows)
        time_step = self._batch.receive(first_B, lost_B)
        self._token = Token()
        return self._token, time_step

    def _exchange(self, todo_B: np.ndarray) -> collections.abc.Iterator[Fault]:
        """Asks every worker that has rows to do, and yields what went wrong."""
        busy = [i for i, rows in enumerate(self._shares) if np.count_nonzero(todo_B[rows.start : rows.stop])]
        for i in [i for i in busy if self._workers[i] is None]:
            try:
                self._workers[i] = self._start()
            except WorkerFaultError as error:
                yield self._lose(i, error)
        waiting, heartbeats = [], self._batch.arrays["heartbeat"]
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
                waiting.append((i, worker, Sent(time.monotonic(), heartbeat)))
            except WorkerFaultError as error:
                yield self._lose(i, error)
        for i, worker, sent in waiting:
            try:
                kind, content = worker.receive(self._isolation.call_timeout_s, heartbeats[i : i + 1], sent)
                if self._labels:
                    self._labels.note(*map(str, content.get("notes", ())))
                if kind == b"F":
                    yield from self._read_faults(i, content)
            except WorkerFaultError as error:
                yield self._lose(i, error)

    def _read_faults(self, i: int, content: dict[str, typing.Any]) -> collections.abc.Iterator[Fault]:
        try:
            faults = [(int(row), str(kind), str(text)) for row, kind, text in content["faults"]]
        except (KeyError, TypeError, ValueError):
            raise WorkerFaultError("garbage", f"the worker sent {str(content)[:200]}, expected faults") from None
        for row, kind, text in faults:
            if kind == "rows":
                raise self._too_many(i, text)
            if row not in self._shares[i]:
                raise WorkerFaultError(kind if row == -1 else "garbage", text)
        yield from (Fault(kind, (row,), text) for row, kind, text in faults)

    def _too_many(self, i: int, made: str) -> EnvironmentFaultError | TooManyRowsError:
        """What to raise where a worker has no room for the environments of its rows."""
        self.close()
        limit, asked = self._isolation.memory_limit_bytes >> 20, len(self._shares[i])
        there = int(made) if made.isdecimal() else 0
        text = f"{self.spec.id}: {there} of the {asked} rows of a worker hold more than its {limit} MB"
        # Room is left for what they may grow by.
        rows = min(int(_ROOM * there) * len(self._shares), self.spec.batch_size - 1)
        if rows < 1:
            return EnvironmentFaultError(f"{text}: raise Isolation.memory_limit_bytes")
        advice = f"make it with {rows} rows or fewer, or raise Isolation.memory_limit_bytes"
        return TooManyRowsError(f"{text}: {advice}", rows)

    def _survive(self, fault: Fault) -> None:
        """Counts a fault, or raises when there were too many."""
        self.faults[fault.kind] += 1
        self.reports.append(fault)
        self._survived += 1
        where = checks.where(self.spec.id, self._step_count, fault.rows)
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
            self._batch.arrays["seed"][row] = np.random.SeedSequence(entropy).generate_state(1)[0] >> 1

    def _lose(self, i: int, error: WorkerFaultError) -> Fault:
        """Ends a worker; another takes its place when its rows are reset."""
        if (worker := self._workers[i]) is not None:
            worker.kill()
        self._workers[i] = None
        why = self._labels.lost(i) if self._labels else ""
        return Fault(error.kind, tuple(self._shares[i]), str(error) + why)

    def _prepare(self) -> tuple[str, weakref.finalize]:
        """A folder for what the workers write, and what ends them and removes it."""
        scratch = make_scratch()
        return scratch.path, weakref.finalize(self, _end, self._worker_spec.id, self._workers, scratch.remove)

    def _start(self) -> Worker:
        return start_worker(self._worker_spec, self._job, self._isolation, self._scratch)

    def _attach(self, i: int) -> None:
        worker, rows, batch = self._workers[i], self._shares[i], self._batch
        assert worker is not None
        content = {"worker": i, "first": rows.start, "rows": len(rows), "arrays": batch.layout, "size": batch.size}
        worker.attach(content, self._file.fileno(), self._isolation.start_timeout_s)

    def _describe(self, about: dict[str, typing.Any], batch_size: int) -> EnvironmentSpec:
        spec = self._worker_spec
        try:
            self._declared = about["observation_space"], about["action_space"]
            carried = read_spaces(*self._declared)
        except (KeyError, TypeError, ValueError) as error:
            raise EnvironmentFaultError(f"{spec.id} declares spaces that are not supported: {error}") from error
        versions = {normalize_name(name): version for name, version in about["versions"].items()}
        return EnvironmentSpec(
            id=spec.id,
            library=spec.library,
            version=versions.get(normalize_name(spec.distribution), "unknown"),
            observation_space=carried.observation,
            action_space=carried.action,
            batch_size=batch_size,
            time_limit=self._job["time_limit"] or find_limit(about["time_limit"]),
            domain=spec.domain,
            jittable=False,
            image_digest=spec.digest,
        )

    def _check_alike(self, about: dict[str, typing.Any]) -> None:
        if (about.get("observation_space"), about.get("action_space")) != self._declared:
            raise WorkerFaultError("start", "a worker declares other spaces than the first one")


def _end(id: str, workers: list[Worker | None], remove_scratch: collections.abc.Callable[[], None]) -> None:
    for i, worker in enumerate(workers):
        for text in worker.close() if worker is not None else ():
            _log.warning("%s: closing it raised an error, and it is gone all the same: %s", id, text)
        workers[i] = None
    remove_scratch()

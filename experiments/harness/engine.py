"""Runs independent units of work, each in a process that may crash, hang or leak without harm to the others.

A unit and the function that works on it can be pickled, and share nothing with the others: what is worth keeping the
function writes itself, at once and whole, so that whoever is killed loses the units in flight alone. An engine over
the machines of a cluster can take the place of `run_units` with the same contract.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import multiprocessing.connection
import multiprocessing.reduction
import os
import signal
import time
import traceback
import typing

from experiments.harness import processes, progress
from ldm_jax.errors import ConfigError

U = typing.TypeVar("U")
R = typing.TypeVar("R")

_PICKLE = multiprocessing.reduction.ForkingPickler  # as connections use it
_TICK_S = 0.25
_SAY_S = 0.25  # between two words of a process about how far it is
_REUSED = 32  # units after which a process is replaced: what libraries leak and JAX has compiled goes with it
_SWOLLEN_BYTES = 4 << 30  # a process that holds more after a unit is replaced, too
_GONE_S = 10.0  # for a process that has closed its pipe to end

OUT_OF_TIME, OUT_OF_MEMORY, DIED = "out of time", "out of memory", "process died"


class Limits(typing.NamedTuple):
    """What one unit may take; 0 for any amount.

    Attributes:
      seconds: from its beginning.
      memory_gb: held by its process and those that it starts, in gigabytes; a process with JAX alone takes about half
        of one.
    """

    seconds: float = 0.0
    memory_gb: float = 0.0


def check_limits(limits: Limits, workers: int) -> None:
    """Checks that limits make sense, with so many processes.

    Raises:
      ConfigError: a limit is negative, or there is no process that could be ended.
    """
    for name, value in zip(("unit_seconds", "unit_memory_gb"), limits, strict=True):
        if value < 0:
            raise ConfigError(f"{name} is {value}, expected at least 0")
        if value and not workers:
            raise ConfigError(f"{name} is {value} and workers is 0: limits hold for processes, give at least 1 worker")


class Finished(typing.NamedTuple, typing.Generic[U, R]):
    """A unit that was worked on.

    Attributes:
      unit: which.
      result: what the function returned; None where the unit was ended.
      cause: why it was ended, `OUT_OF_TIME`, `OUT_OF_MEMORY` or `DIED`; empty where it was not.
      reason: the same in one sentence.
    """

    unit: U
    result: R | None
    cause: str = ""
    reason: str = ""


Work = collections.abc.Callable[[U, progress.Advance], R]
"""`function(unit, advance)`; `advance(n)` says that n more are done, of whatever the progress is counted in."""


def run_units(
    units: collections.abc.Iterable[U],
    function: Work[U, R],
    *,
    workers: int,
    limits: Limits = Limits(),  # noqa: B008 (immutable)
    advance: progress.Advance = lambda n: None,
) -> collections.abc.Generator[Finished[U, R], None, None]:
    """Works on units, several at once, and yields each as it is finished.

    A process has one unit at a time, so that it is known whose fault its end is; it is used again for the next one, and
    replaced once it has ended, has done many, or holds too much.

    Args:
      units: in the order in which they are begun.
      function: a function of a module, or a `functools.partial` of one. What it raises ends everything, and is raised
        here: the disk is full, or it is a fault of ours. What is the unit's own fault it returns.
      workers: processes; 0 for this one, where a crash ends everything and limits do not hold.
      limits: of each unit.
      advance: told of the progress of all units.

    Yields:
      What came of each unit, in the order of their ends. Close it to end the units in flight.
    """
    if not workers:
        for unit in units:
            yield Finished(unit, function(unit, advance))
        return
    waiting = collections.deque(units)
    with contextlib.ExitStack() as stack:
        busy: list[_Worker[U, R]] = []
        idle: list[_Worker[U, R]] = []
        while waiting or busy:
            while waiting and len(busy) < workers:
                idle = [worker for worker in idle if worker.process.is_alive()]
                worker = idle.pop() if idle else _Worker(stack.enter_context(contextlib.ExitStack()), function)
                worker.begin(waiting.popleft())
                busy.append(worker)
            said = multiprocessing.connection.wait([end for worker in busy for end in worker.ends], _TICK_S)
            for worker in busy[:]:
                finished = worker.listen(advance) if {*worker.ends} & {*said} else None
                if finished := finished or worker.end_beyond(limits):
                    busy.remove(worker)
                    if not worker.end_if_worn():
                        idle.append(worker)
                    yield finished


def workers_for(named: int, workers: int, limits: Limits) -> int:
    """The processes that so many units are worth: one alone, without limits, needs none of its own."""
    return 0 if named <= 1 and limits == Limits() else workers


@dataclasses.dataclass
class _Worker(typing.Generic[U, R]):
    """A process that works on one unit after the other; `stack` ends it."""

    stack: contextlib.ExitStack
    function: Work[U, R]

    def __post_init__(self) -> None:
        self.process, self.connection = self.stack.enter_context(processes.child(_serve, self.function))
        self.done = 0
        self.ended = False

    @property
    def ends(self) -> tuple[multiprocessing.connection.Connection, int]:
        """What `multiprocessing.connection.wait` waits for: a word, or the end."""
        return self.connection, self.process.sentinel

    def begin(self, unit: U) -> None:
        self.unit, self.begun_s = unit, 0.0
        with contextlib.suppress(OSError):  # it has ended: `listen` will say
            self.connection.send(unit)

    def listen(self, advance: progress.Advance) -> Finished[U, R] | None:
        """Hears what the process says, up to the result of its unit or its end."""
        if said := self._hear(advance):
            kind, value = said
            if kind == "raised":
                raise value
            self.done += 1
            return Finished(self.unit, value)
        if self.process.is_alive():
            return None
        return self._end(DIED, f"it ends its process {_how(self.process.exitcode or 0)}")

    def _hear(self, advance: progress.Advance) -> tuple[str, typing.Any] | None:
        """The last word about the unit, if it has been said."""
        try:
            while self.connection.poll():
                kind, value = self.connection.recv()
                if kind == "begun":
                    self.begun_s = time.monotonic()
                elif kind == "advance":
                    advance(value)
                else:
                    return kind, value
        except (EOFError, ConnectionError):
            self.process.join(_GONE_S)
        return None

    def end_beyond(self, limits: Limits) -> Finished[U, R] | None:
        """Ends the unit if it has taken more than it may."""
        if limits.seconds and self.begun_s and time.monotonic() - self.begun_s > limits.seconds:
            return self._end(OUT_OF_TIME, f"it took more than {limits.seconds:g} s")
        if limits.memory_gb:
            held_gb = processes.resident_bytes(self.process.pid or 0) / 1e9
            if held_gb > limits.memory_gb:
                return self._end(OUT_OF_MEMORY, f"it held {held_gb:.1f} GB, more than {limits.memory_gb:g} GB")
        return None

    def end_if_worn(self) -> bool:
        """Ends the process if it is not to be used again; says whether it has ended."""
        worn = self.done >= _REUSED or processes.resident_bytes(self.process.pid or 0) > _SWOLLEN_BYTES
        if worn and not self.ended:
            self._end("", "")
        return self.ended

    def _end(self, cause: str, reason: str) -> Finished[U, R]:
        self.stack.close()
        self.ended = True
        return Finished(self.unit, None, cause, reason)


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "by SIGKILL: most likely the machine has no memory left"
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"


def _serve(function: Work[U, R], connection: multiprocessing.connection.Connection) -> None:
    while True:
        try:
            unit = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(("begun", os.getpid()))
        advance, flush = _throttled(connection)
        try:
            message = _PICKLE.dumps(("result", function(unit, advance)))
        except Exception as error:  # what else there is, SystemExit, ends the process, which says it
            message = _PICKLE.dumps(("raised", _portable(error)))
        flush()
        connection.send_bytes(message)


def _throttled(
    connection: multiprocessing.connection.Connection,
) -> tuple[progress.Advance, collections.abc.Callable[[], None]]:
    done, said_s = 0, time.monotonic()

    def flush() -> None:
        nonlocal done, said_s
        if done:
            connection.send(("advance", done))
        done, said_s = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if time.monotonic() - said_s > _SAY_S:
            flush()

    return advance, flush


def _portable(error: BaseException) -> BaseException:
    """An error that arrives: with its traceback as a note, or in words where it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        _PICKLE.loads(_PICKLE.dumps(error))
    except Exception:
        return RuntimeError(text)
    error.add_note(text)
    return error

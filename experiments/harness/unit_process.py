"""A process that works on one unit after the other, and may crash, hang or leak without harm to the others."""

from __future__ import annotations

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
from experiments.harness.units import DIED, NOT_BUILT, OUT_OF_MEMORY, OUT_OF_TIME, Finished, Job, Limits, R, U

PICKLE = multiprocessing.reduction.ForkingPickler
"""Pickles as connections do."""
TICK_S = 0.25
"""Between two looks at what a unit has taken."""
_SAY_S = 0.25  # between two words of a process about how far it is
_REUSED = 32  # units after which a process is replaced: what libraries leak and JAX has compiled goes with it
_SWOLLEN_BYTES = 4 << 30  # a process that holds more after a unit is replaced, too
_GONE_S = 10.0  # for a process that has closed its pipe to end


@dataclasses.dataclass
class UnitProcess(typing.Generic[U, R]):
    """A process that works on one unit after the other.

    Attributes:
      stack: ends it, with all that it has started, when it is closed.
      job: what is done with each unit.
    """

    stack: contextlib.ExitStack
    job: Job[U, R]

    def __post_init__(self) -> None:
        self.process, self.connection = self.stack.enter_context(processes.child(_serve, self.job))
        self.done = 0
        self.ended = False

    @property
    def ends(self) -> tuple[multiprocessing.connection.Connection, int]:
        """What `multiprocessing.connection.wait` waits for: a word, or the end."""
        return self.connection, self.process.sentinel

    def begin(self, unit: U) -> None:
        """Gives it a unit; `listen` and `end_beyond` say what comes of it."""
        self.unit, self.begun_s, self.prepared_s = unit, 0.0, 0.0
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
                elif kind == "prepared":
                    self.prepared_s = time.monotonic()
                elif kind == "advance":
                    advance(value)
                else:
                    return kind, value
        except (EOFError, ConnectionError):
            self.process.join(_GONE_S)
        return None

    def end_beyond(self, limits: Limits) -> Finished[U, R] | None:
        """Ends the unit if it has taken more than it may."""
        now_s = time.monotonic()
        building_s = now_s - self.begun_s if self.begun_s and not self.prepared_s else 0.0
        if limits.build_seconds and building_s > limits.build_seconds:
            return self._end(NOT_BUILT, f"what it needs was not built within {limits.build_seconds:g} s")
        if limits.memory_gb and self.prepared_s:
            held_gb = processes.resident_bytes(self.process.pid or 0) / 1e9
            if held_gb > limits.memory_gb:
                return self._end(OUT_OF_MEMORY, f"it held {held_gb:.1f} GB, more than {limits.memory_gb:g} GB")
        if limits.seconds and self.prepared_s and now_s - self.prepared_s > limits.seconds:
            return self._end(OUT_OF_TIME, f"it took more than {limits.seconds:g} s")
        return None

    def end_if_worn(self) -> bool:
        """Ends the process if it is not to be used again; says whether it has ended."""
        worn = self.done >= _REUSED or processes.resident_bytes(self.process.pid or 0) > _SWOLLEN_BYTES
        if worn and not self.ended:
            self.end()
        return self.ended

    def end(self) -> None:
        """Ends the process, with all that it has started."""
        self.stack.close()
        self.ended = True

    def _end(self, cause: str, reason: str) -> Finished[U, R]:
        self.end()
        return Finished(self.unit, None, cause, reason)


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "by SIGKILL: most likely the machine has no memory left"
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"


def _serve(job: Job[U, R], connection: multiprocessing.connection.Connection) -> None:
    while True:
        try:
            unit = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(("begun", os.getpid()))
        advance, flush = _throttled(connection)
        try:
            early = job.prepare(unit) if job.prepare else None
            connection.send(("prepared", os.getpid()))
            message = PICKLE.dumps(("result", job.function(unit, advance) if early is None else early))
        except Exception as error:  # what else there is, SystemExit, ends the process, which says it
            message = PICKLE.dumps(("raised", portable(error)))
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


def portable(error: BaseException) -> BaseException:
    """An error that arrives elsewhere: with its traceback as a note, or in words where it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        PICKLE.loads(PICKLE.dumps(error))
    except Exception:
        return RuntimeError(text)
    error.add_note(text)
    return error

"""Processes of a script's own: started fresh, deaf to Ctrl-C, and dead as soon as the one that started them is."""

from __future__ import annotations

import collections.abc
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import pathlib
import signal
import threading
import typing

from experiments.harness import compilation

Function = collections.abc.Callable[..., object]

_SPAWN = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
_POLL_S = 0.2


class Child(typing.NamedTuple):
    """A process, and this end of the pipe to it, which goes both ways."""

    process: multiprocessing.process.BaseProcess
    connection: multiprocessing.connection.Connection


class _Lifeline(typing.NamedTuple):
    """What a process watches: it ends when the writer is closed, or its parent is another one.

    The pipe alone does not tell: a process that the parent forked may hold the writer.
    """

    reader: multiprocessing.connection.Connection
    parent: int


@contextlib.contextmanager
def child(target: Function, *args: typing.Any) -> collections.abc.Iterator[Child]:
    """Runs a function in a process of its own, which is killed when the block ends, with all that it has started.

    Args:
      target: a function of a module, called as `target(*args, connection)` with the other end of the pipe.
      *args: what it is called with; they must be picklable.

    Yields:
      The process and the pipe, on which `recv` raises EOFError once the process has ended.
    """
    ours, theirs = _SPAWN.Pipe()
    with _lifeline() as lifeline, ours:
        process = _SPAWN.Process(target=_run, args=(lifeline, target, (*args, theirs)), daemon=True)
        process.start()
        theirs.close()
        try:
            yield Child(process, ours)
        finally:
            started = _descendants(process.pid or 0)  # before it is gone, and they have another parent
            process.kill()
            _kill(started)
            process.join()


def resident_bytes(pid: int) -> int:
    """The memory that a process and those it has started hold, in bytes; 0 where there is none."""
    total = 0
    for each in (pid, *_descendants(pid)):
        with contextlib.suppress(OSError, IndexError):
            total += int(pathlib.Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return total


def _descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have, as far as they are not its grandparent's."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _kill(pids: collections.abc.Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _lifeline() -> collections.abc.Iterator[_Lifeline]:
    reader, writer = _SPAWN.Pipe(duplex=False)
    with reader, writer:
        yield _Lifeline(reader, os.getpid())


def _run(lifeline: _Lifeline, target: Function, args: tuple[typing.Any, ...]) -> None:
    def watch() -> None:
        while os.getppid() == lifeline.parent and not lifeline.reader.poll(_POLL_S):
            pass
        _kill(_descendants(os.getpid()))  # a build, say, that would go on beside the next one
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all of them: the parent says what is to end
    threading.Thread(target=watch, daemon=True).start()
    compilation.say_failures_once()
    target(*args)

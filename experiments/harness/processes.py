"""Processes of a script's own: started fresh, deaf to Ctrl-C, and dead as soon as the one that started them is."""

from __future__ import annotations

import collections.abc
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.queues
import os
import signal
import threading
import typing

from experiments.harness import compilation

Function = collections.abc.Callable[..., object]

_SPAWN = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
_POLL_S = 0.2


class Child(typing.NamedTuple):
    """A process, and the end of the pipe on which it answers."""

    process: multiprocessing.process.BaseProcess
    receiver: multiprocessing.connection.Connection


class _Lifeline(typing.NamedTuple):
    """What a process watches: it ends when the writer is closed, or its parent is another one.

    The pipe alone does not tell: a process that the parent forked may hold the writer.
    """

    reader: multiprocessing.connection.Connection
    parent: int


@contextlib.contextmanager
def child(target: Function, *args: typing.Any) -> collections.abc.Iterator[Child]:
    """Runs a function in a process of its own, which is killed when the block ends.

    Args:
      target: a function of a module, called as `target(*args, sender)` with the other end of the pipe.
      *args: what it is called with; they must be picklable.

    Yields:
      The process and the pipe, on which `recv` raises EOFError once the process has ended.
    """
    receiver, sender = _SPAWN.Pipe(duplex=False)
    with _lifeline() as lifeline, receiver:
        process = _SPAWN.Process(target=_run, args=(lifeline, target, (*args, sender)), daemon=True)
        process.start()
        sender.close()
        try:
            yield Child(process, receiver)
        finally:
            process.kill()
            process.join()


@contextlib.contextmanager
def pool(
    workers: int, initialize: Function, *args: typing.Any
) -> collections.abc.Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Makes a pool of processes; where the block ends with an error or an interrupt, they end at once.

    Args:
      workers: how many processes.
      initialize: a function of a module, called as `initialize(*args)` in each process first.
      *args: what it is called with; they must be picklable.

    Yields:
      The pool. What was submitted is waited for when the block ends without an error.
    """
    with contextlib.ExitStack() as stack:
        lifeline = stack.enter_context(_lifeline())
        executor = concurrent.futures.ProcessPoolExecutor(workers, _SPAWN, _begin, (lifeline, initialize, args))
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            stack.close()
            raise
        finally:
            executor.shutdown()


def make_queue() -> multiprocessing.queues.Queue:
    """Makes a queue that can be given to the `initialize` of a `pool`."""
    return _SPAWN.Queue()


@contextlib.contextmanager
def _lifeline() -> collections.abc.Iterator[_Lifeline]:
    reader, writer = _SPAWN.Pipe(duplex=False)
    with reader, writer:
        yield _Lifeline(reader, os.getpid())


def _begin(lifeline: _Lifeline, initialize: Function, args: tuple[typing.Any, ...]) -> None:
    def watch() -> None:
        while os.getppid() == lifeline.parent and not lifeline.reader.poll(_POLL_S):
            pass
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all of them: the parent says what is to end
    threading.Thread(target=watch, daemon=True).start()
    compilation.say_failures_once()
    initialize(*args)


def _run(lifeline: _Lifeline, target: Function, args: tuple[typing.Any, ...]) -> None:
    _begin(lifeline, target, args)

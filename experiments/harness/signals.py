"""Signals that end a run: what is under way is saved first, where a stage can, and one line says how it ended.

A script that SIGTERM or SIGINT ended exits with 128 plus the number of the signal, 143 or 130, as a shell says of a
process that a signal killed: not finished, start it again.
"""

from __future__ import annotations

import collections.abc
import contextlib
import logging
import os
import signal
import sys
import threading
import typing

import jax
from jax.experimental import multihost_utils

from experiments.harness import progress

_ENDING = (signal.SIGTERM, signal.SIGINT)
_CALLBACKS = logging.getLogger("jax._src.callback")
"""Logs what is raised in a callback, with its traceback, before JAX turns it into an error of its own."""


class Interrupted(BaseException):
    """The run was asked to end; no error, and no SystemExit, which is what a library raises that gives up.

    Attributes:
      number: of the signal.
      facts: what the line about it says beside.
    """

    def __init__(self, number: int, **facts: typing.Any):
        super().__init__(number)
        self.number, self.facts = number, facts


class Deferred:
    """Signals that wait for the end of a step; after each, call it with the number of the step.

    Attributes:
      number: of the signal to end for, or 0.
    """

    def __init__(self, ask: collections.abc.Callable[[int], int]):
        self.number, self._ask = 0, ask

    def __call__(self, step: int) -> bool:
        """Whether to end after this step: the same on all processes, though the signal may have come to one."""
        self.number = self._ask(step)
        return bool(self.number)


@contextlib.contextmanager
def ending() -> collections.abc.Iterator[None]:
    """Turns SIGTERM and SIGINT into `Interrupted`, which unwinds all that runs inside, and ends the script with it.

    The script says so in one line of the log, and exits with 128 plus the number.
    """
    numbers: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        numbers.append(number)
        raise Interrupted(number)

    _CALLBACKS.addFilter(_is_error)
    before = sys.unraisablehook

    def ignored(unraisable: typing.Any) -> None:
        # It came where Python ignores what is raised, in a finalizer or the garbage collection: it is sent again.
        if isinstance(unraisable.exc_value, Interrupted):
            threading.Timer(0.1, os.kill, (os.getpid(), unraisable.exc_value.number)).start()
        else:
            before(unraisable)

    sys.unraisablehook = ignored
    try:
        with _handled(interrupt):
            yield
    except BaseException as error:
        if not isinstance(error, Interrupted):
            if not numbers:
                raise
            error = Interrupted(numbers[0])  # raised in a callback
        progress.log("interrupted", **error.facts, signal=error.number, next="start it again with the same flags")
        _exit(128 + error.number)
    finally:
        _CALLBACKS.removeFilter(_is_error)
        sys.unraisablehook = before


def _exit(status: int) -> typing.NoReturn:
    """Exits without tearing the devices down: what they still compute, for nobody, would crash them."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # the other processes wait for it
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _is_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], Interrupted))


@contextlib.contextmanager
def deferred() -> collections.abc.Iterator[Deferred]:
    """Keeps SIGTERM and SIGINT from ending the process before its step is done; a second signal ends it at once.

    Where there are several processes, they end for SIGTERM alone.

    Yields:
      What is to be asked after every step.
    """
    if jax.process_count() > 1:  # JAX itself listens for the signal, and tells the other processes
        yield Deferred(lambda step: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step))
        return
    numbers: list[int] = []
    with contextlib.ExitStack() as handling:

        def note(number: int, frame: object) -> None:
            numbers.append(number)
            handling.close()

        handling.enter_context(_handled(note))
        yield Deferred(lambda step: numbers[0] if numbers else 0)


@contextlib.contextmanager
def _handled(handler: collections.abc.Callable[[int, object], None]) -> collections.abc.Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone
        return
    before = {each: signal.signal(each, handler) for each in _ENDING}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)

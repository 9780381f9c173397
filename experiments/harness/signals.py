"""Signals that end a run: what is under way is saved first.

A run that SIGTERM or SIGINT ended exits with 128 plus the number of the signal, 143 or 130, as a shell says of a
process that a signal killed: not finished, start it again. A second signal ends it at once.
"""

from __future__ import annotations

import collections.abc
import contextlib
import signal
import threading
import typing

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """The run was asked to end, and has saved what it has."""

    def __init__(self, number: int):
        super().__init__(128 + number)


@contextlib.contextmanager
def deferred() -> collections.abc.Iterator[typing.Callable[[int], int]]:
    """Keeps SIGTERM and SIGINT from ending the process at once.

    Yields:
      `received(step)`, to be called after every step: the number of the signal to end for, or 0. Where there are
      several processes it answers the same at the same step in all of them, though the signal (SIGTERM alone, there)
      may have come to one.
    """
    if jax.process_count() > 1:  # JAX itself listens for the signal, and tells the other processes
        yield lambda step: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0  # Python gives signals to the main thread alone
        return
    numbers: list[int] = []

    def note(number: int, frame: object) -> None:
        numbers.append(number)
        restore()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    for each in before:
        signal.signal(each, note)
    try:
        yield lambda step: numbers[0] if numbers else 0
    finally:
        restore()

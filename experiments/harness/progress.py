"""Progress bars and log lines that do not write over one another."""

from __future__ import annotations

import collections.abc
import contextlib
import logging
import time
import typing

import tqdm

logger = logging.getLogger("ldm_jax")
"""Of all scripts; libraries write to absl's."""


Advance = collections.abc.Callable[[int], None]
"""Called with how much was done since the last call."""


@contextlib.contextmanager
def bar(title: str, total: int, unit: str, done: int = 0) -> collections.abc.Iterator[Advance]:
    """Shows a bar with rate and time left, on the standard error stream.

    Args:
      title: what is being done.
      total: how much there is to do; there is no bar for nothing.
      unit: of `total`, one word.
      done: how much of it was done before.

    Yields:
      What is to be called as work is done.
    """
    # A log file gets a line now and then, a terminal gets a moving bar.
    with tqdm.tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        unit_scale=total > 10_000,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not total or not logger.isEnabledFor(logging.INFO),
    ) as b:
        yield lambda n: b.update(n) and None


def up_to(advance: Advance) -> collections.abc.Callable[[int, int], None]:
    """Turns `advance(n)` into `progress(done, total)`, for what counts from its own beginning."""
    seen = 0

    def progress(done: int, total: int) -> None:
        nonlocal seen
        advance(done - seen)
        seen = done

    return progress


def log(stage: str, **facts: typing.Any) -> None:
    """One line for grep: `stage key=value ...`."""
    text = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in facts.items()
    )
    with tqdm.tqdm.external_write_mode():
        logger.info("%s %s", stage, text, stacklevel=2)


def clock() -> collections.abc.Callable[[], float]:
    """Starts a stopwatch; calling it gives the seconds since."""
    begun = time.monotonic()
    return lambda: round(time.monotonic() - begun, 1)

"""Times taken side by side: contenders in turn, over and over, so that what disturbs one disturbs all."""

from __future__ import annotations

import collections.abc
import statistics
import time
import typing

import jax
import jax.numpy as jnp

PRODUCTS = (1024, 2048, 4096)
"""Sides of the square matrices whose product the machine is measured by."""

Contenders = collections.abc.Mapping[str, collections.abc.Callable[[], object]]


class Times(typing.NamedTuple):
    """Seconds of one call of each contender, one number for each repetition."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The median time of one call, in seconds."""
        return statistics.median(self.seconds[name])

    def speed(self, name: str, base: str) -> float:
        """How fast one is, 1 being the base: the median of the ratios within each repetition."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def compare(contenders: Contenders, repetitions: int, seconds: float) -> Times:
    """Times each contender in every repetition.

    Args:
      contenders: functions that do one portion of the same work and wait for its end; each is first called once, which
        compiles what there is to compile.
      repetitions: rounds; the order turns from one to the next.
      seconds: that one contender should take in one round, by calling it several times; at least once. A tenth of a
        second is too short where threads wait for one another: it takes the scheduler as long to find places for them.

    Returns:
      The times.
    """
    calls = {}
    for name, contender in contenders.items():
        contender()
        calls[name] = max(1, round(seconds / _time(contender, 1))) if seconds else 1
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_time(contenders[name], calls[name]))
    return Times(times)


def _time(contender: collections.abc.Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        contender()
    return (time.perf_counter() - start) / calls


def matrix_products(dtype: str) -> Contenders:
    """JAX's products of square matrices, by name (`jax 1024`); of side n each takes `2 n**3` operations."""
    multiply = jax.jit(jnp.matmul)

    def contender(size: int) -> collections.abc.Callable[[], object]:
        matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        return lambda: multiply(matrix, matrix).block_until_ready()

    return {f"jax {size}": contender(size) for size in PRODUCTS}

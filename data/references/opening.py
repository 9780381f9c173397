"""Making an environment, and closing it whatever comes."""

from __future__ import annotations

import collections.abc
import contextlib
import logging
import typing
import warnings

from ldm_jax.environment import Environment, TooManyRowsError

from .policy import ReferencePolicy

_T = typing.TypeVar("_T")
_log = logging.getLogger(__name__)

MakeEnvironment = collections.abc.Callable[..., Environment]
"""`make(id, batch_size=B)`, as `environments.make`; with `expert=name` too, where a reference is an expert."""


@contextlib.contextmanager
def opened(make: MakeEnvironment, id: str, num_envs: int, expert: str = "") -> collections.abc.Iterator[Environment]:
    """Makes an environment and closes it; one that fails to close costs nothing of what was done with it.

    Args:
      make: makes the environment, `environments.make` or the like.
      id: of the environment.
      num_envs: parallel environments.
      expert: the name of the expert that labels its time steps; empty for none.

    Yields:
      The environment.
    """
    environment = make(id, batch_size=num_envs, expert=expert) if expert else make(id, batch_size=num_envs)
    try:
        yield environment
    finally:
        try:
            environment.close()
        except Exception as error:
            warnings.warn(f"{id} failed to close: {type(error).__name__}: {error}; nothing is lost", stacklevel=3)


def with_room(work: collections.abc.Callable[[int], _T], rows: int) -> _T:
    """Does something with parallel environments, with fewer of them where memory has no room for so many.

    Args:
      work: is given the rows, begins anew each time, and raises TooManyRowsError where they are too many.
      rows: that are wanted; else it is the next power of two that there is room for, which batches divide by.
    """
    while True:
        try:
            return work(rows)
        except TooManyRowsError as error:
            rows = 1 << (error.rows.bit_length() - 1)
            _log.warning("%s; going on with %d", error, rows)


def opened_for(
    make: MakeEnvironment, policy: ReferencePolicy, num_envs: int
) -> contextlib.AbstractContextManager[Environment]:
    """Makes the environment that a reference acts or labels in, with its expert where it is one; see `opened`."""
    return opened(make, policy.spec.id, num_envs, policy.reference.expert)

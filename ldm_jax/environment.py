"""The one interface over every environment library."""

from __future__ import annotations

import typing

from ldm_jax.errors import LdmError
from ldm_jax.types import EnvironmentSpec, Key, PyTree, TimeStep


class StaleStateError(LdmError, RuntimeError):
    """A state of a stateful simulator was used twice."""


class EnvironmentFaultError(LdmError, RuntimeError):
    """An environment broke its contract: NaN rewards, an observation outside its space, a wrong shape."""


class TooManyRowsError(LdmError, MemoryError):
    """More rows of an environment than there is room for in memory.

    Attributes:
      rows: that there is room for, fewer than were asked for.
    """

    def __init__(self, text: str, rows: int):
        super().__init__(text)
        self.rows = rows

    def __reduce__(self) -> tuple[typing.Any, ...]:
        return type(self), (str(self), self.rows)


class LibraryMissingError(LdmError, ImportError):
    """The library of an environment is known but not installed, or its adapter cannot be imported."""


@typing.runtime_checkable
class Environment(typing.Protocol):
    """B parallel environments with next-step reset (see `ldm_jax.types.TimeStep`).

    Where `spec.jittable`, `reset` and `step` are pure and may be traced by `jax.jit`, `jax.lax.scan` and the like; the
    state is any pytree of arrays. Otherwise the simulator keeps its state to itself: `state` is a token that `step`
    accepts once, arrays are NumPy's, and a token used before raises `StaleStateError`. Either way `reset(key)` with the
    same key, followed by the same actions, gives the same time steps.
    """

    @property
    def spec(self) -> EnvironmentSpec:
        """What is known before stepping."""

    def reset(self, key: Key) -> tuple[PyTree, TimeStep]:
        """Starts B new episodes.

        Args:
          key: a typed JAX key; all randomness of the episodes comes from it.

        Returns:
          The state and a time step whose rows are all `first`.
        """

    def step(self, state: PyTree, action: PyTree) -> tuple[PyTree, TimeStep]:
        """Advances all B environments by one step.

        Args:
          state: what the last `reset` or `step` returned.
          action: follows the action space with a leading B: `int32 [B]` for `Discrete`, in the space's own values.
            Rows whose last time step ended an episode are reset and their action is ignored.

        Returns:
          The next state and time step.

        Raises:
          StaleStateError: the simulator is stateful and `state` was used before.
          EnvironmentFaultError: the simulator broke its contract.
        """

    def close(self) -> None:
        """Frees what the environment holds; a second call does nothing."""

"""Single-use tokens: what stands for the hidden state of a simulator."""

from __future__ import annotations

from ldm_jax.environment import StaleStateError


class Token:
    """Stands for the simulators' hidden state; `step` accepts the newest one once."""

    __slots__ = ()


def check_newest(id: str, state: object, newest: Token | None) -> None:
    """Checks that a state is the token that `reset` or `step` returned last.

    Raises:
      StaleStateError: it is another, or there is none to step from.
    """
    if newest is None or state is not newest:
        raise StaleStateError(
            f"{id} got a state that was used before or is older than the last reset or close; "
            "step from the state that the last reset or step returned, and only once"
        )

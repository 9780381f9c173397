"""What simulators with hidden state need: seeds for their rows, and single-use tokens that stand for the state."""

from __future__ import annotations

import jax
import numpy as np

from ldm_jax.environment import StaleStateError
from ldm_jax.types import Array


def draw_seeds(key: Array, batch_size: int) -> np.ndarray:
    """`int32 [B]`, a seed for each row from one key: the same, however many bits JAX has."""
    return np.asarray(jax.random.randint(key, (batch_size,), 0, np.iinfo(np.int32).max, np.int32))


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

"""What an environment says: the time step and the description of where it comes from.

Time runs as in Sutton and Barto: `timestep_t` is what the agent sees at t, so its reward was earned by `action_tm1`.
An episode that ends at t has its last observation, its last reward and the kind of its ending in `timestep_t`. The
next step ignores its action and returns `first=True` (next-step reset, as in `gymnasium.vector` and envpool), so each
observation, the last one included, occurs exactly once.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import operator
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax.errors import ConfigError

Array = jax.Array | np.ndarray
"""A `jax.Array` or a `numpy.ndarray`: pure functions take either and answer in kind."""
Key = jax.Array
"""A typed key of `jax.random`."""
PyTree = typing.Any


MAX_TIME_LIMIT = 2**31 - 2
"""The largest time limit, in steps: they are counted in int32, and some libraries count one more."""


class ExpertLabel(typing.NamedTuple):
    """What an expert would do in each of B environments now; a pytree.

    Attributes:
      action: follows the action space, each leaf `[B, ...]`, within the space where `valid`, and anything elsewhere.
      valid: `bool [B]`, whether the expert has an answer. To have none is ordinary, and the last observation of an
        episode, whose action is ignored, has no label.
    """

    action: PyTree
    valid: Array


class TimeStep(typing.NamedTuple):
    """One step of B parallel environments; a pytree.

    Attributes:
      observation: follows the observation space, each leaf `[B, ...]` in its own dtype. `Discrete` is `int32 [B]`
        in the space's own values; `Text` is `uint8 [B, L]`, UTF-8 padded with zeros (`ldm_jax.spaces.text_bytes` is L).
      reward: `float32 [B]`, earned by the previous action; 0 where `first`.
      terminated: `bool [B]`, the episode ended in a terminal state.
      truncated: `bool [B]`, the episode was cut off (time limit); may be true together with `terminated`.
      first: `bool [B]`, the observation starts an episode and the previous action was ignored.
      action_mask: `bool [B, M]` or None. M is the number of choices summed over the action space's categorical slots in
        canonical order (`Discrete(n)`: n), true where the choice is allowed.
      expert: what the expert that the environment was made with would do at this observation, whoever acts; None where
        it was made without one.
    """

    observation: PyTree
    reward: Array
    terminated: Array
    truncated: Array
    first: Array
    action_mask: Array | None = None
    expert: ExpertLabel | None = None

    @property
    def last(self) -> Array:
        """`bool [B]`: the episode ended here, so the action chosen here will be ignored."""
        return self.terminated | self.truncated


@dataclasses.dataclass(frozen=True)
class EnvironmentSpec:
    """What is known of an environment before it is stepped.

    Attributes:
      id: `library/<the library's own id, unchanged>`.
      library: the part of `id` before the first slash.
      version: the installed version of the library.
      observation_space: a `gymnasium.spaces` space of one environment (without B).
      action_space: the same for actions.
      batch_size: B, the number of parallel environments.
      time_limit: steps after which an episode is truncated.
      domain: what the task is about, for grouping results (`"classic control"`, `"games"`, ...).
      jittable: `reset` and `step` are pure JAX functions and may be traced.
      image_digest: what the library runs in: `sha256:...`, of the container image; `venv:...`, the hash of the
        requirements and the Python that a virtual environment is made of; empty in this process.
    """

    id: str
    library: str
    version: str
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    batch_size: int
    time_limit: int
    domain: str
    jittable: bool
    image_digest: str = ""

    def __post_init__(self) -> None:
        if not self.id.startswith(self.library + "/"):
            raise ConfigError(f"the id {self.id!r} does not start with its library {self.library!r} and a slash")
        for name, largest in (("batch_size", None), ("time_limit", MAX_TIME_LIMIT)):
            # Whole numbers of NumPy too; JSON knows only Python's.
            object.__setattr__(self, name, _positive_int(f"{name} of {self.id}", getattr(self, name), largest))


def _positive_int(name: str, value: typing.Any, largest: int | None) -> int:
    expected = "a whole number, at least 1" + ("" if largest is None else f" and at most {largest}")
    try:
        number = 0 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or (largest is not None and number > largest):
        raise ConfigError(f"{name} is {value!r}, expected {expected}")
    return number


class Agent(typing.NamedTuple):
    """Whatever chooses actions, as a pair of pure functions; both may be traced.

    Attributes:
      init: `init(batch_size) -> carry`, what the agent remembers of B rows before their first time step (a pytree).
      step: `step(params, carry, timestep, key) -> (carry, action, record)`. `action` follows the action space with a
        leading B; `record` is a pytree of what the agent wants kept of this step, each leaf `[B, ...]`. It is called at
        every step, the last of an episode included, though the action is then ignored.
    """

    init: collections.abc.Callable[[int], PyTree]
    step: collections.abc.Callable[[PyTree, PyTree, TimeStep, Key], tuple[PyTree, PyTree, PyTree]]

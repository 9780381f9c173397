"""Gymnasium: any library of it that is installed in this interpreter, stepped as a `gymnasium.vector` environment.

Its own classic control and toy text come with it; ids of other packages are those that their import has registered.
"""

from __future__ import annotations

import contextlib
import types
import typing

import gymnasium
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import EnvironmentFaultError, LibraryMissingError
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

from .. import checks, conversion
from ..catalog import taxonomy
from ..tokens import Token, check_newest, draw_seeds

LIBRARY = "gymnasium"

_DEFAULT_LIMITS = types.MappingProxyType({"toy_text": 200, "": 1000})
"""Steps, where an id has none, by the last word of its package: a random CliffWalking walks thousands of steps."""


class GymnasiumEnvironment:
    """B environments of one Gymnasium id with next-step reset; see `ldm_jax.environment.Environment`.

    Attributes:
      spec: what is known before stepping.
      rows_outside: rows since `make` with a number outside the declared bounds: some libraries return those.
    """

    spec: EnvironmentSpec
    rows_outside: int

    def __init__(self, spec: EnvironmentSpec, inner: gymnasium.vector.SyncVectorEnv, masked: bool):
        self.spec = spec
        self.rows_outside = 0
        self._inner, self._masked = inner, masked
        self._observations = checks.Observations(spec.observation_space, spec.batch_size)
        self._actions = spaces.leaves(inner.single_action_space)
        self._token: Token | None = None

    def reset(self, key: Array) -> tuple[Token, TimeStep]:
        batch_size = self.spec.batch_size
        seeds = draw_seeds(key, batch_size)
        self._step_count = 0
        with self._blame():
            result: typing.Any = self._inner.reset(seed=seeds.tolist())
        no_B = np.zeros(batch_size, bool)
        return self._receive(result[0], no_B, no_B, no_B, ~no_B, result[1])

    def step(self, state: Token, action: PyTree) -> tuple[Token, TimeStep]:
        check_newest(self.spec.id, state, self._token)
        self._token = None  # a step that fails leaves no state to go on from
        self._step_count += 1
        values = []
        for leaf in self._actions:
            value = np.asarray(spaces.get(action, leaf.path))
            values.append(value.astype(leaf.space.dtype).reshape(self.spec.batch_size, *(leaf.space.shape or ())))
        first_B = self._last_B
        with self._blame():
            result: typing.Any = self._inner.step(spaces.unflatten(self._inner.single_action_space, values))
        observation, reward_B, terminated_B, truncated_B, info = result
        return self._receive(observation, reward_B, terminated_B, truncated_B, first_B, info)

    def close(self) -> None:
        self._token = None
        self._inner.close()

    def _receive(
        self,
        observation: PyTree,
        reward_B: typing.Any,
        terminated_B: typing.Any,
        truncated_B: typing.Any,
        first_B: np.ndarray,
        info: dict[str, typing.Any],
    ) -> tuple[Token, TimeStep]:
        batch_size = self.spec.batch_size
        reward_B = np.asarray(reward_B, np.float32)
        if not np.isfinite(reward_B).all():
            self._fault(f"the reward is {reward_B}, expected finite numbers")
        values = [self._fit(leaf, spaces.get(observation, leaf.path)) for leaf in self._observations.leaves]
        violations = self._observations.violations(values)
        for leaf, value in violations:
            for _, _, text in leaf.faults(value, np.ones(batch_size, bool)):
                self._fault(text)
        self.rows_outside += checks.count_outside(violations)
        self._last_B = np.asarray(terminated_B | truncated_B)
        mask = None
        if self._masked:
            mask = np.asarray(info["action_mask"]).astype(bool)
            # At an end nothing may be allowed any more; a slot without a choice would make NaN of every policy.
            mask |= ~mask.any(1, keepdims=True)
        self._token = Token()
        return self._token, TimeStep(
            observation=spaces.unflatten(self.spec.observation_space, values),
            reward=reward_B,
            terminated=np.array(terminated_B, bool),
            truncated=np.array(truncated_B, bool),
            first=first_B.copy(),
            action_mask=mask,
        )

    def _fit(self, leaf: checks.CheckedLeaf, value: typing.Any) -> np.ndarray:
        struct = spaces.leaf_shape_dtype(leaf.space)
        if isinstance(leaf.space, gymnasium.spaces.Text):
            (size,) = struct.shape
            texts = [text.encode() for text in value]
            if too_long := [text for text in texts if len(text) > size]:
                self._fault(f"the observation has a text of {len(too_long[0])} bytes, expected at most {size}")
            return np.stack([np.frombuffer(text.ljust(size, b"\0"), np.uint8) for text in texts])
        value = np.asarray(value)
        if np.issubdtype(struct.dtype, np.integer) and isinstance(leaf.space, gymnasium.spaces.Box):
            limits = np.iinfo(struct.dtype)
            value = np.clip(value, limits.min, limits.max)
        return value.astype(struct.dtype).reshape(self.spec.batch_size, *struct.shape)

    @contextlib.contextmanager
    def _blame(self) -> typing.Iterator[None]:
        try:
            yield
        except Exception as error:  # libraries raise whatever they like
            raise EnvironmentFaultError(f"{self._where()}: it raised {error!r}") from error

    def _fault(self, what: str) -> typing.NoReturn:
        raise EnvironmentFaultError(f"{self._where()}: {what}")

    def _where(self) -> str:
        return f"{self.spec.id}, step {self._step_count} after the reset"


def candidates() -> dict[str, str]:
    """The ids in Gymnasium's registry, each with the reason why it is not offered, empty where it is."""
    return {
        name: "it wraps an environment of old Gym that has to be given" if name.startswith("GymV2") else ""
        for name in gymnasium.registry
    }


def domain(name: str) -> str:
    """What the task of an id is about."""
    known = name in gymnasium.registry and _module(name).startswith("gymnasium.")
    return taxonomy.first_match(taxonomy.GYMNASIUM, name) if known else LIBRARY


def make(name: str, batch_size: int, time_limit: int | None) -> GymnasiumEnvironment:
    """Makes B environments by an id of Gymnasium's registry.

    Args:
      name: the id.
      batch_size: B.
      time_limit: steps; None keeps the registered limit, or takes a default where there is none.

    Raises:
      EnvironmentFaultError: the library cannot make it.
      LibraryMissingError: a package that it needs is not installed.
      SpaceError: it declares a space that is not supported.
    """
    registered = gymnasium.registry[name]
    family = next((family for family in _DEFAULT_LIMITS if f".{family}." in f".{_module(name)}."), "")
    limit = time_limit or registered.max_episode_steps or _DEFAULT_LIMITS[family]

    def make_one() -> gymnasium.Env:
        return gymnasium.make(name, max_episode_steps=limit, disable_env_checker=True)

    try:
        inner = gymnasium.vector.SyncVectorEnv(
            [make_one] * batch_size, autoreset_mode=gymnasium.vector.AutoresetMode.NEXT_STEP
        )
        _, info = inner.reset(seed=0)
    except gymnasium.error.DependencyNotInstalled as error:
        raise LibraryMissingError(
            f"{LIBRARY}/{name} cannot be made: {error}; what it needs comes with: pip install 'ldm_jax[gymnasium]'"
        ) from error
    except Exception as error:
        raise EnvironmentFaultError(f"{LIBRARY}/{name} cannot be made: {error}") from error
    action_space = conversion.action_space(inner.single_action_space)
    spec = EnvironmentSpec(
        id=f"{LIBRARY}/{name}",
        library=LIBRARY,
        version=gymnasium.__version__,
        observation_space=conversion.observation_space(inner.single_observation_space),
        action_space=action_space,
        batch_size=batch_size,
        time_limit=limit,
        domain=domain(name),
        jittable=False,
    )
    masked = isinstance(action_space, gymnasium.spaces.Discrete) and (
        np.shape(info.get("action_mask", ())) == (batch_size, int(action_space.n))
    )
    return GymnasiumEnvironment(spec, inner, masked)


def _module(name: str) -> str:
    point = gymnasium.registry[name].entry_point
    return point.partition(":")[0] if isinstance(point, str) else getattr(point, "__module__", "")

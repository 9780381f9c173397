"""Envpool: simulators in C++ threads, stepped as one batch of NumPy arrays."""

from __future__ import annotations

import importlib.metadata
import os
import string
import typing
import warnings

import gymnasium
import jax
import numpy as np

from environments.interface import EnvironmentFaultError, StaleStateError
from ldm_jax import spaces
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

LIBRARY = "envpool"

REFUSED: dict[str, str] = {}

_NO_LIMIT = 1_000_000  # some environments declare 2^31 - 1 steps
_MAX_THREADS = 16


class Token:
    """Stands for the simulators' hidden state; `step` accepts the newest one once."""

    __slots__ = ()


class EnvpoolEnvironment:
    """B parallel envpool environments with next-step reset; see `environments.interface.Environment`.

    Attributes:
      spec: what is known before stepping.
      rows_outside: rows so far with an observation outside the declared bounds; real libraries do that.
    """

    spec: EnvironmentSpec
    rows_outside: int

    def __init__(self, spec: EnvironmentSpec, name: str):
        self.spec = spec
        self.rows_outside = 0
        self._name = name
        self._pool: typing.Any = None
        self._token: Token | None = None
        self._leaves = spaces.leaves(spec.observation_space)
        self._steps = 0

    def reset(self, key: Array) -> tuple[Token, TimeStep]:
        import envpool

        # Envpool takes seeds only when a pool is made. A pool costs about a millisecond plus its environments.
        self.close()
        batch_size = self.spec.batch_size
        seeds = np.asarray(jax.random.randint(key, (batch_size,), 0, np.iinfo(np.int32).max))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium warns of bounds rounded to float32
            self._pool = envpool.make_gymnasium(
                self._name,
                num_envs=batch_size,
                seed=seeds.tolist(),
                num_threads=min(batch_size, len(os.sched_getaffinity(0)), _MAX_THREADS),
                max_episode_steps=self.spec.time_limit,
            )
        observation, _ = self._pool.reset()
        self._steps = 0
        self._elapsed_B = np.zeros(batch_size, np.int32)
        self._last_B = np.zeros(batch_size, bool)
        self._overdue_B = np.zeros(batch_size, bool)
        no_B = np.zeros(batch_size, bool)
        reward_B = np.zeros(batch_size, np.float32)
        return self._issue(), TimeStep(self._fit(observation), reward_B, no_B, no_B.copy(), ~no_B)

    def step(self, state: Token, action: PyTree) -> tuple[Token, TimeStep]:
        if state is not self._token or self._pool is None:
            raise StaleStateError(
                f"{self.spec.id} got a state that was used before, or that is older than the last reset or close; "
                "step only from the state that the last reset or step returned"
            )
        self._token = None
        self._steps += 1
        first_B = self._last_B
        action = np.asarray(action)
        observation, reward_B, terminated_B, truncated_B = self._advance(action)
        self._elapsed_B = np.where(first_B, 0, self._elapsed_B + 1)
        reward_B = np.asarray(reward_B, np.float32)
        if np.isnan(reward_B).any():
            rows = np.flatnonzero(np.isnan(reward_B))
            raise EnvironmentFaultError(
                f"{self.spec.id}, step {self._steps}: the reward is NaN in rows {rows.tolist()}"
            )
        # Some environments ignore `max_episode_steps`: the rows that envpool will not reset by itself are overdue.
        over_B = self._elapsed_B >= self.spec.time_limit
        self._overdue_B = over_B & ~terminated_B & ~truncated_B
        truncated_B = truncated_B | over_B
        self._last_B = terminated_B | truncated_B
        return self._issue(), TimeStep(self._fit(observation), reward_B, terminated_B, truncated_B, first_B)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None
        self._token = None

    def _issue(self) -> Token:
        self._token = Token()
        return self._token

    def _advance(self, action: np.ndarray) -> tuple[PyTree, np.ndarray, np.ndarray, np.ndarray]:
        if not self._overdue_B.any():
            return self._pool.step(action)[:4]
        # A forced reset and a step sent together would overwrite each other's rows: one after the other.
        overdue, going = np.flatnonzero(self._overdue_B), np.flatnonzero(~self._overdue_B)
        fresh, _ = self._pool.reset(overdue.astype(np.int32))
        no = np.zeros(len(overdue), bool)
        parts = [(overdue, (fresh, np.zeros(len(overdue), np.float32), no, no))]
        if len(going):
            parts.append((going, self._pool.step(action[going], going.astype(np.int32))[:4]))
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *[values for _, values in parts])

    def _fit(self, observation: PyTree) -> PyTree:
        values = []
        for path, space in self._leaves:
            struct = spaces.leaf_shape_dtype(space)
            value = np.asarray(spaces.get(observation, path)).reshape(self.spec.batch_size, *struct.shape)
            value = value.astype(struct.dtype, copy=False)
            if value.dtype == np.float32 and np.isnan(value).any():
                rows = np.flatnonzero(np.isnan(value).reshape(self.spec.batch_size, -1).any(1))
                raise EnvironmentFaultError(
                    f"{self.spec.id}, step {self._steps}: the observation is NaN in rows {rows.tolist()}"
                )
            values.append(value)
        return spaces.unflatten(self.spec.observation_space, values)


def list_ids() -> list[str]:
    """Envpool's own ids that work here."""
    import envpool

    return sorted(set(envpool.list_all_envs()))


def make(name: str, batch_size: int, time_limit: int | None) -> EnvpoolEnvironment:
    """Makes B environments by envpool's own id; None keeps envpool's own time limit, or a default where it has none."""
    import envpool

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium warns of bounds rounded to float32
        inner = envpool.make_spec(name)
        observation_space, action_space = inner.observation_space, inner.action_space
    limit = time_limit or inner.config.max_episode_steps
    if limit > _NO_LIMIT:
        limit = 200 if _family(name) == "toy_text" else 1000
    spec = EnvironmentSpec(
        id=f"{LIBRARY}/{name}",
        library=LIBRARY,
        version=importlib.metadata.version(LIBRARY),
        observation_space=_convert(observation_space),
        action_space=_convert(action_space),
        batch_size=batch_size,
        time_limit=limit,
        domain=_DOMAINS.get(_family(name), LIBRARY),
        jittable=False,
    )
    return EnvpoolEnvironment(spec, name)


_DOMAINS = {
    "atari": "atari",
    "box2d": "box2d",
    "classic_control": "classic control",
    "toy_text": "toy text",
    "minigrid": "navigation",
    "mujoco": "mujoco",
}


def _family(name: str) -> str:
    from envpool.registration import registry

    return registry.specs[name][0].split(".")[1]


def _convert(space: gymnasium.Space, name: str = "") -> gymnasium.Space:
    if isinstance(space, gymnasium.spaces.Dict):
        return gymnasium.spaces.Dict({key: _convert(child, key) for key, child in space.items()})
    if isinstance(space, gymnasium.spaces.Box):
        if name == "mission" and space.dtype == np.uint8:
            return gymnasium.spaces.Text(space.shape[0], min_length=0, charset=string.printable)
        if np.issubdtype(space.dtype, np.floating):
            # FLT_MIN, the smallest positive number, stands where the lowest was meant (LunarLander).
            low = np.where(
                (space.low < -spaces.UNBOUNDED) | (space.low == np.finfo(np.float32).tiny), -np.inf, space.low
            )
            high = np.where(space.high > spaces.UNBOUNDED, np.inf, space.high)
            return gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32), space.shape, np.float32)
    return space

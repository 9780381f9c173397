"""Gymnax: pure JAX environments, compiled and batched by `jax.vmap`."""

from __future__ import annotations

import importlib.metadata
import types
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

LIBRARY = "gymnax"

_REFUSED = {"MNISTBandit-bsuite": "it downloads its images while it is made"}

_DOMAINS = {
    "Acrobot-v1": "classic control",
    "CartPole-v1": "classic control",
    "MountainCar-v0": "classic control",
    "MountainCarContinuous-v0": "classic control",
    "Pendulum-v1": "classic control",
    "Catch-bsuite": "games",
    "Pong-misc": "games",
    "DeepSea-bsuite": "exploration",
    "DiscountingChain-bsuite": "credit assignment",
    "UmbrellaChain-bsuite": "credit assignment",
    "MemoryChain-bsuite": "memory",
    "BernoulliBandit-misc": "bandits",
    "GaussianBandit-misc": "bandits",
    "SimpleBandit-bsuite": "bandits",
    "FourRooms-misc": "navigation",
    "MetaMaze-misc": "navigation",
    "PointRobot-misc": "navigation",
    "FrozenLake-misc": "toy text",
    "Reacher-misc": "robotics",
    "Swimmer-misc": "robotics",
}


# Bounds that gymnax declares too narrow, seen in random play: by index of the observation, low and high.
_BOUNDS: dict[str, dict[int, tuple[float, float]]] = {
    "GaussianBandit-misc": {0: (-np.inf, np.inf), 3: (-1, 1)},  # the last reward is normal; time runs from -1 to 1
    "MemoryChain-bsuite": {0: (-1e-6, 1), 2: (-1, 1)},  # time left falls below 0 by rounding; the context is -1 or 1
    "MetaMaze-misc": {13: (0, 10)},  # the goal pays 10
    "UmbrellaChain-bsuite": {2: (-1e-6, 1)},  # rounding again
}


class State(typing.NamedTuple):
    """State of B environments: a key for what is to come, gymnax's states, and which rows have ended."""

    key: Array
    inner: PyTree
    last: Array


class GymnaxEnvironment:
    """B parallel gymnax environments with next-step reset; see `environments.interface.Environment`."""

    spec: EnvironmentSpec

    def __init__(self, spec: EnvironmentSpec, inner: typing.Any, params: typing.Any):
        self.spec = spec
        self._inner, self._params = inner, params
        # Compiled here, so that stepping by hand is quick too; inside another jit or a scan it makes no difference.
        self._reset, self._step = jax.jit(self._pure_reset), jax.jit(self._pure_step)

    def reset(self, key: Array) -> tuple[State, TimeStep]:
        return self._reset(key)

    def step(self, state: State, action: PyTree) -> tuple[State, TimeStep]:
        return self._step(state, action)

    def close(self) -> None:
        pass

    def _pure_reset(self, key: Array) -> tuple[State, TimeStep]:
        key, reset_key = jax.random.split(key)
        observation, inner = self._reset_rows(reset_key)
        no = jnp.zeros(self.spec.batch_size, bool)
        time_step = TimeStep(observation, jnp.zeros(self.spec.batch_size), no, no, ~no)
        return State(key, inner, no), time_step

    def _pure_step(self, state: State, action: PyTree) -> tuple[State, TimeStep]:
        key, reset_key, step_key = jax.random.split(state.key, 3)
        observation, inner, reward, terminated, truncated = self._step_rows(step_key, state.inner, action)
        first = state.last
        # Resetting all rows for the sake of the few that ended is dear in some environments: do it only when one has.
        observation, inner = jax.lax.cond(
            first.any(),
            lambda: _choose_rows(first, self._reset_rows(reset_key), (observation, inner)),
            lambda: (observation, inner),
        )
        going = ~first
        terminated, truncated = terminated & going, truncated & going
        time_step = TimeStep(observation, jnp.where(going, reward, 0), terminated, truncated, first)
        return State(key, inner, terminated | truncated), time_step

    def _reset_rows(self, key: Array) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key, self.spec.batch_size)
        observation, inner = jax.vmap(self._inner.reset_env, (0, None))(keys, self._params)
        return self._cast(observation), _strong(inner)

    def _step_rows(self, key: Array, inner: PyTree, action: PyTree) -> tuple[PyTree, PyTree, Array, Array, Array]:
        def step(key, inner, action):
            # Not gymnax's own `step`, which resets in the same step and so loses the last observation.
            observation, inner, reward, terminated, _ = self._inner.step_env(key, inner, action, self._params)
            return observation, inner, reward, terminated, self._inner.is_truncated(inner, self._params)

        keys = jax.random.split(key, self.spec.batch_size)
        observation, inner, reward, terminated, truncated = jax.vmap(step)(keys, inner, action)
        return self._cast(observation), _strong(inner), reward.astype(jnp.float32), terminated.astype(bool), truncated

    def _cast(self, observation: PyTree) -> PyTree:
        space = self.spec.observation_space
        parts = [
            spaces.get(observation, leaf.path).astype(spaces.leaf_shape_dtype(leaf.space).dtype)
            for leaf in spaces.leaves(space)
        ]
        return spaces.unflatten(space, parts)


def candidates() -> dict[str, str]:
    """Gymnax's own ids, each with the reason why it is not offered, empty where it is."""
    import gymnax

    return {name: _REFUSED.get(name, "") for name in gymnax.registered_envs}


def domain(name: str) -> str:
    """What the task of an id is about."""
    return "games" if name.endswith("-MinAtar") else _DOMAINS.get(name, LIBRARY)


def make(name: str, batch_size: int, time_limit: int | None) -> GymnaxEnvironment:
    """Makes B environments by gymnax's own id; None keeps gymnax's own time limit (8 to 2,500 steps)."""
    import gymnax

    inner, params = gymnax.make(name)
    if time_limit is not None:
        params = params.replace(max_steps_in_episode=time_limit)
    observation = jax.eval_shape(inner.reset_env, jax.random.key(0), params)[0]
    spec = EnvironmentSpec(
        id=f"{LIBRARY}/{name}",
        library=LIBRARY,
        version=importlib.metadata.version(LIBRARY),
        observation_space=_convert(inner.observation_space(params), observation, _BOUNDS.get(name, {})),
        action_space=_convert(inner.action_space(params)),
        batch_size=batch_size,
        time_limit=int(params.max_steps_in_episode),
        domain=domain(name),
        jittable=True,
    )
    return GymnaxEnvironment(spec, inner, params)


def _convert(
    space: typing.Any,
    value: jax.ShapeDtypeStruct | None = None,
    bounds: typing.Mapping[int, tuple[float, float]] = types.MappingProxyType({}),
) -> gymnasium.Space:
    import gymnax.environments.spaces as gymnax_spaces

    if isinstance(space, gymnax_spaces.Discrete):
        return gymnasium.spaces.Discrete(int(space.n))
    if isinstance(space, gymnax_spaces.Box):
        # What comes out counts: Catch declares int32 and gives float32, FourRooms the other way round.
        dtype = np.dtype(space.dtype if value is None else value.dtype)
        low, high = (np.array(np.broadcast_to(side, space.shape), np.float64) for side in (space.low, space.high))
        for index, (index_low, index_high) in bounds.items():
            low[index], high[index] = index_low, index_high
        if np.issubdtype(dtype, np.floating):
            low = np.where(low < -spaces.UNBOUNDED, -np.inf, low)
            high = np.where(high > spaces.UNBOUNDED, np.inf, high)
        return gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), space.shape, dtype)
    raise spaces.SpaceError(f"got a gymnax space of kind {type(space).__name__}, expected Discrete or Box")


def _strong(tree: PyTree) -> PyTree:
    # Some resets write Python numbers: without this the first step's weak types would compile a second program.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), tree)


def _choose_rows(choose_B: Array, chosen: PyTree, other: PyTree) -> PyTree:
    def choose(a, b):
        return jnp.where(choose_B.reshape(choose_B.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, chosen, other)

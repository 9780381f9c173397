"""Gymnax: pure JAX environments, compiled and batched by `jax.vmap`."""

from __future__ import annotations

import collections.abc
import types
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax import spaces
from ldm_jax.types import Array, PyTree

from ..jittable import JittableEnvironment, Outcome, in_32_bits, make_spec

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


def candidates() -> dict[str, str]:
    """Gymnax's own ids, each with the reason why it is not offered, empty where it is."""
    import gymnax

    return {name: _REFUSED.get(name, "") for name in gymnax.registered_envs}


def domain(name: str) -> str:
    """What the task of an id is about."""
    return "games" if name.endswith("-MinAtar") else _DOMAINS.get(name, LIBRARY)


@in_32_bits()
def make(name: str, batch_size: int, time_limit: int | None) -> JittableEnvironment:
    """Makes B environments by gymnax's own id; None keeps gymnax's own time limit (8 to 2,500 steps)."""
    import gymnax

    inner, params = gymnax.make(name)
    if time_limit is not None:
        params = params.replace(max_steps_in_episode=time_limit)
    struct = jax.eval_shape(inner.reset_env, jax.random.key(0), params)[0]
    spec = make_spec(
        LIBRARY,
        name,
        observation_space=_convert(inner.observation_space(params), struct, _BOUNDS.get(name, {})),
        action_space=_convert(inner.action_space(params)),
        batch_size=batch_size,
        time_limit=int(params.max_steps_in_episode),
        domain=domain(name),
    )

    def reset(key: Array) -> Outcome:
        observation, state = inner.reset_env(key, params)
        return Outcome(state, observation)

    def step(key: Array, state: PyTree, action: PyTree) -> Outcome:
        # Not gymnax's own `step`, which resets in the same step and so loses the last observation.
        observation, state, reward, terminated, _ = inner.step_env(key, state, action, params)
        return Outcome(state, observation, reward, terminated, inner.is_truncated(state, params))

    return JittableEnvironment(spec, reset, step)


def _convert(
    space: typing.Any,
    value: jax.ShapeDtypeStruct | None = None,
    bounds: collections.abc.Mapping[int, tuple[float, float]] = types.MappingProxyType({}),
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
        return gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), space.shape, dtype)
    raise spaces.SpaceError(f"got a gymnax space of kind {type(space).__name__}, expected Discrete or Box")

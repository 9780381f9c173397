"""Adapter of this library: a corridor to walk along, in pure JAX."""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.types import EnvironmentSpec, TimeStep

LENGTH = 6


class Corridor:
    """B walkers start somewhere in the left half of a corridor; the right end pays 1 and ends the episode."""

    def __init__(self, batch_size, time_limit):
        self.spec = EnvironmentSpec(
            id="example/Corridor-v0",
            library="example",
            version=importlib.metadata.version("example_library"),
            observation_space=spaces.Box(np.float32(0), np.float32(1), (LENGTH,)),
            action_space=spaces.Discrete(2),
            batch_size=batch_size,
            time_limit=time_limit,
            domain="navigation",
            jittable=True,
        )

    def reset(self, key):
        key, start_key = jax.random.split(key)
        place, no = self._start(start_key), jnp.zeros(self.spec.batch_size, bool)
        state = (key, place, jnp.zeros(self.spec.batch_size, jnp.int32), no)
        reward = jnp.zeros(self.spec.batch_size)
        return state, TimeStep(observation=self._see(place), reward=reward, terminated=no, truncated=no, first=~no)

    def step(self, state, action):
        key, place, elapsed, first = state
        key, start_key = jax.random.split(key)
        place = jnp.where(first, self._start(start_key), jnp.clip(place + 2 * action - 1, 0, LENGTH - 1))
        elapsed = jnp.where(first, 0, elapsed + 1)
        terminated = ~first & (place == LENGTH - 1)
        truncated = ~first & (elapsed >= self.spec.time_limit)
        time_step = TimeStep(
            observation=self._see(place),
            reward=terminated.astype(jnp.float32),
            terminated=terminated,
            truncated=truncated,
            first=first,
        )
        return (key, place, elapsed, terminated | truncated), time_step

    def close(self):
        pass

    def _start(self, key):
        return jax.random.randint(key, (self.spec.batch_size,), 0, LENGTH // 2)

    def _see(self, place):
        return jax.nn.one_hot(place, LENGTH)


def list_ids():
    return ["Corridor-v0"]


def make(name, batch_size, time_limit):
    return Corridor(batch_size, 20 if time_limit is None else time_limit)

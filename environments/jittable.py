"""Environments written in JAX: one environment's two functions become a batch that keeps the contract."""

from __future__ import annotations

import collections.abc
import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

from . import conversion


class Outcome(typing.NamedTuple):
    """What one environment, without a batch axis, is and says after a reset or a step; numbers of any dtype.

    Attributes:
      state: all that the environment must remember.
      observation: in the structure of the space that is offered.
      reward: earned by the step; that of a reset is not looked at, nor are the two endings.
      terminated: whether the episode ended in a terminal state.
      truncated: whether the library itself cut the episode off.
      action_mask: `bool [M]`, see `TimeStep`, or None.
    """

    state: PyTree
    observation: PyTree
    reward: Array | float = 0.0
    terminated: Array | bool = False
    truncated: Array | bool = False
    action_mask: Array | None = None


class Rows(typing.NamedTuple):
    """State of B environments.

    Attributes:
      key: for what is to come.
      inner: the environments' own states.
      elapsed: `int32 [B]`, steps since the episode started.
      last: `bool [B]`, whether the episode has ended.
    """

    key: Array
    inner: PyTree
    elapsed: Array
    last: Array


class JittableEnvironment:
    """B parallel environments with next-step reset and a time limit; see `ldm_jax.environment.Environment`.

    Attributes:
      spec: what is known before stepping.
    """

    spec: EnvironmentSpec

    def __init__(
        self,
        spec: EnvironmentSpec,
        reset: collections.abc.Callable[[Array], Outcome],
        step: collections.abc.Callable[[Array, PyTree, PyTree], Outcome],
    ):
        """Batches one environment.

        Args:
          spec: of the batch; its time limit is kept here, whatever the library does.
          reset: `reset(key)` starts an episode; pure.
          step: `step(key, state, action)` goes on with it; pure, and harmless where the episode has ended.
        """
        self.spec = spec
        self._reset_one, self._step_one = reset, step
        self._sizes = [size for leaf in spaces.leaves(spec.action_space) for size in spaces.choices(leaf.space)]
        # Compiled here, so that stepping by hand is quick too; inside another jit or a scan it makes no difference.
        self._reset, self._step = jax.jit(self._pure_reset), jax.jit(self._pure_step)

    def reset(self, key: Array) -> tuple[Rows, TimeStep]:
        if jax.enable_x64.value:
            with in_32_bits():
                return self._reset(key)
        return self._reset(key)

    def step(self, state: Rows, action: PyTree) -> tuple[Rows, TimeStep]:
        if jax.enable_x64.value:
            with in_32_bits():
                return self._step(state, self._fit(action))
        return self._step(state, action)

    def close(self) -> None:
        pass

    def _pure_reset(self, key: Array) -> tuple[Rows, TimeStep]:
        key, reset_key = jax.random.split(key)
        new = self._reset_rows(reset_key)
        no_B = jnp.zeros(self.spec.batch_size, bool)
        time_step = TimeStep(
            observation=new.observation,
            reward=jnp.zeros(no_B.shape, jnp.float32),
            terminated=no_B,
            truncated=no_B,
            first=~no_B,
            action_mask=new.action_mask,
        )
        return Rows(key, new.state, jnp.zeros(no_B.shape, jnp.int32), no_B), time_step

    def _pure_step(self, state: Rows, action: PyTree) -> tuple[Rows, TimeStep]:
        key, reset_key, step_key = jax.random.split(state.key, 3)
        first_B = state.last
        keys = jax.random.split(step_key, self.spec.batch_size)
        stepped = self._tidy(jax.vmap(self._step_one)(keys, state.inner, action))
        # Resetting all rows for the sake of the few that ended is dear in some environments: do it only when one has.
        seen = jax.lax.cond(
            first_B.any(), lambda: _choose_rows(first_B, self._reset_rows(reset_key), stepped), lambda: stepped
        )
        elapsed_B = jnp.where(first_B, 0, state.elapsed + 1)
        terminated_B = seen.terminated & ~first_B
        truncated_B = (seen.truncated | (elapsed_B >= self.spec.time_limit)) & ~first_B
        reward_B = jnp.where(first_B, jnp.float32(0), seen.reward)
        time_step = TimeStep(
            observation=seen.observation,
            reward=reward_B,
            terminated=terminated_B,
            truncated=truncated_B,
            first=first_B,
            action_mask=seen.action_mask,
        )
        return Rows(key, seen.state, elapsed_B, terminated_B | truncated_B), time_step

    def _fit(self, action: PyTree) -> PyTree:
        """An action in the dtypes of its space; where JAX has 64 bits, it may have come in those."""
        leaves = spaces.leaves(self.spec.action_space)
        values = [
            jnp.asarray(spaces.get(action, leaf.path), spaces.leaf_shape_dtype(leaf.space).dtype) for leaf in leaves
        ]
        return spaces.unflatten(self.spec.action_space, values)

    def _reset_rows(self, key: Array) -> Outcome:
        return self._tidy(jax.vmap(self._reset_one)(jax.random.split(key, self.spec.batch_size)))

    def _tidy(self, rows: Outcome) -> Outcome:
        """Brings what the library returned into the dtypes of the contract."""
        B, space = self.spec.batch_size, self.spec.observation_space
        parts = []
        for leaf in spaces.leaves(space):
            struct = spaces.leaf_shape_dtype(leaf.space)
            value = jnp.asarray(spaces.get(rows.observation, leaf.path))
            parts.append(conversion.cast(value, struct.dtype).reshape(B, *struct.shape))
        return Outcome(
            jax.tree.map(_strong, rows.state),
            spaces.unflatten(space, parts),
            jnp.broadcast_to(rows.reward, (B,)).astype(jnp.float32),
            jnp.broadcast_to(rows.terminated, (B,)).astype(bool),
            jnp.broadcast_to(rows.truncated, (B,)).astype(bool),
            None if rows.action_mask is None else self._allowed(rows.action_mask.astype(bool)),
        )

    def _allowed(self, mask_BM: Array) -> Array:
        # At an end nothing may be allowed any more; a slot without a choice would make NaN of every policy.
        ends = list(itertools.accumulate(self._sizes))
        slots = jnp.split(mask_BM, ends[:-1], axis=1)
        return jnp.concatenate([slot | ~slot.any(1, keepdims=True) for slot in slots], 1)


def make_spec(
    library: str,
    name: str,
    *,
    observation_space: gymnasium.Space,
    action_space: gymnasium.Space,
    batch_size: int,
    time_limit: int,
    domain: str,
    distribution: str = "",
) -> EnvironmentSpec:
    """The spec of a batch, with its spaces as they are offered.

    Args:
      library: as in the id.
      name: the library's own id.
      observation_space: of one environment, as the library means it.
      action_space: the same for actions.
      batch_size: B.
      time_limit: steps.
      domain: what the task is about.
      distribution: the package whose version counts; empty where it has the library's name.

    Raises:
      SpaceError: a space that is not supported.
    """
    return EnvironmentSpec(
        id=f"{library}/{name}",
        library=library,
        version=importlib.metadata.version(distribution or library),
        observation_space=conversion.observation_space(observation_space),
        action_space=conversion.action_space(action_space),
        batch_size=batch_size,
        time_limit=time_limit,
        domain=domain,
        jittable=True,
    )


def check_installed(library: str) -> None:
    """Checks that a library could be imported, without the seconds that importing it takes.

    Raises:
      ImportError: it is not installed.
    """
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"no module named {library!r}")


@contextlib.contextmanager
def in_32_bits() -> collections.abc.Iterator[None]:
    """Makes JAX compute in 32 bits, as the libraries mean it, whatever the process says; also a decorator.

    With `JAX_ENABLE_X64` their numbers would be others, and some of them cannot be compiled at all.
    """
    with jax.enable_x64(False):
        yield


@contextlib.contextmanager
def quiet() -> collections.abc.Iterator[None]:
    """Keeps a library from telling on standard output what it loads."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def box(struct: jax.ShapeDtypeStruct) -> gymnasium.spaces.Box:
    """The space of arrays of which nothing is known but shape and dtype."""
    dtype = np.dtype(struct.dtype)
    if np.issubdtype(dtype, np.bool_):
        return gymnasium.spaces.Box(0, 1, struct.shape, np.uint8)
    if np.issubdtype(dtype, np.integer):
        return gymnasium.spaces.Box(np.iinfo(dtype).min, np.iinfo(dtype).max, struct.shape, dtype.type)
    return gymnasium.spaces.Box(-np.inf, np.inf, struct.shape, np.float32)


def old_key(key: Array) -> Array:
    """A typed key in the form that older libraries expect and keep in their states, `uint32 [2]`."""
    return jax.random.key_data(key)


def _strong(leaf: typing.Any) -> Array:
    # Some resets write Python numbers: without this the first step's weak types would compile a second program.
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf, leaf.dtype)


def _choose_rows(choose_B: Array, chosen: PyTree, other: PyTree) -> PyTree:
    def choose(a: Array, b: Array) -> Array:
        return jnp.where(choose_B.reshape(choose_B.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, chosen, other)

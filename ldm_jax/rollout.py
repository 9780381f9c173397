"""Acting: one pure step of policy and bookkeeping, and two loops around it.

Environments that are pure JAX run inside `jax.lax` loops and so wholly inside `jax.jit`; the others run in a Python
loop around the same step, compiled. Collection, evaluation and the training of references all act through this file.
"""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.types import Agent, Array, PyTree, TimeStep

Progress = typing.Callable[[int, int], None]
"""`progress(done, total)`, called now and then; what is counted is said by who calls it."""

CHUNK_STEPS = 512
"""Steps of evaluation between two reports, where the environment is jittable."""

HOST_CHUNK_STEPS = 32
"""The same where it is not; the loop may go on for so many steps after the last row has finished."""


class RolloutState(typing.NamedTuple):
    """What acting goes on from; a pytree.

    Attributes:
      carry: what the agent remembers.
      state: of the environment.
      timestep: what the agent acts on next.
    """

    carry: PyTree
    state: PyTree
    timestep: TimeStep


class Trajectory(typing.NamedTuple):
    """T steps of B rows; a pytree.

    Attributes:
      timestep: each leaf `[T, B, ...]`, what the agent acted on.
      action: each leaf `[T, B, ...]`, what was executed at it, clipped to the space.
      record: each leaf `[T, B, ...]`, what the agent wanted kept of it.
    """

    timestep: TimeStep
    action: PyTree
    record: PyTree


class EpisodeReturns(typing.NamedTuple):
    """Finished episodes, equally many per row, in order of time.

    Attributes:
      returns: `float32 [B, E]`, undiscounted.
      lengths: `int32 [B, E]`, in steps.
    """

    returns: np.ndarray
    lengths: np.ndarray


def start(environment: Environment, agent: Agent, key: Array) -> RolloutState:
    """Begins B episodes.

    Args:
      environment: not yet in use, or to be started anew.
      agent: who will act.
      key: typed key; all randomness of the environment comes from it.
    """
    reset = _reset if environment.spec.jittable else type(environment).reset
    return RolloutState(agent.init(environment.spec.batch_size), *reset(environment, key))


def rollout(
    environment: Environment,
    agent: Agent,
    params: PyTree,
    loop: RolloutState,
    key: Array,
    steps: int,
) -> tuple[RolloutState, Trajectory]:
    """Acts for a number of steps; may be traced where the environment is jittable.

    Args:
      environment: hashable by identity; the compiled loop is kept per environment, agent and number of steps.
      agent: who acts; hashable, as pairs of functions are.
      params: of the agent.
      loop: from `start`, or what the last call returned.
      key: typed key; step t of this call uses `fold_in(key, t)`.
      steps: T.

    Returns:
      The state to go on from, and the trajectory, whose first time step is the one given. Arrays are
      NumPy's where the environment is not jittable.
    """
    if environment.spec.jittable:
        return _rollout(environment, agent, params, loop, key, steps)
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    carry, state, timestep = loop
    seen: list[np.ndarray] = []
    done: list[np.ndarray] = []
    for t in range(steps):
        # A clock of NumPy's: one carried on from call to call costs more than the rest of the call.
        carry, action, record = _act(environment, agent, params, carry, np.uint32(t), timestep, key)
        _keep(seen, t, steps, jax.tree.leaves(timestep))  # while the policy computes
        leaves, structure = jax.tree.flatten((action, record))
        leaves = [np.asarray(leaf) for leaf in leaves]  # on a CPU this waits for the result and copies nothing
        _keep(done, t, steps, leaves)
        action, record = jax.tree.unflatten(structure, leaves)
        state, timestep = environment.step(state, action)
    structure = jax.tree.structure(Trajectory(timestep, action, record))
    return RolloutState(carry, state, timestep), jax.tree.unflatten(structure, seen + done)


def evaluate(
    environment: Environment,
    agent: Agent,
    params: PyTree,
    key: Array,
    episodes_per_row: int,
    progress: Progress | None = None,
) -> EpisodeReturns:
    """Runs a fixed number of episodes in every row.

    Taking the first episodes to finish instead would favour short ones. A row that has run its own is ignored from then
    on, though it goes on acting until all have.

    Args:
      environment: B rows.
      agent: who acts, from a fresh memory.
      params: of the agent.
      key: typed key of the episodes and the acting.
      episodes_per_row: E.
      progress: is told the number of finished episodes and their total.

    Returns:
      The episodes, `[B, E]`.

    Raises:
      EnvironmentFaultError: a return that is NaN, or episodes that outlast the time limit.
    """
    spec = environment.spec
    rows, total = spec.batch_size, spec.batch_size * episodes_per_row
    reset_key, act_key = jax.random.split(key)
    carry, state, timestep = start(environment, agent, reset_key)
    tally, clock = _empty_tally(rows, episodes_per_row), _CLOCK
    # An episode takes up to `time_limit` steps and one that resets.
    budget_steps = episodes_per_row * (spec.time_limit + 1) + 1
    while True:
        if spec.jittable:
            carry, clock, tally, state, timestep = _evaluate_chunk(
                environment, agent, params, carry, clock, tally, state, timestep, act_key
            )
        else:
            for _ in range(HOST_CHUNK_STEPS):
                carry, tally, action = _act_and_count(
                    environment, agent, params, carry, clock, tally, timestep, act_key
                )
                clock += np.uint32(1)
                state, timestep = environment.step(state, jax.tree.map(np.asarray, action))
        finished = int(tally.count.sum())
        if progress is not None:
            progress(finished, total)
        if finished == total:
            break
        if int(clock) > budget_steps:
            raise EnvironmentFaultError(
                f"{spec.id}: {finished} of {total} episodes ended within {int(clock)} steps a row, though the time "
                f"limit is {spec.time_limit}; the adapter must truncate"
            )
    episodes = EpisodeReturns(np.asarray(tally.returns), np.asarray(tally.lengths))
    if np.isnan(episodes.returns).any():
        raise EnvironmentFaultError(
            f"{spec.id}: {int(np.isnan(episodes.returns).sum())} of {total} returns are NaN; look at its rewards"
        )
    return episodes


_CLOCK = np.uint32(0)


def _keep(buffers: list[np.ndarray], t: int, steps: int, leaves: list[np.ndarray]) -> None:
    """Writes the leaves of step t into buffers `[T, ...]`, which step 0 makes."""
    if t == 0:
        buffers.extend(np.empty((steps, *leaf.shape), leaf.dtype) for leaf in leaves)
    for buffer, leaf in zip(buffers, leaves, strict=True):
        buffer[t] = leaf


class _Tally(typing.NamedTuple):
    """Finished episodes `[B]`, return and length so far `[B]`, and those of the finished ones `[B, E]`."""

    count: typing.Any
    total: typing.Any
    length: typing.Any
    returns: typing.Any
    lengths: typing.Any


def _empty_tally(rows: int, episodes: int) -> _Tally:
    zeros, steps = np.zeros((rows, episodes), np.float32), np.zeros((rows, episodes), np.int32)
    return _Tally(steps[:, 0], zeros[:, 0], steps[:, 0], zeros, steps)


def _count(tally: _Tally, timestep: TimeStep) -> _Tally:
    """Books a time step: at the end of an episode its return goes to the row's next free place, if any is left."""
    total = jnp.where(timestep.first, 0.0, tally.total + timestep.reward)
    length = jnp.where(timestep.first, 0, tally.length + 1)
    places = jnp.arange(tally.returns.shape[1])
    here_BE = timestep.last[:, None] & (places == tally.count[:, None])
    return _Tally(
        jnp.minimum(tally.count + timestep.last, places.size),
        total,
        length,
        jnp.where(here_BE, total[:, None], tally.returns),
        jnp.where(here_BE, length[:, None], tally.lengths),
    )


def _step(environment, agent, params, carry, clock, timestep, key):
    """The one step of policy: its key, its action, clipped."""
    carry, action, record = agent.step(params, carry, timestep, jax.random.fold_in(key, clock))
    return carry, spaces.clip(environment.spec.action_space, action), record


def _step_and_count(environment, agent, params, carry, clock, tally, timestep, key):
    carry, action, _ = _step(environment, agent, params, carry, clock, timestep, key)
    return carry, _count(tally, timestep), action


_act = jax.jit(_step, static_argnums=(0, 1))
_act_and_count = jax.jit(_step_and_count, static_argnums=(0, 1))


# Apart from the agent, so that an environment's reset is compiled once, whoever acts.
@functools.partial(jax.jit, static_argnums=0)
def _reset(environment, key):
    return environment.reset(key)


@functools.partial(jax.jit, static_argnames=("environment", "agent", "steps"))
def _rollout(environment, agent, params, loop, key, steps):
    def body(inner, _):
        clock, (carry, state, timestep) = inner
        carry, action, record = _step(environment, agent, params, carry, clock, timestep, key)
        state, next_timestep = environment.step(state, action)
        return (clock + 1, RolloutState(carry, state, next_timestep)), Trajectory(timestep, action, record)

    (_, loop), trajectory = jax.lax.scan(body, (jnp.asarray(_CLOCK), loop), length=steps)
    return loop, trajectory


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate_chunk(environment, agent, params, carry, clock, tally, state, timestep, key):
    until, episodes = clock + CHUNK_STEPS, tally.returns.shape[1]

    def going(loop):
        _, clock, tally, _, _ = loop
        return (clock < until) & (tally.count < episodes).any()

    def body(loop):
        carry, clock, tally, state, timestep = loop
        carry, tally, action = _step_and_count(environment, agent, params, carry, clock, tally, timestep, key)
        return carry, clock + 1, tally, *environment.step(state, action)

    return jax.lax.while_loop(going, body, (carry, clock, tally, state, timestep))

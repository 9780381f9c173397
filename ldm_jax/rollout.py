"""Acting: one pure step of policy and bookkeeping, and two loops around it.

Environments that are pure JAX run inside `jax.lax` loops and so wholly inside `jax.jit`; the others run in a Python
loop around the same step, compiled. Collection, evaluation and the training of references all act through this file.
"""

from __future__ import annotations

import collections.abc
import typing
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.types import Agent, Array, EnvironmentSpec, Key, PyTree, TimeStep

Progress = collections.abc.Callable[[int, int], None]
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


def start(environment: Environment, agent: Agent, key: Key) -> RolloutState:
    """Begins B episodes.

    Args:
      environment: not yet in use, or to be started anew.
      agent: who will act.
      key: typed key; all randomness of the environment comes from it.
    """
    return RolloutState(agent.init(environment.spec.batch_size), *reset_from_host(environment, key))


def rollout(
    environment: Environment,
    agent: Agent,
    params: PyTree,
    loop: RolloutState,
    key: Key,
    steps: int,
) -> tuple[RolloutState, Trajectory]:
    """Acts for a number of steps; may be traced where the environment is jittable.

    Args:
      environment: hashable by identity; what is compiled per agent and number of steps is kept as long as it lives.
      agent: who acts; hashable, as pairs of functions are.
      params: of the agent.
      loop: from `start`, or what the last call returned.
      key: typed key; step t of this call uses `fold_in(key, t)`.
      steps: T.

    Returns:
      The state to go on from, and the trajectory, whose first time step is the one given. Arrays are
      NumPy's where the environment is not jittable.

    Raises:
      ConfigError: fewer than one step.
    """
    _check_count("steps", steps)
    if environment.spec.jittable:
        return _programs(environment).rollout(agent=agent, params=params, loop=loop, key=key, steps=steps)
    act = _programs(environment).act
    carry, state, timestep = loop
    carry = jax.tree.map(jnp.copy, carry)  # the first step uses it up, and the caller may go on from it again
    seen: list[np.ndarray] = []
    done: list[np.ndarray] = []
    for t in range(steps):
        # A clock of NumPy's: one carried on from call to call costs more than the rest of the call.
        carry, action, record = act(
            agent=agent, params=params, carry=carry, clock=np.uint32(t), timestep=timestep, key=key
        )
        _keep(seen, t, steps, jax.tree.leaves(timestep))  # while the policy computes
        leaves, structure = jax.tree.flatten((action, record))
        leaves = [np.asarray(leaf) for leaf in leaves]  # on a CPU this waits for the result and copies nothing
        _keep(done, t, steps, leaves)
        action, record = jax.tree.unflatten(structure, leaves)
        state, timestep = environment.step(state, action)
    structure = jax.tree.structure(Trajectory(timestep, action, record))
    return RolloutState(carry, state, timestep), jax.tree.unflatten(structure, seen + done)


def run_episodes(
    environment: Environment,
    agent: Agent,
    params: PyTree,
    key: Key,
    episodes_per_row: int,
    progress: Progress | None = None,
) -> EpisodeReturns:
    """Runs a fixed number of episodes in every row.

    >>> import data, environments, jax, ldm_jax
    >>> environment = environments.make("gymnax/Catch-bsuite", batch_size=4)
    >>> agent = data.references.random_agent(environment.spec.action_space)
    >>> episodes = ldm_jax.rollout.run_episodes(environment, agent, (), jax.random.key(0), episodes_per_row=2)
    >>> episodes.returns.shape, episodes.lengths.tolist()
    ((4, 2), [[9, 9], [9, 9], [9, 9], [9, 9]])

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
      ConfigError: fewer than one episode.
      EnvironmentFaultError: a return that is not finite, or episodes that outlast the time limit.
    """
    _check_count("episodes_per_row", episodes_per_row)
    spec = environment.spec
    rows, total = spec.batch_size, spec.batch_size * episodes_per_row
    reset_key, act_key = jax.random.split(key)
    counted = _Counted(start(environment, agent, reset_key), _CLOCK, _empty_tally(rows, episodes_per_row))
    evaluate_chunk = _programs(environment).evaluate_chunk if spec.jittable else _host_chunk(environment)
    while True:
        counted = evaluate_chunk(agent=agent, params=params, counted=counted, key=act_key)
        finished, clock = int(counted.tally.finished.sum()), int(counted.clock)
        if progress is not None:
            progress(finished, total)
        if finished == total:
            break
        check_ended(spec, finished, total, clock, episodes_per_row)
    episodes = EpisodeReturns(np.asarray(counted.tally.returns), np.asarray(counted.tally.lengths))
    check_returns(spec, episodes)
    return episodes


def check_ended(spec: EnvironmentSpec, finished: int, total: int, steps: int, episodes_per_row: int) -> None:
    """Checks that `finished` of `total` episodes after so many steps of each row are not too few.

    Raises:
      EnvironmentFaultError: some have not ended, though their time limit left time for all.
    """
    # An episode takes up to `time_limit` steps and one that resets.
    if finished < total and steps > episodes_per_row * (spec.time_limit + 1) + 1:
        raise EnvironmentFaultError(
            f"{spec.id}: {finished} of {total} episodes ended within {steps} steps a row, though the time limit is "
            f"{spec.time_limit}; the adapter must truncate"
        )


def check_returns(spec: EnvironmentSpec, episodes: EpisodeReturns) -> None:
    """Checks that returns are numbers.

    Raises:
      EnvironmentFaultError: some are NaN or infinite.
    """
    returns = episodes.returns
    if odd := int((~np.isfinite(returns)).sum()):
        raise EnvironmentFaultError(
            f"{spec.id}: {odd} of {returns.size} returns are NaN or infinite; look at its rewards"
        )


def reset_from_host(environment: Environment, key: Key) -> tuple[PyTree, TimeStep]:
    """`environment.reset(key)` called from Python, compiled where the environment is jittable."""
    return _programs(environment).reset(key=key) if environment.spec.jittable else environment.reset(key)


def step_from_host(environment: Environment, state: PyTree, action: PyTree) -> tuple[PyTree, TimeStep]:
    """`environment.step(state, action)` called from Python, compiled where the environment is jittable."""
    if environment.spec.jittable:
        return _programs(environment).step(state=state, action=action)
    return environment.step(state, action)


def _check_count(name: str, count: int) -> None:
    if not count >= 1:
        raise ConfigError(f"{name} is {count}, expected a whole number, at least 1")


def _host_chunk(environment: Environment) -> collections.abc.Callable[..., _Counted]:
    """`_evaluate_chunk` of an environment that is stepped in Python."""
    act_and_count = _programs(environment).act_and_count

    def evaluate_chunk(agent: Agent, params: PyTree, counted: _Counted, key: Key) -> _Counted:
        (carry, state, timestep), clock, tally = counted
        for _ in range(HOST_CHUNK_STEPS):
            carry, tally, action = act_and_count(
                agent=agent, params=params, carry=carry, clock=clock, tally=tally, timestep=timestep, key=key
            )
            clock = clock + np.uint32(1)
            state, timestep = environment.step(state, jax.tree.map(np.asarray, action))
        return _Counted(RolloutState(carry, state, timestep), clock, tally)

    return evaluate_chunk


_CLOCK = np.zeros((), np.uint32)


def _keep(buffers: list[np.ndarray], t: int, steps: int, leaves: list[np.ndarray]) -> None:
    """Writes the leaves of step t into buffers `[T, ...]`, which step 0 makes."""
    if t == 0:
        buffers.extend(np.empty((steps, *leaf.shape), leaf.dtype) for leaf in leaves)
    for buffer, leaf in zip(buffers, leaves, strict=True):
        buffer[t] = leaf


class _Tally(typing.NamedTuple):
    """Finished episodes `[B]`, return and length so far `[B]`, and those of the finished ones `[B, E]`."""

    finished: Array
    total: Array
    length: Array
    returns: Array
    lengths: Array


class _Counted(typing.NamedTuple):
    """What an evaluation goes on from: the rollout, its clock in steps and its episodes."""

    loop: RolloutState
    clock: Array
    tally: _Tally


def _empty_tally(rows: int, episodes: int) -> _Tally:
    zeros, steps = np.zeros((rows, episodes), np.float32), np.zeros((rows, episodes), np.int32)
    return _Tally(steps[:, 0], zeros[:, 0], steps[:, 0], zeros, steps)


def _count(tally: _Tally, timestep: TimeStep) -> _Tally:
    """Books a time step: at the end of an episode its return goes to the row's next free place, if any is left."""
    total = jnp.where(timestep.first, 0.0, tally.total + timestep.reward)
    length = jnp.where(timestep.first, 0, tally.length + 1)
    places = jnp.arange(tally.returns.shape[1])
    here_BE = timestep.last[:, None] & (places == tally.finished[:, None])
    return _Tally(
        jnp.minimum(tally.finished + timestep.last, places.size),
        total,
        length,
        jnp.where(here_BE, total[:, None], tally.returns),
        jnp.where(here_BE, length[:, None], tally.lengths),
    )


class _Programs(typing.NamedTuple):
    """What is compiled for an environment: by keywords, without the environment itself.

    What an agent remembers is donated from step to step: its memory is written in place.
    """

    reset: collections.abc.Callable[..., tuple[PyTree, TimeStep]]
    step: collections.abc.Callable[..., tuple[PyTree, TimeStep]]
    act: collections.abc.Callable[..., tuple[PyTree, PyTree, PyTree]]
    act_and_count: collections.abc.Callable[..., tuple[PyTree, _Tally, PyTree]]
    rollout: collections.abc.Callable[..., tuple[RolloutState, Trajectory]]
    evaluate_chunk: collections.abc.Callable[..., _Counted]


_COMPILED: weakref.WeakKeyDictionary[Environment, _Programs] = weakref.WeakKeyDictionary()


def _programs(environment: Environment) -> _Programs:
    """The programs of an environment, compiled when they are first called; they live as long as it does.

    As a static argument of one program for all it would be kept alive by the cache of that program.
    """
    if environment not in _COMPILED:
        _COMPILED[environment] = _Programs(
            # Apart from the agent, so that the reset is compiled once, whoever acts.
            reset=_compile(_reset, environment),
            step=_compile(_step, environment),
            act=_compile(_act, environment, "agent", donated=("carry",)),
            act_and_count=_compile(_act_and_count, environment, "agent", donated=("carry", "tally")),
            rollout=_compile(_rollout, environment, "agent", "steps"),
            evaluate_chunk=_compile(_evaluate_chunk, environment, "agent", donated=("counted",)),
        )
    return _COMPILED[environment]


def _compile(
    function: collections.abc.Callable[..., typing.Any],
    environment: Environment,
    *static_argnames: str,
    donated: tuple[str, ...] = (),
) -> collections.abc.Callable[..., typing.Any]:
    alive = weakref.ref(environment)

    def program(**arguments: typing.Any) -> typing.Any:
        return function(alive(), **arguments)

    program.__name__ = function.__name__.lstrip("_")
    return jax.jit(program, static_argnames=static_argnames, donate_argnames=donated)


def _reset(environment: Environment, key: Key) -> tuple[PyTree, TimeStep]:
    return environment.reset(key)


def _step(environment: Environment, state: PyTree, action: PyTree) -> tuple[PyTree, TimeStep]:
    return environment.step(state, action)


def _act(
    environment: Environment, agent: Agent, params: PyTree, carry: PyTree, clock: Array, timestep: TimeStep, key: Key
) -> tuple[PyTree, PyTree, PyTree]:
    """The one step of policy: its key, its action, clipped."""
    carry, action, record = agent.step(params, carry, timestep, jax.random.fold_in(key, clock))
    return carry, spaces.clip(environment.spec.action_space, action), record


def _act_and_count(
    environment: Environment,
    agent: Agent,
    params: PyTree,
    carry: PyTree,
    clock: Array,
    tally: _Tally,
    timestep: TimeStep,
    key: Key,
) -> tuple[PyTree, _Tally, PyTree]:
    carry, action, _ = _act(environment, agent, params, carry, clock, timestep, key)
    return carry, _count(tally, timestep), action


def _rollout(
    environment: Environment, agent: Agent, params: PyTree, loop: RolloutState, key: Key, steps: int
) -> tuple[RolloutState, Trajectory]:
    def body(inner: tuple[jax.Array, RolloutState], _: None) -> tuple[tuple[jax.Array, RolloutState], Trajectory]:
        clock, (carry, state, timestep) = inner
        carry, action, record = _act(environment, agent, params, carry, clock, timestep, key)
        state, next_timestep = environment.step(state, action)
        return (clock + 1, RolloutState(carry, state, next_timestep)), Trajectory(timestep, action, record)

    (_, loop), trajectory = jax.lax.scan(body, (jnp.asarray(_CLOCK), loop), length=steps)
    return loop, trajectory


def _evaluate_chunk(environment: Environment, agent: Agent, params: PyTree, counted: _Counted, key: Key) -> _Counted:
    until, episodes = counted.clock + CHUNK_STEPS, counted.tally.returns.shape[1]

    def going(counted: _Counted) -> Array:
        return (counted.clock < until) & (counted.tally.finished < episodes).any()

    def body(counted: _Counted) -> _Counted:
        (carry, state, timestep), clock, tally = counted
        carry, tally, action = _act_and_count(environment, agent, params, carry, clock, tally, timestep, key)
        return _Counted(RolloutState(carry, *environment.step(state, action)), clock + 1, tally)

    return jax.lax.while_loop(going, body, counted)

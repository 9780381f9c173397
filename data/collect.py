"""Collects labelled trajectories: acts with noise and labels every state with the reference's action.

Stream b of B keeps one noise level for all its steps, from 0 (the reference alone) to 1 (the random policy alone). At
each step a stream executes, with that probability, a random action in place of the reference's. So the data holds the
states that the reference never gets itself into, and what it would do there; and a policy that only repeats the last
action finds no reward in it.
"""

from __future__ import annotations

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.cards import Statistics
from ldm_jax.encoding.actions import (
    NOT_ALLOWED,
    NOT_ALLOWED_FLOAT16,
    ActionLayout,
    Distribution,
    action_layout,
    denormalize,
    to_slots,
)
from ldm_jax.encoding.observations import numeric_vector, observation_layout
from ldm_jax.encoding.transition import Transition, to_leaves, transition_schema
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.rollout import rollout, start
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from .references.policy import ReferencePolicy
from .store import EpisodeIndex

# Levels rise a little faster than linearly, so that at least half of all steps are random whatever the luck.
_NOISE_SLOPE = 1.05
# Mean number of steps that a random action is kept for, stream by stream in turn. Independent random actions average
# out: they leave a continuous system where it was.
_HOLDS = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """How much is collected in one environment.

    Attributes:
      streams: B, parallel streams of consecutive episodes.
      steps: T, of each stream.
      block: steps between two updates of the progress bar, compiled as one program.
      max_bytes: the most memory that the collected arrays may take; large observations get fewer streams.
    """

    streams: int = 192
    steps: int = 1024
    block: int = 128
    max_bytes: int = 2**30

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}, expected at least 1")
        if self.streams < 2:
            raise ValueError(f"streams is {self.streams}, expected at least 2: one of the reference, one random")


class Collected(typing.NamedTuple):
    """What was collected in one environment.

    Attributes:
      leaves: `[T, B, ...]` by name; see `collect`.
      episodes: the index of the episodes, the ones cut off by the end of the data included.
      statistics: measured on the leaves.
      random: fraction of the steps that executed the random policy's action.
      agreement: fraction of the steps whose executed action equals the label.
    """

    leaves: dict[str, np.ndarray]
    episodes: EpisodeIndex
    statistics: Statistics
    random: float
    agreement: float


class _Record(typing.NamedTuple):
    label: PyTree
    distribution: Distribution
    random: Array


def affordable_streams(spec: EnvironmentSpec, config: CollectConfig) -> int:
    """The number of streams whose arrays fit into `config.max_bytes`, at least 2 and at most `config.streams`."""
    # Whether there is a mask shows at the first step only: a byte for each choice is assumed.
    schema = transition_schema(spec.observation_space, spec.action_space, masked=True)
    step = sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in schema.values())
    return max(2, min(config.streams, config.max_bytes // (step * config.steps)))


def noise_levels(streams: int) -> np.ndarray:
    """`float32 [streams]`: the probability of a random action in each stream, from 0 to 1."""
    return np.minimum(1.0, _NOISE_SLOPE * np.linspace(0, 1, streams)).astype(np.float32)


def collect(
    environment: Environment,
    reference: ReferencePolicy,
    seed: int,
    config: CollectConfig,
    progress: typing.Callable[[int], typing.Any] = lambda steps: None,
) -> Collected:
    """Collects B streams of T steps; the same seed gives the same data (bitwise, where the environment is jittable).

    The leaves are those of `ldm_jax.encoding.transition`.

    Args:
      environment: with `spec.batch_size` = B streams, see `affordable_streams`.
      reference: the policy that labels, in the form it was scored in.
      seed: of everything random: the environment's key is the first of two split from it, the actions' the second.
      config: `steps` and `block` count; `streams` is the environment's batch size.
      progress: called with the number of steps (of all streams together) done since the last call.

    Returns:
      The leaves, the episode index and the statistics.

    Raises:
      EnvironmentFaultError: a NaN reward, or an observation that is not in its space.
    """
    spec = environment.spec
    environment_key, agent_key = jax.random.split(jax.random.key(seed))
    levels = noise_levels(spec.batch_size)
    agent = _noisy(reference.agent, spec, levels)
    loop = start(environment, agent, environment_key)
    leaves: dict[str, np.ndarray] = {}
    random = outside = 0
    for begin in range(0, config.steps, config.block):
        # The last block may run past the end: one block length is one compiled program.
        block_key = jax.random.fold_in(agent_key, begin)
        loop, block = rollout(environment, agent, reference.params, loop, block_key, config.block)
        block = jax.tree.map(lambda x, keep=config.steps - begin: np.asarray(x[:keep]), block)
        outside += _check(spec, block.timestep, begin)
        random += int(block.record.random.sum())
        record = block.record
        transition = Transition(block.timestep, block.action, record.label, record.distribution, ~block.timestep.last)
        for name, value in to_leaves(spec.observation_space, spec.action_space, transition).items():
            if name not in leaves:
                leaves[name] = np.empty((config.steps, *value.shape[1:]), value.dtype)
            leaves[name][begin : begin + len(value)] = value
        progress(len(block.record.random) * spec.batch_size)
    steps, agreement = config.steps * spec.batch_size, _agreement(leaves)
    return Collected(
        leaves, index_episodes(leaves, seed, levels), measure(spec, leaves, outside), random / steps, agreement
    )


def index_episodes(leaves: dict[str, np.ndarray], seed: int, levels: np.ndarray) -> EpisodeIndex:
    """Finds the episodes in `[T, B]` leaves, stream by stream; the last of each stream may be unfinished."""
    stream, begin = np.nonzero(leaves["first"].T)
    steps = len(leaves["first"])
    after = np.append(begin[1:], steps)
    # An episode runs to the next one of its stream: the step after a last one is always a first one.
    end = np.where(np.append(stream[1:] != stream[:-1], True), steps, after)
    # sums over [start, end) as differences of running sums, in float64
    total = np.concatenate([np.zeros((1, len(levels))), np.cumsum(leaves["reward"], 0, np.float64)])
    return EpisodeIndex(
        start=begin.astype(np.int64),
        length=(end - begin).astype(np.int64),
        return_=total[end, stream] - total[begin, stream],
        seed=np.full(len(begin), seed, np.int64),
        noise=levels[stream],
        stream=stream.astype(np.int32),
    )


def measure(spec: EnvironmentSpec, leaves: dict[str, np.ndarray], outside: int = 0) -> Statistics:
    """Measures what standardizes an environment's data.

    A deviation is floored at a thousandth of the range seen (below it, standardizing would blow up a rare jump) and at
    1e-5 of the mean (what float32 resolves). A number that never changes has deviation 1: its scale is not known.

    Args:
      spec: the environment's.
      leaves: `[T, B, ...]` by name, as `collect` makes them.
      outside: the number of observations outside their declared bounds.

    Returns:
      The statistics.
    """
    layout, steps = observation_layout(spec.observation_space), leaves["reward"].size
    mean = deviation = np.zeros(0)
    if layout.numbers:
        numbers = np.asarray(numeric_vector(layout, _observation(spec, leaves))).reshape(-1, layout.numbers)
        mean = numbers.mean(0, np.float64)
        deviation = np.sqrt(sum(((block - mean) ** 2).sum(0) for block in _blocks(numbers)) / steps)
        width = (numbers.max(0) - numbers.min(0)).astype(np.float64)
        deviation = np.where(width > 0, np.maximum(deviation, np.maximum(1e-3 * width, 1e-5 * np.abs(mean))), 1.0)
    reward = leaves["reward"][leaves["reward"] != 0].astype(np.float64)
    actions = action_layout(spec.action_space)
    executed = _continuous(actions, spec, leaves).reshape(steps, actions.continuous)
    return Statistics(
        observation_mean=tuple(mean.tolist()),
        observation_std=tuple(deviation.tolist()),
        reward_scale=max(float(np.sqrt((reward**2).mean())), 1e-6) if reward.size else 1.0,
        action_low=tuple(executed.min(0).tolist()),
        action_high=tuple(executed.max(0).tolist()),
        steps=steps,
        outside=outside,
    )


def _noisy(reference: Agent, spec: EnvironmentSpec, levels: np.ndarray) -> Agent:
    layout = action_layout(spec.action_space)
    holds = np.array([_HOLDS[i % len(_HOLDS)] for i in range(len(levels))])
    if not layout.continuous:
        holds = np.ones_like(holds)

    def init(batch_size):
        return reference.init(batch_size), spaces.zeros(spec.action_space, (batch_size,))

    def step(params, carry, timestep, key):
        inner, held = carry
        label_key, coin_key, renew_key, action_key = jax.random.split(key, 4)
        inner, label, distribution = reference.step(params, inner, timestep, label_key)
        label = spaces.clip(spec.action_space, jax.tree.map(jnp.asarray, label))
        renew = timestep.first | (jax.random.uniform(renew_key, levels.shape) * holds < 1)
        if timestep.action_mask is not None:
            renew = jnp.ones_like(renew)  # the action held may no longer be allowed
        fresh = spaces.sample(action_key, spec.action_space, len(levels), timestep.action_mask)
        held = _choose(renew, fresh, held)
        random = jax.random.uniform(coin_key, levels.shape) < levels
        action = _choose(random, held, label)
        return (inner, held), action, _Record(label, _storable(layout, distribution), random)

    return Agent(init, step)


def _storable(layout: ActionLayout, distribution: Distribution) -> Distribution:
    """Log-probabilities in float16: normalized slot by slot, so that none overflows."""
    rows, offset = [distribution.logits[..., :0]], 0
    for size in layout.sizes:
        logits = jnp.maximum(distribution.logits[..., offset : offset + size], NOT_ALLOWED)
        rows.append(jax.nn.log_softmax(logits.astype(jnp.float32)))
        offset += size
    logits = jnp.maximum(jnp.concatenate(rows, -1), NOT_ALLOWED_FLOAT16).astype(jnp.float16)
    return Distribution(logits, distribution.mean.astype(jnp.float32), distribution.scale.astype(jnp.float32))


def _choose(choose: Array, chosen: PyTree, other: PyTree) -> PyTree:
    def choose_leaf(a, b):
        return jnp.where(choose.reshape(choose.shape + (1,) * (jnp.ndim(a) - 1)), a, b)

    return jax.tree.map(choose_leaf, chosen, other)


def _check(spec: EnvironmentSpec, timestep: TimeStep, begin: int) -> int:
    """Refuses what would poison the data, and counts the observations outside their bounds, which is no reason to."""
    if not np.isfinite(timestep.reward).all():
        step, stream = np.argwhere(~np.isfinite(timestep.reward))[0]
        raise EnvironmentFaultError(
            f"{spec.id} gave the reward {timestep.reward[step, stream]} at step {begin + step} of stream {stream}, "
            "expected a finite number; nothing was stored of it"
        )
    rows = timestep.reward.size
    flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), timestep.observation)
    what = f"the observation of {spec.id} in steps {begin} to {begin + len(timestep.reward) - 1}"
    try:
        outside = spaces.check(spec.observation_space, flat, rows, what)
    except spaces.SpaceError as error:
        raise EnvironmentFaultError(f"{error}; nothing was stored of it") from error
    for leaf in observation_layout(spec.observation_space).numeric:
        if not np.isfinite(spaces.get(flat, leaf.path)).all():
            raise EnvironmentFaultError(f"{what}, part {leaf.name!r}, is infinite; nothing was stored of it")
    return outside


def _observation(spec: EnvironmentSpec, leaves: dict[str, np.ndarray]) -> PyTree:
    names = [f"observation/{leaf.name}" for leaf in spaces.leaves(spec.observation_space)]
    return spaces.unflatten(spec.observation_space, [leaves[name] for name in names])


def _continuous(layout: ActionLayout, spec: EnvironmentSpec, leaves: dict[str, np.ndarray]) -> np.ndarray:
    values = [leaves[f"action/{leaf.name}"] for leaf in spaces.leaves(spec.action_space)]
    slots = to_slots(layout, spaces.unflatten(spec.action_space, values))
    return np.asarray(denormalize(layout, slots.continuous))


def _agreement(leaves: dict[str, np.ndarray]) -> float:
    labelled = leaves["label_mask"]
    same = np.ones_like(labelled)
    for name, label in leaves.items():
        if name.startswith("reference_action/"):
            executed = leaves[name.removeprefix("reference_")]
            same &= (executed == label).reshape(*labelled.shape, -1).all(-1)
    return float(same[labelled].mean())


def _blocks(array: np.ndarray, size: int = 2**16) -> typing.Iterator[np.ndarray]:
    # float64 copies of a block at a time: the whole would double the memory
    for begin in range(0, len(array), size):
        yield array[begin : begin + size].astype(np.float64)

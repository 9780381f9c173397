"""Collects labelled trajectories: acts with noise and labels every state with the reference's action.

Stream b of B keeps one noise level for all its steps, from 0 (the reference alone) to 1 (the random policy alone). At
each step a stream executes, with that probability, a random action in place of the reference's. So the data holds the
states that the reference never gets itself into, and what it would do there; and a policy that only repeats the last
action finds no reward in it.

An expert may have no answer: a random action is executed then, and the step has no label. One that answers only for
where it has led itself is replayed: no stream has noise.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import operator
import sys
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.cards import Statistics, check_matches
from ldm_jax.encoding.actions import (
    NOT_ALLOWED,
    NOT_ALLOWED_FLOAT16,
    ActionLayout,
    Distribution,
    action_layout,
    from_slots,
    to_slots,
)
from ldm_jax.encoding.transition import Transition, to_leaves, transition_schema
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.rollout import rollout, start
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from .references import ReferencePolicyError, action_range
from .references.expert import labelled
from .references.policy import ReferencePolicy, executed
from .statistics import measure
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                # An integer of NumPy's would not be kept as JSON; no comparison would find a NaN.
                object.__setattr__(self, field.name, operator.index(value))
            except TypeError as error:
                raise ConfigError(f"{field.name} is {value!r}, expected a whole number") from error
            if value < 1:
                raise ConfigError(f"{field.name} is {value}, expected at least 1")
        if self.streams < 2:
            raise ConfigError(f"streams is {self.streams}, expected at least 2: one of the reference, one random")


class Collected(typing.NamedTuple):
    """What was collected in one environment; equal where all arrays are.

    Attributes:
      leaves: `[T, B, ...]` by name; see `collect`.
      episodes: the index of the episodes, the ones cut off by the end of the data included.
      statistics: measured on the leaves.
      random: fraction of the steps that executed the random policy's action, for want of a label too.
      agreement: fraction of the steps whose executed action equals the label.
    """

    leaves: dict[str, np.ndarray]
    episodes: EpisodeIndex
    statistics: Statistics
    random: float
    agreement: float

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Collected)
            and self[1:] == other[1:]
            and self.leaves.keys() == other.leaves.keys()
            and all(np.array_equal(value, other.leaves[name]) for name, value in self.leaves.items())
        )

    def __ne__(self, other: object) -> bool:
        return not self == other


class _Record(typing.NamedTuple):
    label: PyTree
    distribution: Distribution | None
    random: Array
    labelled: Array


def affordable_streams(spec: EnvironmentSpec, config: CollectConfig) -> int:
    """The number of streams whose arrays fit into `config.max_bytes`, at most `config.streams`.

    Args:
      spec: of the environment; its batch size does not count.
      config: how much is wanted.

    Raises:
      ConfigError: not even two streams fit.
    """
    # Whether there is a mask shows at the first step only: a byte for each choice is assumed.
    fitting = min(config.streams, config.max_bytes // _stream_bytes(spec, config, masked=True))
    if fitting < 2:
        raise _too_large(spec, config, 2)
    return fitting


def _stream_bytes(spec: EnvironmentSpec, config: CollectConfig, *, masked: bool, distribution: bool = True) -> int:
    schema = transition_schema(spec.observation_space, spec.action_space, masked=masked, distribution=distribution)
    return config.steps * sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in schema.values())


def _too_large(spec: EnvironmentSpec, config: CollectConfig, streams: int) -> ConfigError:
    mebibytes = streams * _stream_bytes(spec, config, masked=True) / 2**20
    return ConfigError(
        f"{streams} streams of {config.steps} steps of {spec.id} take {mebibytes:.0f} MiB, more than max_bytes "
        f"({config.max_bytes / 2**20:.0f} MiB) or than there is memory: take fewer streams or steps, or raise max_bytes"
    )


def _allocate(
    spec: EnvironmentSpec, config: CollectConfig, *, masked: bool, distribution: bool
) -> dict[str, np.ndarray]:
    """The leaves, empty; refused before anything is collected where they are too large."""
    if spec.batch_size * _stream_bytes(spec, config, masked=masked, distribution=distribution) > config.max_bytes:
        raise _too_large(spec, config, spec.batch_size)
    schema = transition_schema(spec.observation_space, spec.action_space, masked=masked, distribution=distribution)
    lead = (config.steps, spec.batch_size)
    try:
        return {name: np.empty((*lead, *struct.shape), struct.dtype) for name, struct in schema.items()}
    except MemoryError as error:
        raise _too_large(spec, config, spec.batch_size) from error


def noise_levels(streams: int) -> np.ndarray:
    """`float32 [streams]`: the probability of a random action in each stream, from 0 to 1."""
    return np.minimum(1.0, _NOISE_SLOPE * np.linspace(0, 1, streams)).astype(np.float32)


def collect(
    environment: Environment,
    reference: ReferencePolicy,
    seed: int,
    config: CollectConfig,
    progress: collections.abc.Callable[[int], typing.Any] = lambda steps: None,
) -> Collected:
    """Collects B streams of T steps; the same seed gives the same data (bitwise, where the environment is jittable).

    The leaves are those of `ldm_jax.encoding.transition`.

    Args:
      environment: with `spec.batch_size` = B streams, see `affordable_streams`; made with the reference's expert where
        it is one, see `references.pipeline.opened_for`.
      reference: the policy that labels, in the form it was scored in.
      seed: of everything random: the environment's key is the first of two split from it, the actions' the second.
      config: `steps` and `block` count; `streams` is the environment's batch size.
      progress: called with the number of steps (of all streams together) done since the last call.

    Returns:
      The leaves, the episode index and the statistics.

    Raises:
      ConfigError: a single stream, or arrays that do not fit into `config.max_bytes`.
      CardError: the reference is of another version of the environment, of other spaces or of another time limit.
      EnvironmentFaultError: a NaN reward, an observation that is not in its space, or a mask that comes or goes.
      ReferencePolicyError: a label that is not in the action space, or a distribution that is not finite.
    """
    spec = environment.spec
    if spec.batch_size < 2:
        raise ConfigError(f"{spec.id} has 1 stream, expected at least 2: one of the reference, one random")
    check_matches(reference.spec, spec, f"the reference of {reference.spec.id}")
    environment_key, agent_key = jax.random.split(jax.random.key(seed))
    levels = noise_levels(spec.batch_size) * np.float32(reference.reference.labels_any_state)
    loop = start(environment, reference.agent, environment_key)
    masked = loop.timestep.action_mask is not None
    leaves = _allocate(spec, config, masked=masked, distribution=not reference.reference.expert)
    agent = _noisy(reference, spec, levels, masked=masked)
    loop = loop._replace(carry=agent.init(spec.batch_size))
    random = outside = 0
    for begin in range(0, config.steps, config.block):
        # The last block may run past the end: one block length is one compiled program.
        block_key = jax.random.fold_in(agent_key, begin)
        loop, block = rollout(environment, agent, reference.params, loop, block_key, config.block)
        block = jax.tree.map(lambda x, keep=config.steps - begin: np.asarray(x[:keep]), block)
        record = block.record
        outside += _check(spec, block.timestep, record, begin)
        random += int(record.random.sum())
        mask = record.labelled & ~block.timestep.last
        transition = Transition(block.timestep, block.action, record.label, record.distribution, mask)
        for name, value in to_leaves(spec.observation_space, spec.action_space, transition).items():
            leaves[name][begin : begin + len(value)] = value
        progress(len(record.random) * spec.batch_size)
    return Collected(
        leaves=leaves,
        episodes=index_episodes(leaves, seed, levels),
        statistics=measure(spec, leaves, outside),
        random=random / (config.steps * spec.batch_size),
        agreement=_agreement(leaves),
    )


def index_episodes(leaves: dict[str, np.ndarray], seed: int, levels: np.ndarray) -> EpisodeIndex:
    """Finds the episodes in `[T, B]` leaves, stream by stream; the last of each stream may be unfinished.

    Args:
      leaves: by name; every stream begins with a first step.
      seed: of the collection.
      levels: `[B]`, the noise of each stream.
    """
    stream, begin = np.nonzero(leaves["first"].T)
    steps = len(leaves["first"])
    after = np.append(begin[1:], steps)
    # An episode runs to the next one of its stream: the step after a last one is always a first one.
    end = np.where(np.append(stream[1:] != stream[:-1], True), steps, after)
    # Sums of each episode alone, in float64: a running sum over all would lose small returns beside large ones.
    return_ = np.add.reduceat(leaves["reward"].T.astype(np.float64).ravel(), stream * steps + begin)
    return EpisodeIndex(
        start=begin.astype(np.int64),
        length=(end - begin).astype(np.int64),
        return_=return_,
        seed=np.full(len(begin), seed, np.int64),
        noise=levels[stream],
        stream=stream.astype(np.int32),
    )


def _noisy(reference: ReferencePolicy, spec: EnvironmentSpec, levels: np.ndarray, *, masked: bool) -> Agent:
    inner_agent, draw = reference.agent, _random_actions(reference, spec.action_space, len(levels))
    layout = action_layout(spec.action_space, low=-1.0, high=1.0)
    holds = np.array([_HOLDS[i % len(_HOLDS)] for i in range(len(levels))])
    zeros = spaces.zeros(spec.action_space, ())
    if not layout.continuous:
        holds = np.ones_like(holds)

    def init(batch_size: int) -> PyTree:
        return inner_agent.init(batch_size), spaces.zeros(spec.action_space, (batch_size,))

    def step(params: PyTree, carry: PyTree, timestep: TimeStep, key: typing.Any) -> tuple[PyTree, PyTree, _Record]:
        if (timestep.action_mask is not None) != masked:
            raise EnvironmentFaultError(
                f"{spec.id} {'lost its action mask' if masked else 'gave an action mask'} after its first time step, "
                "expected one at all steps or at none; nothing was stored of it"
            )
        inner, held = carry
        label_key, coin_key, renew_key, action_key = jax.random.split(key, 4)
        inner, label, distribution = inner_agent.step(params, inner, timestep, label_key)
        # In the types of the space: JAX may compute in 64 bits.
        label = jax.tree.map(lambda value, like: jnp.asarray(value).astype(like.dtype), label, zeros)
        label = spaces.clip(spec.action_space, label)
        renew = jnp.asarray(timestep.first) | (jax.random.uniform(renew_key, levels.shape) * holds < 1)
        if timestep.action_mask is not None:
            renew = jnp.ones_like(renew)  # the action held may no longer be allowed
        fresh = draw(action_key, timestep.action_mask)
        held = _choose(renew, fresh, held)
        told = labelled(spec.action_space, timestep) if reference.reference.expert else jnp.ones(levels.shape, bool)
        random = (jax.random.uniform(coin_key, levels.shape) < levels) | (~told & ~timestep.last)
        action = _choose(random, held, label)
        # A label follows what was executed before it, whoever chose that.
        carry = executed(inner, action), held
        return carry, action, _Record(label, _storable(layout, distribution), random, told)

    return Agent(init, step)


def _random_actions(
    reference: ReferencePolicy, space: gymnasium.Space, streams: int
) -> collections.abc.Callable[[jax.Array, Array | None], PyTree]:
    """Draws random actions; where the space has no bounds, as far as the reference's training found they matter."""
    scale = getattr(reference.config, "action_scale", 0.0)
    free = action_range.unbounded(space)
    if not (scale and free.any()):
        return lambda key, mask: spaces.sample(key, space, streams, mask)
    layout = action_layout(space, *action_range.limits(space, scale))

    def draw(key: jax.Array, mask: Array | None) -> PyTree:
        slots = to_slots(layout, spaces.sample(key, space, streams, mask))
        uniform = jax.random.uniform(jax.random.fold_in(key, 1), slots.continuous.shape, minval=-1.0)
        return from_slots(layout, slots._replace(continuous=jnp.where(free, uniform, slots.continuous)))

    return draw


def _storable(layout: ActionLayout, distribution: Distribution | None) -> Distribution | None:
    """Log-probabilities in float16: normalized slot by slot, so that none overflows."""
    if distribution is None:  # an expert says what it does, and no more
        return None
    rows, offset = [distribution.logits[..., :0]], 0
    for size in layout.sizes:
        logits = jnp.maximum(distribution.logits[..., offset : offset + size], NOT_ALLOWED)
        rows.append(jax.nn.log_softmax(logits.astype(jnp.float32)))
        offset += size
    logits = jnp.maximum(jnp.concatenate(rows, -1), NOT_ALLOWED_FLOAT16).astype(jnp.float16)
    return Distribution(logits, distribution.mean.astype(jnp.float32), distribution.scale.astype(jnp.float32))


def _choose(choose: Array, chosen: PyTree, other: PyTree) -> PyTree:
    def choose_leaf(a: Array, b: Array) -> Array:
        return jnp.where(choose.reshape(choose.shape + (1,) * (jnp.ndim(a) - 1)), a, b)

    return jax.tree.map(choose_leaf, chosen, other)


def _check(spec: EnvironmentSpec, timestep: TimeStep, record: _Record, begin: int) -> int:
    """Refuses what would poison the data, and counts the observations outside their bounds, which is no reason to."""
    # An action that is no number makes the next time step none, and that one the next label: what came first is named.
    if _first_not_finite((record.label, record.distribution)) < _first_not_finite(timestep):
        _check_labels(spec, record, begin)
    outside = _check_timesteps(spec, timestep, begin)
    _check_labels(spec, record, begin)
    return outside


def _first_not_finite(tree: PyTree) -> int:
    steps = [np.argwhere(~np.isfinite(leaf))[:1, 0] for leaf in jax.tree.leaves(tree) if leaf.dtype.kind == "f"]
    return min((int(step[0]) for step in steps if step.size), default=sys.maxsize)


def _check_timesteps(spec: EnvironmentSpec, timestep: TimeStep, begin: int) -> int:
    with np.errstate(over="ignore"):
        finite = np.isfinite(timestep.reward.astype(np.float32))
    if not finite.all():
        step, stream = np.argwhere(~finite)[0]
        raise EnvironmentFaultError(
            f"{spec.id} gave the reward {timestep.reward[step, stream]} at step {begin + step} of stream {stream}, "
            "expected a number that is finite in float32; nothing was stored of it"
        )
    rows = timestep.reward.size
    flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), timestep.observation)
    what = f"the observation of {spec.id} in steps {begin} to {begin + len(timestep.reward) - 1}"
    try:
        outside = spaces.check(spec.observation_space, flat, rows, what)
    except spaces.SpaceError as error:
        raise EnvironmentFaultError(f"{error}; nothing was stored of it") from error
    for leaf in spaces.leaves(spec.observation_space):
        value = spaces.get(flat, leaf.path)
        with np.errstate(over="ignore"):
            # A model sees numbers in float32.
            finite = value.dtype.kind != "f" or np.isfinite(value.astype(np.float32, copy=False)).all()
        if not finite:
            raise EnvironmentFaultError(f"{what}, part {leaf.name!r}, is infinite in float32; nothing was stored of it")
    return outside


def _check_labels(spec: EnvironmentSpec, record: _Record, begin: int) -> None:
    rows = record.random.size
    flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), record.label)
    what = f"the label of {spec.id} in steps {begin} to {begin + len(record.random) - 1}"
    try:
        spaces.check(spec.action_space, flat, rows, what)
    except spaces.SpaceError as error:
        raise ReferencePolicyError(f"{error}; nothing was stored of it, train the reference again") from error
    distribution = {} if record.distribution is None else record.distribution._asdict()
    for name, value in {"label": record.label, **distribution}.items():
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value)):
            raise ReferencePolicyError(
                f"{what}: its {name} is not finite; nothing was stored, train the reference again"
            )


def _agreement(leaves: dict[str, np.ndarray]) -> float:
    labelled = leaves["label_mask"]
    same = np.ones_like(labelled)
    for name, label in leaves.items():
        if name.startswith("reference_action/"):
            executed = leaves[name.removeprefix("reference_")]
            same &= (executed == label).reshape(*labelled.shape, -1).all(-1)
    return float(same[labelled].mean()) if labelled.any() else 0.0

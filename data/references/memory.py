"""Models of PPO: a network that sees one observation, or one that remembers what came before.

What is remembered is a gated recurrent unit's state over what was seen, done and earned: where the observation hides
something, the way there tells it.
Source: Hausknecht and Stone 2015 (recurrence for hidden state); Cho et al. 2014 (the unit); Kapturowski et al. 2019
(stored states: sequences are learned from the state that acting had there).
"""

from __future__ import annotations

import collections.abc
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.encoding.actions import ActionLayout
from ldm_jax.spaces import zeros
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

from .moments import Moments
from .networks import Network, network
from .perceptrons import orthogonal
from .policy import Memory

Outputs = tuple[Array, Array, Array]
"""Logits `[..., M]`, mean `[..., C]` in normalized units, and value `[...]`."""


class ActorCritic(typing.NamedTuple):
    """Policy and value as pure functions, with or without memory.

    Attributes:
      init: `init(rng) -> params`, on the host.
      begin: `begin(batch_size) -> memory` before anything was seen.
      see: `see(memory, timestep)`, what is seen at a time step; both may have any leading axes.
      act: `act(params, moments, memory, seen, timestep) -> (outputs, memory)` of B rows.
      unroll: `unroll(params, moments, memory, seen, action_mask, first) -> outputs`, over `[N, ...]` steps, or over
        `[N, L, ...]` sequences that begin with memories `[N, ...]`.
      numbers: `numbers(seen)`, what `moments` are taken of.
      size: how many those are.
    """

    init: collections.abc.Callable[[np.random.Generator], PyTree]
    begin: collections.abc.Callable[[int], PyTree]
    see: collections.abc.Callable[[PyTree, TimeStep], PyTree]
    act: collections.abc.Callable[[PyTree, Moments, PyTree, PyTree, TimeStep], tuple[Outputs, PyTree]]
    unroll: collections.abc.Callable[[PyTree, Moments, PyTree, PyTree, Array | None, Array | None], Outputs]
    numbers: collections.abc.Callable[[PyTree], Array]
    size: int


def memoryless(net: Network) -> ActorCritic:
    """A model that sees the observation of this step alone."""

    def act(
        params: PyTree, moments: Moments, memory: PyTree, seen: PyTree, timestep: TimeStep
    ) -> tuple[Outputs, PyTree]:
        return net.apply(params, moments, seen, timestep.action_mask), memory

    def unroll(
        params: PyTree, moments: Moments, memory: PyTree, seen: PyTree, action_mask: Array | None, first: Array | None
    ) -> Outputs:
        return net.apply(params, moments, seen, action_mask)

    return ActorCritic(
        net.init,
        lambda batch_size: (),
        lambda memory, timestep: timestep.observation,
        act,
        unroll,
        net.numbers,
        net.size,
    )


def recurrent(
    spec: EnvironmentSpec,
    layout: ActionLayout,
    hidden: tuple[int, ...],
    activation: str,
    width: int,
    *,
    convolved: bool = False,
) -> ActorCritic:
    """A model that sees the observation, the action before it and its reward, and remembers.

    Policy and value are given what is seen now beside what is remembered, so memory can only add to it.

    Args:
      spec: of the environment.
      layout: of its action space.
      hidden: widths of the hidden layers of policy and value.
      activation: a name in `jax.nn`.
      width: of the memory.
      convolved: whether small grids are seen through convolutions.
    """
    net = network(_seen_space(spec), layout, hidden, activation, extra=width, convolved=convolved)

    def init(rng: np.random.Generator) -> PyTree:
        cell = {
            "input": np.concatenate([orthogonal(rng, net.width, width, math.sqrt(2)) for _ in range(3)], 1),
            "recurrent": np.concatenate([orthogonal(rng, width, width, 1.0) for _ in range(3)], 1),
            # Memories last about e times longer than they would at 0 (Jozefowicz et al. 2015).
            "bias": np.repeat(np.array([0, 1, 0], np.float32), width),
        }
        return net.init(rng) | {"cell": cell}

    def act(
        params: PyTree, moments: Moments, memory: Memory, seen: PyTree, timestep: TimeStep
    ) -> tuple[Outputs, Memory]:
        features = net.encode(params, moments, seen)
        after, _ = _remember(params["cell"], memory.hidden, features[None], timestep.first[None])
        outputs = net.decide(params, jnp.concatenate([features, after], -1), timestep.action_mask)
        return outputs, Memory(after, memory.action)

    def unroll(
        params: PyTree, moments: Moments, memory: Memory, seen: PyTree, action_mask: Array | None, first: Array | None
    ) -> Outputs:
        assert first is not None, "sequences say where episodes begin"
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
        features = net.encode(params, moments, flat).reshape(*first.shape, net.width)
        _, remembered = _remember(params["cell"], memory.hidden, features.swapaxes(0, 1), first.T)
        return net.decide(params, jnp.concatenate([features, remembered.swapaxes(0, 1)], -1), action_mask)

    return ActorCritic(
        init=init,
        begin=functools.partial(begin_memory, spec, width),
        see=_see,
        act=act,
        unroll=unroll,
        numbers=net.numbers,
        size=net.size,
    )


def begin_memory(spec: EnvironmentSpec, width: int, batch_size: int) -> Memory:
    """What is remembered before anything was seen."""
    return Memory(jnp.zeros((batch_size, width)), jax.tree.map(jnp.asarray, zeros(spec.action_space, (batch_size,))))


def _remember(cell: PyTree, hidden: Array, features: Array, first: Array) -> tuple[Array, Array]:
    """The memory after each of L steps, features and `first` `[L, N, ...]`; the last, and all."""
    inputs = features @ cell["input"] + cell["bias"]
    return jax.lax.scan(functools.partial(_gate, cell["recurrent"]), hidden, (inputs, first))


def _gate(weights: Array, hidden: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
    """One step of the unit, from its input's share `[N, 3 H]` and whether an episode begins `[N]`."""
    inputs, first = now
    hidden = jnp.where(first[:, None], 0.0, hidden)
    width = hidden.shape[-1]
    gates = jax.nn.sigmoid(inputs[:, : 2 * width] + hidden @ weights[:, : 2 * width])
    reset, keep = gates[:, :width], gates[:, width:]
    candidate = jnp.tanh(inputs[:, 2 * width :] + (reset * hidden) @ weights[:, 2 * width :])
    hidden = keep * hidden + (1 - keep) * candidate
    return hidden, hidden


def _seen_space(spec: EnvironmentSpec) -> spaces.Dict:
    return spaces.Dict(
        {
            "observation": spec.observation_space,
            "action": spec.action_space,
            "reward": spaces.Box(-np.inf, np.inf, (1,), np.float32),
            "first": spaces.MultiBinary(1),
        }
    )


def _see(memory: Memory, timestep: TimeStep) -> PyTree:
    """The time step with the action before it, which is zeros where an episode begins."""

    def clear(x: Array) -> Array:
        first = timestep.first
        return jnp.where(first.reshape(first.shape + (1,) * (x.ndim - first.ndim)), jnp.zeros_like(x), x)

    return {
        "observation": timestep.observation,
        "action": jax.tree.map(clear, memory.action),
        "reward": jnp.asarray(timestep.reward, jnp.float32)[..., None],
        "first": jnp.asarray(timestep.first)[..., None].astype(jnp.int8),
    }

"""What a reference policy is, and how any policy over action slots acts, greedily or by sampling."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import cards, spaces
from ldm_jax.encoding.actions import (
    NOT_ALLOWED,
    ActionLayout,
    Distribution,
    Slots,
    denormalize,
    from_slots,
    split_choices,
)
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

SlotDecoding = typing.Literal["greedy", "sample", "random"]
"""How an agent acts: `greedy` takes the likeliest choice and the mean, `sample` draws, `random` ignores the policy."""
DECODINGS: tuple[SlotDecoding, ...] = typing.get_args(SlotDecoding)


class SlotPolicy(typing.NamedTuple):
    """What a policy says of each slot; a pytree.

    Attributes:
      logits: `float32 [B, M]` over the flat choices, `NOT_ALLOWED_FLOAT16` where not allowed; float16 holds them.
      mean: `float32 [B, C]`, in normalized units: a slot's range is -1 to 1.
      std: `float32 [B, C]`, in the same units.
    """

    logits: Array
    mean: Array
    std: Array


class Memory(typing.NamedTuple):
    """What a policy with memory carries from step to step; a pytree.

    Attributes:
      hidden: `float32 [B, H]`.
      action: the action executed last, whoever chose it; each leaf `[B, ...]`.
    """

    hidden: Array
    action: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class ReferencePolicy:
    """A trained policy, ready to act and to label; it can be pickled, copied and compared.

    Attributes:
      agent: its step takes `params` and records an `ldm_jax.encoding.actions.Distribution` at every state. It follows
        from the other fields, so it counts for nothing in comparisons.
      params: NumPy arrays; `params["decoding"]` is the place in `DECODINGS`, so that all are one compiled program.
      reference: algorithm, decoding, budget and seed.
      spec: the environment it was trained for; the batch size does not matter.
      config: of the algorithm.
    """

    agent: Agent
    params: PyTree
    reference: cards.Reference
    spec: EnvironmentSpec
    config: typing.Any

    def with_decoding(self, decoding: typing.Literal["greedy", "sample"]) -> ReferencePolicy:
        """The same policy, acting greedily or by sampling."""
        return dataclasses.replace(
            self,
            params=with_decoding(self.params["policy"], decoding),
            reference=dataclasses.replace(self.reference, decoding=decoding),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ReferencePolicy):
            return NotImplemented
        mine, theirs = ((self.reference, self.spec, self.config), (other.reference, other.spec, other.config))
        return mine == theirs and _equal(self.params, other.params)

    def __hash__(self) -> int:
        return hash((self.reference, self.spec.id))

    def __repr__(self) -> str:
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        reference = self.reference
        return f"ReferencePolicy({self.spec.id}, {reference.algorithm}, {reference.decoding}, {count:,} parameters)"


def _equal(one: PyTree, other: PyTree) -> bool:
    structures: list[typing.Any] = [jax.tree.structure(tree) for tree in (one, other)]
    if structures[0] != structures[1]:
        return False
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def with_decoding(params: PyTree, decoding: SlotDecoding) -> PyTree:
    """Parameters of a `slot_agent` from those of its policy."""
    return {"policy": params, "decoding": np.int32(DECODINGS.index(decoding))}


def random_agent(action_space: gymnasium.Space) -> Agent:
    """The policy that samples actions uniformly among those allowed; it has no parameters and records nothing."""
    return Agent(_remember_nothing, functools.partial(_act_at_random, action_space))


def slot_agent(layout: ActionLayout, policy: collections.abc.Callable[[PyTree, TimeStep], SlotPolicy]) -> Agent:
    """An agent that acts on what `policy` says, and records it as a distribution.

    Greedy takes the likeliest choice and the mean, and records each continuous slot as a point at the clipped mean.
    Random ignores the policy, as `random_agent` does; here it spares the compilation of another agent.

    Args:
      layout: of the action space.
      policy: `policy(params["policy"], timestep)`; the agent can be pickled where this can.

    Returns:
      An agent whose parameters are those of `with_decoding`.
    """
    return Agent(_remember_nothing, functools.partial(_act, layout, policy))


def remembering_agent(
    layout: ActionLayout,
    begin: collections.abc.Callable[[int], Memory],
    policy: collections.abc.Callable[[PyTree, Memory, TimeStep], tuple[SlotPolicy, Memory]],
) -> Agent:
    """A `slot_agent` that carries a memory; who executes another action than its own says so by `executed`.

    Args:
      layout: of the action space.
      begin: `begin(batch_size)`, the memory before the first step.
      policy: `policy(params["policy"], memory, timestep)`.
    """
    return Agent(begin, functools.partial(_act_and_remember, layout, policy))


def executed(carry: PyTree, action: PyTree) -> PyTree:
    """What an agent carries, told the action that was executed in place of its own."""
    return carry._replace(action=action) if isinstance(carry, Memory) else carry


# Functions of the module with what they need bound to them: closures could not be pickled.
def _remember_nothing(batch_size: int) -> tuple[()]:
    return ()


def _act_at_random(
    space: gymnasium.Space, params: PyTree, carry: tuple[()], timestep: TimeStep, key: jax.Array
) -> tuple[tuple[()], PyTree, tuple[()]]:
    return carry, spaces.sample(key, space, timestep.reward.shape[0], timestep.action_mask), ()


def _act(
    layout: ActionLayout,
    policy: collections.abc.Callable[[PyTree, TimeStep], SlotPolicy],
    params: PyTree,
    carry: tuple[()],
    timestep: TimeStep,
    key: jax.Array,
) -> tuple[tuple[()], PyTree, Distribution]:
    action, record = _decode(layout, policy(params["policy"], timestep), params, timestep, key)
    return carry, action, record


def _act_and_remember(
    layout: ActionLayout,
    policy: collections.abc.Callable[[PyTree, Memory, TimeStep], tuple[SlotPolicy, Memory]],
    params: PyTree,
    memory: Memory,
    timestep: TimeStep,
    key: jax.Array,
) -> tuple[Memory, PyTree, Distribution]:
    slots, memory = policy(params["policy"], memory, timestep)
    action, record = _decode(layout, slots, params, timestep, key)
    return executed(memory, action), action, record


def _decode(
    layout: ActionLayout, slot_policy: SlotPolicy, params: PyTree, timestep: TimeStep, key: jax.Array
) -> tuple[PyTree, Distribution]:
    """An action in the way that `params["decoding"]` says, and what is recorded of the policy."""
    logits, mean, std = slot_policy
    greedy, sample = (params["decoding"] == DECODINGS.index(name) for name in ("greedy", "sample"))
    policy_key, random_key = jax.random.split(key)
    point = jnp.clip(mean, -1, 1)
    slots = sample_slots(layout, policy_key, logits, mean, std)
    categorical = jnp.where(sample, slots.categorical, best_choices(layout, logits))
    action = from_slots(layout, Slots(categorical, jnp.where(sample, slots.continuous, point)))
    _, uniform, _ = _act_at_random(layout.space, (), (), timestep, random_key)
    action = jax.tree.map(lambda a, b: jnp.where(greedy | sample, a, b), action, uniform)
    half_range = ((layout.high - layout.low) / 2).astype(np.float32)
    record = Distribution(
        logits, denormalize(layout, jnp.where(greedy, point, mean)), jnp.where(greedy, 0.0, std) * half_range
    )
    return action, record


def choice_logits(layout: ActionLayout, logits: Array) -> Array:
    """Flat logits `[..., M]` as one row of log-probabilities per categorical slot, `[..., K, widest]`."""
    width = max(layout.sizes, default=1)
    return jax.nn.log_softmax(split_choices(layout, logits, layout.categorical, width, fill=NOT_ALLOWED), -1)


def best_choices(layout: ActionLayout, logits: Array) -> Array:
    """The likeliest choice of each categorical slot, `int32 [..., K]`."""
    return jnp.argmax(choice_logits(layout, logits), -1).astype(jnp.int32)


def sample_slots(layout: ActionLayout, key: Array, logits: Array, mean: Array, std: Array) -> Slots:
    """Samples every slot; continuous ones are not clipped."""
    choice_key, noise_key = jax.random.split(key)
    categorical = jax.random.categorical(choice_key, choice_logits(layout, logits)).astype(jnp.int32)
    return Slots(categorical, mean + std * jax.random.normal(noise_key, mean.shape))

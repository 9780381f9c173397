"""What a reference policy is, and how any policy over action slots acts in its greedy and its sampled form."""

from __future__ import annotations

import dataclasses
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import cards, spaces
from ldm_jax.encoding.actions import ActionLayout, Distribution, Slots, denormalize, from_slots, split_choices
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from .networks import MASKED

Form = typing.Literal["greedy", "sample", "random"]
FORMS = typing.get_args(Form)


class SlotPolicy(typing.NamedTuple):
    """What a policy says of each slot; a pytree.

    Attributes:
      logits: `float32 [B, M]` over the flat choices, `MASKED` where not allowed.
      mean: `float32 [B, C]`, in normalized units: a slot's range is -1 to 1.
      std: `float32 [B, C]`, in the same units.
    """

    logits: Array
    mean: Array
    std: Array


@dataclasses.dataclass(frozen=True, eq=False)
class ReferencePolicy:
    """A trained policy, ready to act and to label.

    Attributes:
      agent: its step takes `params` and records an `ldm_jax.encoding.actions.Distribution` at every state.
      params: NumPy arrays; `params["form"]` is the place in `FORMS`, so that all forms are one compiled program.
      reference: algorithm, form, budget and seed.
      spec: the environment it was trained for; the batch size does not matter.
      config: of the algorithm.
    """

    agent: Agent
    params: PyTree
    reference: cards.Reference
    spec: EnvironmentSpec
    config: typing.Any

    def in_form(self, form: typing.Literal["greedy", "sample"]) -> ReferencePolicy:
        """The same policy, acting greedily or by sampling."""
        return dataclasses.replace(
            self,
            params=with_form(self.params["policy"], form),
            reference=dataclasses.replace(self.reference, decoding=form),
        )


def with_form(params: PyTree, form: Form) -> PyTree:
    """Parameters of a `slot_agent` from those of its policy."""
    return {"policy": params, "form": np.int32(FORMS.index(form))}


def random_agent(action_space: gymnasium.Space) -> Agent:
    """The policy that samples actions uniformly among those allowed; it has no parameters and records nothing."""

    def step(params, carry, timestep: TimeStep, key):
        return carry, spaces.sample(key, action_space, timestep.reward.shape[0], timestep.action_mask), ()

    return Agent(lambda batch_size: (), step)


def slot_agent(layout: ActionLayout, policy: typing.Callable[[PyTree, TimeStep], SlotPolicy]) -> Agent:
    """An agent that acts on what `policy` says, and records it as a distribution.

    Greedy takes the likeliest choice and the mean, and records each continuous slot as a point at the clipped mean.
    Random ignores the policy, as `random_agent` does; here it spares the compilation of another agent.

    Args:
      layout: of the action space.
      policy: `policy(params["policy"], timestep)`.

    Returns:
      An agent whose parameters are those of `with_form`.
    """
    half_range = ((layout.high - layout.low) / 2).astype(np.float32)

    def step(params, carry, timestep: TimeStep, key):
        logits, mean, std = policy(params["policy"], timestep)
        greedy, sampled = params["form"] == FORMS.index("greedy"), params["form"] == FORMS.index("sample")
        policy_key, random_key = jax.random.split(key)
        point = jnp.clip(mean, -1, 1)
        slots = sample_slots(layout, policy_key, logits, mean, std)
        categorical = jnp.where(sampled, slots.categorical, best_choices(layout, logits))
        action = from_slots(layout, Slots(categorical, jnp.where(sampled, slots.continuous, point)))
        uniform = spaces.sample(random_key, layout.space, timestep.reward.shape[0], timestep.action_mask)
        action = jax.tree.map(lambda a, b: jnp.where(greedy | sampled, a, b), action, uniform)
        record = Distribution(
            logits,
            denormalize(layout, jnp.where(greedy, point, mean)),
            jnp.where(greedy, 0.0, std) * half_range,
        )
        return carry, action, record

    return Agent(lambda batch_size: (), step)


def choice_logits(layout: ActionLayout, logits: Array) -> Array:
    """Flat logits `[..., M]` as one row of log-probabilities per categorical slot, `[..., K, widest]`."""
    width = max(layout.sizes, default=1)
    return jax.nn.log_softmax(split_choices(layout, logits, layout.categorical, width, MASKED), -1)


def best_choices(layout: ActionLayout, logits: Array) -> Array:
    """The likeliest choice of each categorical slot, `int32 [..., K]`."""
    return jnp.argmax(choice_logits(layout, logits), -1).astype(jnp.int32)


def sample_slots(layout: ActionLayout, key: Array, logits: Array, mean: Array, std: Array) -> Slots:
    """Samples every slot; continuous ones are not clipped."""
    choice_key, noise_key = jax.random.split(key)
    categorical = jax.random.categorical(choice_key, choice_logits(layout, logits)).astype(jnp.int32)
    return Slots(categorical, mean + std * jax.random.normal(noise_key, mean.shape))

"""References that nobody trains: the answers of an expert that a library ships, which come with the time step.

An environment made with `expert=<name>` says at every step what its expert would do (`TimeStep.expert`), whoever acts.
So the policy has no parameters: it does what it is told, and where the expert has no answer it acts at random among
what is allowed, and its action is no label.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import cards, spaces
from ldm_jax.encoding.actions import action_layout, to_slots
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation import scores
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from .algorithm import Learned
from .policy import DECODINGS, ReferencePolicy, with_decoding

ALGORITHM = "expert"
"""What a card calls it."""

LEARNABLE = 0.5
"""The share of a privileged expert's advantage over random that a policy on observations alone has to keep."""


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """Whose answers a reference gives; what `environments.experts(id)` says of an expert.

    Attributes:
      name: that the environment is made with.
      version: of the expert's program.
      privileged: whether it reads what a policy does not see.
      labels_any_state: whether it can label states that others brought about; else it is only replayed.
      budget_steps: 0: it is trained for no time.
      num_envs: parallel environments, of which it needs none.
    """

    name: str
    version: str = ""
    privileged: bool = False
    labels_any_state: bool = True
    budget_steps: int = 0
    num_envs: int = 1

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("the expert has no name: give one that environments.experts(id) lists")
        if self.budget_steps:
            raise ConfigError(f"budget_steps of the expert {self.name} is {self.budget_steps}, expected 0")


def expert_policy(spec: EnvironmentSpec, config: ExpertConfig) -> ReferencePolicy:
    """The reference that an expert is, before it is scored.

    Args:
      spec: of the environment; the batch size does not matter.
      config: which expert.
    """
    return ReferencePolicy(
        agent=agent(spec, config),
        params=with_decoding(example(spec, config), "greedy"),
        reference=cards.Reference(
            algorithm=ALGORITHM,
            decoding="greedy",
            budget_steps=0,
            seed=0,
            expert=config.name,
            expert_version=config.version,
            privileged=config.privileged,
            labels_any_state=config.labels_any_state,
        ),
        spec=spec,
        config=config,
    )


def settle(environment: Environment, config: ExpertConfig, seed: int) -> ExpertConfig:
    """The configuration as it is: it leaves nothing open."""
    del environment, seed
    return config


def learn(environment: Environment, config: ExpertConfig, seed: int) -> collections.abc.Iterator[Learned]:
    """Nothing is trained: no step is taken, and there are no parameters."""
    del seed
    yield Learned(0, example(environment.spec, config))


def agent(spec: EnvironmentSpec, config: ExpertConfig) -> Agent:
    """The agent that does what the time step's expert says; greedy and sampled are the same."""
    del config
    return Agent(_remember_nothing, functools.partial(_act, spec.action_space))


def example(spec: EnvironmentSpec, config: ExpertConfig) -> PyTree:
    """Its parameters: none."""
    del spec, config
    return {}


def labelled(action_space: gymnasium.Space, timestep: TimeStep) -> Array:
    """Where the expert has an answer that may be executed, `bool [..., B]`.

    Args:
      action_space: of one environment.
      timestep: of an environment made with an expert, any number of them.
    """
    label = timestep.expert
    assert label is not None, "looked at after `_act`, which refuses it"
    if timestep.action_mask is None:
        return label.valid
    layout = action_layout(action_space, low=-1.0, high=1.0)
    chosen = jnp.clip(to_slots(layout, jax.tree.map(jnp.asarray, label.action)).categorical, 0)
    place = np.cumsum([0, *layout.sizes[:-1]], dtype=np.int32) + jnp.minimum(chosen, np.array(layout.sizes) - 1)
    return label.valid & jnp.take_along_axis(jnp.asarray(timestep.action_mask), place, -1).all(-1)


def check_learnable(
    admission: scores.Admission, random: cards.Returns, distilled: cards.Returns | None
) -> scores.Admission:
    """Refuses a privileged expert whose labels a policy on observations alone cannot follow.

    Args:
      admission: of the expert, by its own returns.
      random: of the random policy.
      distilled: of a policy that sees observations alone, trained on the expert's labels; None if there is none yet.

    Returns:
      The admission, refused where the policy keeps less than `LEARNABLE` of the expert's advantage over random.
    """
    if not admission.admitted:
        return admission
    if distilled is None:
        reason = "privileged: it reads what a policy does not see, and none was trained on its labels to tell"
        return dataclasses.replace(admission, admitted=False, reason=reason)
    kept = (distilled.mean - random.mean) / admission.difference
    reason = (
        f"privileged: a policy on observations alone, trained on its labels, keeps {kept:.2f} of its advantage over "
        f"random, expected at least {LEARNABLE:g}"
    )
    if kept >= LEARNABLE:
        return dataclasses.replace(admission, reason=f"{admission.reason}; {reason}")
    return dataclasses.replace(admission, admitted=False, reason=reason)


# Functions of the module with what they need bound to them: closures could not be pickled.
def _remember_nothing(batch_size: int) -> tuple[()]:
    return ()


def _act(
    space: gymnasium.Space, params: PyTree, carry: tuple[()], timestep: TimeStep, key: jax.Array
) -> tuple[tuple[()], PyTree, None]:
    if timestep.expert is None:
        raise EnvironmentFaultError(
            "the environment says nothing of what its expert would do: make it with expert=<name>, as "
            "`data.references.pipeline.opened_for` does"
        )
    follows = labelled(space, timestep) & (params["decoding"] != DECODINGS.index("random"))
    uniform = spaces.sample(key, space, timestep.reward.shape[0], timestep.action_mask)

    def choose(told: Array, drawn: Array) -> Array:
        return jnp.where(follows.reshape(follows.shape + (1,) * (drawn.ndim - 1)), told, drawn)

    return carry, jax.tree.map(choose, timestep.expert.action, uniform), None

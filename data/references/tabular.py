"""References for environments whose observations repeat: learn the model by acting, then plan in it.

Where states are few, planning finds in seconds what policy gradients may never find. Observations are states, one
category by its number and anything else by a fingerprint of its bytes. Exploration alternates between seeking what was
tried least and following the best plan so far, both planned in the model learned so far. In a state that was never seen
the policy chooses uniformly among what is allowed.
Source: Strehl and Littman 2008 (count-based bonuses); Bellman 1957 (value iteration).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax import rollout
from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16, ActionLayout, action_layout, to_slots
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.spaces import SpaceError, leaves
from ldm_jax.types import Agent, Array, EnvironmentSpec, PyTree, TimeStep

from .algorithm import REPORTS, Learned
from .hyperparameters import Hyperparameters, check_hyperparameters
from .mdp import NOT_BEST, EmpiricalMDP, add_experience, best_plan, curious_plan, empty_mdp
from .policy import SlotPolicy, slot_agent, with_decoding
from .states import Known, find_states, hash_observations, key_table, nothing_known, number_states

PAIRS_LIMIT = 50_000
"""States times actions up to which a single category is counted by its number."""

ACTIONS_LIMIT = 1024
"""Actions up to which a table is used; those of several slots are all their combinations."""


class UnsuitableError(LdmError, ValueError):
    """An environment is not for a table: it shows more states than there is room for, or none of them again."""


@dataclasses.dataclass(frozen=True)
class TabularConfig(Hyperparameters):
    """How long to explore and how far to look ahead.

    Attributes:
      budget_steps: environment steps of exploration, over all parallel environments.
      num_envs: parallel environments.
      rollout_length: steps in each environment between two plans.
      discount: gamma; close to 1 where a time limit far away ends episodes.
      epsilon: share of random actions while exploring, and of a sampled policy whose states are fingerprints.
      states_limit: how many states there is room for, where they are told apart by fingerprints.
    """

    budget_steps: int = 250_000
    num_envs: int = 64
    rollout_length: int = 128
    discount: float = 0.999
    epsilon: float = 0.1
    states_limit: int = 16_384

    def __post_init__(self) -> None:
        check_hyperparameters(self, whole=("budget_steps", "num_envs", "rollout_length", "states_limit"))
        for name in ("discount", "epsilon"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1")


def is_tabular(spec: EnvironmentSpec) -> bool:
    """Whether observation and action are one category each, few enough for a table."""
    observation, action = spec.observation_space, spec.action_space
    if not (isinstance(observation, spaces.Discrete) and isinstance(action, spaces.Discrete)):
        return False
    return int(observation.n) * int(action.n) <= PAIRS_LIMIT


def takes(spec: EnvironmentSpec) -> bool:
    """Whether its actions are categories, few enough in all combinations for a table of states."""
    if any(isinstance(leaf.space, spaces.Box) for leaf in leaves(spec.action_space)):
        return False
    return math.prod(action_layout(spec.action_space).sizes) <= ACTIONS_LIMIT


def settle(environment: Environment, config: TabularConfig, seed: int) -> TabularConfig:
    """The configuration as it is: it leaves nothing open."""
    del environment, seed
    return config


def learn(environment: Environment, config: TabularConfig, seed: int) -> collections.abc.Iterator[Learned]:
    """Explores, learns the model and plans in it, and pauses at each report.

    Args:
      environment: `config.num_envs` rows; its actions are categories.
      config: how long.
      seed: of everything random.

    Yields:
      Parameters for the policy of `agent`.

    Raises:
      SpaceError: the environment's actions are not for a table.
      UnsuitableError: its observations do not repeat, or there are too many.
      EnvironmentFaultError: a reward that is not finite.
    """
    spec = environment.spec
    if not takes(spec):
        raise SpaceError(f"{spec.id} takes {spec.action_space}: too much for a table")
    layout, explorer = action_layout(spec.action_space), agent(spec, config)
    see, rng = _Eyes(spec, config), np.random.default_rng(seed)
    mdp, known = empty_mdp(see.states, math.prod(layout.sizes)), nothing_known()
    reset_key, key = jax.random.split(jax.random.key(seed))
    loop = rollout.start(environment, explorer, reset_key)
    params, each = example(spec, config), config.num_envs * config.rollout_length
    reports = {config.updates * (i + 1) // REPORTS for i in range(REPORTS)}
    for done in range(1, config.updates + 1):
        round_key = jax.random.fold_in(key, done - 1)
        acting = with_decoding(params, "sample")
        loop, trajectory = rollout.rollout(environment, explorer, acting, loop, round_key, config.rollout_length)
        timestep = jax.tree.map(lambda x, y: np.concatenate([x, y[None]]), trajectory.timestep, loop.timestep)
        state, known = see(known, timestep.observation)
        see.check(known, done * each)
        mdp = dataclasses.replace(mdp, states=see.states or len(known.keys))
        mdp = _allow(layout, mdp, state, timestep.action_mask)
        mdp = add_experience(mdp, state, _joint(layout, trajectory.action), timestep)
        if not np.isfinite(mdp.rewards).all():
            raise EnvironmentFaultError(f"{spec.id} gave a reward that is NaN or infinite, expected a finite number")
        logits = curious_plan(mdp) if done % 2 else _best(mdp, config, spec.time_limit)
        params = see.params(known, _mix(layout, _choices(layout, logits, rng), config.epsilon))
        if done in reports:
            best = _choices(layout, _best(mdp, config, spec.time_limit), None)
            # What looks alike may not be: where the best plan turns in circles, a chance gets out of them.
            yield Learned(done * each, see.params(known, best if see.states else _mix(layout, best, config.epsilon)))


def agent(spec: EnvironmentSpec, config: TabularConfig) -> Agent:
    """The agent of a table of logits, whichever way it decodes; see `policy.slot_agent`."""
    del config
    return slot_agent(action_layout(spec.action_space), functools.partial(_slot_policy, spec))


def example(spec: EnvironmentSpec, config: TabularConfig) -> PyTree:
    """Parameters of the structure and shapes that `learn` yields."""
    see = _Eyes(spec, config)
    return see.params(nothing_known(), np.zeros((see.states, action_layout(spec.action_space).flat_choices)))


class _Eyes:
    """How the states of one environment are told apart: by the number of a single category, or by fingerprints."""

    def __init__(self, spec: EnvironmentSpec, config: TabularConfig) -> None:
        self.spec, self.limit = spec, config.states_limit
        self.states, self.first = _numbered(spec)
        self.print = jax.jit(hash_observations)

    def __call__(self, known: Known, observation: PyTree) -> tuple[np.ndarray, Known]:
        """The state of each observation `[T, B, ...]`, counted from 0, and what is known then."""
        if self.states:
            return np.asarray(observation) - self.first, known
        lead = jax.tree.leaves(observation)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), observation)
        return number_states(known, np.asarray(self.print(flat)).reshape(*lead, 2))

    def check(self, known: Known, steps: int) -> None:
        """Refuses what a table cannot hold, as soon as it shows."""
        count = len(known.keys)
        if count > min(self.limit, steps // 2):
            raise UnsuitableError(
                f"{self.spec.id} showed {count} states in {steps} steps, and a table has room for {self.limit} that "
                "are seen again; take another algorithm"
            )

    def params(self, known: Known, logits: np.ndarray) -> PyTree:
        """A table of logits `[S, M]` as the agent takes it."""
        if self.states:
            return {"logits": logits.astype(np.float32)}
        table = np.zeros((self.limit, logits.shape[1]), np.float16)
        table[: len(known.keys)] = logits[known.states]
        return {"keys": key_table(known, self.limit), "logits": table}


def _numbered(spec: EnvironmentSpec) -> tuple[int, int]:
    """How many states there are and the number of the first, where the environment numbers them itself; else zeros."""
    space = spec.observation_space
    return (int(space.n), int(space.start)) if is_tabular(spec) and isinstance(space, spaces.Discrete) else (0, 0)


def _slot_policy(spec: EnvironmentSpec, params: PyTree, timestep: TimeStep) -> SlotPolicy:
    table = jnp.asarray(params["logits"])
    if "keys" in params:
        row, there = find_states(params["keys"], hash_observations(timestep.observation))
        logits = jnp.where(there[:, None], table[row].astype(jnp.float32), 0.0)
    else:
        logits = table[timestep.observation - _numbered(spec)[1]]
    if timestep.action_mask is not None:
        logits = jnp.where(timestep.action_mask, logits, NOT_ALLOWED_FLOAT16)
    nothing = jnp.zeros((logits.shape[0], 0))
    return SlotPolicy(logits, nothing, nothing)


def _joint(layout: ActionLayout, action: PyTree) -> np.ndarray:
    """Actions of all slots together as one number each, counted from 0."""
    index = np.asarray(to_slots(layout, jax.tree.map(np.asarray, action)).categorical)
    return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), layout.sizes))


def _allow(layout: ActionLayout, mdp: EmpiricalMDP, state: np.ndarray, action_mask: Array | None) -> EmpiricalMDP:
    """Takes in what is allowed in each state seen, `[T, B]` and `[T, B, M]`."""
    if action_mask is None:
        return mdp
    parts = np.split(np.asarray(action_mask).reshape(state.size, -1), np.cumsum(layout.sizes)[:-1], axis=1)
    joint = functools.reduce(lambda a, b: (a[:, :, None] & b[:, None, :]).reshape(len(a), -1), parts)
    allowed = np.zeros((mdp.states, mdp.actions), bool)
    if mdp.allowed is not None:
        allowed[: len(mdp.allowed)] = mdp.allowed
    np.logical_or.at(allowed, state.ravel(), joint)
    return dataclasses.replace(mdp, allowed=allowed)


def _choices(layout: ActionLayout, logits: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Logits over actions `[S, A]` as logits over flat choices `[S, M]`.

    Slots are independent of each other, so of several best actions of several slots one is taken: a random one, or the
    first where there is no generator.
    """
    if layout.categorical == 1:
        return logits
    best = logits if rng is None else np.where(logits > NOT_BEST, rng.random(logits.shape), -1.0)
    chosen = np.unravel_index(best.argmax(1), layout.sizes)
    return np.concatenate(
        [
            np.where(np.arange(size) == index[:, None], 0.0, NOT_BEST)
            for size, index in zip(layout.sizes, chosen, strict=True)
        ],
        1,
    )


def _mix(layout: ActionLayout, logits: np.ndarray, epsilon: float) -> np.ndarray:
    """Logits over flat choices `[S, M]` with a share of chance."""
    uniform = np.repeat(1 / np.array(layout.sizes), layout.sizes)
    return np.log((1 - epsilon) * np.exp(logits) + epsilon * uniform)


def _best(mdp: EmpiricalMDP, config: TabularConfig, horizon: int | None = None) -> np.ndarray:
    """Logits `[S, A]` of the best plan in the model."""
    return best_plan(mdp, config.discount, horizon)

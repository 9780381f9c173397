"""The best wins: of several references for one environment, trained ones and experts, the one that plays best."""

from __future__ import annotations

import collections.abc
import functools
import logging
import math

import jax

from ldm_jax import rollout
from ldm_jax.errors import ConfigError, LdmError

from .opening import MakeEnvironment, opened_for, with_room
from .policy import ReferencePolicy, SlotDecoding, with_decoding

_log = logging.getLogger(__name__)

_CHOOSING = 0xBE57  # sets the randomness of choosing apart from that of training and scoring


def choose_reference(
    make: MakeEnvironment,
    policies: collections.abc.Sequence[ReferencePolicy],
    seed: int = 0,
    num_envs: int = 64,
    episodes_per_env: int = 1,
) -> ReferencePolicy:
    """The policy with the highest mean return, each in its better form, on episodes that nothing else is told by.

    Args:
      make: makes the environment, with `expert=name` too where a reference is an expert.
      policies: of one environment; the first of equals is chosen. An expert beside which its environment cannot be
        played is left out, and told of.
      seed: of the episodes, which are the same for all.
      num_envs: parallel environments.
      episodes_per_env: in each of them.

    Raises:
      ConfigError: there is none to choose from.
      LdmError: the environment cannot be played with any of them.
    """
    if not policies:
        raise ConfigError("got no reference to choose from, expected at least one")
    if len(policies) == 1:
        return policies[0]
    key = jax.random.fold_in(jax.random.key(seed), _CHOOSING)

    def best_mean(policy: ReferencePolicy, rows: int) -> float:
        forms: tuple[SlotDecoding, ...] = ("greedy",) if policy.reference.expert else ("greedy", "sample")
        with opened_for(make, policy, rows) as environment, jax.enable_x64(False):
            played = (
                rollout.run_episodes(
                    environment,
                    policy.agent,
                    with_decoding(policy.params["policy"], form),
                    jax.random.fold_in(key, place),
                    episodes_per_env,
                )
                for place, form in enumerate(forms)
            )
            return max(float(episodes.returns.mean()) for episodes in played)

    means: list[float] = []
    failed: LdmError | None = None
    for policy in policies:
        try:
            means.append(with_room(functools.partial(best_mean, policy), num_envs))
        except LdmError as error:
            if not policy.reference.expert:
                raise
            _log.warning("%s: its expert %s is left out: %s", policy.spec.id, policy.reference.expert, error)
            failed, means = error, [*means, -math.inf]
    if failed is not None and max(means) == -math.inf:
        raise failed
    return policies[means.index(max(means))]

"""Experts where environments and references meet: which an id has, and what is measured of one beside its returns."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time

import jax

import environments
from data.references import ScoredReference, random_agent
from data.references.expert import ExpertConfig, expert_policy
from data.references.pipeline import MakeEnvironment, opened
from data.references.policy import ReferencePolicy
from environments.catalog.experts import find_expert
from ldm_jax import cards, files, rollout
from ldm_jax.types import EnvironmentSpec

FILE = "expert.json"
"""Beside the reference that an expert is."""

_WARM, _STEPS = 8, 24
_SOLVED_BY_RETURN = ("minigrid/BabyAI-",)
"""Beginnings of ids whose return is positive where the task is solved, and 0 elsewhere."""


def expert_policies(spec: EnvironmentSpec) -> list[ReferencePolicy]:
    """The references that the experts of an environment are.

    Args:
      spec: of the environment.
    """
    return [
        expert_policy(spec, ExpertConfig(info.name, info.version, info.privileged, info.labels_any_state))
        for info in environments.experts(spec.id)
    ]


def check_same_expert(id: str, reference: cards.Reference) -> None:
    """Checks that the expert that a reference is, if it is one, is still the one that was scored.

    Args:
      id: of the environment.
      reference: how the reference was made.

    Raises:
      CardError: the expert has another version now.
      ExpertError: the environment has no such expert any more.
    """
    if not reference.expert:
        return
    now = find_expert(id, reference.expert).version
    if now != reference.expert_version:
        raise cards.CardError(
            f"the expert {reference.expert} of {id} was scored in version {reference.expert_version} and is {now} now: "
            "make its reference anew, in another workdir"
        )


def measure_expert(make: MakeEnvironment, scored: ScoredReference, num_envs: int) -> dict[str, float]:
    """Measures an expert.

    Args:
      make: makes the environment.
      scored: the reference that it is.
      num_envs: parallel environments.

    Returns:
      `label_seconds` of one row in the time of acting, and `success`, a share of the episodes, where it can be told.
    """
    id, agent = scored.policy.spec.id, random_agent(scored.policy.spec.action_space)
    seconds = []
    for expert in ("", scored.policy.reference.expert):
        with opened(make, id, num_envs, expert) as environment:
            key = jax.random.key(0)
            loop = rollout.start(environment, agent, key)
            loop, _ = rollout.rollout(environment, agent, (), loop, key, _WARM)
            began = time.perf_counter()
            rollout.rollout(environment, agent, (), loop, key, _STEPS)
            seconds.append((time.perf_counter() - began) / (_STEPS * num_envs))
    facts = {"label_seconds": max(seconds[1] - seconds[0], 1e-7)}
    if id.startswith(_SOLVED_BY_RETURN):
        facts["success"] = float((scored.reference_returns.array > 0).mean())
    return facts


def write_facts(directory: pathlib.Path, facts: dict[str, float]) -> None:
    """Writes what was measured beside a reference."""
    files.write(directory / FILE, json.dumps(facts) + "\n")


def read_facts(directory: pathlib.Path) -> dict[str, float]:
    """What was measured; nothing where nothing was."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((directory / FILE).read_text())
    return {}

"""What is told of an expert beside its returns: what a label costs, and how often an episode was solved."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time

import jax

from data.references import ScoredReference, random_agent
from data.references.pipeline import MakeEnvironment, opened
from ldm_jax import files, rollout

FILE = "expert.json"
"""Beside the reference that an expert is."""

_WARM, _STEPS = 8, 24
_SOLVED_BY_RETURN = ("minigrid/BabyAI-",)
"""Beginnings of ids whose return is positive where the task is solved, and 0 elsewhere."""


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

"""Experts where environments and references meet: which an id has, and what is measured of one beside its returns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib

import numpy as np

import environments
from data.references.expert import ExpertConfig, expert_policy
from data.references.opening import MakeEnvironment
from data.references.policy import ReferencePolicy
from environments.catalog.experts import find_expert
from ldm_jax import cards, files
from ldm_jax.environment import Environment
from ldm_jax.types import EnvironmentSpec, Key, PyTree, TimeStep

FILE = "expert.json"
"""Beside the reference that an expert is."""

_SUCCESS: dict[str, tuple[str, float]] = {
    "minigrid/BabyAI-": ("earned", 0.0),
    "gymnasium-robotics/PointMaze_": ("earned", 0.0),
    "ogbench/": ("ended", 0.5),
    "topogym/": ("ended", 0.5),
    "nasim/": ("ended", 0.5),
    "procedural-frozenlake/": ("earned", 0.0),
    "gymnasium/LunarLander": ("earned", 200.0),
    "gymnasium/BipedalWalker": ("earned", 300.0),
    "envpool/LunarLander": ("earned", 200.0),
    "envpool/BipedalWalker": ("earned", 300.0),
}
"""Beginnings of ids whose library tells success, with what has to be more than a bound in an episode of success: what
it `earned` or whether it `ended` by itself (1) or was cut off (0)."""


def expert_policies(spec: EnvironmentSpec, target: float | None = None) -> list[ReferencePolicy]:
    """The references that the experts of an environment are.

    Args:
      spec: of the environment.
      target: a public return of the task, None where none is known; for their cards.
    """
    configs = (
        ExpertConfig(info.name, info.version, info.privileged, info.labels_any_state)
        for info in environments.experts(spec.id)
    )
    return [_with_target(expert_policy(spec, config), target) for config in configs]


def _with_target(policy: ReferencePolicy, target: float | None) -> ReferencePolicy:
    return dataclasses.replace(policy, reference=dataclasses.replace(policy.reference, public_target=target))


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


class Watch:
    """Makes environments as `make` does, and sees how experts do in them while somebody else plays.

    Args:
      make: makes the environment.
    """

    def __init__(self, make: MakeEnvironment):
        self._make = make
        self._watched: dict[str, _Watched] = {}

    def __call__(self, id: str, batch_size: int, expert: str = "") -> Environment:
        if not expert:
            return self._make(id, batch_size=batch_size)
        watched = _Watched(self._make(id, batch_size=batch_size, expert=expert))
        self._watched[expert] = watched
        return watched

    def facts(self, expert: str) -> dict[str, float]:
        """What was seen of an expert, beside its returns.

        Args:
          expert: its name.

        Returns:
          `label_seconds` of one answer; `answered`, the share of the time steps that it had an answer at; and
          `success`, the share of the episodes, each row's first after a reset, where its library tells it.
        """
        if expert not in self._watched:
            return {}
        watched = self._watched[expert]
        facts = {}
        if report := getattr(watched.inner, "expert_report", None):
            facts = {
                "label_seconds": max(report.label_seconds, 1e-9),
                "answered": report.counts["labels"] / max(report.counts["asked"], 1),
            }
        if watched.told:
            return facts | {"success": float(np.concatenate(watched.told).mean())}
        rule = next((rule for start, rule in _SUCCESS.items() if watched.spec.id.startswith(start)), None)
        if rule and watched.episodes[rule[0]]:
            facts["success"] = float((np.concatenate(watched.episodes[rule[0]]) > rule[1]).mean())
        return facts


class _Watched:
    """An environment of which the first episode of each row after a reset is written down."""

    def __init__(self, environment: Environment):
        self.spec, self.inner = environment.spec, environment
        self.episodes: dict[str, list[np.ndarray]] = {"earned": [], "ended": []}
        self.told: list[np.ndarray] = []

    def reset(self, key: Key) -> tuple[PyTree, TimeStep]:
        rows = self.spec.batch_size
        self._open_B, self._earned_B = np.ones(rows, bool), np.zeros(rows)
        self._solved_B = np.zeros(rows, bool)
        return self.inner.reset(key)

    def step(self, state: PyTree, action: PyTree) -> tuple[PyTree, TimeStep]:
        state, timestep = self.inner.step(state, action)
        reward_B, last_B = np.asarray(timestep.reward, float), np.asarray(timestep.last)
        self._earned_B += reward_B
        solved = getattr(self.inner, "solved", None)
        self._solved_B |= False if solved is None else solved
        closing_B = self._open_B & last_B
        if closing_B.any():
            self._open_B &= ~closing_B
            self.told += [] if solved is None else [self._solved_B[closing_B]]
            for name, value_B in (("earned", self._earned_B), ("ended", np.asarray(timestep.terminated))):
                self.episodes[name].append(value_B[closing_B].astype(float))
        return state, timestep

    def close(self) -> None:
        self.inner.close()


def write_facts(directory: pathlib.Path, facts: dict[str, float]) -> None:
    """Writes what was measured beside a reference."""
    files.write(directory / FILE, json.dumps(facts) + "\n")


def read_facts(directory: pathlib.Path) -> dict[str, float]:
    """What was measured; nothing where nothing was."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((directory / FILE).read_text())
    return {}

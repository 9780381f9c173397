"""Experts that are functions of the observation, beside any environment that shows them what they read.

They run here, row by row, whichever library the environment is of and wherever its simulator runs: what the expert of
one library reads, envpool's version of the task shows too. Each has the calls of `bridges.experts`; in the place of the
library's own environment it gets a `Shown`.
"""

from __future__ import annotations

import importlib
import typing

import jax
import numpy as np

from ldm_jax.environment import Environment
from ldm_jax.types import EnvironmentSpec, Key, PyTree, TimeStep

from .bridges import experts
from .catalog.experts import ExpertError, ExpertInfo
from .isolation.labels import ExpertReport, Labels
from .isolation.worker.experts import Experts
from .tokens import draw_seeds


class Shown:
    """What an expert that sees observations alone is told of its environment.

    Attributes:
      name: the library's own id.
      action_space: of one environment.
      observation_space: of one environment.
    """

    def __init__(self, spec: EnvironmentSpec):
        self.name = spec.id.partition("/")[2]
        self.action_space, self.observation_space = spec.action_space, spec.observation_space

    @property
    def unwrapped(self) -> Shown:
        """Itself."""
        return self


class _Outcome(typing.NamedTuple):
    observation: PyTree
    reward: float
    ended: bool
    info: dict[str, typing.Any]


class ObservedEnvironment:
    """An environment whose time steps are labelled by what an expert makes of their observations.

    Attributes:
      spec: of the environment.
    """

    spec: EnvironmentSpec

    def __init__(self, environment: Environment, expert: ExpertInfo):
        self.spec, self._inner = environment.spec, environment
        rows = self.spec.batch_size
        if self.spec.jittable:
            raise ExpertError(f"{self.spec.id} is a pure function, expected one that is stepped in Python")
        self._shown, self._labels = Shown(self.spec), Labels(self.spec.id, self.spec.action_space, rows)
        self._arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._labels.wanted(1).items()}
        self._arrays["seed"] = np.zeros(rows, np.int64)
        self._labels.place(self._arrays)
        module = importlib.import_module(f"{experts.__name__}.{expert.module}")
        self._program: typing.Any = module.EXPERTS[expert.name]

    @property
    def rows_outside(self) -> int:
        """Rows since `make` with a number outside the declared bounds."""
        return getattr(self._inner, "rows_outside", 0)

    @property
    def expert_report(self) -> ExpertReport:
        """How the expert has done since `make`."""
        return self._labels.report()

    @property
    def solved(self) -> np.ndarray | None:
        """`bool [B]`, whether the task was solved at the last step, where the environment tells it; else None."""
        return getattr(self._inner, "solved", None)

    def reset(self, key: Key) -> tuple[PyTree, TimeStep]:
        state, timestep = self._inner.reset(key)
        self._arrays["seed"][:] = draw_seeds(jax.random.fold_in(key, 1), self.spec.batch_size)
        self._experts = Experts(self._program, self.spec.action_space, self._arrays)
        return state, self._label(timestep, None)

    def step(self, state: PyTree, action: PyTree) -> tuple[PyTree, TimeStep]:
        state, timestep = self._inner.step(state, action)
        return state, self._label(timestep, jax.tree.map(np.asarray, action))

    def close(self) -> None:
        self._inner.close()

    def _label(self, timestep: TimeStep, action: PyTree | None) -> TimeStep:
        last_B, first_B = np.asarray(timestep.last), np.asarray(timestep.first)
        observation = jax.tree.map(np.asarray, timestep.observation)
        for row in range(self.spec.batch_size):
            seen = jax.tree.map(lambda leaf, row=row: leaf[row], observation)
            outcome = _Outcome(seen, float(timestep.reward[row]), bool(last_B[row]), {})
            executed = None if first_B[row] else jax.tree.map(lambda leaf, row=row: leaf[row], action)
            self._experts.follow(row, self._shown, executed, outcome, is_new=action is None)
        if self._experts.notes:
            self._labels.note(*self._experts.notes)
            self._experts.notes = []
        mask = None if timestep.action_mask is None else np.asarray(timestep.action_mask)
        return timestep._replace(expert=self._labels.receive(last_B, mask))

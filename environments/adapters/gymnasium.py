"""Gymnasium: any library of it that is installed in this interpreter, stepped one row after another.

Its own classic control and toy text come with it; ids of other packages are those that their import has registered.
Rows are called, and what they return is checked and converted, by the program of the workers: an environment behaves
here as it does in an interpreter of its own, except that its first fault ends the run.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import operator
import os
import types
import typing
from traceback import format_exception_only

import gymnasium
import numpy as np

from ldm_jax.environment import EnvironmentFaultError, LibraryMissingError
from ldm_jax.spaces import SpaceError
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

from .. import checks
from ..bridges import experts
from ..catalog import taxonomy
from ..catalog.experts import ExpertInfo
from ..isolation.batch import DEFAULT_TIME_LIMIT, EnvironmentBatch, Spaces, find_limit, read_spaces
from ..isolation.labels import ExpertReport
from ..isolation.program import Options, encode_options
from ..isolation.worker import gym_api, values
from ..isolation.worker.experts import Experts
from ..tokens import Token, check_newest

LIBRARY = "gymnasium"

_DEFAULT_LIMITS = types.MappingProxyType({"toy_text": 200, "": DEFAULT_TIME_LIMIT})
"""Steps, where an id has none, by the last word of its package: a random CliffWalking walks thousands of steps."""

_log = logging.getLogger(__name__)


class _Folder(contextlib.AbstractContextManager[None]):
    """Where a library works: it may go elsewhere with `os.chdir`, and this process does not go with it."""

    def __init__(self) -> None:
        self._theirs = ""

    def __enter__(self) -> None:
        self._ours = os.getcwd()
        if self._theirs:
            with contextlib.suppress(FileNotFoundError):
                os.chdir(self._theirs)

    def __exit__(self, *_: object) -> None:
        try:
            now = os.getcwd()
        except FileNotFoundError:  # it has removed the folder that it works in
            now = ""
        if now != self._ours:
            self._theirs = now
            os.chdir(self._ours)


class GymnasiumEnvironment:
    """B environments of one Gymnasium id with next-step reset; see `ldm_jax.environment.Environment`.

    Attributes:
      spec: what is known before stepping.
    """

    spec: EnvironmentSpec

    def __init__(
        self,
        spec: EnvironmentSpec,
        library: gym_api.Library,
        first: gymnasium.Env,
        folder: _Folder,
        program: typing.Any,
    ):
        self.spec, self._folder = spec, folder
        self._token: Token | None = None
        self._step_count = 0
        with folder:
            choices = library.count_choices(first)
        self._batch = EnvironmentBatch(spec, choices, workers=1, has_expert=program is not None)
        try:
            self._batch.place(np.zeros(self._batch.size, np.uint8))
        except MemoryError as error:
            raise EnvironmentFaultError(
                f"{spec.id} with {spec.batch_size} rows cannot be made: {error}; take fewer rows (batch_size)"
            ) from None
        arrays, beside = self._batch.arrays, None
        if program is not None:
            beside = Experts(program, first.action_space, arrays)
        self._rows = gym_api.Rows(library, first, arrays, range(spec.batch_size), experts=beside)

    @property
    def rows_outside(self) -> int:
        """Rows since `make` with a number outside the declared bounds: some libraries return those."""
        return self._batch.rows_outside

    @property
    def expert_report(self) -> ExpertReport | None:
        """How the expert has done since `make`; None without one."""
        return self._batch.labels.report() if self._batch.labels else None

    @property
    def solved(self) -> np.ndarray | None:
        """`bool [B]`, whether the task was solved at the last step; None without an expert, or where nobody tells."""
        return self._batch.labels.solved if self._batch.labels else None

    def reset(self, key: Array) -> tuple[Token, TimeStep]:
        self._step_count = 0
        return self._advance(self._batch.start(key))

    def step(self, state: Token, action: PyTree) -> tuple[Token, TimeStep]:
        check_newest(self.spec.id, state, self._token)
        command_B = self._batch.act(action)
        self._step_count += 1
        return self._advance(command_B)

    def close(self) -> None:
        self._token = None
        with self._folder:
            errors = self._rows.close()
        for error in errors:
            _log.warning(
                "%s: closing it raised an error, and it is gone all the same: %s", self.spec.id, _summary(error)
            )

    def _advance(self, command_B: np.ndarray) -> tuple[Token, TimeStep]:
        self._token = None  # a step that fails leaves no state to go on from
        self._batch.arrays["command"][:] = command_B
        with self._folder:
            failures = self._rows.obey()
        if self._batch.labels and self._rows.experts.notes:
            self._batch.labels.note(*self._rows.experts.notes)
            self._rows.experts.notes = []
        for row, kind, error in failures:
            place = checks.where(self.spec.id, self._step_count, [row])
            raise EnvironmentFaultError(f"{place}: {kind}: {_summary(error)}") from error
        for fault in self._batch.collect(np.ones(self.spec.batch_size, bool)):
            place = checks.where(self.spec.id, self._step_count, fault.rows)
            raise EnvironmentFaultError(f"{place}: {fault.kind}: {fault.text}")
        time_step = self._batch.receive(command_B != gym_api.STEP, np.zeros(self.spec.batch_size, bool))
        self._token = Token()
        return self._token, time_step


def candidates() -> dict[str, str]:
    """The ids in Gymnasium's registry, each with the reason why it is not offered, empty where it is."""
    return {
        name: "it wraps an environment of old Gym that has to be given" if name.startswith("GymV2") else ""
        for name in gymnasium.registry
    }


def domain(name: str) -> str:
    """What the task of an id is about."""
    known = name in gymnasium.registry and _module(name).startswith("gymnasium.")
    return taxonomy.first_match(taxonomy.GYMNASIUM, name) if known else LIBRARY


def make(
    name: str,
    batch_size: int,
    time_limit: int | None,
    options: Options = types.MappingProxyType({}),
    expert: ExpertInfo | None = None,
) -> GymnasiumEnvironment:
    """Makes B environments by an id of Gymnasium's registry.

    Args:
      name: the id.
      batch_size: B.
      time_limit: steps; None keeps the registered limit, or takes a default where there is none.
      options: of the library's own `make`; each environment gets them anew.
      expert: which labels each time step.

    Raises:
      ConfigError: an option that could not be carried to another interpreter.
      EnvironmentFaultError: the library cannot make it.
      LibraryMissingError: a package that it needs is not installed.
      SpaceError: it declares a space that is not supported.
    """
    id, folder = f"{LIBRARY}/{name}", _Folder()
    encoded = encode_options(id, options)
    library = gym_api.Library(gymnasium, gymnasium.registry[name], encoded, time_limit and operator.index(time_limit))
    try:
        with folder:
            first = library.make()
    except gymnasium.error.DependencyNotInstalled as error:
        raise LibraryMissingError(
            f"{id} cannot be made: {error}; what it needs comes with: pip install 'ldm_jax[gymnasium]'"
        ) from error
    except gym_api.FAILURES as error:
        raise EnvironmentFaultError(f"{id} cannot be made: {_summary(error)}") from error
    family = next((family for family in _DEFAULT_LIMITS if f".{family}." in f".{_module(name)}."), "")
    carried = _read_spaces(id, first)
    spec = EnvironmentSpec(
        id=id,
        library=LIBRARY,
        version=gymnasium.__version__,
        observation_space=carried.observation,
        action_space=carried.action,
        batch_size=operator.index(batch_size),
        time_limit=time_limit or find_limit(library.known_limit(first), _DEFAULT_LIMITS[family]),
        domain=domain(name),
        jittable=False,
    )
    program = None
    if expert is not None:
        program = importlib.import_module(f"{experts.__name__}.{expert.module}").EXPERTS[expert.name]
    return GymnasiumEnvironment(spec, library, first, folder, program)


def _read_spaces(id: str, environment: gymnasium.Env) -> Spaces:
    try:
        declared = [values.describe(space) for space in (environment.observation_space, environment.action_space)]
        return read_spaces(*declared)
    except (values.RefusedError, SpaceError) as error:
        gym_api.close(environment)
        raise SpaceError(f"{id} declares spaces that are not supported: {error}") from error


def _summary(error: BaseException) -> str:
    """An error as a traceback ends with it, without the traceback."""
    return str(error) if isinstance(error, values.WrongError) else "".join(format_exception_only(error)).strip()


def _module(name: str) -> str:
    point = gymnasium.registry[name].entry_point
    return point.partition(":")[0] if isinstance(point, str) else getattr(point, "__module__", "")

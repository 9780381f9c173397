"""Envpool: simulators in C++ threads, stepped as one batch of NumPy arrays."""

from __future__ import annotations

import collections.abc
import importlib
import importlib.metadata
import logging
import math
import string
import types
import typing
import warnings

import gymnasium
import jax
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import EnvironmentFaultError, LibraryMissingError
from ldm_jax.types import Array, EnvironmentSpec, PyTree, TimeStep

from .. import checks, conversion
from ..catalog import taxonomy
from ..cores import available_cores
from ..tokens import Token, check_newest, draw_seeds

LIBRARY = "envpool"

_DOMAINS: collections.abc.Mapping[str, dict[str, str]] = types.MappingProxyType(
    {
        "atari": {"*": "games"},
        "box2d": taxonomy.GYMNASIUM,
        "classic_control": taxonomy.GYMNASIUM,
        "gfootball": {"*": "games"},
        "highway": {"*": "driving"},
        "jumanji": taxonomy.JUMANJI,
        "minigrid": {"*Memory*": "memory", "*": "navigation"},
        "mujoco.dmc": taxonomy.DM_CONTROL,
        "mujoco.gym": taxonomy.GYMNASIUM,
        "mujoco.metaworld": {"*": "manipulation"},
        "mujoco.myosuite": dict.fromkeys(("*Leg*", "*OslRun*", "*ChaseTag*", "*Soccer*"), "locomotion")
        | {"*Torso*": "robotics", "*": "manipulation"},
        "mujoco.playground": dict.fromkeys(("*Aloha*", "*Panda*", "*Leap*", "*AeroCube*"), "manipulation")
        | {"*": "locomotion"},
        "mujoco.robotics": {"*Maze*": "navigation", "*": "manipulation"},
        "pgx": {"*": "board games"},
        "procgen": {"*": "games"},
        "toy_text": taxonomy.GYMNASIUM,
        "vizdoom": {"*MyWayHome*": "navigation", "*Navigation*": "navigation", "*": "games"},
    }
)
"""By family of simulators and pattern of ids; the first that matches counts."""

_REFUSED = types.MappingProxyType(
    {
        "Cig-v1": "it waits for other players and crashes the process",
        "MultiDuel-v1": "it waits for other players and crashes the process",
        "VizdoomCustom-v1": "it has no scenario of its own",
        "Sudoku-v0": "its database of puzzles is not in the package",
        "Sudoku-very-easy-v0": "its database of puzzles is not in the package",
        "Jumanji/Sudoku-v0": "its database of puzzles is not in the package",
        "Jumanji/Sudoku-very-easy-v0": "its database of puzzles is not in the package",
    }
)

_NO_LIMIT = 1_000_000  # steps; where a library has no time limit it declares 2^31 - 1
_DEFAULT_LIMIT = 1000
_TOY_TEXT_LIMIT = 200  # CliffWalking declares none, and a random policy walks thousands of steps
_MISSION_LIMIT = 2304  # BabyAI declares 0: each mission brings its own, at most 4 instructions of 8 x 8 x 9 steps
_LIMIT_IS_THEIRS = ("jumanji", "minigrid", "mujoco.playground")
"""Families whose simulators themselves use `max_episode_steps`: for an internal limit, a reward, or a schedule."""

_OPTIONS: collections.abc.Mapping[str, collections.abc.Mapping[str, typing.Any]] = types.MappingProxyType(
    {
        # Raw actions are unbounded numbers of which only zero and non-zero differ: take the discrete form.
        "vizdoom": {"use_combined_action": True},
        # Its default hides the goal, and nobody can be told what to do for a goal that is not shown.
        "mujoco.metaworld": {"partially_observable": False},
    }
)
"""What is asked of envpool beyond its defaults, by family."""

_MAX_THREADS = 16

_log = logging.getLogger(__name__)


class _Pool(typing.NamedTuple):
    """How to make a pool, and where its arrays are.

    Attributes:
      name: envpool's own id.
      options: of its configuration.
      action_dtype: that it takes.
      places: of reward, done, truncated, the mask if there is one, and the leaves of the observation, among the arrays
        that it returns.
      masked: whether there is a mask.
      success: the place of what says whether a task is solved, -1 where nothing does.
    """

    name: str
    options: dict[str, typing.Any]
    action_dtype: typing.Any
    places: tuple[int, ...]
    masked: bool
    success: int = -1


class EnvpoolEnvironment:
    """B parallel envpool environments with next-step reset; see `ldm_jax.environment.Environment`.

    Attributes:
      spec: what is known before stepping.
      solved: `bool [B]`, whether the task was solved at the last step, where envpool tells it; else None.
      rows_outside: rows since `make` with a number outside the declared bounds: some libraries return those.
    """

    spec: EnvironmentSpec
    rows_outside: int

    def __init__(self, spec: EnvironmentSpec, pool: _Pool):
        self.spec = spec
        self.rows_outside = 0
        self._about = pool
        self._rows = np.arange(spec.batch_size, dtype=np.int32)
        self._all_B = np.ones(spec.batch_size, bool)
        self._observations = checks.Observations(spec.observation_space, spec.batch_size)
        self._action_shape = (spec.batch_size, *(spec.action_space.shape or ()))
        # Of each leaf with B before it: asked for at every step, and slow to make.
        self._structs = {
            leaf.path: jax.ShapeDtypeStruct((spec.batch_size, *struct.shape), struct.dtype)
            for leaf in self._observations.leaves
            for struct in [spaces.leaf_shape_dtype(leaf.space)]
        }
        self._pool: typing.Any = None
        self._token: Token | None = None
        self.solved: np.ndarray | None = None

    def reset(self, key: Array) -> tuple[Token, TimeStep]:
        self.close()
        batch_size = self.spec.batch_size
        # Envpool takes seeds only when a pool is made. A pool costs a millisecond and what its simulators load.
        seeds = draw_seeds(key, batch_size)
        with _quiet():
            self._pool = _envpool().make_gymnasium(
                self._about.name,
                num_envs=batch_size,
                num_threads=min(batch_size, available_cores(), _MAX_THREADS),
                seed=seeds.tolist(),
                **self._about.options,
            )
        self._pool._reset(self._rows)
        _, _, _, *rest = self._hear()
        self._step_count = 0
        self._start_B = np.zeros(batch_size, np.int64)
        self._due = self.spec.time_limit
        self._last_B = np.ones(batch_size, bool)
        no_B = np.zeros(batch_size, bool)
        return self._receive([np.zeros(batch_size, np.float32), no_B, no_B, *rest])

    def step(self, state: Token, action: PyTree) -> tuple[Token, TimeStep]:
        check_newest(self.spec.id, state, self._token)
        self._token = None  # a step that fails leaves no state to go on from
        self._step_count += 1
        action = np.array(action, self._about.action_dtype, order="C")  # it refuses arrays that cannot be written
        if action.shape != self._action_shape:
            raise spaces.SpaceError(
                f"{self.spec.id}: the action has shape {list(action.shape)}, expected {list(self._action_shape)}"
            )
        if not self._any_overdue:
            self._pool._send([self._rows, self._rows, action])
            return self._receive(self._hear())
        # A forced reset and a step in flight together overwrite each other's rows: one after the other.
        overdue, going = self._rows[self._overdue_B], self._rows[~self._overdue_B]
        self._pool._reset(overdue)
        reward, _, _, *rest = self._hear()
        no = np.zeros(len(overdue), bool)
        heard = [np.zeros_like(reward), no, no, *rest]
        if len(going):
            self._pool._send([going, going, action[going]])
            heard = [np.concatenate(both) for both in zip(heard, self._hear(), strict=True)]
        row_of = np.argsort(np.concatenate([overdue, going]))
        return self._receive([part[row_of] for part in heard])

    def close(self) -> None:
        pool, self._pool, self._token = self._pool, None, None
        if pool is not None:
            try:
                pool.close()
            except Exception as error:  # it is gone all the same
                _log.warning("%s: closing it raised an error: %r", self.spec.id, error)

    def _hear(self) -> list[np.ndarray]:
        """Reward, terminated, truncated, the mask if there is one, and the leaves of the observation, as they come."""
        # Without the two layers of Python around it, which take a fifth of the time of a quick simulator.
        arrays = self._pool._recv()
        if self._about.success >= 0:
            success = arrays[self._about.success]
            self.solved = success > 0 if len(success) == self.spec.batch_size else None
        reward, done, truncated, *rest = [arrays[place] for place in self._about.places]
        return [reward, done & ~truncated, truncated, *rest]

    def _receive(self, heard: list[np.ndarray]) -> tuple[Token, TimeStep]:
        """Makes a time step of what envpool returned and keeps the books."""
        reward_B, terminated_B, truncated_B, *rest = heard
        mask = rest.pop(0) if self._about.masked else None
        first_B = self._last_B
        if any_first := np.count_nonzero(first_B):
            self._start_B[first_B] = self._step_count
        self._any_overdue = False
        if self._step_count >= self._due:
            over_B = self._step_count - self._start_B >= self.spec.time_limit
            # Only envpool's own ends make it reset a row by itself.
            self._overdue_B = over_B & ~terminated_B & ~truncated_B
            self._any_overdue = bool(self._overdue_B.any())
            truncated_B = truncated_B | over_B
            going_on = self._start_B[~over_B]
            self._due = self.spec.time_limit + (going_on.min() if len(going_on) else self._step_count)
        self._last_B = terminated_B | truncated_B
        reward_B = np.asarray(reward_B, np.float32)
        if reward_B.shape != (self.spec.batch_size,):
            self._refuse_shape("the reward", reward_B, [self.spec.batch_size])
        self._refuse(checks.reward_faults(reward_B, self._all_B))
        if any_first:
            reward_B = np.where(first_B, np.float32(0), reward_B)  # MetaWorld rewards a reset
        values = [self._fit(leaf, value) for leaf, value in zip(self._observations.leaves, rest, strict=True)]
        if violations := self._observations.violations(values):
            for leaf, value in violations:
                self._refuse(leaf.faults(value, self._all_B))
            self.rows_outside += checks.count_outside(violations)
        time_step = TimeStep(
            observation=spaces.unflatten(self.spec.observation_space, values),
            reward=reward_B,
            terminated=terminated_B,
            truncated=truncated_B,
            first=first_B,
            action_mask=None if mask is None else self._allowed(mask),
        )
        self._token = Token()
        return self._token, time_step

    def _fit(self, leaf: checks.CheckedLeaf, value: np.ndarray) -> np.ndarray:
        """The value `[B, ...]` in the shape and dtype of its space."""
        struct = self._structs[leaf.path]
        if value.shape != struct.shape:
            if value.size != math.prod(struct.shape):
                what = "the observation" + (f", part {leaf.name!r}," if leaf.path else "")
                self._refuse_shape(what, value, struct.shape)
            value = value.reshape(struct.shape)  # scalars come as [B, 1]
        return value if value.dtype == struct.dtype else conversion.cast(value, struct.dtype)

    def _allowed(self, mask: np.ndarray) -> np.ndarray:
        sizes = [size for leaf in spaces.leaves(self.spec.action_space) for size in spaces.choices(leaf.space)]
        mask = mask.astype(bool).reshape(self.spec.batch_size, len(sizes), -1)
        # At an end nothing may be allowed any more; a slot without a choice would make NaN of every policy.
        return (mask | ~mask.any(-1, keepdims=True)).reshape(self.spec.batch_size, -1)

    def _refuse(self, faults: collections.abc.Iterable[checks.RowFault]) -> None:
        if found := list(faults):
            place = checks.where(self.spec.id, self._step_count, (fault.row for fault in found))
            raise EnvironmentFaultError(f"{place}: {found[0].kind}: {found[0].text}")

    def _refuse_shape(self, what: str, value: np.ndarray, expected: collections.abc.Iterable[int]) -> typing.NoReturn:
        place = checks.where(self.spec.id, self._step_count, range(self.spec.batch_size))
        raise EnvironmentFaultError(f"{place}: shape: {what} has shape {list(value.shape)}, expected {list(expected)}")


def candidates() -> dict[str, str]:
    """Envpool's own ids, each with the reason why it is not offered, empty where it is."""
    return {name: _refusal(name) for name in _envpool().list_all_envs()}


def domain(name: str) -> str:
    """What the task of an id is about."""
    return taxonomy.first_match(_DOMAINS.get(_family(name), {}), name) if name in _registry().specs else LIBRARY


def _refusal(name: str) -> str:
    if name in _REFUSED or name not in _registry().specs:
        return _REFUSED.get(name, "envpool lists it and cannot make it")
    if (_family(name) == "pgx" and name != "Play2048-v1") or "multi-agent" in name or "MultiAgent" in name:
        return "several players act in it, and envpool returns an observation and a reward for each"
    return ""


def make(name: str, batch_size: int, time_limit: int | None) -> EnvpoolEnvironment:
    """Makes B environments by envpool's own id.

    Args:
      name: envpool's own id.
      batch_size: B.
      time_limit: steps; None keeps envpool's own, or takes a default where it has none.

    Raises:
      LibraryMissingError: shared libraries that it needs are not there.
    """
    family = _family(name)
    options: dict[str, typing.Any] = dict(_OPTIONS.get(family, {}))
    with _quiet():
        try:
            inner = _envpool().make_spec(name, **options)
        except ImportError as error:
            if family != "procgen":
                raise
            raise LibraryMissingError(
                f"{LIBRARY}/{name} needs the shared libraries of Qt, which no Python package brings ({error}); on "
                "Debian: apt-get install libqt5core5a libqt5gui5"
            ) from error
        declared, action_space = inner.observation_space, conversion.action_space(_mend(inner.action_space))
    own_limit = inner.config.max_episode_steps
    if time_limit is None and own_limit == 0:
        time_limit = _MISSION_LIMIT  # not passed on: a mission's reward depends on its own limit
    else:
        if time_limit is None and own_limit > _NO_LIMIT:
            time_limit = _TOY_TEXT_LIMIT if family == "toy_text" else _DEFAULT_LIMIT
        time_limit = time_limit or own_limit
        # Envpool calls an end in the very step of its limit truncated, even a terminal one, and some simulators ignore
        # the limit. So the limit is kept by `EnvpoolEnvironment`, and envpool's own lies one step behind it.
        options["max_episode_steps"] = time_limit + (family not in _LIMIT_IS_THEIRS)
    mask = _find_mask(inner.state_array_spec, action_space)
    spec = EnvironmentSpec(
        id=f"{LIBRARY}/{name}",
        library=LIBRARY,
        version=importlib.metadata.version(LIBRARY),
        observation_space=conversion.observation_space(_mend(declared, mask.partition(":")[2])),
        action_space=action_space,
        batch_size=batch_size,
        time_limit=time_limit,
        domain=domain(name),
        jittable=False,
    )
    keys = [key.replace(".", ":") for key in inner._state_keys]
    parts = [":".join(map(str, ("obs", *leaf.path))) for leaf in spaces.leaves(spec.observation_space)]
    if parts == ["obs"]:  # it may have a name that its space has not
        parts = [key for key in keys if key.partition(":")[0] == "obs"]
    wanted = ["reward", "done", "trunc", *([mask] if mask else []), *parts]
    places = tuple(keys.index(key) for key in wanted)
    success = keys.index("info:success") if "info:success" in keys else -1
    pool = _Pool(name, options, inner._action_spec[-1][0], places, bool(mask), success)
    return EnvpoolEnvironment(spec, pool)


def _envpool() -> typing.Any:
    return importlib.import_module("envpool")


def _quiet() -> warnings.catch_warnings:
    # Gymnasium warns of bounds that it rounds to float32, once for every space.
    return warnings.catch_warnings(action="ignore")


def _family(name: str) -> str:
    return _registry().specs[name][0].removeprefix("envpool.")


def _registry() -> typing.Any:
    _envpool()  # the whole of it: while another thread imports it, its registry is there already, and not yet filled
    return importlib.import_module("envpool.registration").registry


def _find_mask(state_spec: dict[str, typing.Any], action_space: typing.Any) -> str:
    """The key of the mask of allowed choices is, if it has one row per slot of the action space."""
    sizes = spaces.choices(action_space)
    wanted = sizes if len(sizes) == 1 else (len(sizes), *set(sizes))
    for key in ("obs:action_mask", "info:legal_action_mask"):
        # Masks over combinations of slots (BinPack, Minesweeper) say nothing slot by slot: they stay observations.
        if sizes and key in state_spec and tuple(state_spec[key].shape) == wanted:
            return key
    return ""


def _mend(space: typing.Any, left_out: str = "", name: str = "") -> gymnasium.Space:
    """The space that envpool means by the one that it declares."""
    if isinstance(space, gymnasium.spaces.Dict):
        children = {key: child for key, child in space.items() if key != left_out}
        return gymnasium.spaces.Dict({key: _mend(child, "", key) for key, child in children.items()})
    if name == "mission":
        # MiniGrid declares its sentence as bytes; they are ASCII, padded with zeros.
        return gymnasium.spaces.Text(space.shape[0], min_length=0, charset=string.printable)
    if isinstance(space, gymnasium.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        # LunarLander, pgx and VizDoom declare the smallest positive number where they mean the lowest one.
        low = np.where(space.low == np.finfo(space.dtype).tiny, -np.inf, space.low).astype(space.dtype)
        return gymnasium.spaces.Box(low, space.high, space.shape, typing.cast(typing.Any, space.dtype))
    return space

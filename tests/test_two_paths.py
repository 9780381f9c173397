"""Gymnasium in this interpreter and in a worker's: every oddity of a library is met alike, step by step."""

import copy
import importlib
import json
import logging
import os
import pathlib
import pickle
import re
import sys

import gymnasium
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from spaces_strategies import action_spaces, any_spaces, library_sample
from test_isolation import LIBRARY, OF_A_ROW, same, worker_spec

import ldm_jax
from environments.adapters import gymnasium as in_process
from environments.isolation import IsolatedEnvironment, Isolation, WorkerSpec, groups
from environments.isolation.batch import Fault, read_spaces
from environments.isolation.program import WorkerFaultError
from environments.isolation.venvs import VenvSpec
from environments.isolation.worker import values
from ldm_jax import spaces
from ldm_jax.errors import ConfigError
from ldm_jax.types import MAX_TIME_LIMIT

ROWS, STEPS, TROUBLE = 3, 12, 6
OPTIONS = {"size": (4, 4), "prices": {0: 5.0, 1: 7.0}, "weights": np.arange(3.0), "level": np.int16(3)}

GOES_ON = (
    *("Steady", "Everything", "Choosy", "InfoOfMixedTypes", "InfoIsNone", "MaskIsAList", "MaskIsMissingAtTheEnd"),
    *("MaskIsOneOfEachSlot", "MaskIsFlat", "KeysInTheirOwnOrder", "ReadsItsSpec", "ReadsItsLimit", "ChangesFolder"),
    *("CloseRaises", "TakesOptions", "BeyondItsBounds"),
)
FAILS = {
    **{name: text for name, (_, text) in OF_A_ROW.items()},
    "ExitsInStep": "SystemExit",
    "ExitsInReset": "SystemExit.*3",
    "TypeErrorInReset": "TypeError.*unsupported operand",
    "ResetReturnsNone": "reset returned NoneType, expected a pair of the observation and a dict",
    "ResetReturnsTheObservation": "reset returned dict, expected a pair of the observation and a dict",
    "ResetTakesNoSeed": "its reset takes no seed",
    "MaskOfAnotherSize": "the action mask has 2 entries of .*, expected 4",
    "CannotBeMade": "RuntimeError.*no display",
    "SequenceSpace": "kind Sequence is not supported",
    "IntegerKeys": "keys that are not strings",
}
EXACT_OR_REFUSED = ("WideIntegers", "FarDiscrete")


@pytest.fixture(scope="module", autouse=True)
def library():
    """The misbehaving library in this interpreter too, while the tests of this file run."""
    before = set(gymnasium.registry)
    _forget_library()  # it registers its environments when it is imported
    sys.path.insert(0, str(LIBRARY))
    importlib.import_module("misbehaving")
    yield
    sys.path.remove(str(LIBRARY))
    for id in set(gymnasium.registry) - before:
        del gymnasium.registry[id]


def _forget_library():
    for module in [name for name in sys.modules if name.split(".")[0] == "misbehaving"]:
        del sys.modules[module]


def make(where, name, batch_size=ROWS, time_limit=None, options=None):
    if where == "here":
        return in_process.make(f"{name}-v0", batch_size, time_limit, options or {})
    isolation = Isolation(workers=1, max_faults=0)
    return IsolatedEnvironment(worker_spec(name, kwargs=options or {}), batch_size, time_limit, isolation)


def actions(environment):
    """The same actions for the same space; those of the usual one make trouble in one row."""
    space = environment.spec.action_space
    for t in range(STEPS):
        if space == gymnasium.spaces.Discrete(4):
            action = np.random.default_rng(t).integers(0, 3, ROWS).astype(np.int32)
            action[1] = 3 if t == TROUBLE else action[1]
        else:
            action = jax.tree.map(np.asarray, spaces.sample(jax.random.key(t), space, ROWS))
        yield action


def play(where, name, time_limit=None, options=None):
    """The time steps, what was counted outside the bounds after each, and the error that ended it."""
    seen, environment = [], None
    try:
        environment = make(where, name, ROWS, time_limit, options)
        state, time_step = environment.reset(jax.random.key(0))
        seen.append((time_step, environment.rows_outside))
        for action in actions(environment):
            state, time_step = environment.step(state, action)
            seen.append((time_step, environment.rows_outside))
    except ldm_jax.LdmError as error:
        return environment, seen, str(error)
    finally:
        if environment is not None:
            environment.close()
    return environment, seen, ""


def play_both(name, **options):
    """Plays in both interpreters and compares step by step."""
    (one, here, error), (other, there, other_error) = (play(where, name, **options) for where in ("here", "there"))
    assert bool(error) == bool(other_error), (error, other_error)
    assert len(here) == len(there)
    for (time_step, outside), (other_step, other_outside) in zip(here, there, strict=True):
        assert same(time_step, other_step) and outside == other_outside
        kinds, others = (jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (time_step, other_step))
        assert kinds == others
    if one is not None and other is not None:
        for name in ("observation_space", "action_space", "time_limit"):
            assert getattr(one.spec, name) == getattr(other.spec, name)
    return here, (error, other_error)


@pytest.mark.parametrize("name", GOES_ON)
def test_oddities_that_are_no_faults_are_met_alike(name, caplog):
    folder = os.getcwd()
    with caplog.at_level(logging.WARNING):
        seen, errors = play_both(name, options=OPTIONS if name == "TakesOptions" else None)
    assert errors == ("", "") and len(seen) == STEPS + 1
    assert os.getcwd() == folder
    warned = [record.getMessage() for record in caplog.records if "closing it raised an error" in record.getMessage()]
    assert (len(warned) >= 2) == (name == "CloseRaises")
    last, _ = seen[-1]
    if name == "ReadsItsLimit":
        assert (last.observation["place"] == 20).all()
    if name == "TakesOptions":  # 100 and 7 and 3 in each step, for every row
        places = np.array([time_step.observation["place"][:, 0] for time_step, _ in seen])
        assert (np.diff(places, axis=0) >= 109.9).all()
    if name == "BeyondItsBounds":  # from the first step on: 10**10 is no number up to 100
        assert [outside for _, outside in seen] == [ROWS * t for t in range(STEPS + 1)]
        assert (seen[5][0].observation["picture"] == [255, 3]).all()
    if name == "MaskIsMissingAtTheEnd":
        assert [t for t, (time_step, _) in enumerate(seen) if time_step.terminated.all()] == [4, 9]
        assert seen[4][0].action_mask.all() and not seen[3][0].action_mask.all()
    if name in ("MaskIsOneOfEachSlot", "MaskIsFlat"):
        assert seen[1][0].action_mask.tolist() == [[True, False, False, True, True]] * ROWS
        assert seen[5][0].action_mask.all()


@pytest.mark.parametrize("name", FAILS)
def test_faults_are_met_alike_and_say_the_same(name):
    seen, errors = play_both(name)
    assert len(seen) <= TROUBLE + 1
    for error in errors:
        assert re.search(f"(?s){FAILS[name]}", error), error


@pytest.mark.parametrize("name", EXACT_OR_REFUSED)
def test_wide_numbers_arrive_or_are_refused_when_made(name):
    seen, errors = play_both(name)
    if any(errors):
        assert not seen and all(f"{name}-v0" in error for error in errors)
    elif name == "WideIntegers":
        for t, (time_step, outside) in enumerate(seen):
            assert time_step.observation["cents"].astype(np.float32).tolist() == [[np.float32((5 + t) * 10**9)]] * ROWS
            ticks = np.float32(2**32 - 2**10 * (1 + t))
            assert time_step.observation["ticks"].astype(np.float32).tolist() == [ticks] * ROWS
            assert outside == 0


@hypothesis.given(space=any_spaces, seed=st.integers(0, 99))
def test_what_a_library_shows_arrives_to_the_precision_of_float32(space, seed):
    """Or the space is refused when an environment is made."""
    try:
        carried, _ = read_spaces(values.describe(space), values.describe(gymnasium.spaces.Discrete(2)))
    except spaces.SpaceError:
        return
    space.seed(seed)
    shown = library_sample(space)
    places = zip(values.find_leaves(space), spaces.leaves(carried), strict=True)
    for (path, leaf), offered in places:
        struct = spaces.leaf_shape_dtype(offered.space)
        slot = np.zeros(struct.shape, struct.dtype)
        assert not values.write(slot, path, values.kind_of(leaf), leaf, shown)
        value = spaces.get(shown, path)
        if isinstance(value, str):
            assert bytes(slot).rstrip(b"\0") == value.encode()
        else:
            np.testing.assert_allclose(slot.astype(np.float64), np.asarray(value, np.float64), rtol=1e-7, atol=1e-38)


@pytest.mark.filterwarnings("ignore:.*Casting input")
@hypothesis.settings(deadline=None)  # the first of a shape compiles
@hypothesis.given(space=action_spaces, seed=st.integers(0, 99))
def test_whatever_is_chosen_here_is_in_the_library_s_own_space(space, seed):
    try:
        _, carried = read_spaces(values.describe(gymnasium.spaces.Discrete(2)), values.describe(space))
    except spaces.SpaceError:
        return
    chosen = spaces.sample(jax.random.key(seed), carried, 1)
    given = []
    for (_, leaf), offered in zip(values.find_leaves(space), spaces.leaves(carried), strict=True):
        slots = np.asarray(spaces.get(chosen, offered.path))
        given.append(values.make_reader(leaf, plain_integers=False)(slots)[0])
    action = values.build(space, iter(given))
    assert space.contains(action), action
    assert jax.tree.map(type, action) == jax.tree.map(type, library_sample(space))


@pytest.mark.parametrize("limit", [5, 50, MAX_TIME_LIMIT])
def test_the_limit_that_is_asked_for_is_the_one_that_the_library_knows(limit):
    seen, errors = play_both("ReadsItsLimit", time_limit=limit)
    assert errors == ("", "")
    assert (seen[0][0].observation["place"] == np.float32(limit)).all()
    assert seen[5][0].truncated.all() == (limit == 5)


@pytest.mark.parametrize("where", ["here", "there"])
def test_actions_that_their_type_cannot_hold_are_refused(where):
    environment = make(where, "Steady")
    state, _ = environment.reset(jax.random.key(0))
    for wrong in (np.array([0, 2**32 + 1, 0]), np.array([0, 0.5, 0]), np.zeros(2, np.int32)):
        with pytest.raises(spaces.SpaceError, match="the action, part 'value'"):
            environment.step(state, wrong)
    environment.step(state, np.array([0.0, 1.0, 2.0]))
    environment.close()


@pytest.mark.parametrize("where", ["here", "there"])
def test_rows_without_room_are_refused_when_made(where):
    with pytest.raises(ldm_jax.EnvironmentFaultError, match=r"4194304 rows cannot be made.*take fewer rows"):
        make(where, "Huge", 1 << 22)


# Options


plain = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=9), st.complex_numbers()),
    st.sampled_from([np.int16(3), np.uint64(2**64 - 1), np.float32(0.1), np.bool_(True), np.datetime64("2020-01-01")]),
)
keys = st.one_of(
    st.text(max_size=4), st.integers(), st.tuples(st.integers(), st.text(max_size=3)), st.frozensets(st.integers())
)
arrays = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(dtype),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(["bool", "int8", "uint64", ">i4", "float16", "float64", "complex64", "<U3", "S2"]),
    st.integers(0, 99),
)
anything = st.recursive(
    st.one_of(plain, arrays),
    lambda child: st.one_of(
        st.lists(child, max_size=3),
        st.lists(child, max_size=3).map(tuple),
        st.dictionaries(keys, child, max_size=3),
        st.sets(keys, max_size=3),
    ),
    max_leaves=8,
)


def alike(one, other):
    """Whether two values are of the same types throughout and equal, NaN to NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return alike(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float | complex):
        return repr(one) == repr(other)
    return one == other


@hypothesis.given(options=st.dictionaries(st.text(max_size=4), anything, max_size=3))
def test_options_are_carried_exactly(options):
    carried = values.decode_options(json.loads(json.dumps(values.encode_options(options))))
    assert alike(carried, options)


class Color(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        np.sin,
        object(),
        Color("red"),
        pathlib.Path("x"),
        np.array([object()]),
        np.zeros(2, [("a", int)]),
        gymnasium,
    ],
)
def test_options_that_cannot_be_carried_are_refused_by_their_name(value):
    options = {"fine": 1, "wrong": {"deep": [0, value]}}
    for where in ("here", "there"):
        with pytest.raises(ConfigError, match=r"Steady-v0: the option wrong\['deep'\]\[1\] is "):
            make(where, "Steady", options=options)
    loop = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="contain themselves"):
        make("there", "Steady", options={"loop": loop})


# What travels


def test_what_is_sent_to_other_processes_can_be_pickled_copied_and_compared():
    spec = worker_spec("TakesOptions", kwargs=OPTIONS)
    venv = VenvSpec("tiny", "3.11", pathlib.Path("requirements.txt"), (), ("json",), ())
    for thing in (spec, Isolation("venv", workers=2), venv, Fault("nan", (1,), "what was seen")):
        for twin in (pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing), copy.copy(thing)):
            assert twin == thing
    assert alike(pickle.loads(pickle.dumps(spec)).kwargs, OPTIONS)
    assert spec != worker_spec("TakesOptions", kwargs={**OPTIONS, "level": np.int8(3)})
    assert isinstance(spec, WorkerSpec)
    library = groups.isolated_libraries()["nasim"]
    assert vars(pickle.loads(pickle.dumps(library))) == vars(copy.deepcopy(library)) == vars(library)
    for error in (WorkerFaultError("crash", "it died"), values.WrongError("shape", "it is [2]")):
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), twin.kind, str(twin)) == (type(error), error.kind, str(error))

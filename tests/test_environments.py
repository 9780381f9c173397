import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import compiling
import gymnasium
import hypothesis
import jax
import numpy as np
import pytest
import spaces_strategies
from hypothesis import strategies

import environments
import ldm_jax
from environments import checks, conversion, laws, registry
from environments.catalog import entries
from ldm_jax import spaces
from ldm_jax.types import MAX_TIME_LIMIT, TimeStep

EXAMPLE_LIBRARY = pathlib.Path(__file__).parent / "example_library"

# One of each kind: vector, grid, categorical, continuous, text, masks, several action slots, a limit we impose.
PASSING = [
    "gymnasium/Taxi-v4",
    "gymnax/DeepSea-bsuite",
    "gymnax/Pendulum-v1",
    "envpool/CartPole-v1",
    "envpool/CliffWalking-v1",
    "envpool/Connector-v2",
    "envpool/Game2048-v1",
    "envpool/LunarLander-v3",
    "envpool/MetaWorld/Reach-v3",
    "envpool/MiniGrid-Empty-5x5-v0",
    "envpool/Pendulum-v1",
    "envpool/Taxi-v3",
]


@pytest.mark.parametrize("id", PASSING)
def test_real_environments_pass_the_kit(id):
    environments.check_environment(id)


# The kit can fail: a real environment with one law broken at a time.


class Wrapped:
    """A real environment whose time steps pass through `change`."""

    def __init__(self, id="envpool/CartPole-v1", *, batch_size, time_limit):
        self.inner = environments.make(id, batch_size, time_limit=time_limit)
        self.spec = self.inner.spec
        self.last = np.zeros(batch_size, bool)

    def change(self, time_step, action):
        return time_step

    def reset(self, key):
        state, time_step = self.inner.reset(key)
        self.last = time_step.last
        return state, self.change(time_step, None)

    def step(self, state, action):
        before = self.last
        state, time_step = self.inner.step(state, action)
        self.last, self.before = time_step.last, before
        return state, self.change(time_step, action)

    def close(self):
        self.inner.close()


class WrongBatchSize(Wrapped):
    def __init__(self, *, batch_size, time_limit):
        super().__init__(batch_size=batch_size + 1, time_limit=time_limit)


class HugeBounds(Wrapped):
    def __init__(self, **options):
        super().__init__(**options)
        space = gymnasium.spaces.Box(np.float32(-3.4e38), np.float32(3.4e38), (4,))
        self.spec = dataclasses.replace(self.spec, observation_space=space)


class NoFirst(Wrapped):
    def change(self, time_step, action):
        return time_step._replace(first=np.zeros_like(time_step.first)) if action is None else time_step


class DoublePrecisionReward(Wrapped):
    def change(self, time_step, action):
        return time_step._replace(reward=time_step.reward.astype(np.float64))


class NanReward(Wrapped):
    def change(self, time_step, action):
        return time_step._replace(reward=time_step.reward * np.float32(np.nan))


class WrongShape(Wrapped):
    def change(self, time_step, action):
        return time_step._replace(observation=time_step.observation[:, :3])


class NoSuchCategory(Wrapped):
    def __init__(self, **options):
        super().__init__("envpool/CliffWalking-v1", **options)

    def change(self, time_step, action):
        return time_step._replace(observation=time_step.observation + np.int32(48))


class OneBuffer(Wrapped):
    buffer = None

    def change(self, time_step, action):
        self.buffer = np.empty_like(time_step.observation) if self.buffer is None else self.buffer
        self.buffer[:] = time_step.observation
        return time_step._replace(observation=self.buffer)


class FirstLate(Wrapped):
    def change(self, time_step, action):
        return time_step if action is None else time_step._replace(first=time_step.last)


class RewardAtFirst(Wrapped):
    def change(self, time_step, action):
        return time_step if action is None else time_step._replace(reward=np.ones_like(time_step.reward))


class ActionNotIgnored(Wrapped):
    def change(self, time_step, action):
        if action is None or not self.before.any():
            return time_step
        seen = np.where(self.before[:, None], action[:, None], time_step.observation).astype(np.float32)
        return time_step._replace(observation=seen)


class OneStepTooLong(Wrapped):
    def __init__(self, *, batch_size, time_limit):
        longer = None if time_limit is None else time_limit + 1
        super().__init__("envpool/CliffWalking-v1", batch_size=batch_size, time_limit=longer)
        self.spec = dataclasses.replace(self.spec, time_limit=time_limit or self.spec.time_limit)


class OneStepTooShort(Wrapped):
    def __init__(self, *, batch_size, time_limit):
        shorter = None if time_limit is None else time_limit - 1
        super().__init__("envpool/CliffWalking-v1", batch_size=batch_size, time_limit=shorter)
        self.spec = dataclasses.replace(self.spec, time_limit=time_limit or self.spec.time_limit)


class LimitCalledTerminal(Wrapped):
    def change(self, time_step, action):
        return time_step._replace(terminated=time_step.last, truncated=np.zeros_like(time_step.last))


class HiddenRandomness(Wrapped):
    def change(self, time_step, action):
        noise = np.random.default_rng().normal(size=time_step.observation.shape).astype(np.float32)
        return time_step._replace(observation=np.clip(time_step.observation + 1e-3 * noise, -4, 4))


class RefusesLargestAction(Wrapped):
    def step(self, state, action):
        if (action == 1).all():
            raise ValueError("no")
        return super().step(state, action)


class RowsAlike(Wrapped):
    def __init__(self, *, batch_size, time_limit):
        super().__init__(batch_size=1, time_limit=time_limit)
        self.spec = dataclasses.replace(self.spec, batch_size=batch_size)

    def step(self, state, action):
        return super().step(state, action[:1])

    def change(self, time_step, action):
        return jax.tree.map(lambda leaf: leaf.repeat(self.spec.batch_size, 0), time_step)


class TakesOldStates(Wrapped):
    def reset(self, key):
        self.state, time_step = super().reset(key)
        return self.state, time_step

    def step(self, state, action):
        self.state, time_step = super().step(self.state, action)
        return self.state, time_step


class ClosesOnce(Wrapped):
    closed = False

    def close(self):
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class CountsInPython(Wrapped):
    """Says that it is pure and is not: compiled, its count stands still."""

    calls = 0

    def __init__(self, **options):
        super().__init__("gymnax/CartPole-v1", **options)

    def change(self, time_step, action):
        self.calls += action is not None
        return time_step._replace(observation=time_step.observation.at[:, 1].add(self.calls))


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (WrongBatchSize, "the spec"),
        (HugeBounds, "the spec"),
        (NoFirst, "reset"),
        (DoublePrecisionReward, "time steps"),
        (NanReward, "time steps"),
        (WrongShape, "time steps"),
        (NoSuchCategory, "time steps"),
        (OneBuffer, "time steps"),
        (FirstLate, "next-step reset"),
        (RewardAtFirst, "next-step reset"),
        (ActionNotIgnored, "next-step reset"),
        (OneStepTooLong, "the time limit"),
        (OneStepTooShort, "the time limit"),
        (LimitCalledTerminal, "the time limit"),
        (HiddenRandomness, "reproducibility"),
        (RefusesLargestAction, "the edges of the action space"),
        (RowsAlike, "independent rows"),
        (TakesOldStates, "stale states"),
        (ClosesOnce, "close"),
        (CountsInPython, "jit"),
    ],
)
def test_the_kit_finds_a_broken_law(broken, law):
    with pytest.raises(environments.ConformanceError, match=law) as caught:
        environments.check_environment(broken)
    assert caught.value.law == law


def _as_integers(key, space, batch_size, action_mask=None):
    """Samples with `high + 1` in the type of the space, which overflows in int8."""
    low, high = space.low.astype(np.int8), space.high.astype(np.int8)
    return jax.random.randint(key, (batch_size, *space.shape), low, high + np.int8(1)).astype(np.float32)


@pytest.mark.parametrize(
    "sample",
    [
        _as_integers,
        lambda key, space, batch_size, mask=None: np.zeros((batch_size, *space.shape), np.float32),
        lambda key, space, batch_size, mask=None: np.full((batch_size, *space.shape), np.nan, np.float32),
        lambda key, space, batch_size, mask=None: jax.random.normal(key, (batch_size, *space.shape)),
        lambda key, space, batch_size, mask=None: jax.random.uniform(key, (batch_size, *space.shape)),
        lambda key, space, batch_size, mask=None: 2 * jax.random.beta(key, 1.3, 1.0, (batch_size, *space.shape)) - 1,
    ],
)
def test_the_kit_calls_samples_unsound_that_are_not_uniform(sample, monkeypatch):
    class Bytes(Wrapped):
        def __init__(self, **options):
            super().__init__("envpool/Pendulum-v1", **options)
            bound = 127 if sample is _as_integers else 1
            self.spec = dataclasses.replace(self.spec, action_space=gymnasium.spaces.Box(-bound, bound, (1,)))

    monkeypatch.setattr(spaces, "sample", sample)
    with pytest.raises(environments.ConformanceError, match="the law of sampling"):
        environments.check_environment(Bytes)


def test_the_kit_compares_an_environment_with_the_entry_of_its_id(monkeypatch):
    spec = environments.spec("gymnax/CartPole-v1")
    wrong = dataclasses.replace(spec, action_space=gymnasium.spaces.Discrete(3))
    monkeypatch.setattr("environments.listing.spec", lambda id: wrong)
    with pytest.raises(environments.ConformanceError, match=r"the law of the catalog: .*action_space"):
        environments.check_environment(spec.id)


def test_the_kit_names_the_law_when_an_environment_cannot_be_made():
    def make(batch_size, time_limit):
        raise RuntimeError("no display")

    with pytest.raises(environments.ConformanceError, match="making: it raised RuntimeError"):
        environments.check_environment(make)


def test_every_gymnax_environment_gives_what_it_declares():
    for id in environments.list_ids("gymnax"):
        environment = environments.make(id, 3)
        spec = environment.spec
        action = jax.tree.map(jax.numpy.asarray, spaces.zeros(spec.action_space, (3,)))
        state, time_step = jax.eval_shape(environment.reset, jax.random.key(0))
        after, next_step = jax.eval_shape(environment.step, state, action)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), (state, time_step)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), (after, next_step)
        ), id
        for leaf in spaces.leaves(spec.observation_space):
            struct, value = spaces.leaf_shape_dtype(leaf.space), spaces.get(time_step.observation, leaf.path)
            assert (value.shape, value.dtype) == ((3, *struct.shape), struct.dtype), id


@pytest.mark.parametrize(
    "id",
    ["gymnax/GaussianBandit-misc", "gymnax/MemoryChain-bsuite", "gymnax/MetaMaze-misc", "gymnax/UmbrellaChain-bsuite"],
)
def test_corrected_bounds_hold(id):
    environment = environments.make(id, 8)

    @jax.jit
    def play(key):
        def step(state, key):
            state, time_step = environment.step(state, spaces.sample(key, environment.spec.action_space, 8))
            return state, time_step.observation

        return jax.lax.scan(step, environment.reset(key)[0], jax.random.split(key, 500))[1]

    for observation in np.asarray(play(jax.random.key(0))):
        assert spaces.check(environment.spec.observation_space, observation, 8, "the observation") == 0


def test_a_second_call_compiles_nothing():
    environment = environments.make("gymnax/Acrobot-v1", 2)

    def play(seed):
        state, _ = environment.reset(jax.random.key(seed))
        for _ in range(3):
            state, _ = environment.step(state, np.zeros(2, np.int32))

    with compiling.compilations() as first:
        play(0)
    with compiling.compilations() as second:
        play(1)
    assert first and not second


# Time limits that envpool ignores: rows are reset one by one while the others go on.


def _walk(place, action):
    """The dynamics of CliffWalking, written anew: up, right, down, left on 4 x 12 fields."""
    row, column = divmod(place, 12)
    d_row, d_column = ((-1, 0), (0, 1), (1, 0), (0, -1))[action]
    row, column = min(max(row + d_row, 0), 3), min(max(column + d_column, 0), 11)
    if row == 3 and 0 < column < 11:
        return 36, -100.0, False
    return row * 12 + column, -1.0, (row, column) == (3, 11)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    limit=strategies.integers(1, 20), batch_size=strategies.integers(1, 5), seed=strategies.integers(0, 2**31 - 1)
)
def test_imposed_limits_reset_single_rows(limit, batch_size, seed):
    rng = np.random.default_rng(seed)
    environment = environments.make("envpool/CliffWalking-v1", batch_size, time_limit=limit)
    state, time_step = environment.reset(jax.random.key(seed))
    goal_in_13 = [0] + [1] * 11 + [2]
    place, elapsed, ended = np.full(batch_size, 36), np.zeros(batch_size, int), np.zeros(batch_size, bool)
    hurries = rng.random(batch_size) < 0.5
    for _ in range(60):
        wander = rng.integers(0, 4, batch_size)
        action = [goal_in_13[e % 13] if h else w for e, h, w in zip(elapsed, hurries, wander, strict=True)]
        state, time_step = environment.step(state, np.array(action, np.int32))
        for row in range(batch_size):
            if ended[row]:
                expected = (36, 0.0, False, False, True)
                place[row], elapsed[row] = 36, 0
                hurries[row] = rng.random() < 0.5
            else:
                place[row], reward, terminated = _walk(place[row], action[row])
                elapsed[row] += 1
                expected = (place[row], reward, terminated, elapsed[row] >= limit, False)
            ended[row] = expected[2] or expected[3]
            got = (leaf[row] for leaf in time_step[:5])
            assert tuple(got) == expected
    environment.close()


def test_envpool_leaves_no_threads_behind():
    environment = environments.make("envpool/CartPole-v1", 8)

    def threads():
        return len(list(pathlib.Path("/proc/self/task").iterdir()))

    environment.reset(jax.random.key(0))
    before = threads()
    for seed in range(50):
        environment.reset(jax.random.key(seed))
    assert threads() <= before
    environment.close()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (lambda r, *ends, o: [r, *ends, o * np.nan], r"step 1 .*rows \[0, 1, 2\]: nan: the observation is nan"),
        (lambda r, *ends, o: [r * [1, np.nan, 1], *ends, o], r"step 1 .*rows \[1\]: nan: the reward is nan"),
        (lambda r, *ends, o: [r, *ends, o[:, :2]], r"step 1 .*: shape: .* has shape \[3, 2\], expected \[3, 4\]"),
    ],
)
def test_faults_of_a_simulator_are_named(fault, text):
    environment = environments.make("envpool/CartPole-v1", 3)
    state, _ = environment.reset(jax.random.key(0))
    hear = environment._hear

    def hear_wrongly():
        *heard, observation = hear()
        return fault(*heard, o=observation)

    environment._hear = hear_wrongly
    with pytest.raises(ldm_jax.EnvironmentFaultError, match=f"envpool/CartPole-v1, {text}"):
        environment.step(state, np.zeros(3, np.int32))
    with pytest.raises(ldm_jax.StaleStateError):
        environment.step(state, np.zeros(3, np.int32))
    environment.close()


# Names.


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("gymnax/Cartpole-v1", "did you mean gymnax/CartPole-v1"),
        ("envpool/LunarLandar-v3", "did you mean envpool/LunarLander-v3"),
        ("CartPole-v1", "expected `library/name`; did you mean .*/CartPole-v1"),
        ("gymnas/CartPole-v1", "known are .*envpool, .*gymnax, .*; did you mean gymnax"),
        ("gymnax/MNISTBandit-bsuite", "not offered: it downloads"),
        ("envpool/Cig-v1", "not offered: .*crashes"),
        ("envpool/Chess-v1", "not offered: several players"),
    ],
)
def test_unknown_ids_are_answered_with_a_way_out(id, text):
    with pytest.raises(environments.UnknownEnvironmentError, match=text):
        environments.make(id)


@pytest.mark.parametrize("name", ["batch_size", "time_limit"])
@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, np.True_, np.array([2]), 2**31 - 1 + True, sys.maxsize])
def test_sizes_must_be_positive_integers(name, size):
    for id in ("gymnax/CartPole-v1", "envpool/CartPole-v1", "gymnasium/CartPole-v1"):
        with pytest.raises(
            ldm_jax.errors.ConfigError, match=f"{name} of {id} is .*, expected an integer of at least 1 and at"
        ):
            environments.make(id, **{name: size})


@pytest.mark.parametrize("id", ["gymnax/CartPole-v1", "envpool/Taxi-v3", "gymnasium/CartPole-v1"])
def test_integers_of_any_type_become_plain_ones_and_the_largest_limit_works(id):
    largest = MAX_TIME_LIMIT
    with contextlib.closing(environments.make(id, np.int64(2), time_limit=np.uint32(largest))) as environment:
        spec = environment.spec
        assert (type(spec.batch_size), type(spec.time_limit)) == (int, int)
        assert json.loads(json.dumps([spec.batch_size, spec.time_limit])) == [2, largest]
        state, _ = environment.reset(jax.random.key(0))
        _, time_step = environment.step(state, np.zeros(2, np.int32))
        assert not np.any(time_step.truncated)
    with pytest.raises(ldm_jax.errors.ConfigError, match=f"at most {largest}"):
        environments.make(id, time_limit=largest + 1)


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    for name in ("CartPole-v1", "SomethingNewer-v9"):
        with pytest.raises(ldm_jax.LibraryMissingError, match=r"pip install 'ldm_jax\[gymnax\]'"):
            environments.make(f"gymnax/{name}")


def test_a_missing_simulator_of_gymnasium_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    with pytest.raises(ldm_jax.LibraryMissingError, match=r"Box2D.*pip install 'ldm_jax\[gymnasium\]'"):
        environments.make("gymnasium/LunarLander-v3")


def test_ids_are_unique_and_can_be_made():
    ids = [id for id in environments.list_ids() if id.partition("/")[0] in registry.BUILT_IN]
    assert len(ids) == len(set(ids)) > 1400
    for id in ids[:: len(ids) // 25]:
        try:
            assert environments.make(id).spec.id == id
        except ldm_jax.LibraryMissingError as error:  # a suite, or what no package brings
            assert "pip install" in str(error) or "apt-get install" in str(error)


# Third parties.


def _declare(folder, name, entry):
    """Writes what pip leaves behind of a package with one entry point."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{entry}\n")


def test_a_broken_third_party_takes_nothing_away(tmp_path, monkeypatch):
    _declare(tmp_path, "broken", "broken = no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match="left out the environments of 'broken'.*no_such_module"):
        ids = environments.list_ids()
    assert "gymnax/CartPole-v1" in ids
    with pytest.raises(ldm_jax.LibraryMissingError, match="no_such_module"):
        environments.make("broken/Anything")


def test_a_third_party_does_not_shadow_a_built_in_library(tmp_path, monkeypatch):
    _declare(tmp_path, "usurper", "gymnax = usurper.adapter")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"ignored the entry point gymnax = usurper.adapter of usurper"):
        assert environments.make("gymnax/CartPole-v1").spec.version != "1.0"


def test_a_third_party_package_is_found_and_passes_the_kit(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(EXAMPLE_LIBRARY, source)  # building writes beside the sources
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    program = """
        import environments
        assert environments.list_ids("example") == ["example/Corridor-v0"]
        assert "example/Corridor-v0" in environments.list_ids()
        assert environments.make("example/Corridor-v0", 3, time_limit=9).spec.version == "0.3.0"
        environments.check_environment("example/Corridor-v0")
        print("passed")
    """
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path)
    result = run([sys.executable, "-c", textwrap.dedent(program)], env={"PYTHONPATH": str(target)})
    assert result.stdout == "passed\n", result.stderr


@pytest.mark.parametrize("ids", [("envpool/Taxi-v3", "envpool/FrozenLake-v1"), ("gymnasium/Taxi-v4",)])
def test_the_first_of_a_library_are_made_from_several_threads_at_once(ids):
    program = f"""
        import concurrent.futures, threading, time, environments
        environments.make("gymnax/Catch-bsuite").close()
        start = threading.Barrier(8)
        def make(i):
            start.wait()
            time.sleep(0.02 * i)
            environments.make({ids}[i % {len(ids)}]).close()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(make, range(8)))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_importing_the_package_imports_no_library():
    program = """
        import sys
        import environments
        assert not {"jax", "gymnasium", "gymnax", "envpool"} & set(sys.modules)
        from environments import make, check_environment
        import environments.adapters.gymnax, environments.adapters.envpool
        assert not {"gymnax", "envpool"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_time_steps_are_a_pytree_with_numpy_arrays_where_the_simulator_is_stateful():
    environment = environments.make("envpool/MiniGrid-Empty-5x5-v0", 2)
    _, time_step = environment.reset(jax.random.key(0))
    assert isinstance(time_step, TimeStep)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(time_step))
    assert bytes(time_step.observation["mission"][0]).rstrip(b"\0") == b"get to the green goal square"


# What is known without making anything.


@pytest.mark.parametrize("library", ["gymnax", "envpool", "gymnasium", "jumanji", "pgx", "xminigrid", "craftax"])
def test_the_catalog_describes_an_environment_as_it_is_made(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    id = environments.list_ids(library)[0]
    with contextlib.closing(environments.make(id)) as environment:
        assert environments.spec(id) == environment.spec


def test_what_the_catalog_does_not_know_is_said_with_a_way_out(tmp_path, monkeypatch):
    _declare(tmp_path, "corridors", "corridors = no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    assert environments.libraries()[-1] == "corridors" and "gymnax" in environments.libraries()
    for id, text in {
        "gymnax/Cartpole-v1": "did you mean gymnax/CartPole-v1",
        "envpool/Cig-v1": "not offered: .*crashes",
        "corridors/Corridor-v0": "the catalog knows nothing of corridors: make corridors/Corridor-v0",
        "corridor/Corridor-v0": "no library 'corridor' .*did you mean corridors",
        "CartPole-v1": "expected `library/name`; did you mean .*/CartPole-v1",
        7: "expected `library/name`",
    }.items():
        with pytest.raises(environments.UnknownEnvironmentError, match=text):
            environments.spec(id)
    with pytest.raises(environments.UnknownEnvironmentError, match=r"no library 'gymnaxx' .*did you mean gymnax"):
        environments.find("gymnaxx")


@pytest.mark.parametrize("question", [{}, {"library": "gymnax"}, {"domain": "memory", "verified": None}])
def test_a_table_is_a_sequence_of_the_entries_that_are_listed_and_shows_itself(question):
    table = environments.find(**question)
    assert table.ids == [entry.id for entry in table] and len(table) == len(table.ids)
    assert sorted(table.ids) == sorted(environments.list_ids(**question))
    assert isinstance(table[:3], environments.Table) and table[:3].ids == table.ids[:3] and table[0] in table
    for text in (repr(table), table._repr_html_()):
        assert all(id in text for id in table.ids[:20]) and table.ids[21] not in text
        assert f"{len(table):,} environments of " in text and "more" in text
    assert "<td>Discrete(" in table._repr_html_()


def test_what_is_known_of_an_environment_can_be_pickled_copied_and_compared():
    error = environments.ConformanceError("a/b", "jit", "no")
    for value in (environments.spec("gymnax/CartPole-v1"), environments.find("gymnax"), environments.find("gymnax")[0]):
        assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.law) == (str(error), "jit")


# What was not there may be there now.


class Still(gymnasium.Env):
    action_space, observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Box(0, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


@pytest.fixture
def register():
    """Puts an environment into Gymnasium's registry for the time of a test."""
    before = dict(gymnasium.registry)

    def put(name, point, **options):
        gymnasium.register(name, point, max_episode_steps=9, **options)
        return f"gymnasium/{name}"

    yield put
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


def test_an_id_that_is_registered_after_a_failed_try_is_found(register):
    with pytest.raises(environments.UnknownEnvironmentError):
        environments.make("gymnasium/Late-v0")
    assert environments.make(register("Late-v0", Still)).spec.time_limit == 9


def test_a_catalog_that_is_written_anew_is_read_anew(tmp_path, monkeypatch):
    path, known = tmp_path / "gymnax.jsonl", entries.read_entries(entries.CATALOG / "gymnax.jsonl")
    monkeypatch.setattr(entries, "CATALOG", tmp_path)
    assert not entries.entries("gymnax")
    for count in (2, 3):
        entries.write_entries(path, known[:count])
        assert [entry.id for entry in entries.entries("gymnax").values()] == [entry.id for entry in known[:count]]


# What goes wrong while an environment is made.


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("no display"), SystemExit(3), KeyError("x"), spaces.SpaceError("a Graph"), ModuleNotFoundError("x")],
)
def test_whatever_goes_wrong_while_an_environment_is_made_comes_with_its_id(error, register, monkeypatch):
    id = register("Odd-v0", lambda: _raise(error))
    with pytest.raises(ldm_jax.LdmError, match="gymnasium/Odd-v0 cannot be made"):
        environments.make(id)
    import environments.adapters.gymnax as adapter

    monkeypatch.setattr(adapter, "make", lambda name, batch_size, time_limit: _raise(error))
    with pytest.raises(ldm_jax.LdmError, match="gymnax/CartPole-v1 cannot be made"):
        environments.make("gymnax/CartPole-v1")


def test_a_limit_that_an_adapter_does_not_keep_is_refused_when_it_is_made(monkeypatch):
    import environments.adapters.gymnax as adapter

    make = adapter.make
    monkeypatch.setattr(adapter, "make", lambda name, batch_size, time_limit: make(name, batch_size, None))
    assert environments.make("gymnax/CartPole-v1", time_limit=500).spec.time_limit == 500
    with pytest.raises(ldm_jax.EnvironmentFaultError, match="time_limit 500, asked for 7"):
        environments.make("gymnax/CartPole-v1", time_limit=7)


# How the spaces of a library are carried.


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(strategies.one_of(spaces_strategies.any_boxes(), spaces_strategies.action_spaces))
def test_whatever_the_policy_can_emit_lies_within_the_library_s_own_space(declared):
    try:
        offered = conversion.action_space(declared)
    except spaces.SpaceError as error:
        assert "too many whole numbers" in str(error) or "expected" in str(error)
        return
    if any(not np.issubdtype(leaf.space.dtype, np.floating) for leaf in spaces.leaves(declared)):
        assert all(spaces.choices(leaf.space) or leaf.space.dtype == np.float32 for leaf in spaces.leaves(offered))
    edges = [laws.edge_actions(offered, 1, edge) for edge in ("low", "high")]
    samples = jax.tree.map(np.asarray, spaces.sample(jax.random.key(0), offered, 8))
    rows = [jax.tree.map(lambda leaf, row=row: leaf[row], samples) for row in range(8)]
    for action in [*(jax.tree.map(lambda leaf: leaf[0], edge) for edge in edges), *rows]:
        clipped = spaces.clip(offered, jax.tree.map(np.asarray, action))
        for leaf in spaces.leaves(declared):
            value = np.asarray(spaces.get(clipped, leaf.path)).astype(leaf.space.dtype)
            inside = leaf.space.contains(value[()] if isinstance(leaf.space, gymnasium.spaces.Discrete) else value)
            assert inside or _is_point(leaf.space), (leaf, value)


def _is_point(space):
    """Whether the Box is so narrow somewhere that no float32 lies in it: the one beside it is then the nearest."""
    if not isinstance(space, gymnasium.spaces.Box) or space.dtype != np.float64:
        return False
    with np.errstate(over="ignore"):
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    return bool((np.nextafter(low, np.float32(np.inf)) >= high).any())


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(strategies.one_of(spaces_strategies.any_boxes(), spaces_strategies.boxes()), strategies.data())
def test_what_a_library_shows_arrives_unchanged_to_the_precision_of_float32(declared, data):
    try:
        offered = conversion.observation_space(declared)
    except spaces.SpaceError as error:
        assert "is bounded by NaN, by a low above its high, or to more than 1e+30" in str(error)
        return
    assert offered.dtype.itemsize <= 4 and offered.shape == declared.shape
    declared.seed(data.draw(strategies.integers(0, 2**31)))
    for value in (declared.low, declared.high, spaces_strategies.library_sample(declared)):
        with np.errstate(over="ignore"):
            arrived = conversion.cast(np.asarray(value), offered.dtype)
            expected = np.asarray(value).astype(np.float32)
        assert (arrived.astype(np.float32) == expected).all() or not np.isfinite(np.asarray(value, float)).all()
        if np.isfinite(np.asarray(value, float)).all():
            assert ((arrived >= offered.low) & (arrived <= offered.high)).all()


def test_finite_bounds_are_bounds_but_for_what_mujoco_writes_for_none():
    low, high = np.array([-1e10, -1e10, 0, -1e9]), np.array([1e10, 5.0, 1e10, 1e9])
    offered = conversion.action_space(gymnasium.spaces.Box(low, high, dtype=np.float64))
    assert offered.low.tolist() == [-np.inf, -1e10, 0, -1e9] and offered.high.tolist() == [np.inf, 5.0, 1e10, 1e9]
    assert environments.make("envpool/LqrLqr21-v1").spec == environments.spec("envpool/LqrLqr21-v1")


def test_what_is_too_wide_for_its_type_is_outside_its_bounds_and_not_another_number():
    space = conversion.observation_space(gymnasium.spaces.Box(0, 100, (1,), np.int64))
    leaf = checks.CheckedLeaf(*spaces.leaves(space)[0])
    for value in (2**32 + 5, -(2**32) + 5, 2**31):
        arrived = conversion.cast(np.array([[value]]), space.dtype)
        assert arrived.dtype == np.int32 and leaf.outside(arrived).all() and not leaf.validator(1)(arrived)
    assert not leaf.outside(conversion.cast(np.array([[7]]), space.dtype)).any()


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Discrete(5, start=2**33),
        gymnasium.spaces.Discrete(2**33),
        gymnasium.spaces.Box(0, 2**40, (1,), int),
    ],
)
def test_actions_that_cannot_be_carried_are_refused_when_made(space, register):
    class Far(Still):
        action_space = space

    with pytest.raises(spaces.SpaceError, match=r"gymnasium/Far-v0 .*(expected|too many)"):
        environments.make(register("Far-v0", Far))


@pytest.mark.parametrize(
    "box",
    [
        gymnasium.spaces.Box(0, 255, (3,), np.uint8),
        gymnasium.spaces.Box(-128, 127, (3,), np.int8),
        gymnasium.spaces.Box(0, 2**31 - 1, (3,), np.int32),
        gymnasium.spaces.Box(-3e8, 5e8, (2,), np.float32),
    ],
)
def test_samples_are_uniform_in_boxes_that_reach_the_ends_of_their_type(box):
    laws.check_sampling(box, seed=0)


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(spaces_strategies.action_spaces)
def test_samples_of_every_space_are_uniform(space):
    laws.check_sampling(space, seed=0)

"""Environments in worker processes: the contract, misbehaviour of every kind, and that nothing is left behind."""

import ast
import concurrent.futures
import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import hypothesis
import jax
import numpy as np
import pytest
from spaces_strategies import any_spaces

import environments
import ldm_jax
from data import references
from data.references.opening import with_room
from data.references.ppo import PPOConfig
from environments.isolation import IsolatedEnvironment, Isolation, WorkerSpec, groups, scratch
from environments.isolation import host as workers
from environments.isolation.worker import gym_api, values
from ldm_jax import spaces
from ldm_jax.environment import EnvironmentFaultError, TooManyRowsError

LIBRARY = pathlib.Path(__file__).parent / "misbehaving_library"
LIMIT_S = 0.5


def worker_spec(name, python=sys.executable, api="gymnasium", **options):
    fixed = {"library": "misbehaving", "imports": ("misbehaving",), "domain": "test"}
    path, variables = (str(LIBRARY), *options.pop("path", ())), {"MISBEHAVING_API": api}
    return WorkerSpec(
        python, name=f"{name}-v0", api=api, distribution=api, path=path, variables=variables, **fixed, **options
    )


@contextlib.contextmanager
def make(name, batch_size=4, time_limit=None, spec_options=(), **limits):
    limits = {"workers": 2, "call_timeout_s": LIMIT_S} | limits
    environment = IsolatedEnvironment(
        worker_spec(name, **dict(spec_options)), batch_size, time_limit, Isolation(**limits)
    )
    try:
        yield environment
    finally:
        environment.close()


def play(environment, actions, seed=0):
    """Time steps of a reset and of one step for each of the actions `[T, B]`."""
    state, time_step = environment.reset(jax.random.key(seed))
    seen = [time_step]
    for action in actions:
        state, time_step = environment.step(state, np.asarray(action, np.int32))
        seen.append(time_step)
    return seen


def same(one, other, rows=slice(None)):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a[rows], b[rows]), one, other))


def row(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition, seconds=30.0):
    """Whether a condition holds now or becomes true in a while."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def pids(environment):
    return [worker.pid for worker in environment._workers if worker is not None]


# The contract.


@pytest.mark.parametrize(
    ("name", "options"),
    [("Steady", {}), ("Shared", {"global_randomness": True}), ("Everything", {}), ("Steady", {"remake": True})],
)
def test_environments_in_workers_pass_the_kit(name, options):
    environments.check_environment(
        lambda batch_size, time_limit: IsolatedEnvironment(
            worker_spec(name, **options), batch_size, time_limit, Isolation(workers=2)
        )
    )


@pytest.mark.builds
def test_environments_of_gym_0_26_pass_the_kit(tmp_path):
    packages = ("gym==0.26.2", "gym-notices==0.0.8", "cloudpickle==3.1.2")  # numpy is the one that is here
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={tmp_path}", *packages]
    subprocess.run(pip, check=True)
    for name in ("Steady", "Everything"):
        environments.check_environment(
            lambda batch_size, time_limit, name=name: IsolatedEnvironment(
                worker_spec(name, api="gym", path=(str(tmp_path),)), batch_size, time_limit, Isolation(workers=2)
            )
        )


@pytest.mark.parametrize(("name", "options"), [("Steady", {}), ("Shared", {"global_randomness": True})])
def test_the_number_of_workers_changes_nothing(name, options):
    actions = np.random.default_rng(0).integers(0, 3, (40, 5))
    runs = []
    for count in (1, 2, 5):
        with make(name, 5, spec_options=options, workers=count) as environment:
            runs.append(play(environment, actions))
            assert len(pids(environment)) == count
    assert all(same(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


def test_actions_arrive_and_observations_come_back_in_every_kind_of_space():
    with make("Everything", 3) as environment:
        spec = environment.spec
        state, _ = environment.reset(jax.random.key(0))
        for seed in range(50):
            action = jax.tree.map(np.asarray, spaces.sample(jax.random.key(seed), spec.action_space, 3))
            state, time_step = environment.step(state, action)
            assert spaces.check(spec.observation_space, time_step.observation, 3, "the observation") == 0
            for leaf in spaces.leaves(spec.action_space):
                shown, sent = (spaces.get(tree, leaf.path) for tree in (time_step.observation["action"], action))
                np.testing.assert_array_equal(shown[~time_step.first], sent[~time_step.first])
            words = [bytes(text).rstrip(b"\0").decode() for text in time_step.observation["words"]]
            assert words == ["ä" * (count % 13) for count in time_step.observation["counter"]]
        assert not environment.faults


def test_masks_of_allowed_actions_are_passed_on():
    with make("Choosy", 2) as environment:
        start, later = play(environment, [[0, 0]])
    assert start.action_mask.tolist() == [[True, False, True, False]] * 2
    assert later.action_mask.all()  # nothing allowed would make NaN of every policy


@hypothesis.given(space=any_spaces)
def test_spaces_are_described_in_the_form_of_the_core(space):
    described = values.describe(space)
    assert described == spaces.to_json(space)
    assert [leaf.path for leaf in spaces.leaves(space)] == [path for path, _ in values.find_leaves(space)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SequenceSpace", "kind Sequence is not supported"),
        ("IntegerKeys", "keys that are not strings"),
        ("TextAction", "nothing here can choose"),
        ("CannotBeMade", "RuntimeError: no display"),
        ("HangsWhenMade", "no answer within"),
        ("NoSuchThing", "has no environment 'NoSuchThing-v0'"),
    ],
)
def test_what_cannot_be_offered_is_refused_with_a_reason(name, text):
    before = len(os.listdir("/proc/self/fd"))
    limit = 2.0 if name == "HangsWhenMade" else 60.0
    with pytest.raises(ldm_jax.EnvironmentFaultError, match=text):
        IsolatedEnvironment(worker_spec(name), 1, None, Isolation(start_timeout_s=limit))
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interpreter_that_is_missing_is_named():
    with pytest.raises(ldm_jax.EnvironmentFaultError, match="/no/such/python cannot be started"):
        IsolatedEnvironment(worker_spec("Steady", "/no/such/python"), 1, None, Isolation())


# Faults. Four rows, two workers: row 1 makes trouble in step 6, and again later.

OF_A_ROW = {
    "Raise": ("exception", "RuntimeError: no such move"),
    "NanObservation": ("nan", "part 'place', is nan"),
    "NanReward": ("nan", "the reward is nan, expected a finite number"),
    "HugeReward": ("nan", "the reward is inf, expected a finite number"),
    "WrongShape": ("shape", r"part 'place', has shape \[3\], expected \[2\]"),
    "WrongType": ("shape", "expected numbers"),
    "MissingPart": ("shape", "part 'place', is missing"),
    "NoTuple": ("shape", "expected a tuple"),
    "NoSuchCategory": ("category", "part 'parity', is 7"),
}
OF_A_WORKER = {
    "Crash": ("crash", "(?s)ended by SIGSEGV.*about to crash"),
    "Exit": ("crash", "exited with status 7"),
    "Orphan": ("crash", "ended by SIGKILL"),
    "Hang": ("hang", "no answer within the limit of 0.5 s"),
    "Sleep": ("hang", "no answer within the limit of 0.5 s"),
    "Garbage": ("garbage", "begins no answer"),
    "Forged": ("garbage", "expected an object"),
    "HangUp": ("crash", "closed the connection|exited|ended"),
}


@pytest.mark.parametrize("name", [*OF_A_ROW, *OF_A_WORKER])
def test_faulty_rows_restart_and_the_run_goes_on(name, caplog):
    kind, text = (OF_A_ROW | OF_A_WORKER)[name]
    struck = [1] if name in OF_A_ROW else [0, 1]
    spared = [index for index in range(4) if index not in struck]
    actions = np.random.default_rng(0).integers(0, 3, (20, 4))
    with make("Steady") as environment:
        expected = play(environment, actions)
    actions[5, 1] = actions[12, 1] = 3
    with make(name) as environment:
        seen = play(environment, actions)
        assert environment.faults == {kind: 2}
        report = environment.reports[-1]
        assert report.kind == kind and report.rows == tuple(struck)
        assert re.search(text, report.text), report.text
        assert f"step 6 after the reset, rows {struck}: {kind}" in caplog.text
        words = report.text.split()
        if name == "Orphan":
            child = int(words[words.index("child") + 1])
            assert soon(lambda: not alive(child))
        for t, (one, other) in enumerate(zip(seen, expected, strict=True)):
            assert same(one, other, spared)
            if t < 6:
                assert same(one, other)
        for t in (6, 13):
            end, start = row(seen[t], struck), row(seen[t + 1], struck)
            assert same(end.observation, row(seen[t - 1], struck).observation)
            assert end.truncated.all() and not end.terminated.any() and not end.first.any() and not end.reward.any()
            assert start.first.all() and not start.last.any() and not start.reward.any()
            assert not start.observation["place"][:, 1].any()
        # It starts elsewhere than before: the seed that led to the fault is not tried again.
        assert not same(row(seen[7], struck).observation, row(seen[0], struck).observation)
        again = play(environment, actions)
        assert all(same(one, other) for one, other in zip(seen, again, strict=True))


def test_an_answer_to_another_question_is_noticed_at_once():
    with make("Twice") as environment:
        seen = play(environment, [[0, 3, 0, 0], [1, 1, 1, 1]])
        assert environment.faults == {"garbage": 1}
    assert seen[1].truncated.tolist() == [True, True, False, False]
    assert seen[2].first.tolist() == [True, True, False, False]


def test_a_worker_that_leaks_is_replaced():
    with make("Leak", memory_limit_bytes=300 << 20) as environment:
        seen = play(environment, [[0, 3, 0, 0], *[[1, 1, 1, 1]] * 27])
        assert environment.faults == {"memory": 1}
        assert "more than its limit" in environment.reports[0].text
    assert sum(time_step.first[2] for time_step in seen) == 1


def test_more_rows_than_memory_has_room_for_are_refused_at_once_and_fewer_are_taken():
    """Ten restarts of a worker that is too small for its rows would be no better than one."""

    def reset(rows, limit=300):
        with make("Heavy", rows, memory_limit_bytes=limit << 20) as environment:
            environment.reset(jax.random.key(0))
            return environment

    with pytest.raises(TooManyRowsError, match=r"hold more than its 300 MB: make it with \d+ rows or fewer") as raised:
        reset(24)
    assert 2 <= raised.value.rows < 12
    environment = with_room(reset, 24)
    assert environment.spec.batch_size in (2, 4, 8) and not environment.faults
    with pytest.raises(EnvironmentFaultError, match=r"of a worker hold more than its 10 MB: raise Isolation"):
        with_room(functools.partial(reset, limit=10), 4)


def test_a_reference_is_trained_and_scored_in_as_many_rows_as_there_is_room_for():
    def made(id, batch_size):
        return IsolatedEnvironment(
            worker_spec("Heavy"), batch_size, None, Isolation(workers=2, memory_limit_bytes=300 << 20)
        )

    recipe = references.Recipe("ppo", PPOConfig(budget_steps=2048, rollout_length=16, hidden=(8,)))
    policy = references.train_reference(made, worker_spec("Heavy").id, recipe)
    assert policy.config.num_envs <= 8 and policy.config.num_envs * policy.config.rollout_length == 64 * 16
    assert references.score_reference(made, policy, 0, 24, 1, 24, 24).reference_returns.episodes >= 24


def test_a_slow_batch_is_not_a_hang_and_prints_are_no_messages():
    with make("Slow", 3, workers=1) as environment:
        play(environment, [[0, 1, 2]])
        assert not environment.faults
    with make("Chatter", 2) as environment:
        play(environment, [[3, 3]] * 25)
        assert not environment.faults
        assert all(os.fstat(worker._log.fileno()).st_size < 8 << 20 for worker in environment._workers)


def test_resets_that_fail_are_tried_again_under_another_seed():
    with make("RarelyStarts", max_faults=50) as environment:
        seen = play(environment, [[1, 1, 1, 1]] * 62)
        assert environment.faults["exception"] > 3
        assert [t for t, time_step in enumerate(seen) if time_step.first.all()] == [0, 31, 62]
        again = play(environment, [[1, 1, 1, 1]] * 62)
    assert all(same(one, other) for one, other in zip(seen, again, strict=True))


def test_too_many_faults_end_the_run_with_a_report():
    with make("NeverStarts", max_faults=5) as environment:
        with pytest.raises(
            ldm_jax.EnvironmentFaultError, match=r"(?s)NeverStarts-v0, step 0 .*never.*expected at most 5"
        ):
            environment.reset(jax.random.key(0))
        assert not pids(environment)
    with make("Raise", max_faults=1) as environment:
        state, _ = environment.reset(jax.random.key(0))
        state, _ = environment.step(state, np.array([3, 0, 0, 0]))
        with pytest.raises(ldm_jax.EnvironmentFaultError, match=r"since it was made: 2 exception"):
            environment.step(state, np.array([0, 3, 0, 0]))
        with pytest.raises(ldm_jax.StaleStateError):
            environment.step(state, np.array([0, 0, 0, 0]))
        assert len(play(environment, [[0, 0, 0, 0]])) == 2  # a reset starts afresh


def test_actions_of_another_shape_are_refused_and_cost_nothing():
    with make("Steady") as environment:
        state, _ = environment.reset(jax.random.key(0))
        with pytest.raises(ValueError, match=r"has shape \[2\], expected \[4\]"):
            environment.step(state, np.zeros(2, np.int32))
        environment.step(state, np.zeros(4, np.int32))


# Nothing is left behind.


def test_nothing_is_left_after_close_and_after_forgetting_to_close():
    with make("Steady"):
        pass
    descriptors = len(os.listdir("/proc/self/fd"))
    for closes in (True, False):
        with contextlib.ExitStack() as stack:
            environment = stack.enter_context(make("Steady"))
            play(environment, [[0, 0, 0, 0]])
            running, folder = pids(environment), environment._scratch
            assert all(map(alive, running)) and os.path.isdir(folder)
            if not closes:
                stack.pop_all()
        del environment, stack
        assert not any(map(alive, running)) and not os.path.exists(folder)
        assert len(os.listdir("/proc/self/fd")) == descriptors


def check_killed_workers_are_replaced(environment, kill_first):
    """Kills the first of two slow workers between steps, and the second in the middle of one."""
    state, _ = environment.reset(jax.random.key(0))
    kill_first()
    state, time_step = environment.step(state, np.zeros(2, np.int32))
    assert time_step.truncated.tolist() == [True, False]
    state, time_step = environment.step(state, np.zeros(2, np.int32))
    assert time_step.first.tolist() == [True, False]
    timer = threading.Timer(0.1, os.kill, (pids(environment)[1], signal.SIGKILL))
    timer.start()
    state, time_step = environment.step(state, np.zeros(2, np.int32))
    assert time_step.truncated.tolist() == [False, True]
    assert environment.faults == {"crash": 2}


def test_a_worker_killed_between_and_in_the_middle_of_steps_is_replaced():
    with make("Slow", 2, call_timeout_s=5.0) as environment:
        check_killed_workers_are_replaced(environment, lambda: os.kill(pids(environment)[0], signal.SIGKILL))
        assert "SIGKILL" in environment.reports[-1].text


HOST = """
    import sys, jax, numpy as np
    sys.path.insert(0, {tests!r})
    from test_isolation import make, pids
    with make("Hang", 2, call_timeout_s=1000) as environment:
        state, _ = environment.reset(jax.random.key(0))
        print(*pids(environment), environment._scratch, flush=True)
        environment.step(state, np.array({action}))
"""


@pytest.mark.parametrize("action", [[3, 3], [0, 3]])
def test_workers_that_hang_end_when_the_host_is_killed(action):
    code = textwrap.dedent(HOST.format(tests=str(pathlib.Path(__file__).parent), action=action))
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    *running, folder = host.stdout.readline().split()
    assert len(running) == 2 and all(map(alive, running))
    # The memory that they share has no name that could be left.
    shared = [line for line in pathlib.Path(f"/proc/{host.pid}/maps").read_text().splitlines() if "/dev/shm/" in line]
    assert shared and all(line.endswith("(deleted)") for line in shared)
    time.sleep(0.3)
    host.kill()
    host.wait()
    host.stdout.close()
    assert soon(lambda: not any(map(alive, running)))
    # What the library wrote is removed by whoever makes such a folder next.
    _, remove = scratch.make_scratch()
    remove()
    assert not os.path.exists(folder)


def test_folders_of_the_living_are_kept():
    (one, remove_one), (other, remove_other) = scratch.make_scratch(), scratch.make_scratch()
    assert os.path.isdir(one) and os.path.isdir(other)
    remove_one()
    remove_other()
    assert not os.path.exists(one) and not os.path.exists(other)


# The program that runs in the other interpreter.


def load_server():
    spec = importlib.util.spec_from_file_location("server", workers.SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SERVER = load_server()


def test_host_and_worker_speak_the_same_protocol():
    names = ("IDLE", "STEP", "RESET", "SEED", "REMAKE")
    assert [getattr(SERVER.gym_api, name) for name in names] == [getattr(gym_api, name) for name in names]
    assert SERVER.PROTOCOL == workers.PROTOCOL and SERVER.HEAD.format == workers.HEAD.format


def test_the_program_of_workers_is_written_for_python_3_7():
    sources = list(workers.SERVER.parent.glob("*.py"))
    assert len(sources) == 5
    for source in (*sources, *(groups.BRIDGES / "experts").glob("*.py")):
        ast.parse(source.read_text(), feature_version=(3, 7))


def test_a_worker_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(workers, "PROTOCOL", 99)
    with pytest.raises(ldm_jax.EnvironmentFaultError, match="got the protocol 99, expected 4"):
        IsolatedEnvironment(worker_spec("Steady"), 1, None, Isolation())


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "jail"},
        {"workers": -1},
        {"max_faults": -1},
        {"call_timeout_s": 0},
        {"memory_limit_bytes": 0},
        {"start_timeout_s": float("nan")},
    ],
)
def test_wrong_limits_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Isolation(**wrong)


def test_folders_of_processes_that_start_at_the_same_time_are_not_taken_for_left_ones():
    def make_one(_):
        path, remove = scratch.make_scratch()
        there = os.path.isdir(path)
        remove()
        return there

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(make_one, range(400)))

"""The stage that makes references: one bad environment costs nothing but itself, and says why."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import chex
import gymnasium as gym
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from gymnasium import spaces

import environments
from data.references import learning, load_reference
from experiments import references
from experiments.harness import making, spare_time
from experiments.harness.ids import Choice
from experiments.harness.outcomes import UnitOutcome
from experiments.harness.stage import UnitsFailedError
from experiments.harness.workdir import WorkdirError
from ldm_jax import cards
from ldm_jax.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*failed to close")  # what Unclosable is there for
CONFIG = references.ReferencesConfig(budget=0.002, num_envs=4, episodes=1, workers=0)


class Plain(gym.Env):
    """Goes well, but for what others change."""

    action_space, observation_space = spaces.Discrete(2), spaces.Box(0, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        return np.zeros(self.observation_space.shape, np.float32), float(action), False, False, {}


class Unclosable(Plain):
    def close(self):
        self.viewer.close()  # nothing was ever rendered


class Unmakable(Plain):
    def __init__(self):
        raise RuntimeError("no licence found")


class Wide(Plain):
    observation_space = spaces.Box(0, 1, (9000,), np.float32)


class Leaving(Plain):
    def step(self, action):
        sys.exit(0)


class Endless(Plain):
    def step(self, action):
        return np.zeros(1, np.float32), float("nan"), False, False, {}


class Dying(Plain):
    def step(self, action):
        os._exit(7)


class Hanging(Plain):
    def step(self, action):
        time.sleep(600)


ODD = (Unclosable, Unmakable, Wide, Leaving, Endless, Dying, Hanging)
for kind in (Plain, *ODD):
    gym.register(f"{kind.__name__}-v7", kind, max_episode_steps=5)
for number in range(4):
    gym.register(f"Plain{number}-v7", Plain, max_episode_steps=5)


def outcome_of(workdir, id):
    return UnitOutcome(**json.loads((workdir / "references" / id / "outcome.json").read_text()))


def run(workdir, *names, config=CONFIG):
    """Runs the stage; returns what it wrote down of each, and what it raised in the end."""
    error = None
    try:
        references.run(config, workdir, tuple(f"gymnasium/{name}-v7" for name in names))
    except UnitsFailedError as caught:
        error = caught
    outcomes = {name: outcome_of(workdir, f"gymnasium/{name}-v7") for name in names}
    failed = {f"gymnasium/{name}-v7": x.reason for name, x in outcomes.items() if x.verdict == "failed"}
    assert failed == (error.reasons if error else {})
    return outcomes


def test_one_bad_environment_does_not_stop_the_others(tmp_path):
    names = ("Unmakable", "Wide", "Leaving", "Endless", "Unclosable", "Plain")
    outcomes = run(tmp_path, *names)
    for name, words in [
        ("Unmakable", "no licence found"),
        ("Wide", "9000"),
        ("Leaving", ""),
        ("Endless", ""),
    ]:
        assert outcomes[name].verdict == "failed" and words in outcomes[name].reason, outcomes[name]
        assert outcomes[name].reason and "\n" not in outcomes[name].reason
    for name in ("Unclosable", "Plain"):
        assert outcomes[name].verdict in ("admitted", "refused"), outcomes[name]
        assert (tmp_path / "references" / "gymnasium" / f"{name}-v7" / "reference.json").exists()
    assert run(tmp_path, *names) == outcomes


def test_a_finished_reference_is_not_made_again(tmp_path):
    first = run(tmp_path, "Plain")
    (saved,) = tmp_path.rglob("reference.json")
    before = saved.stat().st_mtime_ns
    assert run(tmp_path, "Plain") == first
    assert saved.stat().st_mtime_ns == before


def test_a_damaged_reference_is_said_and_left(tmp_path):
    run(tmp_path, "Plain")
    (saved,) = tmp_path.rglob("reference.json")
    saved.write_text("{")
    outcome = run(tmp_path, "Plain")["Plain"]
    assert outcome.verdict == "failed" and "cannot be read" in outcome.reason
    assert saved.read_text() == "{"


def test_what_failed_is_tried_again_only_when_asked(tmp_path):
    mended = []

    class Mended(Plain):
        def __init__(self):
            if not mended:
                raise RuntimeError("no licence found")

    gym.register("Mended-v7", Mended, max_episode_steps=5)
    ids = ("gymnasium/Mended-v7", "gymnasium/Plain-v7")
    try:
        for _ in range(2):
            with pytest.raises(UnitsFailedError, match=r"1 failed, .*retry=failed.*no licence found"):
                references.run(CONFIG, tmp_path, ids)
            mended.append("the second time it would go well, and is not tried")
        references.run(CONFIG, tmp_path, Choice(ids, retry="failed"))
    finally:
        del gym.registry["Mended-v7"]
    assert outcome_of(tmp_path, ids[0]).verdict in ("admitted", "refused")


class Given:
    """A clock that says what it is told to."""

    def __init__(self, *left):
        self._left = iter(left)

    @property
    def left(self):
        return next(self._left)


def test_what_the_hours_do_not_reach_waits_for_the_next_start(tmp_path, monkeypatch):
    ids = ("gymnasium/Plain-v7", "gymnasium/Unclosable-v7")
    monkeypatch.setattr(references, "Clock", lambda hours: Given(-1.0, -1.0))
    with pytest.raises(UnitsFailedError, match=r"1 failed, .*the hours were over"):
        references.run(CONFIG, tmp_path, ids)
    made = [(tmp_path / "references" / id / "outcome.json").exists() for id in ids]
    assert made == [True, False], "what was not begun has no outcome, so that it is not taken for tried"
    monkeypatch.undo()
    references.run(CONFIG, tmp_path, ids)
    assert outcome_of(tmp_path, ids[1]).verdict in ("admitted", "refused")


def test_time_that_is_left_goes_to_what_falls_short_and_the_better_is_kept(tmp_path, monkeypatch):
    config, id = dataclasses.replace(CONFIG, total_hours=1.0), "gymnasium/Plain-v7"
    monkeypatch.setattr(references, "Clock", lambda hours: Given(9e9, 9e9, -1.0, -1.0))
    references.run(config, tmp_path, (id,))
    assert outcome_of(tmp_path, id).budget == spare_time.MORE * CONFIG.budget
    before = load_reference(tmp_path / "references" / id)

    def none_learns(*_):
        raise learning.DivergenceError("nothing was learned")

    # Another try that fails leaves what there was, and is not made once more.
    monkeypatch.setattr(making, "train_reference", none_learns)
    monkeypatch.setattr(references, "Clock", lambda hours: Given(9e9, 9e9, -1.0, -1.0))
    references.run(config, tmp_path, (id,))
    assert outcome_of(tmp_path, id).budget == spare_time.MORE**2 * CONFIG.budget
    after = load_reference(tmp_path / "references" / id)
    chex.assert_trees_all_equal(after.policy.params, before.policy.params)
    assert outcome_of(tmp_path, id).verdict == ("admitted" if before.admission.admitted else "refused")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    run(workdir, "Plain")
    return load_reference(workdir / "references" / "gymnasium" / "Plain-v7")


@hypothesis.given(
    cases=st.lists(
        st.tuples(st.booleans(), st.floats(-0.5, 1.5), st.sampled_from(["", "flat"])), min_size=1, max_size=6
    ),
    seconds=st.floats(0, 1e5),
    workers=st.integers(0, 4),
)
def test_other_tries_fit_into_the_time_that_is_left_and_are_for_what_may_get_better(reference, cases, seconds, workers):
    random = cards.Returns.of(np.array([[0.0, 1.0]]))

    def tried(told, share, stopped):
        target, made = 100.0 if told else None, reference.policy.reference
        made = dataclasses.replace(made, public_target=target, steps=10**6, seconds=10.0, stopped=stopped)
        policy = dataclasses.replace(reference.policy, reference=made)
        returns = cards.Returns.of(np.array([[0.0, 1.0]]) + 100 * share)
        return dataclasses.replace(reference, policy=policy, random_returns=random, reference_returns=returns)

    scored = {f"library/{i}": tried(*case) for i, case in enumerate(cases)}
    have = {id: spare_time.Tried(one, 0.5) for id, one in scored.items()}
    again = spare_time.try_again(have, seconds, workers)
    assert sum(one.seconds for one in again) <= seconds * max(1, workers)
    assert all(one.seconds <= seconds and one.budget == 2.0 for one in again)
    merits = [spare_time._merit(scored[one.id]) for one in again]
    assert merits == sorted(merits) and all(merit < spare_time.GOOD for merit in merits)
    for id, one in scored.items():
        share, made = one.share_of_target, one.policy.reference
        done = one.admission.admitted and (made.stopped if share is None else share >= spare_time.GOOD)
        assert not done or id not in {each.id for each in again}
        if seconds == 1e5 and not done:
            assert id in {each.id for each in again}


PROGRAM = """
import sys, pathlib
sys.path.insert(0, {tests!r})
sys.modules["navix"] = sys.modules["podman"] = None  # what is not installed
import test_reference_stage as here
if __name__ == "__main__":
    from experiments.harness import flags
    sys.argv[1:] = ["--workdir={workdir}", *sys.argv[1:]]
    flags.launch(here.references.run, {{"test": here.CONFIG}})
"""
MISSING, UNBUILDABLE = "navix/Navix-Empty-5x5-v0", "nasim/Tiny-v0"


def start(tmp_path, *arguments):
    """Starts the script on the environments of this file, on a machine where nothing can be built."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(tests=os.path.dirname(__file__), workdir=tmp_path / "run"))
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"LDM_JAX_CACHE": "/dev/null/cache"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_environments_that_die_or_hang_or_whose_library_cannot_be_made_end_by_themselves_alone(tmp_path):
    names = ("Dying", "Leaving", "Unmakable", "Plain", "Unclosable")
    ids = [*(f"gymnasium/{name}-v7" for name in names), MISSING, UNBUILDABLE]
    (tmp_path / "ids.txt").write_text("# all that is odd\n" + "\n".join(ids))
    process = start(tmp_path, f"--environments=@{tmp_path / 'ids.txt'}", "--config.workers=2")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 1 and "5 failed, the others are done" in err.splitlines()[-1], err
    found = {id: outcome_of(tmp_path / "run", id) for id in ids}
    for id, cause, words in [
        ("gymnasium/Dying-v7", "process died", "with status 7"),
        ("gymnasium/Leaving-v7", "faults", ""),
        ("gymnasium/Unmakable-v7", "faults", "no licence found"),
        (MISSING, "library missing", "pip install 'ldm_jax[navix]'"),
        (UNBUILDABLE, "group does not build", ""),
    ]:
        assert found[id].verdict == "failed" and found[id].cause == cause and words in found[id].reason, found[id]
    for name in ("Plain", "Unclosable"):
        assert found[f"gymnasium/{name}-v7"].verdict in ("admitted", "refused")
    table = {line.split()[0]: line.split()[1] for line in out.splitlines() if "/" in line}
    assert table == {id: outcome.verdict for id, outcome in found.items()}

    # Once more, one that hangs with them: what is finished stays as it is.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json")}
    more = ",".join([*ids, "gymnasium/Hanging-v7"])
    process = start(tmp_path, f"--environments={more}", "--config.workers=1", "--config.unit_seconds=5")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 1 and "8 environments" in out and "6 failed" in err, err
    assert outcome_of(tmp_path / "run", "gymnasium/Hanging-v7").cause == "out of time"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_killed_at_any_moment_a_run_keeps_what_is_finished(tmp_path):
    draw = random.Random(3)
    ids = [f"gymnasium/Plain{number}-v7" for number in range(4)]
    arguments = [f"--environments={','.join(ids)}", "--config.workers=0"]
    finished = {}
    for kills in range(3):
        process = start(tmp_path, *arguments)
        while process.poll() is None and kills < 2:
            made = {*tmp_path.glob("run/references/gymnasium/*/reference.json")} - {*finished}
            if made or (kills == 0 and draw.random() < 0.01):
                time.sleep(draw.random())
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        process.communicate(timeout=900)
        now = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/references/gymnasium/*/reference.json")}
        assert {path: now[path] for path in finished} == finished, "what is finished is made once"
        finished = now
    assert process.returncode == 0 and len(finished) == 4
    assert all(outcome_of(tmp_path / "run", id).verdict in ("admitted", "refused") for id in ids)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".aside")]

    # And it is what a run gives that nobody killed.
    run(tmp_path / "straight", "Plain0")
    killed, straight = (load_reference(tmp_path / name / "references" / ids[0]) for name in ("run", "straight"))
    chex.assert_trees_all_equal(killed.policy.params, straight.policy.params)
    assert (killed.random_returns, killed.reference_returns) == (straight.random_returns, straight.reference_returns)


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "cache"))
    names = ("gymnasium/Plain-v7", "gymnasium/Unmakable-v7")
    verdicts = {name: outcome.verdict for name, outcome in run(tmp_path / "run", "Plain", "Unmakable").items()}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    references.run(CONFIG, tmp_path / "run", Choice((*names, UNBUILDABLE, MISSING), "library=gymnax", dry_run=True))
    out = capsys.readouterr().out
    states = {line.split()[0]: line for line in out.splitlines() if "/" in line}
    assert verdicts["Plain"] in states[names[0]] and "failed (faults)" in states[names[1]]
    assert (
        "to do" in states[MISSING]
        and "to do" in states[UNBUILDABLE]
        and states["gymnax/CartPole-v1"].endswith((" s", " min"))
    )
    assert {*states} >= {*environments.select("library=gymnax").ids}
    assert ", 2 finished" in out and "to be built first: nasim" in out and "about" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_where_nothing_is_trained_the_scoring_of_experts_is_foreseen(tmp_path):
    (id,) = environments.select("expert=yes limit=1").ids
    for changes, episodes in [({"least_episodes": 64}, 64), ({"least_episodes": 8, "num_envs": 16, "episodes": 3}, 48)]:
        config = dataclasses.replace(CONFIG, algorithms="expert", budget=9.0, **changes)
        (planned,) = references.foresee(config, tmp_path, (id,))
        assert planned.steps == 2 * episodes * environments.spec(id).time_limit


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": float("nan")},
        {"budget": float("inf")},
        {"num_envs": 0},
        {"workers": -1},
        {"unit_seconds": -1.0},
        {"unit_seconds": 9.0, "workers": 0},
        {"unit_memory_gb": float("nan")},
    ],
)
def test_a_configuration_without_meaning_is_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        references.ReferencesConfig(**changes)


@pytest.mark.parametrize(
    "ids", [(), ("gymnasium/Plain-v7",) * 2, ("gymnasium/Plane-v7",), ("gymnasium/Plain-v7", "nowhere/A")]
)
def test_what_is_wrong_with_the_list_is_said_before_the_workdir_is_touched(tmp_path, ids):
    with pytest.raises((WorkdirError, references.UnknownEnvironmentError, references.LibraryMissingError)):
        references.run(CONFIG, tmp_path / "run", ids)
    assert not (tmp_path / "run").exists()

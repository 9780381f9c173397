"""Laws of an evaluation of many environments: killed anywhere it goes on, and what breaks costs itself alone."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import examples
import numpy as np
import pytest
from runs import copies_at_drawn_moments
from test_isolation import make as misbehaving
from test_isolation import pids

import environments
from data.references import ReferencePolicy, ScoredReference, load_reference, save_reference
from data.references.policy import with_decoding
from data.references.recipes import ALGORITHMS
from experiments import evaluate
from experiments.harness.stage import UnitsFailedError
from ldm_jax import cards
from ldm_jax.environment import Environment
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.policy import Policy

NANO = SIZES["nano"]
PARAMS = examples.random_params(make_model(NANO))
HOST = ("envpool/CliffWalking-v1", "envpool/FrozenLake-v1", "envpool/FrozenLake8x8-v1", "envpool/Taxi-v3")
CLIFF, LAKE = OLD = HOST[:2]
ISOLATED = "misbehaving/Steady-v0"
DYING = "dying/Cliff-v1"
CONFIG = evaluate.EvaluateConfig(num_envs=4, episodes=6, rows=8, buckets=1, workers=0)


def spec_of(id):
    if id == DYING:
        return dataclasses.replace(spec_of(CLIFF), id=DYING, library="dying", version="1.0")
    made = misbehaving("Steady", 1) if id == ISOLATED else contextlib.closing(environments.make(id))
    with made as environment:
        return environment.spec


def lay_out(workdir, ids, change=lambda spec: spec):
    """A workdir with a policy of random parameters, and with references of which the scores alone matter."""
    known = {}
    for id in ids:
        spec = change(spec_of(id))
        card = examples.make_card(spec.observation_space, spec.action_space)
        name = "ppo" if id == ISOLATED else "tabular"
        algorithm, config = ALGORITHMS[name], ALGORITHMS[name].config()
        reference = dataclasses.replace(card.reference, algorithm=name)
        params = with_decoding(algorithm.example(spec, config), "greedy")
        acting = ReferencePolicy(algorithm.agent(spec, config), params, reference, spec, config)
        scored = ScoredReference(acting, card.random_returns, card.reference_returns)
        save_reference(workdir / "references" / id, scored)
        parts = {name: getattr(card, name) for name in ("statistics", "random_returns", "reference_returns")}
        known[id] = cards.EnvironmentCard.of(spec, reference=reference, **parts)
    Policy(NANO, PARAMS, known).save(workdir / "policy")
    return workdir


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("laid") / "out", (*HOST, ISOLATED))


@pytest.fixture(scope="module")
def straight(laid_out, tmp_path_factory):
    """What an evaluation finds that nothing disturbs, and its workdir."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    shutil.copytree(laid_out, workdir)
    return evaluate.run(CONFIG, workdir, HOST), workdir


@pytest.fixture
def workdir(laid_out, tmp_path):
    shutil.copytree(laid_out, tmp_path / "run")
    return tmp_path / "run"


def by_id(found):
    return {item["id"]: item for item in found["environments"]}


def stamps(workdir):
    """Of each finished evaluation, whatever would change if it were written again."""
    paths = (workdir / "evaluation").rglob("[!.]*.json")
    paths = [path for path in paths if path.name != "outcome.json"]
    return {path.relative_to(workdir): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_killed_at_any_moment_an_evaluation_repeats_nothing_and_finds_the_same(straight, workdir, tmp_path):
    found, _ = straight
    flags = [f"--config.{field.name}={getattr(CONFIG, field.name)}" for field in dataclasses.fields(CONFIG)]
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={workdir}", *flags]
    rng = random.Random(0)
    with subprocess.Popen([*command, f"--environments={','.join(HOST)}"], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while not (workdir / "evaluation").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        copies = [workdir, *copies_at_drawn_moments(process, workdir, tmp_path, 2, rng)]
        process.kill()
    assert any(len(stamps(copy)) < len(HOST) for copy in copies), "all was done before the first moment"
    for copy in copies:
        before = stamps(copy)
        assert evaluate.run(CONFIG, copy, HOST)["environments"] == found["environments"]
        assert before.items() <= stamps(copy).items() and len(stamps(copy)) == len(HOST)


def test_a_dry_run_says_what_is_evaluated_already_and_what_the_policy_does_not_know(straight, workdir):
    told = {each.id: each.state for each in evaluate.foresee(CONFIG, straight[1], (*HOST, ISOLATED, "pgx/chess"))}
    assert told == dict.fromkeys(HOST, "evaluated") | {
        ISOLATED: "to do",
        "pgx/chess": "the policy was not trained there",
    }
    assert {each.state for each in evaluate.foresee(CONFIG, workdir, HOST)} == {"to do"}


def test_a_policy_is_played_as_long_as_its_reference_was_scored(straight, workdir):
    config = dataclasses.replace(CONFIG, episodes=1, as_reference=True)
    for item in evaluate.run(config, workdir, HOST)["environments"]:
        scored = load_reference(workdir / "references" / item["id"]).reference_returns.episodes
        assert scored > CONFIG.num_envs and item["episodes"] == -(-scored // CONFIG.num_envs) * CONFIG.num_envs
    longer = dataclasses.replace(config, episodes=1000)
    assert longer.episodes_beside(np.zeros((32, 8))) == 1000 == longer.episodes_beside(None)


def test_the_other_form_of_decoding_is_played_when_asked_and_shown_beside(straight, tmp_path, capsys):
    (found, run), workdir = straight, tmp_path / "run"
    shutil.copytree(run, workdir)
    before = stamps(workdir)
    both = evaluate.run(dataclasses.replace(CONFIG, both=True), workdir, HOST)
    assert before.items() <= stamps(workdir).items() and len(stamps(workdir)) == 2 * len(HOST)
    page, (header, _, *lines) = (workdir / "report" / "index.html").read_text(), capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["decoding", "other", "z"]
    for item in both["environments"]:
        other = item.pop("other")
        assert item | {"other": None} == by_id(found)[item["id"]], "what is scored stays what it was"
        played = json.loads((workdir / "evaluation" / "other_decoding" / f"{item['id']}.json").read_text())
        share = (np.mean(played["returns"]) - item["random"]) / (item["reference"] - item["random"])
        assert (item["decoding"], other["decoding"]) == ("greedy", "sample") and other["z"] == pytest.approx(share)
        assert f"sample: {other['z']:.2f}" in page
        (line,) = [line.split() for line in lines if line.startswith(f"{item['id']} ")]
        assert line[-3:] == ["greedy", "sample", f"{other['z']:.2f}"]


@dataclasses.dataclass(eq=False)
class Dying:
    """An environment in a real worker, which is killed while it plays."""

    inner: Environment
    after: int = 5

    @property
    def spec(self):
        return self.inner.spec

    @property
    def faults(self):
        return self.inner.faults

    def reset(self, key):
        return self.inner.reset(key)

    def step(self, state, action):
        self.after -= 1
        if self.after == 0:
            os.kill(pids(self.inner)[0], signal.SIGKILL)
        return self.inner.step(state, action)

    def close(self):
        self.inner.close()


def making(monkeypatch, **limits):
    """Has the isolated environment made with a worker that dies."""
    with contextlib.ExitStack() as stack:
        real = environments.make

        def make(id, rows):
            if id != ISOLATED:
                return real(id, rows)
            return Dying(stack.enter_context(misbehaving("Steady", rows, **limits)))

        monkeypatch.setattr(environments, "make", make)
        return stack.pop_all()


def test_a_worker_that_dies_costs_its_own_environment_at_most_and_is_counted(straight, workdir, monkeypatch):
    with making(monkeypatch, max_faults=0), pytest.raises(UnitsFailedError, match="SIGKILL") as caught:
        evaluate.run(CONFIG, workdir)
    assert list(caught.value.reasons) == [ISOLATED]
    before, found = stamps(workdir), by_id(json.loads((workdir / "report" / "scores.json").read_text()))
    assert found[ISOLATED]["z"] is None and "SIGKILL" in found[ISOLATED]["reason"]
    for id, item in by_id(straight[0]).items():
        assert found[id] == item and not item["faults"]
    with making(monkeypatch):  # where faults are survived, the worker's places are filled again
        found = by_id(evaluate.run(CONFIG, workdir))
    assert found[ISOLATED]["faults"] == {"crash": 1} and found[ISOLATED]["episodes"] == 4 * 6
    assert before.items() < stamps(workdir).items(), "what was played before is not played again"


ADAPTER = """
import contextlib
import dataclasses
import os

import environments

def candidates():
    return {"Cliff-v1": ""}

class Dying:
    def __init__(self, inner):
        self.inner, self.steps = inner, 0
        self.spec = dataclasses.replace(inner.spec, id="dying/Cliff-v1", library="dying", version="1.0")

    def reset(self, key):
        return self.inner.reset(key)

    def step(self, state, action):
        self.steps += 1
        if self.steps > 3:
            os._exit(7)
        return self.inner.step(state, action)

    def close(self):
        self.inner.close()

def make(name, batch_size, time_limit):
    return Dying(environments.make("envpool/CliffWalking-v1", batch_size))
"""


def test_an_environment_that_ends_its_process_costs_the_others_nothing(straight, tmp_path):
    workdir, plugin = lay_out(tmp_path / "run", (*OLD, DYING)), tmp_path / "plugin"
    information = plugin / "dying-1.0.dist-info"
    information.mkdir(parents=True)
    (plugin / "dying_adapter.py").write_text(ADAPTER)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: dying\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[ldm_jax.environments]\ndying = dying_adapter\n")
    changes = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)} | {"workers": 1}
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    path = os.pathsep.join([str(plugin), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, the others are done" in done.stderr.splitlines()[-1], done.stderr
    found = by_id(json.loads((workdir / "report" / "scores.json").read_text()))
    assert "ends its process with status 7" in found[DYING]["reason"]
    assert all(found[id] == by_id(straight[0])[id] for id in OLD), "alone or together, they play the same"
    outcomes = {id: json.loads((workdir / "evaluation" / id / "outcome.json").read_text()) for id in found}
    assert {id: each["verdict"] for id, each in outcomes.items()} == {
        CLIFF: "evaluated",
        LAKE: "evaluated",
        DYING: "failed",
    }
    assert outcomes[DYING]["reason"] == found[DYING]["reason"]


def test_an_environment_that_is_another_now_is_said_and_the_others_are_scored(straight, workdir, tmp_path):
    # The policy alone knows another lake; of the cliff, both the policy and the reference do.
    changed = lay_out(
        tmp_path / "changed",
        HOST,
        lambda spec: dataclasses.replace(spec, version=spec.version + "1" * (spec.id in OLD)),
    )
    for name in ("policy", f"references/{CLIFF}"):
        shutil.rmtree(workdir / name)
        shutil.move(changed / name, workdir / name)
    with pytest.raises(UnitsFailedError, match="version was") as caught:
        evaluate.run(CONFIG, workdir, HOST)
    assert sorted(caught.value.reasons) == sorted(OLD)
    found = by_id(json.loads((workdir / "report" / "scores.json").read_text()))
    assert all(found[id]["z"] is None and "version was" in found[id]["reason"] for id in OLD)
    assert all(found[id] == by_id(straight[0])[id] for id in HOST if id not in OLD)

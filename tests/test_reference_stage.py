"""The stage that makes references: one bad environment costs nothing but itself, and says why."""

import json
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from experiments import references
from experiments.harness.stage import UnitsFailedError
from experiments.harness.workdir import WorkdirError
from ldm_jax.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*failed to close")  # what Unclosable is there for
CONFIG = references.ReferencesConfig(budget=0.002, num_envs=4, episodes=1, workers=1)


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


ODD = (Unclosable, Unmakable, Wide, Leaving, Endless, Dying)
for kind in (Plain, *ODD):
    gym.register(f"{kind.__name__}-v7", kind, max_episode_steps=5)


def run(workdir, *names, config=CONFIG):
    """Runs the stage; returns what it wrote down of each, and what it raised in the end."""
    error = None
    try:
        references.run(config, workdir, tuple(f"gymnasium/{name}-v7" for name in names))
    except UnitsFailedError as caught:
        error = caught
    written = json.loads((workdir / "references" / "outcomes.json").read_text())
    outcomes = {name: references.ReferenceOutcome(**written[f"gymnasium/{name}-v7"]) for name in names}
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


def test_a_process_that_dies_is_the_failure_of_one_environment(tmp_path):
    # In processes of their own, which know the ids by importing this file.
    program = (
        "import sys, pathlib; sys.path.insert(0, {tests!r});\n"
        "import test_reference_stage as here\n"
        "if __name__ == '__main__':\n"
        "    import dataclasses\n"
        "    config = dataclasses.replace(here.CONFIG, workers=2)\n"
        "    workdir = pathlib.Path({workdir!r})\n"
        "    for name, outcome in here.run(workdir, 'Dying', 'Plain', 'Unclosable', config=config).items():\n"
        "        print(name, outcome.verdict, outcome.reason)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program.format(tests=os.path.dirname(__file__), workdir=str(tmp_path / "run")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    verdicts = dict(line.split()[:2] for line in done.stdout.splitlines())
    assert verdicts["Dying"] == "failed", done.stderr
    assert verdicts["Plain"] != "failed" and verdicts["Unclosable"] != "failed"


@pytest.mark.parametrize(
    "changes", [{"budget": float("nan")}, {"budget": float("inf")}, {"num_envs": 0}, {"workers": 0}]
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

"""What a user can get wrong: every stage says it in one line, before it touches the workdir, whatever it is."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import os
import pathlib
import pickle
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from absl import flags as absl_flags
from runs import copies_at_drawn_moments

import data
import environments
import experiments
import ldm_jax
from data.collect import CollectConfig
from data.references.expert import ExpertConfig
from data.store import open_dataset, verify_dataset
from experiments import collect, diagnose, evaluate, pretrain, quickstart, references, scaling
from experiments.harness import flags
from experiments.harness.stage import UnitsFailedError
from experiments.harness.workdir import pin_config
from ldm_jax.errors import LdmError
from ldm_jax.model.config import SIZES
from ldm_jax.training.optimizer import TrainingConfig

IDS = ("envpool/CliffWalking-v1", "envpool/FrozenLake-v1")
LISTED = ",".join(IDS)
STAGES = {
    "references": (references, references.ReferencesConfig(budget=0.2, num_envs=32, episodes=2, workers=0)),
    "collect": (collect, collect.CollectStageConfig(data=CollectConfig(streams=16, steps=128), workers=0)),
    "pretrain": (
        pretrain,
        pretrain.PretrainConfig(
            model=dataclasses.replace(SIZES["nano"], layers=1),
            training=TrainingConfig(steps=3, warmup=1, optimizer="adamw"),
            window=16,
            peak_flops=1e11,
        ),
    ),
    "evaluate": (evaluate, evaluate.EvaluateConfig(num_envs=8, episodes=2, workers=0)),
    "quickstart": (quickstart, quickstart.SMOKE),
    "scaling": (scaling, scaling.ScalingConfig()),
    "diagnose": (diagnose, diagnose.DiagnoseConfig()),
}
WRITES = {
    "references": ("references",),
    "collect": ("collect.json", "dataset"),
    "pretrain": ("pretrain.json", "checkpoints", "metrics.jsonl", "tensorboard", "policy"),
    "evaluate": ("evaluate.json", "evaluation", "report"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir in which the four stages are done; the policy was trained in one of the two environments."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    references.run(STAGES["references"][1], workdir, IDS)
    collect.run(STAGES["collect"][1], workdir)
    pretrain.run(STAGES["pretrain"][1], workdir, IDS[1:])
    evaluate.run(STAGES["evaluate"][1], workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def files(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def remove(workdir, *names):
    for name in names:
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(name, workdir, *arguments):
    """Runs a stage as its script does; returns what ends it."""
    module, config = STAGES[name]
    argv, values = [name, f"--workdir={workdir}", *arguments], absl_flags.FlagValues()
    with pytest.raises(SystemExit) as caught, flags.one_line():
        preset = flags.define({"test": config}, argv, values)
        values(argv)
        flags.call(module.run, preset, values)
        sys.exit(0)
    return caught.value.code


WRONG = [
    ("references", [], "no environment was named"),
    ("references", ["--environments=gymnax/Catch-bsuite, gymnax/Catch-bsuite"], "twice"),
    ("references", [f"--environments={LISTED},envpool/CliffWalkin-v1"], "envpool/CliffWalking-v1"),
    ("references", ["--environments=gymnax/Catsh*"], "gymnax/Catch-bsuite"),
    ("references", ["--environments=@/nowhere/ids.txt"], "cannot read the list of environments"),
    ("references", ["--select=library=gymnacks"], "did you mean gymnax"),
    ("references", ["--select=libary=gymnax"], "did you mean library"),
    ("references", ["--select=library=gymnax domain=health"], "domain=health leaves none of the"),
    ("references", ["--select=library=gymnax per_family=none"], "per_family=none"),
    ("references", [f"--environments={LISTED}", "--config.unit_seconds=-1"], "unit_seconds is -1.0"),
    ("references", [f"--environments={LISTED}", "--config.budget=nan"], "budget is nan"),
    ("references", [f"--environments={LISTED}", "--config.budget=inf"], "budget is inf"),
    ("references", [f"--environments={LISTED}", "--config.num_envs=0"], "num_envs is 0"),
    ("references", [f"--environments={LISTED}", "--config.seed=2.5"], "seed"),
    ("collect", [f"--environments={LISTED},{IDS[0]}"], "twice"),
    ("collect", [f"--environments={LISTED},envpool/CliffWalkin-v1"], "envpool/CliffWalkin"),
    ("collect", ["--select=library=gymnax"], "that --select='library=gymnax' selects is there"),
    ("collect", ["--environments=gymnax/*"], "none of 2 environments matches 'gymnax/*'"),
    ("collect", ["--retry=failed"], "always tries again"),
    ("collect", ["--config.workers=-1"], "workers is -1"),
    ("collect", ["--config.unit_seconds=9"], "give at least 1 worker"),
    ("collect", ["--config.data.streams=1"], "streams is 1"),
    ("collect", ["--config.data.steps=0"], "steps is 0"),
    ("collect", ["--config.dta.steps=0"], "dta"),
    ("pretrain", ["--config.decoding=gredy"], "gredy"),
    ("pretrain", ["--dry_run"], "has no --dry_run: `python -m experiments.describe`"),
    ("scaling", ["--dry_run"], "has no --dry_run"),
    ("pretrain", ["--config.training.weight_decay=nan"], "weight_decay is nan"),
    ("pretrain", ["--config.training.learning_rate=inf"], "learning_rate is inf"),
    ("pretrain", ["--config.training.learning_rate=1e39"], "learning_rate"),
    ("pretrain", ["--config.model.bins=8"], "bins"),
    ("pretrain", ["--config.model.bins=12"], "bins"),
    ("pretrain", ["--config.model.numeric=0"], "numeric is 0"),
    ("pretrain", ["--config.model.values=2"], "values"),
    ("pretrain", ["--config.window=8"], "window is 8"),
    ("pretrain", ["--config.training.seed=-1"], "seed is -1"),
    ("pretrain", [f"--environments={LISTED},{IDS[0]}"], "twice"),
    ("pretrain", [f"--environments={LISTED},envpool/CliffWalkin-v1"], "envpool/CliffWalkin"),
    ("pretrain", ["--config.evaluation.environments=a, b"], "names a, b"),
    ("pretrain", [f"--config.evaluation.environments={IDS[0]},{IDS[0]}"], "twice"),
    ("pretrain", ["--config.mesh.data=7"], "devices"),
    ("pretrain", ["--config.held_out=17"], "collect more streams"),
    ("evaluate", ["--config.seed=-1"], "seed is -1"),
    ("evaluate", ["--config.num_envs=1"], "num_envs is 1"),
    ("evaluate", ["--config.episodes=0"], "episodes is 0"),
    ("evaluate", [f"--environments={IDS[0]},{IDS[0]}"], "twice"),
    ("evaluate", [f"--environments={LISTED},envpool/CliffWalkin-v1"], "envpool/CliffWalkin"),
    ("quickstart", [f"--environments={LISTED},envpool/CliffWalkin-v1"], "envpool/CliffWalking-v1"),
    ("quickstart", [f"--environments={LISTED}, {IDS[0]}"], "twice"),
    ("quickstart", ["--config.pretrain.held_out=17"], "held_out is 17"),
    ("quickstart", ["--config.pretrain.window=257"], "window is 257"),
    ("quickstart", ["--config.pretrain.model.tokens_per_step=3"], "tokens_per_step is 3"),
    ("quickstart", ["--config.pretrain.evaluation.environments=a"], "names a"),
    ("quickstart", ["--config.pretrain.mesh.fsdp=7"], "devices"),
    ("quickstart", ["--config.pretrain.decoding=gredy"], "gredy"),
    ("quickstart", ["--config.evaluate.seed=-1"], "seed is -1"),
    ("scaling", ["--config.sizes=huge,1x1,2x2"], "huge"),
    ("scaling", ["--config.tokens=1e5,2e5,nan"], "tokens"),
    ("scaling", [f"--environments={IDS[0]},{IDS[0]}"], "twice"),
    ("diagnose", ["--config.step=-1"], "step is -1"),
    ("diagnose", ["--config.step=99"], "no checkpoint 98"),
    *((name, ["--preset=other"], "preset") for name in STAGES),
    *((name, ["--workdir=/dev/null/run"], "cannot use the workdir") for name in STAGES),
]


@pytest.mark.parametrize(("name", "arguments", "words"), WRONG, ids=[f"{name} {flag}" for name, flag, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line_before_anything_is_touched(workdir, name, arguments, words):
    # As if the stage had never run there: it could take the workdir for itself.
    remove(workdir, *(each for each in WRITES.get(name, ()) if (workdir / each).exists()))
    if name == "quickstart":
        shutil.rmtree(workdir)
        workdir.mkdir()
    before = files(workdir)
    code = run(name, workdir, *arguments)
    assert isinstance(code, str) and code.startswith("error: ") and words in code and "\n" not in code
    assert files(workdir) == before


@pytest.mark.parametrize("name", ["collect", "pretrain", "evaluate", "scaling", "diagnose"])
def test_a_stage_without_what_it_needs_says_what_is_missing_and_leaves_nothing(name, tmp_path):
    code = run(name, tmp_path / "a" / "run")
    assert isinstance(code, str) and code.startswith("error: ") and str(tmp_path) in code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_that_is_started_beside_another_says_who_is_at_work_and_touches_nothing(name, workdir):
    hold = "import pathlib, sys\nfrom experiments.harness.workdir import lock\n"
    hold += "with lock(pathlib.Path(sys.argv[1]), 'collect'): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = files(workdir)
        code = run(name, workdir)
        assert "experiments.collect is at work there" in code and str(other.pid) in code
        assert files(workdir) == before
        other.kill()


class Wide(gymnasium.Env):
    """More numbers than any bucket holds."""

    action_space, observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Box(0, 1, (9000,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(9000, np.float32), {}

    def step(self, action):
        return np.zeros(9000, np.float32), float(action), False, False, {}


@pytest.fixture
def wide():
    gymnasium.register("Wide-v0", Wide, max_episode_steps=5)
    yield "gymnasium/Wide-v0"
    del gymnasium.registry["Wide-v0"]


def test_an_environment_too_wide_for_the_model_is_said_first_and_the_others_go_on(wide, tmp_path, caplog):
    stages = {name: STAGES[name][1] for name in WRITES}
    config = quickstart.QuickstartConfig(**stages, environments=(wide, IDS[1]))
    with caplog.at_level("INFO", logger="ldm_jax"):
        found = quickstart.run(config, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith(f"refused id={wide}") and "9000" in said[0], said
    by_id = {item["id"]: item for item in found["environments"]}
    assert by_id[wide]["z"] is None and "9000" in by_id[wide]["reason"]
    assert by_id[IDS[1]]["z"] is not None
    assert not (tmp_path / "run" / "references" / wide).exists()


# Whatever goes wrong later is said in one line, too.


def start(name, workdir, *arguments, room=""):
    """Starts the script; no file may be larger than `room`, in blocks, as on a disk that is full."""
    _, config = STAGES[name]
    command = [sys.executable, "-m", f"experiments.{name}", f"--workdir={workdir}", *overrides(config), *arguments]
    return subprocess.Popen(
        ["sh", "-c", f'ulimit -f {room} && exec "$@"', "sh", *command] if room else command,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def overrides(config, prefix="--config"):
    """The flags that make the default configuration this one."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from overrides(value, name)
        else:
            yield f"{name}={value}"


def is_litter(path):
    return path.name == ".lock" or path.name.endswith(".aside") or (path.name.startswith(".") and path.is_dir())


@pytest.mark.parametrize("name", list(WRITES))
def test_a_disk_without_room_ends_a_stage_in_one_line_and_it_can_go_on(name, workdir):
    remove(workdir, *(set(WRITES[name]) - {f"{name}.json"}))
    arguments = [f"--environments={LISTED if name == 'references' else IDS[1]}"]
    process = start(name, workdir, *arguments, room="2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert "error: " in err.splitlines()[-1], err
    assert not [path for path in workdir.rglob("*") if is_litter(path)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("references", ["--environments=gymnax/Catch-bsuite", "--config.budget=50"]),
        ("references", [f"--environments={LISTED}", "--config.budget=50", "--config.workers=2"]),
        ("collect", ["--config.data.steps=2000000", "--config.data.max_bytes=10000000000"]),
        ("evaluate", ["--config.episodes=100000"]),
    ],
)
def test_a_signal_ends_a_stage_in_one_line_with_the_status_of_a_shell(name, arguments, number, workdir):
    remove(workdir, *WRITES[name])
    if name == "references":
        remove(workdir, "references.json")
    process = start(name, workdir, *arguments)
    until = time.monotonic() + 120
    while not (workdir / f"{name}.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)  # it is at work
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number, out + err
    assert "Traceback" not in out + err and "interrupted" in err and "failed" not in err, err
    assert not [path for path in workdir.rglob("*") if is_litter(path)]


# What is optional is optional.


def scores_of(workdir):
    return {item["id"]: item for item in json.loads((workdir / "report" / "scores.json").read_text())["environments"]}


def test_an_environment_that_the_policy_was_not_trained_in_is_listed_and_the_others_are_reported(finished):
    found = scores_of(finished)
    assert found[IDS[0]]["z"] is None and "not trained" in found[IDS[0]]["reason"]
    assert found[IDS[0]]["reference"] > found[IDS[0]]["random"], "what is known is shown"
    assert found[IDS[1]]["z"] is not None


@pytest.mark.parametrize(
    ("break_it", "lost"),
    [
        (lambda workdir: (workdir / "metrics.jsonl").unlink(), ()),
        (lambda workdir: (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "tok'), ()),
        (lambda workdir: (workdir / "metrics.jsonl").write_bytes(b"\xff\n3\n"), ()),
        (lambda workdir: (workdir / "evaluation" / f"{IDS[1]}.json").write_text("{"), ()),
        (lambda workdir: damage(workdir / "references" / IDS[0]), IDS[:1]),
        (lambda workdir: (workdir / "references" / IDS[0] / "reference.json").write_text("{"), IDS[:1]),
        (lambda workdir: lose_a_return(workdir / "evaluation" / f"{IDS[1]}.json"), IDS[1:]),
    ],
    ids=["no curve", "half a line", "no text", "half a result", "bad weights", "bad reference", "a NaN return"],
)
def test_the_report_has_what_there_is(workdir, break_it, lost):
    before = scores_of(workdir)
    shutil.rmtree(workdir / "report")
    break_it(workdir)
    assert not run("evaluate", workdir)
    found = scores_of(workdir)
    for id in IDS:
        if id in lost:
            assert found[id]["z"] is None and found[id]["reason"]
        else:
            assert found[id] == before[id]


def damage(reference):
    (params,) = reference.glob("*.npz")
    params.write_bytes(b"x")


def lose_a_return(path):
    result = json.loads(path.read_text())
    result["returns"][0][0] = math.nan
    path.write_text(json.dumps(result))


def test_one_reference_that_is_damaged_does_not_stop_the_collection_of_the_others(workdir):
    remove(workdir, "dataset")
    damage(workdir / "references" / IDS[0])
    code = run("collect", workdir)
    assert isinstance(code, str) and IDS[0] in code and IDS[1] not in code and "the others are done" in code
    assert open_dataset(workdir / "dataset").ids == IDS[1:]


def test_processes_collect_the_same_data_and_one_that_takes_too_much_is_a_failure(workdir):
    remove(workdir, "dataset")
    arguments = ["--select=library=envpool", "--config.workers=2"]
    code = run("collect", workdir, *arguments, "--config.unit_memory_gb=0.001")
    assert isinstance(code, str) and code.startswith("error: 2 failed") and "more than 0.001 GB" in code
    assert open_dataset(workdir / "dataset").ids == ()
    assert not run("collect", workdir, *arguments)
    alone = workdir.parent / "alone"
    shutil.copytree(workdir / "references", alone / "references")
    collect.run(STAGES["collect"][1], alone)
    found, wanted = ({k: v for k, v in files(each / "dataset").items() if "part-" in k} for each in (workdir, alone))
    assert found == wanted and len(found) > 20


def test_killed_at_any_moment_a_collection_goes_on_and_finds_the_same(finished, workdir, tmp_path):
    remove(workdir, "dataset")
    draw = random.Random(1)
    with start("collect", workdir) as process:
        while not (workdir / "dataset").exists() and process.poll() is None:
            time.sleep(0.01)
        copies = copies_at_drawn_moments(process, workdir, tmp_path, 4, draw)
        process.kill()
        process.communicate()
    wanted = open_dataset(finished / "dataset")
    assert copies
    for copied in copies:
        assert not run("collect", copied)
        found = open_dataset(copied / "dataset")
        verify_dataset(found)
        assert {id: (found.card(id), len(found.parts(id))) for id in found.ids} == {
            id: (wanted.card(id), 1) for id in IDS
        }


def test_no_library_moves_results_by_changing_the_directory(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "references", "run/references")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    make = environments.make

    def move_and_make(*args, **kwargs):
        os.chdir(elsewhere)
        return make(*args, **kwargs)

    monkeypatch.setattr(environments, "make", move_and_make)
    collect.run(STAGES["collect"][1], pathlib.Path("run"), IDS[1:])
    assert list(elsewhere.iterdir()) == [] and (tmp_path / "run" / "dataset").is_dir()


# Every number of every configuration.


def configurations():
    for package in (ldm_jax, environments, data, experiments):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".worker" not in module.name and ".bridges" not in module.name:
                for name, each in inspect.getmembers(importlib.import_module(module.name), dataclasses.is_dataclass):
                    if name.endswith("Config") and isinstance(each, type) and each.__module__ == module.name:
                        yield each


FLOATS = [
    (each, field.name)
    for each in configurations()
    for field in dataclasses.fields(each)
    if field.type in ("float", float)
]


def test_the_configurations_are_found():
    assert {each.__name__ for each, _ in FLOATS} >= {"ModelConfig", "TrainingConfig", "PPOConfig", "ReferencesConfig"}


@pytest.mark.parametrize(("config", "name"), FLOATS, ids=[f"{each.__name__}.{name}" for each, name in FLOATS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_configuration_takes_a_number_that_is_not_finite(config, name, value):
    with pytest.raises(LdmError, match=name):
        dataclasses.replace(example(config), **{name: value})


def example(config):
    return SIZES["nano"] if config is ldm_jax.ModelConfig else config()


def test_configurations_and_failures_travel():
    whole = [
        each for each in configurations() if each.__name__ not in ("DescribeConfig", "ExpertConfig", "ModelConfig")
    ]
    for value in (SIZES["nano"], ExpertConfig("bot"), *(each() for each in whole)):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
        assert hash(pickle.loads(pickle.dumps(value))) == hash(value)
    failed = pickle.loads(pickle.dumps(UnitsFailedError({"a/A": "broken"})))
    assert failed.reasons == {"a/A": "broken"} and "a/A: broken" in str(failed)


# What is in the way of our packages.


@pytest.mark.parametrize("name", ["data.py", "environments/__init__.py", "ldm_jax.py"])
def test_a_file_of_the_user_that_shadows_a_package_is_named(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x = 1\n")
    root = pathlib.Path(experiments.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.collect", "--workdir=run"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert str(tmp_path / name) in done.stderr and not (tmp_path / "run").exists()


# The flags.


@pytest.mark.parametrize("name", list(STAGES))
def test_every_field_of_a_configuration_says_what_it_is(name):
    lines = list(flags.describe_fields(STAGES[name][1]))
    assert lines and not [line for line in lines if ":  (default" in line]


def test_the_help_of_a_script_shows_its_flags():
    command = [sys.executable, "-m", "experiments.evaluate", "--help"]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    assert all(flag in out for flag in ("--workdir", "--environments", "--preset", "config.seed: seed of"))


def test_a_pinned_configuration_that_differs_names_the_difference(tmp_path):
    pin_config(tmp_path, "evaluate", evaluate.EvaluateConfig(), owns=("evaluation",))
    with pytest.raises(LdmError, match="num_envs was 64 there and is 32 now"):
        pin_config(tmp_path, "evaluate", evaluate.EvaluateConfig(num_envs=32), owns=("evaluation",))

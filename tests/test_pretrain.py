"""Pretraining as a user runs it: what it writes, how it ends, and how it goes on."""

import dataclasses
import re
import signal
import struct

import gymnasium
import jax
import numpy as np
import pytest
import runs
from tensorboardX.proto.event_pb2 import Event

from data.store import StoreError, open_dataset
from experiments import diagnose, pretrain
from experiments.harness import validation
from experiments.harness.mesh import HostsConfig, MeshConfig
from experiments.harness.metrics_log import RunLog, read_rows
from experiments.harness.workdir import WorkdirError
from ldm_jax import policy, training
from ldm_jax.cards import CardError, EnvironmentCard
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.spaces import SpaceError
from ldm_jax.training import checkpoints
from ldm_jax.training.optimizer import TrainingConfig

CONFIG = pretrain.PretrainConfig(
    model=dataclasses.replace(SIZES["nano"], layers=1, values=64),
    training=TrainingConfig(steps=12, warmup=2, optimizer="adamw"),
    window=16,
    rows=4,
    checkpoint_steps=4,
    log_steps=3,
    evaluation=validation.ValidationConfig(steps=5, batches=2, environments=runs.IDS[0], rows=2),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset"
    runs.make_dataset(path)
    return path


FLAGS = ("--config.training.steps=200", "--config.checkpoint_steps=20")
EVALUATED = (
    "--config.evaluation.steps=90",
    "--config.evaluation.batches=2",
    f"--config.evaluation.environments={runs.IDS[0]}",
    "--config.evaluation.rows=2",
    "--config.keep_period=80",
)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Has a workdir `straight`, trained without interruption and evaluated on the way, and an empty one, `stopped`."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("straight", "stopped"):
        (folder / name).mkdir()
        (folder / name / "dataset").symlink_to(data)
    out, code = runs.finish(runs.start(folder / "straight", *FLAGS, *EVALUATED, cache=folder / "cache"))
    assert code == 0, out
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return folder / "straight"


def events(folder):
    """`{(tag, step): value}` of TensorBoard's files."""
    found = {}
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return found


def test_metrics_say_how_well_and_how_fast(trained):
    rows = runs.rows(trained)
    assert [row["step"] for row in rows] == sorted({*range(20, 201, 20), 90, 180, 200})
    tokens = 16 * 2 * 2
    for row in rows:
        assert row["tokens"] == row["step"] * tokens
        assert 0 < row["useful_fraction"] <= 1 and row["useful_fraction"] == row["useful_tokens"] / tokens
        assert set(row["kl_by_environment"]) <= set(runs.IDS)
        assert row["kl_by_domain"] == {"classic control": pytest.approx(row["kl"], abs=1e-5)}
        assert ("held_out" in row) == ("evaluation" in row) == (row["step"] in (90, 180, 200))
        assert ("tokens_per_s" in row) == (row["step"] > 20)
        if "tokens_per_s" in row:
            assert row["tokens_per_s"] > 0 and row["flop_utilization"] > 0
    rates = [row["learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True) and rates[0] < TrainingConfig().learning_rate
    last = rows[-1]
    assert last["share_by_environment"] == pytest.approx(dict.fromkeys(runs.IDS, 0.5))
    assert set(last["held_out"]["kl_by_environment"]) == set(runs.IDS)
    assert last["held_out"]["loss"] > last["held_out"]["kl"] > 0
    assert last["held_out"]["loss"] < rows[0]["loss"], "nothing was learned"
    acted = last["evaluation"][runs.IDS[0]]
    random, reference = runs.RETURNS[runs.IDS[0]]
    assert acted["z"] == pytest.approx((acted["return"] - random) / (reference - random))


def test_tensorboard_has_the_same_numbers(trained):
    found = events(trained / "tensorboard")
    for row in runs.rows(trained):
        for name in ("loss", "tokens_per_s", "useful_fraction"):
            if name in row:
                assert found[name, row["step"]] == pytest.approx(row[name], rel=1e-5)
        if "held_out" in row:
            assert found["held_out/loss", row["step"]] == pytest.approx(row["held_out"]["loss"], rel=1e-5)


def test_parameters_alone_are_restored_for_acting(trained):
    model = policy.load(trained / "policy").cfg
    with checkpoints.Checkpoints(trained / "checkpoints", {}) as saved:
        assert saved.steps == [80, 160, 180, 200]
        params = saved.restore_params(jax.eval_shape(make_model(model).init, jax.random.key(0)))
        wider = make_model(dataclasses.replace(model, width=64))
        with pytest.raises(
            checkpoints.CheckpointError, match=r"decoder/blocks/down/kernel was float32\[1, 64, 32\] the"
        ):
            saved.restore_params(jax.eval_shape(wider.init, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, params, policy.load(trained / "policy").params)


def test_signals_save_and_exit_and_the_run_goes_on_as_if_nothing_had_been(folder, trained):
    # evaluated nowhere, as that must change nothing
    stopped, done = folder / "stopped", 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = runs.start(stopped, *FLAGS, cache=folder / "cache")
        seen = runs.send_at(process, "pretrain step=", number)
        rest, ended = runs.finish(process)
        assert ended == code and "Traceback" not in rest, seen + rest
        with checkpoints.Checkpoints(stopped / "checkpoints", {}) as saved:
            assert done < saved.latest < 200
            done = saved.latest
        assert f"interrupted step={done} signal={number}" in rest
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # a crash may cut a line off
    out, code = runs.finish(runs.start(stopped, *FLAGS, cache=folder / "cache"))
    assert code == 0 and "was not written to its end" in out and "Traceback" not in out, out
    one, two = (policy.load(path / "policy").params for path in (trained, stopped))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    losses = [{row["step"]: row["loss"] for row in runs.rows(path)} for path in (trained, stopped)]
    assert len(losses[1]) >= 8 and {step: losses[0][step] for step in losses[1]} == losses[1]


def test_what_is_not_finite_stops_the_run_and_can_be_repeated(tmp_path, capsys):
    runs.make_dataset(tmp_path / "dataset", poison=True)
    config = dataclasses.replace(CONFIG, rows=8, training=dataclasses.replace(CONFIG.training, steps=50))
    with pytest.raises(training.TrainingError, match=r"not finite at step \d+: .* experiments\.diagnose") as caught:
        pretrain.run(config, tmp_path)
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])
    with checkpoints.Checkpoints(tmp_path / "checkpoints", {}) as saved:
        assert saved.latest == step - 1
    before = listing(tmp_path)
    capsys.readouterr()
    found = diagnose.run(diagnose.DiagnoseConfig(), tmp_path)
    out = capsys.readouterr().out
    assert listing(tmp_path) == before, "it looks and touches nothing"
    assert np.isnan(found.loss) and not found.parameters and found.gradients and found.updates
    assert all("features/reward" in name for name in found.leaves) and found.leaves
    assert found.rows and {index for _, _, index in found.rows} == {0}
    assert "rows whose loss is not finite" in out and "of gymnax/CartPole-v1" in out and "of gymnax/Pendulum" not in out
    with pytest.raises(checkpoints.CheckpointError, match=f"no checkpoint {step} in"):
        diagnose.run(diagnose.DiagnoseConfig(step=step + 1), tmp_path)
    for _ in range(2):  # twice as much is not the same
        runs.make_dataset(tmp_path / "other")
    with pytest.raises(WorkdirError, match="no longer the data that was trained on"):
        diagnose.run(diagnose.DiagnoseConfig(dataset=str(tmp_path / "other")), tmp_path)


def listing(folder):
    """Every file of a folder with its time and size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def test_what_does_not_fit_is_left_out_and_the_rest_is_trained(data, tmp_path, caplog):
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, continuous_slots=1),
        training=dataclasses.replace(CONFIG.training, steps=3),
        evaluation=validation.ValidationConfig(steps=0),
        peak_flops=1e11,
    )
    pretrain.run(config, tmp_path / "run", data=data)
    assert [r.message for r in caplog.records if "left out" in r.message and runs.IDS[1] in r.message]
    assert tuple(policy.load(tmp_path / "run" / "policy").cards) == (runs.IDS[0],)
    (row,) = runs.rows(tmp_path / "run")
    assert set(row["kl_by_environment"]) == {runs.IDS[0]} and row["tokens"] == 3 * 16 * 4


def test_a_full_disk_ends_in_one_line_and_costs_no_checkpoint(folder, data):
    full, cache = folder / "full", folder / "cache"
    full.mkdir()
    (full / "dataset").symlink_to(data)
    process = runs.start(full, *FLAGS, cache=cache)
    runs.send_at(process, "pretrain step=")
    assert runs.finish(process)[1] == 128 + signal.SIGTERM
    whole = listing(full / "checkpoints")
    out, code = runs.finish(runs.start(full, *FLAGS, largest=50_000))
    assert code == 1 and "Traceback" not in out, out
    assert "error: cannot write a checkpoint to" in out.splitlines()[-1] and "make room" in out.splitlines()[-1]
    after = listing(full / "checkpoints")
    assert {path: after.get(path) for path in whole} == whole
    out, code = runs.finish(runs.start(full, *FLAGS, cache=cache))
    assert code == 0, out


def test_metrics_that_cannot_be_written_say_so(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with pytest.raises(WorkdirError, match=r"cannot write .*tensorboard: File exists"):
        RunLog(tmp_path, 0, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_what_cannot_be_trained_says_the_way_out(data, tmp_path):
    def refused(error, words, environments=(), **changes):
        with pytest.raises(error, match=words):
            pretrain.run(dataclasses.replace(CONFIG, **changes), tmp_path / "run", environments, data)
        assert not (tmp_path / "run").exists(), "refused before anything is written"

    count = jax.device_count()
    refused(ConfigError, f"there are {count}: choose three numbers", mesh=MeshConfig(data=3 * count))
    refused(
        ConfigError,
        r"needs continuous_slots=2 \(the model has 1\): make the model with these values or leave",
        environments=(runs.IDS[1],),
        model=dataclasses.replace(CONFIG.model, continuous_slots=1),
    )
    refused(ConfigError, "a multiple of 3", training=dataclasses.replace(CONFIG.training, accumulation=3))
    refused(
        ConfigError,
        "choose among gymnax/CartPole-v1",
        evaluation=validation.ValidationConfig(environments="gymnax/Catch"),
    )
    refused(ValueError, "collect more streams", held_out=64)
    refused(ConfigError, "expected one of greedy, mode, sample", decoding="gredy")
    refused(WorkdirError, "CartPole-v1 twice", environments=(runs.IDS[0], runs.IDS[0]))
    refused(StoreError, "gymnax/Catch", environments=("gymnax/Catch",))
    refused(ConfigError, "tokens_per_step=2", model=dataclasses.replace(CONFIG.model, tokens_per_step=2))
    for change, words in (
        (lambda: MeshConfig(fsdp=0), "mesh.fsdp is 0"),
        (lambda: HostsConfig(processes=2), "coordinator is empty"),
        (lambda: HostsConfig("localhost:1", 2, 2), "process is 2"),
        (lambda: dataclasses.replace(CONFIG, keep_period=5), "multiple of checkpoint_steps"),
        (lambda: dataclasses.replace(CONFIG, held_out=1), "held_out is 1"),
        (lambda: dataclasses.replace(CONFIG, peak_flops=float("nan")), "peak_flops is nan"),
        (lambda: dataclasses.replace(CONFIG, peak_flops=-1.0), "peak_flops is -1"),
        (lambda: dataclasses.replace(CONFIG, keep_period=-4), "keep_period is -4"),
        (lambda: diagnose.DiagnoseConfig(step=-1), "step is -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            change()
    twice = f"{runs.IDS[0]}, {runs.IDS[0]}"
    with pytest.raises(WorkdirError, match="twice"):
        validation.ValidationConfig(environments=twice)
    assert validation.ValidationConfig(environments=", ".join(runs.IDS)).ids == runs.IDS, "blanks do not count"


def test_a_card_without_the_fields_needed_and_a_space_too_large_for_any_bucket_are_refused(data):
    dataset = open_dataset(data)
    described = dataset.card(runs.IDS[0]).to_json()
    del described["statistics"]
    with pytest.raises(CardError, match=r"CartPole.*'statistics'; collect its data again"):
        EnvironmentCard.from_json(described)
    card = dataset.card(runs.IDS[0])
    huge = dataclasses.replace(card, observation_space=gymnasium.spaces.Box(-1, 1, (20_000,)))
    with pytest.raises(SpaceError, match="the largest bucket has 8192: shrink the space in its adapter"):
        Codec(huge)


def test_an_unknown_axis_is_refused_at_the_command_line(data, tmp_path):
    (tmp_path / "dataset").symlink_to(data)
    for flag, words in (("--config.mesh.pipeline=2", "pipeline"), ("--config.mesh.data=5", "choose three numbers")):
        out, code = runs.finish(runs.start(tmp_path, flag))
        assert code == 1 and words in out and "Traceback" not in out, out

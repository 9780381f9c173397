"""Pretraining as a user runs it: what it writes, how it ends, and how it goes on."""

import dataclasses
import signal
import struct

import gymnasium
import jax
import numpy as np
import pytest
import runs
from tensorboardX.proto.event_pb2 import Event

from data.store import open_dataset
from experiments import diagnose, pretrain
from experiments.harness import validation
from experiments.harness.mesh import HostsConfig, MeshConfig
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
    rows=2,
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
    out, code = runs.finish(runs.start(stopped, *FLAGS, cache=folder / "cache"))
    assert code == 0, out
    one, two = (policy.load(path / "policy").params for path in (trained, stopped))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    losses = [{row["step"]: row["loss"] for row in runs.rows(path)} for path in (trained, stopped)]
    assert len(losses[1]) >= 8 and {step: losses[0][step] for step in losses[1]} == losses[1]


def test_what_is_not_finite_stops_the_run_and_can_be_replayed(tmp_path, capsys):
    runs.make_dataset(tmp_path / "dataset", poison=True)
    config = dataclasses.replace(CONFIG, rows=4, training=dataclasses.replace(CONFIG.training, steps=50))
    with pytest.raises(training.TrainingError, match=r"loss is nan .* experiments\.replay"):
        pretrain.run(config, tmp_path)
    (path,) = (tmp_path / "failure").iterdir()
    step = int(path.name.split("-")[1])
    with checkpoints.Checkpoints(tmp_path / "checkpoints", {}) as saved:
        assert saved.latest == step - 1
    capsys.readouterr()
    found = diagnose.run(diagnose.DiagnoseConfig(), tmp_path)
    out = capsys.readouterr().out
    assert np.isnan(found.loss) and not found.parameters and found.gradients
    assert all("features/reward" in name for name in found.leaves) and found.leaves
    assert found.rows and {index for _, _, index in found.rows} == {0}
    assert "rows whose loss is not finite" in out and "of gymnax/CartPole-v1" in out and "of gymnax/Pendulum" not in out


def test_what_cannot_be_trained_says_the_way_out(data, tmp_path):
    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            pretrain.run(dataclasses.replace(CONFIG, **changes), tmp_path / "run", data=data)
        assert not (tmp_path / "run").exists(), "refused before anything is written"

    count = jax.device_count()
    refused(ConfigError, f"there are {count}: choose three numbers", mesh=MeshConfig(data=3 * count))
    refused(
        ConfigError,
        r"needs continuous_slots=2 \(the model has 1\): make the model with these values or leave",
        model=dataclasses.replace(CONFIG.model, continuous_slots=1),
    )
    refused(ConfigError, "a multiple of 3", training=dataclasses.replace(CONFIG.training, accumulation=3))
    refused(
        ConfigError,
        "choose among gymnax/CartPole-v1",
        evaluation=validation.ValidationConfig(environments="gymnax/Catch"),
    )
    refused(ValueError, "collect more streams", held_out=64)
    for change, words in (
        (lambda: MeshConfig(fsdp=0), "mesh.fsdp is 0"),
        (lambda: HostsConfig(processes=2), "coordinator is empty"),
        (lambda: HostsConfig("localhost:1", 2, 2), "process is 2"),
        (lambda: dataclasses.replace(CONFIG, keep_period=5), "multiple of checkpoint_steps"),
        (lambda: dataclasses.replace(CONFIG, held_out=1), "held_out is 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            change()


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

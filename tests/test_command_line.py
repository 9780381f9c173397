"""The command line: each verb says what the function behind it says, and a mistake is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys

import examples
import jax
import numpy as np
import pytest

import environments
import ldm_jax
from data.store import create_dataset
from experiments import command_line, watching

CATCH = "gymnax/Catch-bsuite"


def run(monkeypatch, capsys, *arguments):
    """What is printed, and the status: the text of an error, or 0."""
    monkeypatch.setattr(sys, "argv", ["ldm-jax", *arguments])
    try:
        command_line.main()
    except SystemExit as end:
        return capsys.readouterr().out, end.code or 0
    return capsys.readouterr().out, 0


@pytest.fixture(scope="module")
def catch_policy(tmp_path_factory):
    """A policy that has learnt nothing, in one environment that it has a card of."""
    return save_policy(tmp_path_factory.mktemp("play") / "policy", CATCH)


def save_policy(folder, id):
    with contextlib.closing(environments.make(id, batch_size=1)) as environment:
        spec = environment.spec
    made = examples.make_card(spec.observation_space, spec.action_space, id)
    card = dataclasses.replace(made, library=spec.library, version=spec.version, time_limit=spec.time_limit)
    cfg = dataclasses.replace(ldm_jax.SIZES["nano"], channels=4)
    ldm_jax.Policy(cfg, ldm_jax.make_model(cfg).init(jax.random.key(1)), {id: card}).save(folder)
    return folder


def test_info_names_versions_devices_and_the_catalog(monkeypatch, capsys):
    text, status = run(monkeypatch, capsys, "info")
    told = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert status == 0 and told["ldm_jax"] == ldm_jax.__version__ and told["jax"] == jax.__version__
    assert told["devices"].startswith(str(jax.device_count())) and "environments" in told["catalog"]


def test_list_gives_what_select_gives(monkeypatch, capsys):
    text, status = run(monkeypatch, capsys, "list", "--domain=board games", "--library=pgx", "--ids")
    assert status == 0 and text.split() == environments.select("library=pgx domain=board_games").ids


def test_play_tells_each_episode_and_the_same_seed_the_same_ones(monkeypatch, capsys, catch_policy):
    play = ("play", CATCH, f"--policy={catch_policy}", "--episodes=3", "--decoding=sample")
    text, status = run(monkeypatch, capsys, *play)
    returns = np.array([float(line.split()[1]) for line in text.splitlines()[1:4]])
    card = ldm_jax.load(catch_policy).cards[CATCH]
    random, reference = card.random_returns.mean, card.reference_returns.mean
    assert status == 0 and set(np.abs(returns)) == {1.0}
    assert f"mean return {returns.mean():.5g}, z {(returns.mean() - random) / (reference - random):.2f}; " in text
    assert run(monkeypatch, capsys, *play)[0] == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("list", "--domain=bandts"), "did you mean bandits"),
        (("check", "gymnax/Catch"), "did you mean gymnax/Catch-bsuite"),
        (("play", CATCH, "--policy=nowhere"), "there is no such folder"),
        (("play", "gymnax/CartPole-v1", "--policy=FOLDER"), "has no card of 'gymnax/CartPole-v1'"),
        (("play", CATCH, "--policy=FOLDER", "--episodes=0"), "expected at least 1"),
        (("play", "gymnax/Catch", "--policy=FOLDER", "--unknown"), "did you mean gymnax/Catch-bsuite"),
        (("play", CATCH, "--policy=FOLDER", "--video=catch.avi"), "expected a path that ends in .mp4"),
        (("play", CATCH, "--policy=FOLDER", "--video=nowhere/catch.mp4"), "no folder nowhere for the video: make it"),
        (("list", "--library=pgx", "--domain=navigation"), "domain is board games"),
        (("play", CATCH, "--policy=FOLDER/.."), "holds no policy: there is no"),
        (("play", CATCH, "--policy=FOLDER/.."), "; pass "),
        (("play", CATCH, "--policy=FOLDER/policy.json"), "pass FOLDER"),
        (("play", CATCH, "--policy=FOLDER", "--episodes=x"), "invalid int value: 'x'. See ldm-jax play --help"),
        (("play", CATCH), "the following arguments are required: --policy. See ldm-jax play --help"),
        (("lst",), "did you mean list? See ldm-jax --help"),
        (("list", "--domian=games"), "unrecognized arguments: --domian=games"),
        (("report", "nowhere"), "expected the folder of a run, such as runs/quickstart"),
        (("dataset", "verfy"), "did you mean verify?"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(monkeypatch, capsys, catch_policy, arguments, said):
    out, status = run(monkeypatch, capsys, *(each.replace("FOLDER", str(catch_policy)) for each in arguments))
    said = said.replace("FOLDER", str(catch_policy))
    assert not out and status.startswith("error: ") and said in status and "\n" not in status


@pytest.mark.parametrize("arguments", [["list", "--ids"], ["dataset", "--help"]], ids=" ".join)
def test_who_stops_reading_ends_a_verb_without_a_word(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        command = [sys.executable, "-m", "experiments.command_line", *arguments]
        found = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=300)
    assert found.stderr == "" and found.returncode == 128 + signal.SIGPIPE


def test_what_a_dataset_lacks_is_said_in_one_line_and_nothing_before_it(tmp_path):
    (tmp_path / "dataset").mkdir()
    create_dataset(tmp_path / "dataset")
    for flags, said in (
        ((), "error: --dataset has to be given"),
        ((f"--dataset={tmp_path}",), f"error: {tmp_path} is not a dataset: pass {tmp_path / 'dataset'}, which is one"),
    ):
        command = [sys.executable, "-m", "experiments.command_line", "dataset", "verify", *flags]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert found.returncode == 1 and not found.stdout
        assert found.stderr.startswith(said) and len(found.stderr.splitlines()) == 1


def test_an_environment_that_is_too_large_for_the_model_is_said_with_its_parts(monkeypatch, capsys, catch_policy):
    out, status = run(monkeypatch, capsys, "play", "gymnax/Freeway-MinAtar", f"--policy={catch_policy}", "--unknown")
    assert not out and "needs channels=16 (the model has 4)" in status and "Its parts are observation value" in status


def test_a_video_without_ffmpeg_is_refused_before_anything_is_played(monkeypatch, capsys, catch_policy, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    video = tmp_path / "catch.mp4"
    out, status = run(monkeypatch, capsys, "play", CATCH, f"--policy={catch_policy}", f"--video={video}")
    assert not out and "pip install 'ldm_jax[video]', or leave out --video" in status
    assert not any(tmp_path.iterdir())


def test_a_video_holds_each_step_that_was_played_and_changes_nothing_of_it(monkeypatch, capsys, catch_policy, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    video = tmp_path / "catch.mp4"
    play = ("play", CATCH, f"--policy={catch_policy}", "--episodes=3", "--decoding=sample")
    text, status = run(monkeypatch, capsys, *play, f"--video={video}")
    *lines, last = text.splitlines()
    assert status == 0 and last.startswith(f"video: {video}, drawn from what the policy sees")
    assert lines == run(monkeypatch, capsys, *play)[0].splitlines()
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(video))
    # Nine steps, the observation before them, and three episodes.
    assert frames == 3 * 10 and seconds == pytest.approx(frames / 20, abs=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["catch.mp4"]


def test_an_environment_that_draws_itself_is_filmed_so_and_without_a_word(capfd, tmp_path):
    for library in ("imageio_ffmpeg", "pygame"):
        pytest.importorskip(library)
    folder = save_policy(tmp_path / "policy", "gymnasium/CartPole-v1")
    lines = watching.play_policy("gymnasium/CartPole-v1", str(folder), 1, 0, "card", video=str(tmp_path / "cart.mp4"))
    assert "rendered by the environment" in lines[-1] and (tmp_path / "cart.mp4").stat().st_size > 1000
    assert "ALSA" not in capfd.readouterr().err


def test_every_verb_says_what_it_is_for_with_an_example_that_is_read(monkeypatch, capsys):
    for name, verb in command_line.COMMANDS.items():
        text, status = run(monkeypatch, capsys, name, "--help")
        words = verb.example.split()
        assert status == 0 and verb.example in " ".join(text.split()) and words[:2] == ["ldm-jax", name]
        assert command_line.parser().parse_args(words[1:]).do is verb.do
    text, status = run(monkeypatch, capsys, "--print-completion", "bash")
    assert status == 0 and "complete" in text and "--policy" in text


def test_verbs_of_datasets_are_those_of_the_script(monkeypatch, capsys):
    text, status = run(monkeypatch, capsys, "dataset", "--help")
    assert status == 0 and "verify" in text and "import-minari" in text

"""Several hosts, as processes of this one: they train as one, stop as one, and go on after one was killed."""

import dataclasses
import signal
import socket

import jax
import numpy as np
import pytest
import runs

from data.batches import Shape, make_codecs, mix
from data.mixture import Streams
from data.store import open_dataset
from ldm_jax import policy
from ldm_jax.model.config import SIZES
from ldm_jax.training import checkpoints

STEPS = 60
FLAGS = (f"--config.training.steps={STEPS}", "--config.log_steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts")
    runs.make_dataset(path / "dataset")
    return path


def workdir(folder, name):
    path = folder / name
    path.mkdir(exist_ok=True)
    if not (path / "dataset").exists():
        (path / "dataset").symlink_to(folder / "dataset")
    return path


def start_two(path, cache):
    """Two processes with one device each, on a mesh of two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = ("--config.mesh.data=2", f"--config.hosts.coordinator=localhost:{port}", "--config.hosts.processes=2")
    return [runs.start(path, *FLAGS, *shared, f"--config.hosts.process={i}", cache=cache) for i in range(2)]


def test_two_processes_stopped_and_killed_and_started_again_equal_one(folder):
    cache, two = folder / "cache", workdir(folder, "two")
    first, second = start_two(two, cache)
    runs.send_at(first, "pretrain step=4")  # SIGTERM comes to one, and both save and end at the same step
    (out, code), (out_2, code_2) = runs.finish(first), runs.finish(second)
    assert code == code_2 == 128 + signal.SIGTERM, out + out_2
    with checkpoints.Checkpoints(two / "checkpoints", {}) as saved:
        assert 4 <= saved.latest < STEPS - 8, "stopped too late to see anything"

    first, second = start_two(two, cache)
    runs.send_at(first, "pretrain step=", signal.SIGKILL)
    second.kill()  # it waits for the other one without an end; whoever started them ends it
    assert runs.finish(first)[1] == runs.finish(second)[1] == -signal.SIGKILL

    for process in start_two(two, cache):
        out, code = runs.finish(process)
        assert code == 0, out
    one = workdir(folder, "one")  # the same mesh in one process
    out, code = runs.finish(runs.start(one, *FLAGS, "--config.mesh.data=2", devices=2, cache=cache))
    assert code == 0, out

    params = [policy.load(path / "policy").params for path in (two, one)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    losses = [{row["step"]: row["loss"] for row in runs.rows(path)} for path in (two, one)]
    assert losses[0] and {step: losses[1][step] for step in losses[0]} == losses[0]


def test_the_shares_of_the_hosts_are_the_batch(folder):
    dataset = open_dataset(folder / "dataset")
    model = dataclasses.replace(SIZES["nano"], values=64)
    codecs = make_codecs(dataset, runs.IDS, model)
    whole, *shares = (
        mix(dataset, codecs, Shape(16, 4, 0, multiple=2), Streams(16), share)[5]
        for share in ((0, 1), *((i, 2) for i in range(2)))
    )
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *shares)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)

"""Small pretraining runs for tests: scripted references, real data of two environments, and the command line."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import tensorstore

import environments
from data import collect, store
from data.references.policy import ReferencePolicy
from ldm_jax import cards
from ldm_jax.cards import Reference
from ldm_jax.encoding.actions import Distribution
from ldm_jax.types import Agent

IDS = ("gymnax/CartPole-v1", "gymnax/Pendulum-v1")
XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
STREAMS, STEPS = 32, 96
RETURNS = {"gymnax/CartPole-v1": (22.0, 500.0), "gymnax/Pendulum-v1": (-1235.0, -152.0)}
FLAGS = (
    "--preset=nano",
    "--config.model.layers=1",
    "--config.training.steps=24",
    "--config.training.warmup=2",
    "--config.training.optimizer=adamw",
    "--config.rows=4",
    "--config.rows_multiple=2",
    "--config.checkpoint_steps=4",
    "--config.log_steps=20",
    "--config.peak_flops=1e11",
    "--config.evaluation.steps=0",
)


def _push_pole(observation):
    """Balances CartPole: pushes to the side that the pole leans and turns to."""
    right = observation[:, 2] + 0.3 * observation[:, 3] > 0
    logits = jnp.where(right[:, None], jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf]))
    return right.astype(jnp.int32), Distribution(logits, jnp.zeros((len(right), 0)), jnp.zeros((len(right), 0)))


def _damp(observation):
    """Turns against the motion of Pendulum, beyond its bounds at times."""
    torque = -observation[:, 2:3]
    return torque, Distribution(jnp.zeros((len(torque), 0)), torque, jnp.zeros_like(torque))


def go_right(observation):
    logits = jnp.zeros((len(observation), 4)).at[:, 2].set(1e6)
    empty = jnp.zeros((len(observation), 0))
    return jnp.full(len(observation), 2, jnp.int32), Distribution(logits, empty, empty)


def reference_of(policy, environment):
    """A reference that acts by a function of the observation."""
    agent = Agent(lambda batch_size: (), lambda params, carry, timestep, key: (carry, *policy(timestep.observation)))
    return ReferencePolicy(agent, (), Reference("scripted", "greedy", 0, 0), environment.spec, ())


CASES = {
    "gymnax/CartPole-v1": _push_pole,
    "gymnax/Pendulum-v1": _damp,
    "envpool/FrozenLake-v1": go_right,
}


def make_dataset(path: pathlib.Path, poison: bool = False) -> store.Dataset:
    """Collects a little; where it is poisoned, the rewards of a few streams of CartPole are not numbers."""
    dataset = store.create_dataset(path)
    for id in IDS:
        environment = environments.make(id, STREAMS)
        collected = collect.collect(
            environment, reference_of(CASES[id], environment), 7, collect.CollectConfig(STREAMS, STEPS)
        )
        environment.close()
        random, reference = (cards.Returns.of(np.full((2, 2), value)) for value in RETURNS[id])
        card = cards.EnvironmentCard.of(
            environment.spec,
            statistics=collected.statistics,
            random_returns=random,
            reference_returns=reference,
            reference=cards.Reference("scripted", "greedy", 0, 0),
        )
        dataset = store.append_part(dataset, card, collected.leaves, collected.episodes)
    if poison:
        # The store refuses such numbers; another program could still write them.
        folder = path.absolute() / IDS[0] / "part-00001" / "reward"
        rewards = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{folder}/"}, open=True).result()
        rewards[40:, :6] = np.nan
    return dataset


def start(workdir, *flags, devices=1, cache=None, largest=None):
    """Starts pretraining; the log comes on its standard output."""
    return start_script("pretrain", workdir, *FLAGS, *flags, devices=devices, cache=cache, largest=largest)


def start_script(name, workdir, *flags, devices=1, cache=None, largest=None):
    """Starts a script on so many virtual devices; its programs are compiled in haste.

    They are kept in `cache` or, where none is given, where those of the tests are.

    Where `largest` is given, no file can grow over so many bytes, as if the disk were full.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {XLA}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", f"experiments.{name}", f"--workdir={workdir}", *flags]
    limit = largest and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)))
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limit
    )


def finish(process):
    """Waits for the end; returns the output and the exit code."""
    out, _ = process.communicate()
    return out, process.returncode


def copy_while_still(process, folder, copy):
    """Copies a folder in which a process works: what is there while it stands still is what a kill would have left."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # all of its threads stand still from here on
    shutil.copytree(folder, copy)
    process.send_signal(signal.SIGCONT)


def copies_at_drawn_moments(process, folder, into, most, draw):
    """Copies a folder in which a process works, `most` times at most, until the process ends."""
    copies = []
    while process.poll() is None and len(copies) < most:
        copies.append(into / str(len(copies)))
        copy_while_still(process, folder, copies[-1])
        time.sleep(draw.uniform(0, 0.5))
    return copies


def send_at(process, line, number=signal.SIGTERM):
    """Reads the log up to a line, then sends a signal; returns what was read."""
    seen = []
    for text in process.stdout:
        seen.append(text)
        if line in text:
            process.send_signal(number)
            return "".join(seen)
    raise AssertionError(f"{line!r} never came: {''.join(seen)}")


def rows(workdir):
    """The rows of metrics."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

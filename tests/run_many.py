"""Sixty environments of sixteen libraries, three of which cannot work: `python tests/run_many.py FOLDER [ray]`.

Not a test: it takes a while. Of the three one needs a system package (Qt, where it is not installed), one is of a
group that does not build (nothing can be downloaded) and one hangs. With `ray` it is done on a cluster of two
nodes, of which one is lost in the middle; without, on this machine. The run has to end by itself, with all others done.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import time
import typing

from experiments.harness.outcomes import read_outcome
from experiments.harness.processes import resident_bytes

PACKAGE, GROUP, HANGS = "envpool/BigfishEasy-v0", "grid2op/educ_case14_redisp", "hanging/Hang-v0"
IDS = (  # those that take least, since of each only its end counts
    *(f"gymnax/{name}-bsuite" for name in ("DiscountingChain", "UmbrellaChain", "MemoryChain", "Catch")),
    "gymnax/Swimmer-misc",
    *(f"envpool/{name}" for name in ("FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v3", "CliffWalking-v1", "Catch-v0")),
    "envpool/MountainCarContinuous-v0",
    *(
        f"gymnasium/{name}"
        for name in ("FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4", "CartPole-v0")
    ),
    *("gymnasium/CartPole-v1", "pgx/leduc_holdem"),
    *(f"bsuite/discounting_chain/{number}" for number in (0, 3, 6, 9, 13, 16, 19)),
    *(f"bsuite/{kind}/{number}" for kind in ("bandit", "bandit_noise", "bandit_scale") for number in (0, 5, 10, 15)),
    *(f"antibiosim/antibiosim/{name}-v0" for name in ("TherapySwitch", "ResistanceControl")),
    *(f"anesthesim/anesthesim/{name}-v0" for name in ("CombinedAnesthesia", "RemifentanilDosing")),
    *(f"cardiosim/cardiosim/{name}-v0" for name in ("AntiarrhythmicDosing", "PacingControl")),
    *(f"hemosim/hemosim/{name}-v0" for name in ("HeparinInfusion", "DICManagement")),
    *(f"immunosim/immunosim/{name}-v0" for name in ("CARTCell", "CombinationTherapy")),
    *(f"topogym/TopoGym/{name}-v0" for name in ("EpicChase1-60", "ShapeTr-50", "Decoys4-50")),
    "token-env/TokenEnv-v0",
    *(f"mathy-envs/mathy-{name}-v0" for name in ("poly-blockers-hard", "complex-easy")),
    *(f"gym-anytrading/{name}-v0" for name in ("forex", "stocks")),
    *(f"nasim/{name}-v0" for name in ("SmallGenPO", "Small2DVA")),
)
FLAGS = (  # as little as there can be of each: this is about the stage
    "--config.budget=0.0001",
    "--config.num_envs=2",
    "--config.episodes=1",
    "--config.least_episodes=2",
    "--config.most_episodes=2",
    "--config.unit_seconds=400",
    "--config.build_seconds=300",
)
LOSE_AFTER = 8  # outcomes

ADAPTER = '''
"""A library whose one environment never answers."""

import time

from gymnasium import spaces

from ldm_jax.types import EnvironmentSpec


def candidates():
    return {"Hang-v0": ""}


class Hanging:
    def __init__(self, batch_size, time_limit):
        self.spec = EnvironmentSpec(
            id="hanging/Hang-v0",
            library="hanging",
            version="1.0",
            observation_space=spaces.Discrete(2),
            action_space=spaces.Discrete(2),
            batch_size=batch_size,
            time_limit=time_limit or 10,
            domain="none",
            jittable=False,
        )

    def reset(self, key):
        time.sleep(100_000)

    def close(self):
        pass


def make(name, batch_size, time_limit):
    return Hanging(batch_size, time_limit)
'''


def environment_of(folder: pathlib.Path) -> dict[str, str]:
    """Variables of a machine without containers and without a way to download, with a library that hangs."""
    plugin, programs = folder / "plugin", folder / "programs"
    information = plugin / "hanging-1.0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (plugin / "hanging_adapter.py").write_text(ADAPTER)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[ldm_jax.environments]\nhanging = hanging_adapter\n")
    programs.mkdir(exist_ok=True)
    (programs / "podman").write_text("#!/bin/sh\nexit 1\n")
    (programs / "podman").chmod(0o755)
    root = pathlib.Path(__file__).parents[1]
    return os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{plugin}",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_register_timeout_seconds": "900",  # a busy machine is not a lost one
        "RAY_health_check_timeout_ms": "120000",
    }


def at_work(node: typing.Any) -> bool:
    """Whether a node of Ray's works on a unit: its raylet has a worker that has a process of its own with JAX."""
    below = [process.pid for kind, process in node.live_processes() if kind == "raylet"]
    for _ in range(2):
        below = [child for pid in below for child in children(pid)]
    return any(resident_bytes(pid) > 200e6 for pid in below if b"spawn_main" in command_of(pid))


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    with contextlib.suppress(OSError):
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found


def command_of(pid: int) -> bytes:
    """The command line of a process; empty where there is none."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def outcomes(workdir: pathlib.Path) -> int:
    """How many environments are done."""
    return len([*(workdir / "references").rglob("outcome.json")])


def main(folder: pathlib.Path, engine: str) -> None:
    """Runs the stage, and says what came of the three and how long it took."""
    folder.mkdir(parents=True, exist_ok=True)
    variables, workdir = environment_of(folder), folder / engine
    ids = (*IDS, PACKAGE, GROUP, HANGS)
    assert len({*ids}) == 60, len({*ids})
    (folder / "ids.txt").write_text("\n".join(ids))
    command = [sys.executable, "-m", "experiments.references", f"--workdir={workdir}"]
    command += [f"--environments=@{folder / 'ids.txt'}", *FLAGS]
    cluster = None
    if engine == "ray":
        os.environ.update(variables)  # the nodes inherit them
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        second = cluster.add_node(**node)
        command += ["--engine=ray", f"--ray_address={cluster.address}"]
    before_s = time.monotonic()
    with subprocess.Popen(command, env=variables) as process:
        while process.poll() is None:
            time.sleep(1)
            if cluster and second and outcomes(workdir) >= LOSE_AFTER and at_work(second):
                print(f"one of two nodes is lost at work, after {outcomes(workdir)} environments", flush=True)
                cluster.remove_node(second, allow_graceful=False)
                second = None
    took_s = time.monotonic() - before_s
    if cluster:
        cluster.shutdown()
    print(f"status {process.returncode}, {outcomes(workdir)} of {len(ids)} environments, {took_s:.0f} s")
    for id in (PACKAGE, GROUP, HANGS):
        print(id, read_outcome(workdir / "references" / id))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else "local")

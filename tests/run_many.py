"""Sixty environments of fourteen libraries, three of which cannot work: `python tests/run_many.py FOLDER [ray]`.

Not a test: it takes a while. Of the three one needs a system package (Qt, where it is not installed), one is of a
group that does not build (nothing can be downloaded) and one hangs. With `ray` it is done on a cluster of two
nodes, of which one is lost in the middle; without, on this machine. The run has to end by itself, with all others done.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

from experiments.harness.outcomes import read_outcome

PACKAGE, GROUP, HANGS = "envpool/BigfishEasy-v0", "grid2op/educ_case14_redisp", "hanging/Hang-v0"
IDS = (
    *(f"gymnax/{name}-bsuite" for name in ("DiscountingChain", "UmbrellaChain", "MemoryChain", "Catch")),
    *(f"gymnax/{name}-misc" for name in ("Swimmer", "Reacher", "FourRooms")),
    *(f"envpool/{name}" for name in ("FrozenLake-v1", "Pendulum-v1", "MountainCarContinuous-v0", "Acrobot-v1")),
    *(f"envpool/{name}" for name in ("MiniGrid-LavaGapS5-v0", "LqrLqr21-v1", "CheetahRun-v1", "Taxi-v3", "Catch-v0")),
    *(f"gymnasium/{name}" for name in ("FrozenLake-v1", "CartPole-v0", "Pendulum-v1", "InvertedPendulum-v5")),
    *(f"gymnasium/{name}" for name in ("LunarLander-v3", "Taxi-v4")),
    *(f"pgx/{name}" for name in ("kuhn_poker", "tic_tac_toe", "leduc_holdem")),
    *(f"bsuite/{name}" for name in ("discounting_chain/13", "bandit/18", "umbrella_distract/5", "bandit_noise/10")),
    *(f"bsuite/{name}" for name in ("umbrella_length/22", "memory_size/5", "cartpole_scale/0")),
    *(f"topogym/TopoGym/{name}-v0" for name in ("Maze-100", "EpicChase6-110", "ShapeTr-50", "EpicChase1-60")),
    *(f"topogym/TopoGym/{name}-v0" for name in ("Decoys4-50", "Dilution-200")),
    *(f"nasim/{name}-v0" for name in ("Pocp2GenPO2D", "Pocp2Gen2D", "SmallGenPO", "Small2DVA", "MediumPOVA")),
    *(f"or-gymnasium/{name}-v0" for name in ("Knapsack", "TSP", "InvManagement", "VMPacking")),
    "or-gymnasium/BinPacking-v2",
    *(
        f"mathy-envs/mathy-{name}-v0"
        for name in ("complex-normal", "poly-normal", "poly-blockers-hard", "complex-easy")
    ),
    *(f"gym-anytrading/{name}-v0" for name in ("forex", "stocks")),
    "token-env/TokenEnv-v0",
    *(f"antibiosim/antibiosim/{name}-v0" for name in ("TherapySwitch", "ResistanceControl")),
)
FLAGS = (
    "--config.budget=0.001",
    "--config.num_envs=2",
    "--config.episodes=1",
    "--config.unit_seconds=600",
    "--config.build_seconds=300",
)
LOSE_AFTER = 15  # outcomes

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
    }


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
            if cluster and second and outcomes(workdir) >= LOSE_AFTER:
                cluster.remove_node(second, allow_graceful=False)
                print(f"lost one of two nodes after {outcomes(workdir)} environments", flush=True)
                second = None
    took_s = time.monotonic() - before_s
    if cluster:
        cluster.shutdown()
    print(f"status {process.returncode}, {outcomes(workdir)} of {len(ids)} environments, {took_s:.0f} s")
    for id in (PACKAGE, GROUP, HANGS):
        print(id, read_outcome(workdir / "references" / id))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else "local")

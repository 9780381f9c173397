"""How fast PPO trains beside Stable-Baselines3's and rejax's: whole trainings of the same network, batch and epochs.

The others run in virtual environments of their own, made in the workdir when they are first needed. What compiles is
apart: ours is timed from its first report on, Stable-Baselines3 from its second rollout on, rejax the second time.
"""

from __future__ import annotations

import collections.abc
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
import typing

from ldm_jax import files

SETTINGS: dict[str, typing.Any] = {
    "num_envs": 64,
    "rollout_length": 128,
    "epochs": 4,
    "minibatches": 8,
    "learning_rate": 1e-3,
    "hidden": (64, 64),
}
REPETITIONS = 3


class Rival(typing.NamedTuple):
    """Who is compared with us in training CartPole.

    Attributes:
      id: of the environment that we train in.
      steps: environment steps of our training.
      script: in `benchmarks/library`, that times theirs.
      requirements: of its virtual environment, which is named as the first of them.
      arguments: of the script, beside what both sides share.
    """

    id: str
    steps: int
    script: str
    requirements: tuple[str, ...]
    arguments: dict[str, typing.Any]


_SB3 = ("stable-baselines3==2.9.2", "torch==2.13.0", "envpool==1.2.5")
RIVALS: dict[str, Rival] = {
    "ppo_to_sb3_jittable": Rival(
        "gymnax/CartPole-v1", 500_000, "sb3_training.py", _SB3, {"environments": "gymnasium", "steps": 81_920}
    ),
    "ppo_to_sb3_host": Rival(
        "envpool/CartPole-v1", 200_000, "sb3_training.py", _SB3, {"environments": "envpool", "steps": 81_920}
    ),
    "ppo_to_rejax": Rival(
        "gymnax/CartPole-v1", 1_000_000, "rejax_training.py", ("rejax==0.1.3", "gymnax==0.0.9"), {"steps": 1_000_000}
    ),
}
"""By the name of our rate divided by theirs."""


def compare_training(workdir: pathlib.Path, names: collections.abc.Collection[str]) -> dict[str, float | None]:
    """Our rate divided by that of each rival: measured now where it is named, else as it was before, None if never.

    Args:
      workdir: gets the virtual environments and what was measured.
      names: keys of `RIVALS`.
    """
    path = workdir / "training.json"
    known: dict[str, float | None] = dict.fromkeys(RIVALS)
    if path.exists():
        known |= json.loads(path.read_text("utf-8"))
    for name in names:
        interpreter = find_interpreter(workdir, RIVALS[name])
        pairs = [(_our_rate(RIVALS[name]), _their_rate(RIVALS[name], interpreter)) for _ in range(REPETITIONS)]
        known[name] = round(statistics.median(ours / theirs for ours, theirs in pairs), 2)
        print(json.dumps({"rate": name, "ours_and_theirs": [[round(rate) for rate in pair] for pair in pairs]}))
        files.write(path, json.dumps(known))
    return known


def find_interpreter(workdir: pathlib.Path, rival: Rival) -> pathlib.Path:
    """The interpreter of a rival's virtual environment, which is made if it is not there."""
    folder = workdir / "venvs" / rival.requirements[0]
    interpreter = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *rival.requirements], check=True)
        files.write(folder / "complete", "")
    return interpreter


def _our_rate(rival: Rival) -> float:
    """Environment steps a second of a whole training of ours, from its first report on."""
    import environments
    from data.references import ppo

    config = ppo.PPOConfig(budget_steps=rival.steps, **SETTINGS)
    environment = environments.make(rival.id, batch_size=config.num_envs)
    try:
        reports = [(time.perf_counter(), learned.steps) for learned in ppo.learn(environment, config, 0)]
    finally:
        environment.close()
    (began, first), (ended, last) = reports[0], reports[-1]
    return (last - first) / (ended - began)


def _their_rate(rival: Rival, interpreter: pathlib.Path) -> float:
    """Environment steps a second of a whole training of theirs."""
    script = pathlib.Path(__file__).with_name("library") / rival.script
    arguments = json.dumps(SETTINGS | rival.arguments)
    done = subprocess.run([interpreter, script, arguments], stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return told["steps"] / told["seconds"]

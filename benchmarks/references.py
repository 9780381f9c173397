"""References found without a hand, over a fixed panel of forty environments: how many, how good, and for how long.

Each is searched for and scored as `experiments.references` does it, in a process of its own, and what came of it is a
line of the workdir; started again it goes on with what is missing.

    python -m benchmarks.references --workdir=runs/panel
    python -m benchmarks.references --workdir=runs/panel --environments=gymnax/CartPole-v1,envpool/Taxi-v3 --budget=0.3
    python -m benchmarks.references --workdir=runs/panel --environments=none --rates=ppo_to_sb3_host,ppo_to_rejax

Its last line is one JSON object: `panel` has `ids`, `finished`, `admitted`, `minutes` of training and of scoring,
`scoring_share` of both together, `cpu_minutes` of all processes, and of those with a public return `share`, the mean
share of the way to it from random (at most 1 each), and `near`, how many get 0.9 of it. `complete` says whether all of
the panel are in it. `ppo_to_sb3_jittable`, `ppo_to_sb3_host` and `ppo_to_rejax` are our rate of training divided by
theirs, measured where `--rates` names them (see `benchmarks.training`), else what they were before in this workdir, or
null.
"""

from __future__ import annotations

import argparse
import collections.abc
import json
import pathlib
import resource
import subprocess
import sys
import time
import typing

from ldm_jax import files

from .training import RIVALS, compare_training

PANEL = pathlib.Path(__file__).with_name("panel.txt")
NEAR = 0.9


class Line(typing.NamedTuple):
    """What came of one environment; `error` says why nothing came, seconds are of the clock, or of processors."""

    id: str
    admitted: bool
    algorithm: str
    candidate: str
    steps: int
    random: float
    reference: float
    reference_error: float
    episodes: int
    share_of_target: float | None
    train_seconds: float
    score_seconds: float
    error: str = ""
    cpu_seconds: float = 0.0


def read_panel(path: pathlib.Path = PANEL) -> list[str]:
    """The ids of a file, one a line."""
    return [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]


def measure(id: str, budget: float, seed: int) -> Line:
    """Searches for and scores the reference of one environment."""
    import environments
    from data import references
    from experiments.report.targets import find_target

    target = find_target(id)
    target_return = target and target.target_return
    began = time.monotonic()
    policy = references.train_reference(environments.make, id, None, seed, budget=budget, target=target_return)
    trained = time.monotonic()
    scored = references.score_reference(environments.make, policy, seed)
    made, returns = scored.policy.reference, scored.reference_returns
    return Line(
        id,
        scored.admission.admitted,
        made.algorithm,
        made.candidate,
        made.steps,
        scored.random_returns.mean,
        returns.mean,
        returns.standard_error,
        returns.episodes,
        scored.share_of_target,
        trained - began,
        time.monotonic() - trained,
    )


def summarize(lines: collections.abc.Sequence[Line], ids: collections.abc.Sequence[str]) -> dict[str, typing.Any]:
    """The figures of the panel, from the lines that there are."""
    shares = [min(1.0, line.share_of_target) for line in lines if line.share_of_target is not None]
    training, scoring = (sum(getattr(line, name) for line in lines) / 60 for name in ("train_seconds", "score_seconds"))
    return {
        "ids": len(ids),
        "finished": len(lines),
        "complete": len(lines) == len(ids),
        "admitted": sum(line.admitted for line in lines),
        "minutes": round(training + scoring, 1),
        "cpu_minutes": round(sum(line.cpu_seconds for line in lines) / 60, 1),
        "scoring_share": round(scoring / max(training + scoring, 1e-9), 3),
        "with_target": len(shares),
        "share": round(sum(shares) / len(shares), 3) if shares else None,
        "near": sum(share >= NEAR for share in shares),
    }


def main() -> None:
    """Runs what is missing, prints the table and the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--environments", default="")
    parser.add_argument("--rates", default="", help=f"of {', '.join(RIVALS)}; all for all of them")
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.budget, options.seed)._asdict()))
        return
    ids = options.environments.split(",") if options.environments else read_panel()
    ids = [] if ids == ["none"] else ids
    rates = list(RIVALS) if options.rates == "all" else options.rates.split(",") if options.rates else []
    if unknown := set(rates) - set(RIVALS):
        parser.error(f"got --rates={','.join(sorted(unknown))}, expected some of {', '.join(RIVALS)}")
    lines = [_line(options, id) for id in ids]
    for line in lines:
        print(json.dumps(line._asdict()))
    options.workdir.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"panel": summarize(lines, ids)} | compare_training(options.workdir, rates)))


def _line(options: argparse.Namespace, id: str) -> Line:
    """What came of an environment before, or comes of it now."""
    path = options.workdir / f"{id.replace('/', '--')}-{options.budget:g}-{options.seed}.json"
    if path.exists():
        return Line(**json.loads(path.read_text("utf-8")))
    arguments = [f"--workdir={options.workdir}", f"--one={id}", f"--budget={options.budget}", f"--seed={options.seed}"]
    began, spent = time.monotonic(), _cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.references", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        line = Line(**json.loads(done.stdout.splitlines()[-1]))
    else:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        line = Line(id, False, "", "", 0, 0.0, 0.0, 0.0, 0, None, time.monotonic() - began, 0.0, reason)
    line = line._replace(cpu_seconds=_cpu_seconds() - spent)
    options.workdir.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(line._asdict()))
    return line


def _cpu_seconds() -> float:
    """Of all processes that this one started and waited for, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()

"""References found without a hand, over a fixed panel of forty environments: how many, how good, and for how long.

They are made as `experiments.references` makes them, in its workdir; started again it goes on with what is missing.

    python -m benchmarks.references --workdir=runs/panel --total_hours=1.25
    python -m benchmarks.references --workdir=runs/panel --environments=gymnax/CartPole-v1,envpool/Taxi-v3 --budget=0.3
    python -m benchmarks.references --workdir=runs/panel --environments=none --rates=ppo_to_sb3_host,ppo_to_rejax

Its last line is one JSON object: `panel` has `ids`, `finished`, `admitted`, `wall_minutes` of this start, `minutes` of
training and of scoring, `scoring_to_training`, and of those with a public return `share`, the mean share of the way to
it from random (at most 1 each), and `near`, how many get 0.9 of it. `complete` says whether all of the panel are in it.
`ppo_to_sb3_jittable`, `ppo_to_sb3_host` and `ppo_to_rejax` are our rate of training divided by theirs, measured where
`--rates` names them (see `benchmarks.training`), else what they were before in this workdir, or null.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import json
import logging
import pathlib
import time
import typing

from experiments import references
from experiments.harness import progress
from experiments.harness.spare_time import GOOD
from experiments.harness.stage import UnitsFailedError
from experiments.references_table import find_reference

from .training import RIVALS, compare_training

PANEL = pathlib.Path(__file__).with_name("panel.txt")


class Line(typing.NamedTuple):
    """What came of one environment; `error` says why nothing came."""

    id: str
    admitted: bool = False
    algorithm: str = ""
    candidate: str = ""
    steps: int = 0
    random: float = 0.0
    reference: float = 0.0
    reference_error: float = 0.0
    episodes: int = 0
    share_of_target: float | None = None
    budget: float = 0.0
    train_seconds: float = 0.0
    score_seconds: float = 0.0
    error: str = ""


def read_panel(path: pathlib.Path = PANEL) -> list[str]:
    """The ids of a file, one a line."""
    return [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]


def read_line(folder: pathlib.Path, id: str, budget: float) -> Line:
    """What is in the folder of a reference."""
    _, outcome, scored = find_reference(folder, id)
    if scored is None:
        return Line(id, error=outcome.reason)
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
        outcome.budget or budget,
        outcome.train_seconds,
        outcome.score_seconds,
    )


def summarize(lines: collections.abc.Sequence[Line], wall_minutes: float) -> dict[str, typing.Any]:
    """The figures of the panel."""
    made = [line for line in lines if not line.error]
    shares = [min(1.0, line.share_of_target) for line in made if line.share_of_target is not None]
    training, scoring = (sum(getattr(line, name) for line in made) / 60 for name in ("train_seconds", "score_seconds"))
    return {
        "ids": len(lines),
        "finished": len(made),
        "complete": len(made) == len(lines),
        "admitted": sum(line.admitted for line in made),
        "wall_minutes": round(wall_minutes, 1),
        "minutes": round(training + scoring, 1),
        "scoring_to_training": round(scoring / max(training, 1e-9), 3),
        "with_target": len(shares),
        "share": round(sum(shares) / len(shares), 3) if shares else None,
        "near": sum(share >= GOOD for share in shares),
    }


def main() -> None:
    """Runs what is missing, prints the table and the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--environments", default="")
    parser.add_argument("--rates", default="", help=f"of {', '.join(RIVALS)}; all for all of them")
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total_hours", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    ids = options.environments.split(",") if options.environments else read_panel()
    ids = [] if ids == ["none"] else ids
    rates = list(RIVALS) if options.rates == "all" else options.rates.split(",") if options.rates else []
    if unknown := set(rates) - set(RIVALS):
        parser.error(f"got --rates={','.join(sorted(unknown))}, expected some of {', '.join(RIVALS)}")
    logging.basicConfig()
    progress.logger.setLevel(logging.INFO)
    began = time.monotonic()
    with contextlib.suppress(UnitsFailedError):  # each line says why
        if ids:
            config = references.ReferencesConfig(
                seed=options.seed, budget=options.budget, total_hours=options.total_hours, workers=options.workers
            )
            references.run(config, options.workdir, tuple(ids))
    folder, minutes = options.workdir.absolute() / "references", (time.monotonic() - began) / 60
    lines = [read_line(folder / id, id, options.budget) for id in ids]
    for line in lines:
        print(json.dumps(line._asdict()))
    print(json.dumps({"panel": summarize(lines, minutes)} | compare_training(options.workdir, rates)))


if __name__ == "__main__":
    main()

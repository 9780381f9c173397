"""Evaluates the saved policy in every environment: `python -m experiments.evaluate --workdir=runs/mine`.

Writes `evaluation/<id>.json` as each environment is finished and, once all are, `report/`. Killed and started again, it
evaluates only what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import typing

import jax
import numpy as np

import environments as registry
from data.references import load_reference
from experiments.harness import progress
from experiments.harness.stage import stage
from experiments.harness.workdir import key_of, listed, pin_config
from experiments.report.page import write_report
from experiments.report.targets import PUBLIC_TARGETS
from ldm_jax import files
from ldm_jax import policy as policies
from ldm_jax.evaluation import aggregates, scores
from ldm_jax.model.network import count_parameters
from ldm_jax.rollout import evaluate


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How the policy is evaluated; its decoding is the one it was saved with, the same in all environments.

    Attributes:
      seed: of the episodes.
      rows: parallel rows per environment; each starts with an empty context.
      episodes: per row, on one context; the first is reported apart too.
    """

    seed: int = 1_000_003
    rows: int = 64
    episodes: int = 4

    def __post_init__(self):
        if self.rows < 2 or self.episodes < 1:
            raise ValueError(f"got {self.rows} rows x {self.episodes} episodes, expected at least 2 rows x 1")


@stage("evaluate")
def run(config: EvaluateConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> dict[str, typing.Any]:
    """Evaluates in all environments the policy knows, scores it and writes the report.

    Args:
      config: how many episodes.
      workdir: has `references/` and `policy/`.
      environments: the ids to report; empty for all that have a reference, admitted or refused.

    Returns:
      The contents of `report/scores.json`.

    Raises:
      WorkdirError: the workdir cannot be used.
      PolicyError: there is no policy.
    """
    policy = policies.load(workdir / "policy")
    ids = environments or listed(workdir / "references")
    pin_config(workdir, "evaluate", config, owns=("evaluation", "report"))
    digest = fingerprint(policy)
    paths = {id: workdir / "evaluation" / f"{id}.json" for id in ids if id in policy.cards}
    missing = [id for id, path in paths.items() if _kept(path, digest) is None]
    if missing:
        with progress.bar("evaluate", len(missing) * config.rows * config.episodes, "episode") as advance:
            for id in missing:
                _evaluate(config, policy, digest, id, paths[id], advance)
    measured: list[scores.Measurement] = []
    for id in ids:
        scored = load_reference(workdir / "references" / id)
        returns = _kept(paths[id], digest) if id in paths else None
        reference = (scored.random_returns.array, scored.reference_returns.array)
        missing_reason = "" if id in policy.cards else "the policy was not trained in it"
        measured.append(
            scores.Measurement(
                id, scored.policy.spec.domain, *reference, returns, PUBLIC_TARGETS.get(id), missing_reason
            )
        )
    results = scores.score_each(measured, config.seed)
    parameters = count_parameters(policy.params)
    found = aggregates.to_json(results, parameters, policy.decoding, config.seed)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    details = {"Evaluation seed": config.seed, "Policy": digest, "ldm_jax": importlib.metadata.version("ldm_jax")}
    page = write_report(workdir / "report", found, rows, "One policy, many environments", details)
    print(f"{aggregates.table(found)}\n\nreport: {page}")
    return found


def fingerprint(policy: policies.Policy) -> str:
    """Changes with the parameters, decoding and cards: results of another policy are not taken for this one's."""
    digest = hashlib.blake2b(digest_size=8)
    cards = {id: card.to_json() for id, card in sorted(policy.cards.items())}
    digest.update(json.dumps([dataclasses.asdict(policy.cfg), policy.decoding, cards], sort_keys=True).encode())
    for leaf in jax.tree.leaves(policy.params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _kept(path: pathlib.Path, digest: str) -> np.ndarray | None:
    """Returns `[rows, episodes]` of an earlier evaluation of the same policy."""
    kept = json.loads(path.read_text()) if path.exists() else {"policy": ""}
    return np.array(kept["returns"]) if kept["policy"] == digest else None


def _evaluate(
    config: EvaluateConfig,
    policy: policies.Policy,
    digest: str,
    id: str,
    path: pathlib.Path,
    advance: typing.Callable[[int], None],
) -> None:
    clock, key = progress.clock(), key_of(config.seed, "evaluate", id)
    environment = registry.make(id, config.rows)
    try:
        watch = progress.up_to(advance)
        episodes = evaluate(environment, policy.agent(id), policy.params, key, config.episodes, watch)
    finally:
        environment.close()
    returns = episodes.returns.astype(np.float64)
    result = {"id": id, "policy": digest, "returns": returns.tolist(), "lengths": episodes.lengths.tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(result))
    progress.log("evaluated", id=id, model=float(returns.mean()), episodes=returns.size, seconds=clock())


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": EvaluateConfig()})

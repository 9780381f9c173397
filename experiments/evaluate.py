"""Evaluates the saved policy in every environment: `python -m experiments.evaluate --workdir=runs/mine`.

Writes `evaluation/<id>.json` as each environment is finished and, once all are, `report/`. Killed and started again, it
evaluates only what is missing. What cannot be evaluated is listed in the report, with the reason.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import types
import typing

import jax
import numpy as np

import environments as registry
from data.references import ReferencePolicyError, load_reference
from experiments.harness import progress
from experiments.harness.metrics_log import read_rows
from experiments.harness.stage import stage
from experiments.harness.workdir import FREE, key_of, listed, pin_config
from experiments.report.page import write_report
from experiments.report.targets import PUBLIC_TARGETS
from ldm_jax import files, playing
from ldm_jax import policy as policies
from ldm_jax.cards import check_matches
from ldm_jax.encoding.buckets import join_buckets
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.evaluation import aggregates, scores
from ldm_jax.model.network import count_parameters


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How the policy is evaluated; its decoding is the one it was saved with, the same in all environments.

    Attributes:
      seed: seed of the episodes.
      num_envs: parallel environments of each id; each starts with an empty context.
      episodes: episodes of each of them, on one context; the first is reported apart, too.
      rows: of a batch that the policy acts in, shared by environments; more take more memory.
      buckets: programs to compile, at most, as long as environments have observations of the same kind.
    """

    seed: int = 1_000_003
    num_envs: int = 64
    episodes: int = 4
    rows: int = dataclasses.field(default=128, metadata={FREE: True})
    buckets: int = dataclasses.field(default=4, metadata={FREE: True})

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("num_envs", 2), ("episodes", 1), ("rows", 1), ("buckets", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}, expected at least {least}")


@stage("evaluate", among=lambda workdir: listed(workdir / "references"))
def run(
    config: EvaluateConfig,
    workdir: pathlib.Path,
    environments: tuple[str, ...] = (),
    failed: collections.abc.Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, typing.Any]:
    """Evaluates in all environments the policy knows, scores it and writes the report.

    Where an environment cannot be evaluated, the report says why, and has all others.

    Args:
      config: how many episodes.
      workdir: has `references/` and `policy/`.
      environments: the ids to report; empty for all that have a reference, admitted or refused.
      failed: why there is no reference of some of them.

    Returns:
      The contents of `report/scores.json`.

    Raises:
      WorkdirError: the workdir cannot be used.
      PolicyError: there is no policy.
      ReferencePolicyError: an id that was named has no reference; nothing has been done then.
    """
    policy = policies.load(workdir / "policy")
    ids = environments or listed(workdir / "references")
    measured = {id: _measurement(policy, workdir, id, failed.get(id, "")) for id in ids}
    pin_config(workdir, "evaluate", config, owns=("evaluation", "report"))
    digest = fingerprint(policy)
    paths = {id: workdir / "evaluation" / f"{id}.json" for id in ids if not measured[id].missing}
    missing = [id for id, path in paths.items() if _finished(path, digest) is None]
    with progress.bar("evaluate", len(missing) * config.num_envs * config.episodes, "episode") as advance:
        for played in playing.play(policy.cfg, policy.params, _trials(config, policy, missing), config.rows, advance):
            id = played.trial.codec.card.id
            if played.error is None:
                _write(paths[id], played, digest)
            else:
                progress.log("failed", id=id, reason=played.error)
                measured[id] = measured[id]._replace(missing=str(played.error))
    for id, path in paths.items():
        measured[id] = measured[id]._replace(model_returns=_finished(path, digest))
    results = scores.score_each(measured.values(), config.seed)
    found = aggregates.scores_json(results, count_parameters(policy.params), policy.decoding, config.seed)
    details = {"Evaluation seed": config.seed, "Policy": digest, "ldm_jax": importlib.metadata.version("ldm_jax")}
    training = read_rows(workdir / "metrics.jsonl")
    page = write_report(workdir / "report", found, training, "One policy, many environments", details)
    print(f"{aggregates.table(found)}\n\nreport: {page}")
    return found


def _measurement(policy: policies.Policy, workdir: pathlib.Path, id: str, missing: str) -> scores.Measurement:
    """What is known of an environment before the policy acts in it; `missing` says why it will not."""
    unknown = scores.Measurement(id, "unknown", None, None, None, PUBLIC_TARGETS.get(id), missing)
    directory = workdir / "references" / id
    if missing and not (directory / "reference.json").exists():
        return unknown
    try:
        scored = load_reference(directory)
    except ReferencePolicyError as error:
        if not directory.exists():
            raise  # it was named, and is not known: most often it is misspelled
        return unknown._replace(missing=str(error))
    if id in policy.cards:
        try:
            check_matches(policy.cards[id], scored.policy.spec, "the policy")
        except LdmError as error:
            missing = str(error)
    else:
        missing = missing or "the policy was not trained there"
    return unknown._replace(
        domain=scored.policy.spec.domain,
        random_returns=scored.random_returns.array,
        reference_returns=scored.reference_returns.array,
        missing=missing,
    )


def fingerprint(policy: policies.Policy) -> str:
    """Changes with the parameters, decoding and cards: results of another policy are not taken for this one's."""
    digest = hashlib.blake2b(digest_size=8)
    cards = {id: card.to_json() for id, card in sorted(policy.cards.items())}
    digest.update(json.dumps([dataclasses.asdict(policy.cfg), policy.decoding, cards], sort_keys=True).encode())
    for leaf in jax.tree.leaves(policy.params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _finished(path: pathlib.Path, digest: str) -> np.ndarray | None:
    """Returns `[num_envs, episodes]` of a finished evaluation of the same policy, if there is one."""
    try:
        result = json.loads(path.read_text())
        return np.array(result["returns"], np.float64) if result["policy"] == digest else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # what is damaged is evaluated again
        return None


def _trials(config: EvaluateConfig, policy: policies.Policy, ids: list[str]) -> list[playing.Trial]:
    """What is to be played; environments of similar spaces share a program, whoever else is evaluated."""
    codecs = {id: Codec(card) for id, card in policy.cards.items()}
    joined = join_buckets(collections.Counter(codec.bucket for codec in codecs.values()), config.buckets)
    return [
        playing.Trial(
            codec=Codec(codecs[id].card, joined[codecs[id].bucket]),
            make=functools.partial(registry.make, id, config.num_envs),
            rows=config.num_envs,
            episodes=config.episodes,
            key=key_of(config.seed, "evaluate", id),
            decoding=policy.decoding,
        )
        for id in ids
    ]


def _write(path: pathlib.Path, played: playing.Played, digest: str) -> None:
    assert played.episodes is not None
    id, returns = played.trial.codec.card.id, played.episodes.returns.astype(np.float64)
    result = {"id": id, "policy": digest, "returns": returns.tolist(), "lengths": played.episodes.lengths.tolist()}
    if played.faults:
        result["faults"] = played.faults
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(result))
    progress.log(
        "evaluated", id=id, model=float(returns.mean()), episodes=returns.size, faults=sum(played.faults.values())
    )


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": EvaluateConfig()})

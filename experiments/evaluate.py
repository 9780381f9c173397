"""Evaluates the saved policy in every environment: `python -m experiments.evaluate --workdir=runs/mine`.

Writes `evaluation/<id>.json` as each environment is finished and, once all are, `report/`. Killed and started again, it
evaluates only what is missing. What cannot be evaluated is listed in the report, with the reason; where an environment
failed, though the policy knows it, the script ends with status 1 after the report, and tries it again the next time.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import hashlib
import json
import pathlib
import types
import typing

import jax
import numpy as np

import environments as registry
from data.references import ReferencePolicyError, load_reference
from experiments.harness import progress
from experiments.harness.dry_run import TO_DO, Planned
from experiments.harness.outcomes import read_outcome
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.workdir import FREE, key_of, listed, pin_config
from experiments.report import rollouts
from experiments.report.page import write_report
from experiments.report.provenance import provenance
from experiments.report.runs import PROVENANCE, ROLLOUTS, read_run
from experiments.report.targets import find_target
from ldm_jax import acting, files
from ldm_jax import policy as policies
from ldm_jax.cards import CardError, EnvironmentCard, Reference, check_matches
from ldm_jax.encoding.buckets import join_buckets
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation import aggregates, scores
from ldm_jax.model.network import count_parameters
from ldm_jax.training.bucket_work import bucket_work


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How the policy is evaluated; how it takes its actions was said when it was saved: by default, as each card does.

    Attributes:
      seed: seed of the episodes.
      num_envs: parallel environments of each id; each starts with an empty context.
      episodes: episodes of each of them, on one context; the first is reported apart, too.
      both: plays the other form of decoding, too, greedy or sampled, and reports it beside; takes twice the time.
      rows: of a batch that the policy acts in, shared by environments; more take more memory.
      buckets: programs to compile, at most, as long as environments have observations of the same kind.
    """

    seed: int = 1_000_003
    num_envs: int = 64
    episodes: int = 4
    both: bool = dataclasses.field(default=False, metadata={FREE: True})
    rows: int = dataclasses.field(default=128, metadata={FREE: True})
    buckets: int = dataclasses.field(default=4, metadata={FREE: True})

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("num_envs", 2), ("episodes", 1), ("rows", 1), ("buckets", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}, expected at least {least}")


def foresee(config: EvaluateConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> list[Planned]:
    """What would be played by the policy that is there; where there is none yet, all of it."""
    if not (workdir / "policy").exists():
        return [*map(Planned, environments)]
    policy = policies.load(workdir / "policy")
    digest = fingerprint(policy)

    def state(id: str) -> str:
        if id not in policy.cards:
            return "the policy was not trained there"
        return "evaluated" if _finished(workdir / "evaluation" / f"{id}.json", digest) else TO_DO

    return [Planned(id, state(id)) for id in environments]


@stage("evaluate", among=lambda workdir: listed(workdir / "references"), plan=foresee)
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
      UnitsFailedError: some environments failed; the others are evaluated, and in the report.
    """
    policy = policies.load(workdir / "policy")
    ids = environments or listed(workdir / "references")
    known = {id: _known(policy, workdir, id, failed.get(id, "")) for id in ids}
    measured = {id: each.measurement for id, each in known.items()}
    pin_config(workdir, "evaluate", config, owns=("evaluation", "report"))
    digest, folder = fingerprint(policy), workdir / "evaluation"
    paths = {id: folder / f"{id}.json" for id in ids if not measured[id].missing}
    faults = {id: each.measurement.missing for id, each in known.items() if each.fault}
    gallery = rollouts.Gallery(workdir / "report" / ROLLOUTS, {id: measured[id].domain for id in paths})
    faults |= _evaluate(config, policy, digest, paths, policy.decoding, gallery)
    beside = {id: folder / "other_decoding" / f"{id}.json" for id in paths if id not in faults} if config.both else {}
    broken = _evaluate(config, policy, digest, beside, "other")
    done = {id: finished for id, path in paths.items() if (finished := _finished(path, digest))}
    for id in paths:
        returns = done[id].returns if id in done else None
        measured[id] = measured[id]._replace(missing=faults.get(id, ""), model_returns=returns)
    results = scores.score_each(measured.values(), config.seed)
    found = aggregates.scores_json(results, count_parameters(policy.params), policy.decoding, config.seed)
    for item in found["environments"]:
        if (id := item["id"]) in paths:
            item["decoding"] = acting.resolve_decoding(policy.decoding, policy.cards[id])
            item["other"] = _beside(item, _other(policy, id), _finished(beside[id], digest)) if id in beside else None
            item["faults"] = done[id].faults if id in done else {}
    told = provenance(workdir) | {"Evaluation": {"Seed": config.seed, "Policy": digest}}
    (workdir / "report").mkdir(exist_ok=True)
    files.write(workdir / "report" / PROVENANCE, json.dumps(told, indent=1) + "\n")
    page = write_report(workdir / "report", read_run(workdir, found))
    print(f"{aggregates.table(found)}\n\nreport: {page}")
    if faults := faults | {id: f"{_other(policy, id)} decoding, reported beside: {broken[id]}" for id in broken}:
        raise UnitsFailedError(faults)
    return found


class _Known(typing.NamedTuple):
    """What is known of an environment before the policy acts in it, and whether it failed already."""

    measurement: scores.Measurement
    fault: bool = False


def _known(policy: policies.Policy, workdir: pathlib.Path, id: str, missing: str) -> _Known:
    """Reads what is known of an environment; `missing` says why the policy will not act in it."""
    target = find_target(id)
    unknown = scores.Measurement(id, "unknown", None, None, None, target and target.target_return, missing)
    directory = workdir / "references" / id
    if missing and not (directory / "reference.json").exists():
        return _Known(unknown)
    try:
        scored = load_reference(directory)
    except ReferencePolicyError as error:
        if not directory.exists():
            raise  # it was named, and is not known: most often it is misspelled
        outcome = read_outcome(directory)
        reason = outcome.reason if outcome and outcome.verdict == "failed" else str(error)
        return _Known(unknown._replace(missing=reason))
    mismatch = ""
    if id in policy.cards:
        try:
            check_matches(policy.cards[id], scored.policy.spec, "the policy")
            _check_decoding(policy.cards[id], scored.policy.reference)
        except CardError as error:
            mismatch = str(error)
    else:
        missing = missing or "the policy was not trained there"
    measurement = unknown._replace(
        domain=scored.policy.spec.domain,
        random_returns=scored.random_returns.array,
        reference_returns=scored.reference_returns.array,
        missing=mismatch or missing,
    )
    return _Known(measurement, bool(mismatch))


def _check_decoding(card: EnvironmentCard, reference: Reference) -> None:
    if card.reference.decoding != reference.decoding:
        raise CardError(
            f"the policy was trained on a reference of {card.id} scored with decoding {card.reference.decoding}, and "
            f"this one was scored with {reference.decoding}: train with this reference, or score with that one"
        )


def fingerprint(policy: policies.Policy) -> str:
    """Changes with the parameters, decoding and cards: results of another policy are not taken for this one's."""
    digest = hashlib.blake2b(digest_size=8)
    cards = {id: card.to_json() for id, card in sorted(policy.cards.items())}
    digest.update(json.dumps([dataclasses.asdict(policy.cfg), policy.decoding, cards], sort_keys=True).encode())
    for leaf in jax.tree.leaves(policy.params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


class _Finished(typing.NamedTuple):
    """A finished evaluation: returns `[num_envs, episodes]`, and how often which fault was survived."""

    returns: np.ndarray
    faults: dict[str, int]


def _finished(path: pathlib.Path, digest: str) -> _Finished | None:
    """A finished evaluation of the same policy, if there is one."""
    try:
        result = json.loads(path.read_text())
        found = _Finished(np.array(result["returns"], np.float64), result.get("faults", {}))
        return found if result["policy"] == digest else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # what is damaged is evaluated again
        return None


def _evaluate(
    config: EvaluateConfig,
    policy: policies.Policy,
    digest: str,
    paths: collections.abc.Mapping[str, pathlib.Path],
    decoding: acting.Decoding | typing.Literal["other"],
    gallery: rollouts.Gallery | None = None,
) -> dict[str, str]:
    """Plays and writes what is not there yet.

    Returns:
      Why some could not be played, by id.
    """
    codecs = {id: policy.codec(card) for id, card in policy.cards.items()}
    shares = collections.Counter(codec.bucket for codec in codecs.values())
    # Environments of similar spaces share a program, whoever of them is left.
    joined = join_buckets(shares, config.buckets, bucket_work(policy.cfg))
    gallery = gallery or rollouts.Gallery()
    missing = [id for id, path in paths.items() if _finished(path, digest) is None]
    trials = [
        acting.Trial(
            codec=Codec(codecs[id].card, joined[codecs[id].bucket]),
            make=gallery.watch(id, functools.partial(registry.make, id, config.num_envs)),
            rows=config.num_envs,
            episodes=config.episodes,
            key=key_of(config.seed, "evaluate", id),
            decoding=_other(policy, id) if decoding == "other" else decoding,
        )
        for id in missing
    ]
    failures = dict[str, str]()
    with progress.bar("evaluate", len(missing) * config.num_envs * config.episodes, "episode") as advance:
        for played in acting.play_trials(policy.cfg, policy.params, trials, config.rows, advance):
            id = played.trial.codec.card.id
            if played.error is None:
                gallery.write(id)
                _write(paths[id], played, digest)
            else:
                progress.log("failed", id=id, reason=played.error)
                failures[id] = str(played.error)
    return failures


def _other(policy: policies.Policy, id: str) -> acting.Decoding:
    """The form of decoding that the policy is not scored in."""
    return "greedy" if acting.resolve_decoding(policy.decoding, policy.cards[id]) == "sample" else "sample"


def _beside(item: dict[str, typing.Any], decoding: str, finished: _Finished | None) -> dict[str, typing.Any] | None:
    """What is reported of the form that the policy is not scored in."""
    if finished is None or item["z"] is None:
        return None
    mean = float(finished.returns.mean())
    z = (mean - item["random"]) / (item["reference"] - item["random"])
    return {"decoding": decoding, "model": mean, "z": z}


def _write(path: pathlib.Path, played: acting.Played, digest: str) -> None:
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

"""Evaluates the saved policy in every environment: `python -m experiments.evaluate --workdir=runs/mine`.

Writes `evaluation/<id>.json` as each environment is finished and, once all are, `report/`. Killed and started again, it
evaluates only what is missing. What cannot be evaluated is listed in the report, with the reason; where an environment
failed, though the policy knows it, the script ends with status 1 after the report, and tries it again the next time.
`evaluation/<id>/outcome.json` says what came of each.
"""

from __future__ import annotations

import collections.abc
import contextlib
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
from experiments.harness.dry_run import TO_DO, Planned
from experiments.harness.evaluating import (
    EVALUATION,
    EvaluateConfig,
    FinishedEvaluation,
    other_decoding,
    play_missing,
    read_finished,
    result_path,
)
from experiments.harness.outcomes import UnitOutcome, Verdict, read_outcome, write_outcome
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import LOCAL, Engine
from experiments.harness.workdir import listed, pin_config
from experiments.report import rollouts
from experiments.report.page import write_report
from experiments.report.provenance import provenance
from experiments.report.runs import PROVENANCE, read_run
from experiments.report.targets import find_target
from ldm_jax import acting, files
from ldm_jax import policy as policies
from ldm_jax.cards import CardError, EnvironmentCard, Reference, check_matches
from ldm_jax.errors import LdmError
from ldm_jax.evaluation import aggregates, scores
from ldm_jax.model.network import count_parameters


def foresee(config: EvaluateConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> list[Planned]:
    """What would be played by the policy that is there; where there is none yet, all of it."""
    if not (workdir / "policy").exists():
        return [*map(Planned, environments)]
    policy = policies.load(workdir / "policy")
    digest = fingerprint(policy)

    def state(id: str) -> str:
        if id not in policy.cards:
            return "the policy was not trained there"
        return "evaluated" if read_finished(result_path(workdir, id), digest) else TO_DO

    return [Planned(id, state(id)) for id in environments or listed(workdir / "references")]


@stage("evaluate", among=lambda config, workdir: listed(workdir / "references"), plan=foresee)
def run(
    config: EvaluateConfig,
    workdir: pathlib.Path,
    environments: tuple[str, ...] = (),
    failed: collections.abc.Mapping[str, str] = types.MappingProxyType({}),
    *,
    engine: Engine = LOCAL,
) -> dict[str, typing.Any]:
    """Evaluates in all environments the policy knows, scores it and writes the report.

    Where an environment cannot be evaluated, the report says why, and has all others.

    Args:
      config: how many episodes.
      workdir: has `references/` and `policy/`.
      environments: the ids to report; empty for all that have a reference, admitted or refused.
      failed: why there is no reference of some of them.
      engine: where they are played.

    Returns:
      The contents of `report/scores.json`.

    Raises:
      WorkdirError: the workdir cannot be used.
      PolicyError: there is no policy.
      ReferencePolicyError: an id that was named has no reference; nothing has been done then.
      ClusterError: the cluster cannot be reached or used; what is finished stays.
      UnitsFailedError: some environments failed; the others are evaluated, and in the report.
    """
    policy, ids = policies.load(workdir / "policy"), environments or listed(workdir / "references")
    known = {id: _known(policy, workdir, id, failed.get(id, "")) for id in ids}
    measured = {id: each.measurement for id, each in known.items()}
    pin_config(workdir, "evaluate", config, owns=("evaluation", "report"))
    digest, play = fingerprint(policy), functools.partial(play_missing, config, policy, workdir, engine=engine)
    playable = {id: config.episodes_beside(measured[id].reference_returns) for id in ids if not measured[id].missing}
    faults = {id: each.measurement.missing for id, each in known.items() if each.fault}
    shown = rollouts.choose_few({id: measured[id].domain for id in playable})
    faults |= play(digest, playable, recorded=shown)
    beside = {id: episodes for id, episodes in playable.items() if config.both and id not in faults}
    broken = play(digest, beside, other=True)
    done = {id: one for id in playable if (one := read_finished(result_path(workdir, id), digest))}
    for id in playable:
        returns = done[id].returns if id in done else None
        measured[id] = measured[id]._replace(missing=faults.get(id, ""), model_returns=returns)
    _write_outcomes(workdir, measured, faults)
    results = scores.score_each(measured.values(), config.seed)
    found = aggregates.scores_json(results, count_parameters(policy.params), policy.decoding, config.seed)
    for item in found["environments"]:
        if (id := item["id"]) in playable:
            other = read_finished(result_path(workdir, id, other=True), digest) if id in beside else None
            item["decoding"] = acting.resolve_decoding(policy.decoding, policy.cards[id])
            item["other"] = _beside(item, other_decoding(policy, id), other)
            item["faults"] = done[id].faults if id in done else {}
    page = _write_page(workdir, found, {"Seed": config.seed, "Policy": digest})
    print(f"{aggregates.table(found)}\n\nreport: {page}")
    faults |= {id: f"{other_decoding(policy, id)} decoding, reported beside: {broken[id]}" for id in broken}
    if faults:
        raise UnitsFailedError(faults)
    return found


def _write_page(workdir: pathlib.Path, found: dict[str, typing.Any], details: dict[str, typing.Any]) -> pathlib.Path:
    told = provenance(workdir) | {"Evaluation": details}
    (workdir / "report").mkdir(exist_ok=True)
    files.write(workdir / "report" / PROVENANCE, json.dumps(told, indent=1) + "\n")
    return write_report(workdir / "report", read_run(workdir, found))


class _Known(typing.NamedTuple):
    """What is known of an environment before the policy acts in it, and whether it failed already."""

    measurement: scores.Measurement
    fault: bool = False


def _domain_of(id: str) -> str:
    """What the catalog says of an environment of which nothing else is known."""
    with contextlib.suppress(LdmError):
        return registry.spec(id).domain
    return "unknown"


def _known(policy: policies.Policy, workdir: pathlib.Path, id: str, missing: str) -> _Known:
    """Reads what is known of an environment; `missing` says why the policy will not act in it."""
    target = find_target(id)
    unknown = scores.Measurement(id, _domain_of(id), None, None, None, target and target.target_return, missing)
    directory = workdir / "references" / id
    if missing and not (directory / "reference.json").exists():
        return _Known(unknown)
    try:
        scored = load_reference(directory)
    except ReferencePolicyError as error:
        if not directory.exists():
            raise  # it was named, and is not known: most often it is misspelled
        outcome = read_outcome(directory)
        reason = outcome.reason if outcome and outcome.verdict != "admitted" else str(error)
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


def _write_outcomes(
    workdir: pathlib.Path,
    measured: collections.abc.Mapping[str, scores.Measurement],
    faults: collections.abc.Mapping[str, str],
) -> None:
    """Writes what came of each environment, as `references` does: one small file each."""
    for id, each in measured.items():
        verdict: Verdict = "failed" if id in faults else "left out" if each.missing else "evaluated"
        write_outcome(workdir / EVALUATION / id, UnitOutcome(verdict, each.missing))


def _beside(
    item: dict[str, typing.Any], decoding: str, finished: FinishedEvaluation | None
) -> dict[str, typing.Any] | None:
    """What is reported of the form that the policy is not scored in."""
    if finished is None or item["z"] is None:
        return None
    mean = float(finished.returns.mean())
    z = (mean - item["random"]) / (item["reference"] - item["random"])
    return {"decoding": decoding, "model": mean, "z": z}


if __name__ == "__main__":
    from experiments import evaluate  # by its own name: other machines run another script
    from experiments.harness.flags import launch

    launch(evaluate.run, {"default": EvaluateConfig()})

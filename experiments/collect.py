"""Collects labelled trajectories of every admitted environment: `python -m experiments.collect --workdir=runs/mine`.

Writes one group per environment to `dataset/`, whole or not at all. Killed and started again, it collects only what is
missing; a group whose reference has changed since is collected anew. One that fails, crashes or hangs does not stop the
others; the table of all comes last. Episodes that fail are kept, and counted in it.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import pathlib
import typing

import environments as registry
from data import collect
from data.references import ScoredReference, load_reference
from data.references.opening import opened_for, with_room
from data.store import MANIFEST, Dataset, StoreError, append_part, create_dataset, open_dataset, remove_group
from data.store.merging import copy_parts
from experiments.harness import progress
from experiments.harness.building import build_all, build_for
from experiments.harness.dry_run import TO_DO, Planned
from experiments.harness.engine import work_on
from experiments.harness.experts import check_same_expert
from experiments.harness.ids import spec_of
from experiments.harness.outcomes import UnitOutcome, failure, in_one_line, outcome_table, read_outcome, read_refusal
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import LOCAL, Engine, Job, Travel, UnitsConfig
from experiments.harness.workdir import listed, pin_config, resolved, seed_of
from ldm_jax.cards import EnvironmentCard
from ldm_jax.environment import Environment
from ldm_jax.errors import LdmError


@dataclasses.dataclass(frozen=True)
class CollectStageConfig(UnitsConfig):
    """What is collected; the data do not depend on how they are worked on.

    Attributes:
      seed: seed of all episodes and all noise.
      data: how much is collected of each environment.
    """

    seed: int = 0
    data: collect.CollectConfig = dataclasses.field(default_factory=collect.CollectConfig)


def _listed(workdir: pathlib.Path) -> tuple[str, ...]:
    return listed(workdir / "references")


def foresee(config: CollectStageConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> list[Planned]:
    """What would be done, told without reading what was collected."""
    try:
        there = frozenset(open_dataset(workdir / "dataset").ids)
    except StoreError:
        there = frozenset()
    planned = []
    for id in environments or _listed(workdir):
        found = read_outcome(workdir / "references" / id)
        if id in there:
            planned.append(Planned(id, "collected"))
        elif found and found.verdict != "admitted":
            planned.append(Planned(id, found.verdict))
        else:
            try:
                streams = collect.affordable_streams(spec_of(id), config.data)
                planned.append(Planned(id, TO_DO, streams * config.data.steps))
            except LdmError as error:
                planned.append(Planned(id, in_one_line(error)))
    return planned


@stage("collect", among=lambda config, workdir: _listed(workdir), plan=foresee)
def run(
    config: CollectStageConfig, workdir: pathlib.Path, environments: tuple[str, ...] = (), *, engine: Engine = LOCAL
) -> None:
    """Collects in every environment whose reference was admitted.

    Args:
      config: what to collect.
      workdir: has `references/`.
      environments: ids to collect; empty for all that have a reference.
      engine: where they are worked on.

    Raises:
      WorkdirError: the workdir cannot be used.
      ReferencePolicyError: an id that was named has no reference, or a damaged one; nothing has been done then.
      StoreError: its `dataset/` is not one, or cannot be written.
      ClusterError: the cluster cannot be reached or used; what is collected stays.
      UnitsFailedError: some environments failed; the others are collected.
    """
    todo = _examine(config, workdir, environments)
    pin_config(workdir, "collect", config, owns=("dataset",))
    dataset = create_dataset(workdir / "dataset", resolved(config))
    units = [unit for unit in todo.units if not _is_done(dataset, _load(workdir, unit.id))]
    workers = config.workers_for(len(environments or todo.units))
    for id, outcome in build_all((unit.id for unit in units), workers, config.build_seconds, engine).items():
        todo.fail(id, outcome)
    units = [unit for unit in units if unit.id not in todo.outcomes]
    job = Job(functools.partial(_collect, config), _prepare)
    travel = Travel(workdir, _needed, _moved, _arrived)
    for each in work_on("collect", units, job, config, workers=workers, engine=engine, travel=travel):
        if isinstance(each.result, dict):
            todo.outcomes[each.unit.id] = UnitOutcome("collected", _summary(each.result))
            progress.log("collected", id=each.unit.id, **each.result)
        else:
            todo.fail(each.unit.id, UnitOutcome("failed", each.result or each.reason, each.cause))
    print(outcome_table({unit.id: _BEFORE for unit in todo.units} | todo.outcomes))
    if failed := {id: each.reason for id, each in todo.outcomes.items() if each.verdict == "failed"}:
        raise UnitsFailedError(failed)


class CollectUnit(typing.NamedTuple):
    """One environment to collect, the workdir of its reference and of the dataset, and the steps that it will take."""

    id: str
    workdir: pathlib.Path
    steps: int


_BEFORE = UnitOutcome("collected", "before")


def _summary(facts: collections.abc.Mapping[str, typing.Any]) -> str:
    text = "{steps:,} steps, {episodes:,} episodes of which {failed:,} failed, {faults:,} faults survived"
    return text.format(**facts)


class _ToDo(typing.NamedTuple):
    """What is to be collected, and what came of each environment of which that is known."""

    units: list[CollectUnit]
    outcomes: dict[str, UnitOutcome]

    def fail(self, id: str, outcome: UnitOutcome) -> None:
        self.outcomes[id] = outcome
        progress.log("failed", id=id, reason=outcome.reason)


def _examine(config: CollectStageConfig, workdir: pathlib.Path, named: tuple[str, ...]) -> _ToDo:
    found = _ToDo([], {})
    refused = {id: said for id in named if (said := read_refusal(workdir / "references" / id))}
    for id in named:
        if id not in refused:
            _load(workdir, id)  # who names an id wants to know first
    for id in named or _listed(workdir):
        if id in refused:
            found.outcomes[id] = refused[id]
            continue
        try:
            scored = _load(workdir, id)
            if scored.admission.admitted:
                streams = collect.affordable_streams(scored.policy.spec, config.data)
                found.units.append(CollectUnit(id, workdir, streams * config.data.steps))
            else:
                found.outcomes[id] = UnitOutcome("refused", scored.admission.reason)
                progress.log("refused", id=id, reason=scored.admission.reason)
        except LdmError as error:
            found.fail(id, failure(error))
    return found


def _load(workdir: pathlib.Path, id: str) -> ScoredReference:
    return load_reference(workdir / "references" / id)


def _is_done(dataset: Dataset, scored: ScoredReference) -> bool:
    if scored.policy.spec.id not in dataset.ids:
        return False
    card = dataset.card(scored.policy.spec.id)
    return card.reference == scored.policy.reference and card.reference_returns == scored.reference_returns


def _prepare(unit: CollectUnit) -> str | None:
    failed = build_for(unit.id)
    return failed.reason if failed else None


def _needed(unit: CollectUnit) -> list[str]:
    return [f"references/{unit.id}", f"dataset/{MANIFEST}"]  # a dataset of the same kind, with nothing in it


def _moved(unit: CollectUnit, root: pathlib.Path) -> CollectUnit:
    return unit._replace(workdir=root)


def _arrived(unit: CollectUnit, root: pathlib.Path) -> None:
    """Takes what was collected elsewhere: compared with its checksums, and added as if it had been collected here."""
    arrived = root / "dataset"
    if arrived.exists():  # else it failed
        (arrived / MANIFEST).write_bytes((unit.workdir / "dataset" / MANIFEST).read_bytes())
        copy_parts(_emptied(unit), open_dataset(arrived))


def _emptied(unit: CollectUnit) -> Dataset:
    """The dataset, without what was collected before of the environment, with another reference."""
    dataset = open_dataset(unit.workdir / "dataset")
    return remove_group(dataset, unit.id) if unit.id in dataset.ids else dataset


def _collect_streams(
    config: CollectStageConfig, scored: ScoredReference, advance: progress.Advance, streams: int
) -> tuple[Environment, collect.Collected]:
    """The environment, closed, and what was collected in it."""
    with opened_for(registry.make, scored.policy, streams) as environment:
        seed = seed_of(config.seed, "collect", scored.policy.spec.id)
        return environment, collect.collect(environment, scored.policy, seed, config.data, advance)


def _collect(config: CollectStageConfig, unit: CollectUnit, advance: progress.Advance) -> dict[str, typing.Any] | str:
    """Collects and stores; returns what the log says of it, or the reason why the environment failed."""
    clock = progress.clock()
    try:
        scored = _load(unit.workdir, unit.id)
        check_same_expert(unit.id, scored.policy.reference)
        streams = collect.affordable_streams(scored.policy.spec, config.data)
        work = functools.partial(_collect_streams, config, scored, advance)
        environment, collected = with_room(work, streams)
        # What is cut off where a worker fails stays in the data, and its place is filled again.
        faults: collections.abc.Mapping[str, int] = getattr(environment, "faults", {})
        card = EnvironmentCard.of(
            environment.spec,
            statistics=collected.statistics,
            random_returns=scored.random_returns,
            reference_returns=scored.reference_returns,
            reference=scored.policy.reference,
        )
    except (Exception, SystemExit) as error:
        return in_one_line(error)
    dataset = _emptied(unit)  # what goes wrong with it would go wrong with the next one, too
    try:
        append_part(dataset, card, collected.leaves, collected.episodes)
    except StoreError:
        raise
    except LdmError as error:
        return in_one_line(error)
    return {
        "streams": environment.spec.batch_size,
        "steps": collected.statistics.steps,
        "episodes": len(collected.episodes.start),
        "failed": int(collected.episodes.failed(config.data.steps, scored.random_returns.mean).sum()),
        "faults": sum(faults.values()),
        "random": collected.random,
        "agreement": collected.agreement,
        "unlabelled": collected.statistics.unlabelled,
        "outside": collected.statistics.outside,
        "megabytes": sum(value.nbytes for value in collected.leaves.values()) / 1e6,
        "seconds": clock(),
    }


if __name__ == "__main__":
    from experiments import collect as collect_stage  # by its own name: other machines run another script
    from experiments.harness.flags import launch

    launch(collect_stage.run, {"default": collect_stage.CollectStageConfig()})

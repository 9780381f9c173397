"""Collects labelled trajectories of every admitted environment: `python -m experiments.collect --workdir=runs/mine`.

Writes one group per environment to `dataset/`, whole or not at all. Killed and started again, it collects only what is
missing; a group whose reference has changed since is collected anew. One that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import typing

import environments as registry
from data import collect
from data.references import ScoredReference, load_reference
from data.store import Dataset, StoreError, append_part, create_dataset, remove_group
from experiments.harness import progress
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.workdir import listed, pin_config, seed_of
from ldm_jax.cards import EnvironmentCard
from ldm_jax.errors import LdmError


@dataclasses.dataclass(frozen=True)
class CollectStageConfig:
    """What is collected.

    Attributes:
      seed: seed of all episodes and all noise.
      data: how much is collected of each environment.
    """

    seed: int = 0
    data: collect.CollectConfig = dataclasses.field(default_factory=collect.CollectConfig)


@stage("collect")
def run(config: CollectStageConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> None:
    """Collects in every environment whose reference was admitted.

    Args:
      config: what to collect.
      workdir: has `references/`.
      environments: ids to collect; empty for all that have a reference.

    Raises:
      WorkdirError: the workdir cannot be used.
      ReferencePolicyError: an id that was named has no reference, or a damaged one; nothing has been done then.
      StoreError: its `dataset/` is not one, or cannot be written.
      UnitsFailedError: some environments failed; the others are collected.
    """
    plan = _plan(config, workdir, environments)
    pin_config(workdir, "collect", config, owns=("dataset",))
    dataset = create_dataset(workdir / "dataset")
    missing = [id for id in plan.steps if not _is_done(dataset, _load(workdir, id))]
    total = sum(plan.steps[id] for id in missing)
    with progress.bar("collect", total, "step") as advance:
        for id in missing:
            try:
                dataset = _collect(config, dataset, _load(workdir, id), advance)
            except StoreError:
                raise  # the next one would fail, too
            except LdmError as error:
                progress.log("failed", id=id, reason=error)
                plan.failed[id] = str(error)
    if plan.failed:
        raise UnitsFailedError(plan.failed)


class _Plan(typing.NamedTuple):
    """What is known before: the steps to collect, by id, and why there are none of others."""

    steps: dict[str, int]
    failed: dict[str, str]


def _plan(config: CollectStageConfig, workdir: pathlib.Path, named: tuple[str, ...]) -> _Plan:
    plan = _Plan({}, {})
    for id in named:
        _load(workdir, id)  # who names an id wants to know first
    for id in named or listed(workdir / "references"):
        try:
            scored = _load(workdir, id)
            if scored.admission.admitted:
                plan.steps[id] = collect.affordable_streams(scored.policy.spec, config.data) * config.data.steps
            else:
                progress.log("refused", id=id, reason=scored.admission.reason)
        except LdmError as error:
            progress.log("failed", id=id, reason=error)
            plan.failed[id] = str(error)
    return plan


def _load(workdir: pathlib.Path, id: str) -> ScoredReference:
    return load_reference(workdir / "references" / id)


def _is_done(dataset: Dataset, scored: ScoredReference) -> bool:
    if scored.policy.spec.id not in dataset.ids:
        return False
    card = dataset.card(scored.policy.spec.id)
    return card.reference == scored.policy.reference and card.reference_returns == scored.reference_returns


def _collect(
    config: CollectStageConfig,
    dataset: Dataset,
    scored: ScoredReference,
    advance: progress.Advance,
) -> Dataset:
    id, clock = scored.policy.spec.id, progress.clock()
    streams = collect.affordable_streams(scored.policy.spec, config.data)
    with contextlib.closing(registry.make(id, streams)) as environment:
        seed = seed_of(config.seed, "collect", id)
        collected = collect.collect(environment, scored.policy, seed, config.data, advance)
    card = EnvironmentCard.of(
        environment.spec,
        statistics=collected.statistics,
        random_returns=scored.random_returns,
        reference_returns=scored.reference_returns,
        reference=scored.policy.reference,
    )
    if id in dataset.ids:
        dataset = remove_group(dataset, id)
    dataset = append_part(dataset, card, collected.leaves, collected.episodes)
    progress.log(
        "collected",
        id=id,
        streams=streams,
        steps=collected.statistics.steps,
        episodes=len(collected.episodes.start),
        random=collected.random,
        agreement=collected.agreement,
        outside=collected.statistics.outside,
        megabytes=sum(value.nbytes for value in collected.leaves.values()) / 1e6,
        seconds=clock(),
    )
    return dataset


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": CollectStageConfig()})

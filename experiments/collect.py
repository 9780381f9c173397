"""Collects labelled trajectories of every admitted environment: `python -m experiments.collect --workdir=runs/mine`.

Writes one group per environment to `dataset/`, whole or not at all. Killed and started again, it collects only what is
missing; a group whose reference has changed since is collected anew.
"""

from __future__ import annotations

import dataclasses
import pathlib
import typing

import environments as registry
from data import collect
from data.references import ScoredReference, load_reference
from data.store import Dataset, append_part, create_dataset, remove_group
from experiments.harness import progress
from experiments.harness.stage import stage
from experiments.harness.workdir import listed, pin_config, seed_of
from ldm_jax.cards import EnvironmentCard


@dataclasses.dataclass(frozen=True)
class CollectStageConfig:
    """What is collected.

    Attributes:
      seed: of all episodes and all noise.
      data: how much of it.
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
      StoreError: its `dataset/` is not one, or cannot be written.
    """
    ids = environments or listed(workdir / "references")
    pin_config(workdir, "collect", config, owns=("dataset",))
    dataset, missing = create_dataset(workdir / "dataset"), []
    for id in ids:
        scored = load_reference(workdir / "references" / id)
        if not scored.admission.admitted:
            progress.log("refused", id=id, reason=scored.admission.reason)
        elif not _is_done(dataset, id, scored):
            missing.append(scored)
    if missing:
        total = sum(_streams(config, scored) for scored in missing) * config.data.steps
        with progress.bar("collect", total, "step") as advance:
            for scored in missing:
                if scored.policy.spec.id in dataset.ids:
                    dataset = remove_group(dataset, scored.policy.spec.id)
                dataset = _collect(config, dataset, scored, advance)


def _is_done(dataset: Dataset, id: str, scored: ScoredReference) -> bool:
    if id not in dataset.ids:
        return False
    card = dataset.card(id)
    return card.reference == scored.policy.reference and card.reference_returns == scored.reference_returns


def _streams(config: CollectStageConfig, scored: ScoredReference) -> int:
    return collect.affordable_streams(scored.policy.spec, config.data)


def _collect(
    config: CollectStageConfig, dataset: Dataset, scored: ScoredReference, advance: typing.Callable[[int], None]
) -> Dataset:
    spec, streams, clock = scored.policy.spec, _streams(config, scored), progress.clock()
    environment = registry.make(spec.id, streams)
    try:
        seed = seed_of(config.seed, "collect", spec.id)
        collected = collect.collect(environment, scored.policy, seed, config.data, advance)
    finally:
        environment.close()
    card = EnvironmentCard.of(
        environment.spec,
        statistics=collected.statistics,
        random_returns=scored.random_returns,
        reference_returns=scored.reference_returns,
        reference=scored.policy.reference,
    )
    dataset = append_part(dataset, card, collected.leaves, collected.episodes)
    progress.log(
        "collected",
        id=spec.id,
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

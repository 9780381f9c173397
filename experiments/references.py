"""Trains references: `python -m experiments.references --workdir=runs/mine --environments=gymnax/Catch-bsuite`.

Writes `references/<id>/` as each is finished. Killed and started again, it trains only what is missing.
"""

from __future__ import annotations

import collections.abc
import concurrent.futures
import dataclasses
import multiprocessing.queues
import pathlib
import typing

import environments as registry
from data.references import Recipe, load_reference, recipe, save_reference, score_reference, train_reference
from experiments.harness import processes, progress
from experiments.harness.ids import check_ids
from experiments.harness.stage import stage
from experiments.harness.workdir import FREE, WorkdirError, pin_config, seed_of


@dataclasses.dataclass(frozen=True)
class ReferencesConfig:
    """How references are made.

    Attributes:
      seed: of training and scoring.
      budget: fraction of each recipe's environment steps that is spent.
      num_envs: parallel environments of scoring.
      episodes: in each of them, of each policy scored.
      workers: processes; small networks do not fill two cores. Results do not depend on it.
    """

    seed: int = 0
    budget: float = 1.0
    num_envs: int = 64
    episodes: int = 4
    workers: int = dataclasses.field(default=2, metadata={FREE: True})

    def __post_init__(self):
        if not self.budget > 0:
            raise ValueError(f"budget is {self.budget}, expected a positive fraction")
        for name in ("num_envs", "episodes", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


class Unit(typing.NamedTuple):
    """One environment to work on."""

    id: str
    recipe: Recipe
    directory: pathlib.Path


@stage("references")
def run(config: ReferencesConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> None:
    """Makes the references that are missing.

    Args:
      config: how.
      workdir: gets `references/`.
      environments: their ids.

    Raises:
      UnknownEnvironmentError: an id that is not known; nothing has been done then.
      WorkdirError: the workdir cannot be used, or no environment was named.
    """
    if not environments:
        raise WorkdirError(
            "no environment was named; give --environments=gymnax/CartPole-v1,envpool/Taxi-v3 or the like"
        )
    check_ids(environments)
    pin_config(workdir, "references", config, owns=("references",))
    units = []
    for id in environments:
        directory = workdir / "references" / id
        if directory.exists():
            load_reference(directory)  # finished, or it says what is wrong with it
        else:
            units.append(Unit(id, _recipe(config, id), directory))
    if units:
        total = sum(unit.recipe.config.budget_steps for unit in units)
        with progress.bar("references", total, "step") as advance:
            run_units = _run_here if config.workers == 1 or len(units) == 1 else _run_in_processes
            for facts in run_units(config, units, advance):
                progress.log("reference", **facts)


def _recipe(config: ReferencesConfig, id: str) -> Recipe:
    environment = registry.make(id)
    chosen = recipe(environment.spec)
    environment.close()
    budget = max(1, round(config.budget * chosen.config.budget_steps))
    return dataclasses.replace(chosen, config=dataclasses.replace(chosen.config, budget_steps=budget))


def _make(
    config: ReferencesConfig, unit: Unit, advance: collections.abc.Callable[[int], None]
) -> dict[str, typing.Any]:
    clock, seed = progress.clock(), seed_of(config.seed, "references", unit.id)
    policy = train_reference(registry.make, unit.id, unit.recipe, seed, progress.up_to(advance))
    trained_s = clock()
    scored = score_reference(registry.make, policy, seed, config.num_envs, config.episodes)
    save_reference(unit.directory, scored)
    return {
        "id": unit.id,
        "algorithm": scored.policy.reference.algorithm,
        "decoding": scored.policy.reference.decoding,
        "random": scored.random_returns.mean,
        "reference": scored.reference_returns.mean,
        "admitted": scored.admission.admitted,
        "train_seconds": trained_s,
        "score_seconds": round(clock() - trained_s, 1),
    }


def _run_here(
    config: ReferencesConfig, units: list[Unit], advance: collections.abc.Callable[[int], None]
) -> collections.abc.Iterator[dict[str, typing.Any]]:
    for unit in units:
        yield _make(config, unit, advance)


def _run_in_processes(
    config: ReferencesConfig, units: list[Unit], advance: collections.abc.Callable[[int], None]
) -> collections.abc.Iterator[dict[str, typing.Any]]:
    steps = processes.make_queue()
    # The longest first: else one of them may be what all wait for in the end.
    units = sorted(units, key=lambda unit: -unit.recipe.config.budget_steps)
    with processes.pool(config.workers, _begin_worker, steps) as pool:
        waiting = {pool.submit(_make_in_worker, config, unit) for unit in units}
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
            while not steps.empty():
                advance(steps.get())
            yield from (future.result() for future in done)


_worker: dict[str, typing.Any] = {}


def _begin_worker(steps: multiprocessing.queues.Queue) -> None:
    _worker["steps"] = steps


def _make_in_worker(config: ReferencesConfig, unit: Unit) -> dict[str, typing.Any]:
    return _make(config, unit, _worker["steps"].put)


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": ReferencesConfig()})

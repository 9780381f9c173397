"""Trains references: `python -m experiments.references --workdir=runs/mine --environments=gymnax/Catch-bsuite`.

Writes `references/<id>/` as each is finished, and `references/outcomes.json`, what came of each. One that fails does
not stop the others; in the end the exit status says it. Killed and started again, it trains only what is missing.
"""

from __future__ import annotations

import collections.abc
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import json
import multiprocessing.queues
import pathlib
import types
import typing

import environments as registry
from data.references import Recipe, load_reference, recipe, save_reference, score_reference, train_reference
from data.references.pipeline import ScoredReference, opened
from environments import UnknownEnvironmentError
from experiments.harness import processes, progress
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.workdir import FREE, WorkdirError, pin_config, seed_of
from ldm_jax import files
from ldm_jax.encoding.buckets import bucket_for
from ldm_jax.environment import LibraryMissingError
from ldm_jax.errors import ConfigError, LdmError, check_finite
from ldm_jax.types import EnvironmentSpec


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

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.budget > 0:
            raise ConfigError(f"budget is {self.budget}, expected a positive fraction")
        for name in ("num_envs", "episodes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")


class ReferenceOutcome(typing.NamedTuple):
    """What came of one environment.

    Attributes:
      verdict: "admitted", or "refused" by what the reference scored, or "failed": there is no reference.
      reason: why, in one sentence.
    """

    verdict: typing.Literal["admitted", "refused", "failed"]
    reason: str


class Unit(typing.NamedTuple):
    """One environment to work on."""

    id: str
    recipe: Recipe
    directory: pathlib.Path


class _Finished(typing.NamedTuple):
    """A unit that was worked on, what came of it, and what the log says of it."""

    id: str
    outcome: ReferenceOutcome
    facts: collections.abc.Mapping[str, typing.Any] = types.MappingProxyType({})


_Advance = collections.abc.Callable[[int], None]


@stage("references")
def run(config: ReferencesConfig, workdir: pathlib.Path, environments: tuple[str, ...]) -> None:
    """Makes the references that are missing.

    Args:
      config: how.
      workdir: gets `references/`.
      environments: their ids.

    Raises:
      UnknownEnvironmentError: an id that is not known; nothing has been done then.
      LibraryMissingError: the library of an id is not installed; the same.
      WorkdirError: the workdir cannot be used, or no environment was named.
      UnitsFailedError: some environments have no reference in the end; the others do.
    """
    if not environments:
        raise WorkdirError(
            "no environment was named; give --environments=gymnax/CartPole-v1,envpool/Taxi-v3 or the like"
        )
    outcomes: dict[str, ReferenceOutcome] = {}
    units: list[Unit] = []
    for id in environments:
        found = _examine(config, id, workdir / "references" / id)
        if isinstance(found, Unit):
            units.append(found)
        else:
            outcomes[id] = found
            if found.verdict == "failed":
                _log(_Finished(id, found))
    pin_config(workdir, "references", config, owns=("references",))
    _write(workdir, outcomes)
    total = sum(unit.recipe.config.budget_steps for unit in units)
    with progress.bar("references", total, "step") as advance:
        run_units = _run_here if config.workers == 1 or len(units) <= 1 else _run_in_processes
        for finished in run_units(config, units, advance):
            outcomes[finished.id] = finished.outcome
            _write(workdir, outcomes)
            _log(finished)
    failed = {id: outcomes[id].reason for id in environments if outcomes[id].verdict == "failed"}
    if failed:
        raise UnitsFailedError(failed)


def _examine(config: ReferencesConfig, id: str, directory: pathlib.Path) -> Unit | ReferenceOutcome:
    """What there is to do for an id, or what came of it already: all that can be known before anything is trained."""
    try:
        if directory.exists():
            return _outcome(load_reference(directory))  # finished, or it says what is wrong with it
        with opened(registry.make, id, 1) as environment:
            return Unit(id, _recipe(config, environment.spec), directory)
    except (UnknownEnvironmentError, LibraryMissingError):
        raise
    except Exception as error:
        return ReferenceOutcome("failed", _said(error))


def _recipe(config: ReferencesConfig, spec: EnvironmentSpec) -> Recipe:
    bucket_for(spec.observation_space, spec.action_space)  # what no model can be given needs no reference
    chosen = recipe(spec)
    budget = max(1, round(config.budget * chosen.config.budget_steps))
    return dataclasses.replace(chosen, config=dataclasses.replace(chosen.config, budget_steps=budget))


def _outcome(scored: ScoredReference) -> ReferenceOutcome:
    admission = scored.admission
    return ReferenceOutcome("admitted" if admission.admitted else "refused", admission.reason)


def _said(error: BaseException) -> str:
    """An error in one line; what is not the project's own names its class."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LdmError) else f"{type(error).__name__}: {text}"


def _log(finished: _Finished) -> None:
    if finished.outcome.verdict == "failed":
        progress.log("failed", id=finished.id, reason=finished.outcome.reason)
    else:
        progress.log("reference", id=finished.id, **finished.facts)


def _write(workdir: pathlib.Path, outcomes: dict[str, ReferenceOutcome]) -> None:
    path = workdir / "references" / "outcomes.json"
    path.parent.mkdir(exist_ok=True)
    known: dict[str, typing.Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text())  # of other lists of ids
    known |= {id: outcome._asdict() for id, outcome in outcomes.items()}
    files.write(path, json.dumps(known, indent=1, sort_keys=True) + "\n")


def _make(config: ReferencesConfig, unit: Unit, advance: _Advance) -> _Finished:
    """Trains, scores and saves; whatever the environment does is its own failure, `sys.exit` included."""
    clock, seed = progress.clock(), seed_of(config.seed, "references", unit.id)
    try:
        policy = train_reference(registry.make, unit.id, unit.recipe, seed, progress.up_to(advance))
        trained_s = clock()
        scored = score_reference(registry.make, policy, seed, config.num_envs, config.episodes)
    except (Exception, SystemExit) as error:
        return _Finished(unit.id, ReferenceOutcome("failed", _said(error)))
    save_reference(unit.directory, scored)
    facts = {
        "algorithm": scored.policy.reference.algorithm,
        "decoding": scored.policy.reference.decoding,
        "random": scored.random_returns.mean,
        "reference": scored.reference_returns.mean,
        "admitted": scored.admission.admitted,
        "train_seconds": trained_s,
        "score_seconds": round(clock() - trained_s, 1),
    }
    return _Finished(unit.id, _outcome(scored), facts)


def _run_here(config: ReferencesConfig, units: list[Unit], advance: _Advance) -> collections.abc.Iterator[_Finished]:
    for unit in units:
        yield _make(config, unit, advance)


def _run_in_processes(
    config: ReferencesConfig, units: list[Unit], advance: _Advance
) -> collections.abc.Iterator[_Finished]:
    # The longest first: else one of them may be what all wait for in the end.
    units = sorted(units, key=lambda unit: -unit.recipe.config.budget_steps)
    lost = yield from _run_in_pool(config, units, advance, config.workers)
    for unit in lost:  # one of them ended the pool; alone, each answers for itself
        if (yield from _run_in_pool(config, [unit], advance, 1)):
            reason = "its process died: out of memory, or a fault of its library"
            yield _Finished(unit.id, ReferenceOutcome("failed", reason))


def _run_in_pool(
    config: ReferencesConfig, units: list[Unit], advance: _Advance, workers: int
) -> collections.abc.Generator[_Finished, None, list[Unit]]:
    """Yields what is finished, and returns the units that were lost because a process died."""
    steps, lost = processes.make_queue(), []
    with processes.pool(workers, _begin_worker, steps) as pool:
        waiting = {pool.submit(_make_in_worker, config, unit): unit for unit in units}
        while waiting:
            done, _ = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
            while not steps.empty():
                advance(steps.get())
            for future in done:
                unit = waiting.pop(future)
                try:
                    yield future.result()
                except concurrent.futures.process.BrokenProcessPool:
                    lost.append(unit)
    return lost


_worker: dict[str, typing.Any] = {}


def _begin_worker(steps: multiprocessing.queues.Queue) -> None:
    _worker["steps"] = steps


def _make_in_worker(config: ReferencesConfig, unit: Unit) -> _Finished:
    return _make(config, unit, _worker["steps"].put)


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": ReferencesConfig()})

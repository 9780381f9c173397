"""Plays where the policy was never trained: `python -m experiments.zero_shot --workdir=runs/mine --environments=...`.

Each environment is measured by random steps, as `ldm_jax.evaluate` does, and then played by the policy and, as often,
by the uniformly random one. Writes `zero_shot/<id>.json` as each is finished and, once all are, `zero_shot.md`, the
table. Killed and started again, it plays only what is missing.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import json
import math
import pathlib
import typing

import environments as registry
import ldm_jax
from data.references import random_agent
from data.references.opening import opened
from data.references.zoo import NO_FURTHER
from experiments.evaluate import fingerprint
from experiments.harness import progress
from experiments.harness.building import build_all, build_for
from experiments.harness.engine import work_on
from experiments.harness.outcomes import UnitOutcome, failure
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.units import LOCAL, Engine, Job, UnitsConfig
from experiments.harness.workdir import WorkdirError, key_of, pin_config
from experiments.report.catalog_page import markdown_table, mean_with_error
from ldm_jax import files, rollout
from ldm_jax.cards import Returns
from ldm_jax.errors import check_at_least


@dataclasses.dataclass(frozen=True)
class ZeroShotConfig(UnitsConfig):
    """How much is played.

    Attributes:
      seed: of the episodes.
      num_envs: parallel environments, each on a context of its own.
      episodes: of each of them, by the policy and by the random one.
    """

    seed: int = 1_000_003
    num_envs: int = 16
    episodes: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"seed": 0, "num_envs": 2, "episodes": 1})


class ZeroShot(typing.NamedTuple):
    """What was returned in one environment.

    Attributes:
      model: by the policy.
      random: by the uniformly random policy.
    """

    model: Returns
    random: Returns

    @property
    def verdict(self) -> str:
        """Whether the policy is better than random, beyond what the errors explain."""
        error = math.hypot(self.model.standard_error, self.random.standard_error)
        apart = self.model.mean - self.random.mean
        if abs(apart) <= NO_FURTHER * error:
            return "as random"
        return "better" if apart > 0 else "worse"


class _Unit(typing.NamedTuple):
    id: str
    workdir: pathlib.Path
    steps: int


@stage("zero_shot")
def run(
    config: ZeroShotConfig, workdir: pathlib.Path, environments: tuple[str, ...], *, engine: Engine = LOCAL
) -> dict[str, ZeroShot]:
    """Plays in all environments and writes the table.

    Args:
      config: how much.
      workdir: has `policy/`.
      environments: their ids.
      engine: where they are played.

    Returns:
      What was returned, by id.

    Raises:
      WorkdirError: no environment was named, the policy was trained in one of them, or the workdir cannot be used.
      PolicyError: there is no policy.
      UnitsFailedError: some could not be played; the others are.
    """
    policy = ldm_jax.load(workdir / "policy")
    if not environments:
        raise WorkdirError("no environment was named; give --environments=@ids.txt or the like, or --select")
    if trained := [id for id in environments if id in policy.cards]:
        raise WorkdirError(f"the policy was trained in {', '.join(trained[:3])}: experiments.evaluate scores it there")
    pin_config(workdir, "zero_shot", config, owns=("zero_shot", "zero_shot.md"))
    digest = fingerprint(policy)
    missing = [id for id in environments if _read(workdir, id, digest) is None]
    workers = config.workers_for(len(missing))
    failed = build_all(missing, workers, config.build_seconds, engine)
    episodes = config.num_envs * config.episodes
    units = [_Unit(id, workdir, 2 * episodes) for id in missing if id not in failed]
    job = Job(functools.partial(_play, config), _prepare)
    for each in work_on("zero_shot", units, job, config, workers=workers, engine=engine, counted="episode"):
        if isinstance(each.result, ZeroShot):
            _write(workdir, each.unit.id, digest, each.result)
            progress.log("played", id=each.unit.id, model=each.result.model.mean, random=each.result.random.mean)
        else:
            failed[each.unit.id] = each.result or UnitOutcome("failed", each.reason, each.cause)
            progress.log("failed", id=each.unit.id, reason=failed[each.unit.id].reason)
    played = {id: found for id in environments if (found := _read(workdir, id, digest))}
    page = render_zero_shot(played, {id: outcome.reason for id, outcome in failed.items()})
    files.write(workdir / "zero_shot.md", page)
    print(page)
    if failed:
        raise UnitsFailedError({id: outcome.reason for id, outcome in failed.items()})
    return played


def render_zero_shot(played: collections.abc.Mapping[str, ZeroShot], failed: collections.abc.Mapping[str, str]) -> str:
    """The table.

    Args:
      played: what was returned, by id.
      failed: why others could not be played, by id.

    Returns:
      Markdown.
    """
    verdicts = collections.Counter(found.verdict for found in played.values())
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("better", "as random", "worse"))
    rows = [
        (id, found.verdict, mean_with_error(found.random), mean_with_error(found.model), f"{found.model.episodes:,}")
        for id, found in played.items()
    ]
    rows += [(id, f"failed: {reason}", "", "", "") for id, reason in failed.items()]
    told = f"{len(rows)} environments that the policy was not trained in: {counts}, {len(failed)} failed."
    return f"{told}\n\n{markdown_table(('environment', '', 'random', 'policy', 'episodes each'), rows)}"


def _path(workdir: pathlib.Path, id: str) -> pathlib.Path:
    return workdir / "zero_shot" / f"{id}.json"


def _read(workdir: pathlib.Path, id: str, digest: str) -> ZeroShot | None:
    try:
        said = json.loads(_path(workdir, id).read_text())
        found = ZeroShot(*(Returns.of(said[name]) for name in ZeroShot._fields))
        return found if said["policy"] == digest else None
    except (OSError, ValueError, TypeError, KeyError):  # what is damaged is played again
        return None


def _write(workdir: pathlib.Path, id: str, digest: str, found: ZeroShot) -> None:
    path = _path(workdir, id)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"id": id, "policy": digest, **{name: returns.values for name, returns in found._asdict().items()}}
    files.write(path, json.dumps(said))


def _prepare(unit: _Unit) -> UnitOutcome | None:
    return build_for(unit.id)


def _play(config: ZeroShotConfig, unit: _Unit, advance: progress.Advance) -> ZeroShot | UnitOutcome:
    try:
        policy = ldm_jax.load(unit.workdir / "policy")
        with opened(registry.make, unit.id, config.num_envs) as environment:
            key = key_of(config.seed, "zero shot", unit.id)
            chance = random_agent(environment.spec.action_space)
            random = rollout.run_episodes(environment, chance, (), key, config.episodes)
            advance(unit.steps // 2)
            model = ldm_jax.evaluate(policy, environment, key, episodes=config.episodes)
    except (Exception, SystemExit) as error:
        return failure(error)
    advance(unit.steps - unit.steps // 2)
    return ZeroShot(Returns.of(model.returns), Returns.of(random.returns))


if __name__ == "__main__":
    from experiments import zero_shot  # by its own name: other processes run another script
    from experiments.harness.flags import launch

    launch(zero_shot.run, {"default": zero_shot.ZeroShotConfig()})

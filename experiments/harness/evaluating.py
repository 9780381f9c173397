"""Units of an evaluation: environments that one process plays together, in batches that they share.

One that ends its process or takes too much costs the others of its unit a second attempt, each in a process of its own,
so that it is known whose fault it was.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import json
import pathlib
import typing

import jax
import numpy as np

import environments
from environments import UnknownEnvironmentError, registry
from experiments.harness import progress
from experiments.harness.building import build_all, build_for
from experiments.harness.engine import work_on
from experiments.harness.units import LOCAL, Engine, Job, Travel, UnitsConfig
from experiments.harness.workdir import FREE, key_of
from experiments.report.rollouts import Gallery
from experiments.report.runs import ROLLOUTS
from ldm_jax import acting, files
from ldm_jax import policy as policies
from ldm_jax.encoding.buckets import Bucket, join_buckets
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import check_at_least
from ldm_jax.training.bucket_work import bucket_work

EVALUATION = "evaluation"
_RECORDINGS = f"report/{ROLLOUTS}"
_free: typing.Any = {FREE: True}


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(UnitsConfig):
    """How the policy is evaluated; how it takes its actions was said when it was saved: by default, as each card does.

    Attributes:
      seed: seed of the episodes.
      num_envs: parallel environments of each id; each starts with an empty context.
      episodes: episodes of each of them, on one context; the first is reported apart, too.
      as_reference: whether as many as the reference was scored on are played of an id, where those are more.
      both: plays the other form of decoding, too, greedy or sampled, and reports it beside; takes twice the time.
      rows: of a batch that the policy acts in, shared by environments; more take more memory.
      buckets: programs to compile, at most, as long as environments have observations of the same kind.
      together: environments that a process plays, in batches that they share, where there are several or a cluster.
      workers: processes of this machine; 0 for this one, which an accelerator and simulators that cannot crash it get
        in any case. Where there are limits each plays `together` environments, else its part of all.
    """

    seed: int = 1_000_003
    num_envs: int = 64
    episodes: int = 4
    as_reference: bool = False
    both: bool = dataclasses.field(default=False, metadata=_free)
    rows: int = dataclasses.field(default=128, metadata=_free)
    buckets: int = dataclasses.field(default=4, metadata=_free)
    together: int = dataclasses.field(default=16, metadata=_free)
    workers: int = dataclasses.field(default=1, metadata=_free, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"seed": 0, "num_envs": 2, "episodes": 1, "rows": 1, "buckets": 1, "together": 1}
        check_at_least(self, least, "evaluate.")

    def episodes_beside(self, reference: np.ndarray | None) -> int:
        """Episodes of each row, beside the returns of a reference."""
        asked = reference.size if self.as_reference and reference is not None else 0
        return max(self.episodes, -(-asked // self.num_envs))


class EvaluateUnit(typing.NamedTuple):
    """What one process plays: environments, with how many episodes of each row, from where to where, and how."""

    ids: tuple[str, ...]
    episodes: tuple[int, ...]
    workdir: pathlib.Path
    digest: str
    other: bool
    steps: int
    recorded: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """For people."""
        return ",".join(self.ids)


class FinishedEvaluation(typing.NamedTuple):
    """A finished evaluation: returns `[num_envs, episodes]`, and how often which fault was survived."""

    returns: np.ndarray
    faults: dict[str, int]


def result_path(workdir: pathlib.Path, id: str, *, other: bool = False) -> pathlib.Path:
    """Where the result of an environment is, of the form of decoding that is scored or of the other one."""
    folder = workdir / EVALUATION
    return (folder / "other_decoding" if other else folder) / f"{id}.json"


def read_finished(path: pathlib.Path, digest: str) -> FinishedEvaluation | None:
    """A finished evaluation of the same policy, if there is one."""
    try:
        result = json.loads(path.read_text())
        found = FinishedEvaluation(np.array(result["returns"], np.float64), result.get("faults", {}))
        return found if result["policy"] == digest else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # what is damaged is evaluated again
        return None


def other_decoding(policy: policies.Policy, id: str) -> acting.Decoding:
    """The form of decoding that the policy is not scored in."""
    return "greedy" if acting.resolve_decoding(policy.decoding, policy.cards[id]) == "sample" else "sample"


def play_missing(
    config: EvaluateConfig,
    policy: policies.Policy,
    workdir: pathlib.Path,
    digest: str,
    ids: collections.abc.Mapping[str, int],
    *,
    other: bool = False,
    recorded: collections.abc.Container[str] = (),
    engine: Engine = LOCAL,
) -> dict[str, str]:
    """Plays and writes what is not there yet.

    Args:
      config: how many episodes.
      policy: that plays; in `policy/` of the workdir.
      workdir: gets the results.
      digest: of the policy.
      ids: of the environments, all of which the policy knows, with the episodes of each row.
      other: whether it takes its actions in the form that it is not scored in.
      recorded: those of which the report shows what the policy did.
      engine: where they are played.

    Returns:
      Why some could not be played, by id.
    """
    missing = [id for id in ids if read_finished(result_path(workdir, id, other=other), digest) is None]
    workers = config.workers if _needs_process(config, missing) else 0
    failures = {id: made.reason for id, made in build_all(missing, workers, config.build_seconds, engine).items()}
    groups = _grouped(config, policy, [id for id in missing if id not in failures], workers, engine)
    load = _load if workers or not engine.is_local else lambda unit: policy
    job = Job(functools.partial(_play, config, load), _prepare)
    travel = Travel(workdir, lambda unit: (), _moved, _arrived, common=("policy",))
    while groups:
        most = max(map(len, groups))
        units = []
        for group in groups:
            episodes, shown = tuple(ids[id] for id in group), (*filter(recorded.__contains__, group),)
            units.append(EvaluateUnit(group, episodes, workdir, digest, other, config.num_envs * sum(episodes), shown))
        limited = dataclasses.replace(config, unit_seconds=config.unit_seconds * most)
        groups = []
        for each in work_on(
            "evaluate", units, job, limited, workers=workers, engine=engine, travel=travel, counted="episode"
        ):
            left = {}
            for id in each.unit.ids:
                found = read_finished(result_path(workdir, id, other=other), digest)
                if found is None:
                    left[id] = each.reason if each.result is None else each.result[id]
                else:
                    _tell(id, found)
            if each.result is None and len(each.unit.ids) > 1:
                progress.log("again", environments=len(left), reason=each.reason)
                groups += [(id,) for id in left]
            else:
                failures |= left
    for id, reason in failures.items():
        progress.log("failed", id=id, reason=reason)
    return failures


def _grouped(
    config: EvaluateConfig, policy: policies.Policy, ids: collections.abc.Sequence[str], workers: int, engine: Engine
) -> list[tuple[str, ...]]:
    """The environments that are played together: of similar spaces, and here as many as there can be."""
    size = config.together
    if engine.is_local and not (config.unit_seconds or config.unit_memory_gb):
        size = max(1, -(-len(ids) // max(1, workers)))
    buckets = _buckets(config, policy)
    ids = sorted(ids, key=lambda id: buckets[id].name)
    return [(*ids[begin : begin + size],) for begin in range(0, len(ids), size)]


def _needs_process(config: EvaluateConfig, ids: collections.abc.Sequence[str]) -> bool:
    """Whether environments are played in a process of their own: one of several that could end this one."""
    if config.unit_seconds or config.unit_memory_gb or config.workers > 1:
        return True
    return len(ids) > 1 and jax.default_backend() == "cpu" and any(map(_may_crash, ids))


def _may_crash(id: str) -> bool:
    """Whether an environment could end the process that plays in it: it is neither traced nor in one of its own."""
    try:
        return not registry.group(id.partition("/")[0]) and not environments.spec(id).jittable
    except UnknownEnvironmentError:  # the catalog does not have it
        return True


def _buckets(config: EvaluateConfig, policy: policies.Policy) -> dict[str, Bucket]:
    """The bucket of each environment that the policy knows: similar spaces share a program, whoever is left."""
    own = {id: policy.codec(card).bucket for id, card in policy.cards.items()}
    joined = join_buckets(collections.Counter(own.values()), config.buckets, bucket_work(policy.cfg))
    return {id: joined[bucket] for id, bucket in own.items()}


def _tell(id: str, found: FinishedEvaluation) -> None:
    faults = sum(found.faults.values())
    progress.log("evaluated", id=id, model=float(found.returns.mean()), episodes=found.returns.size, faults=faults)


def _load(unit: EvaluateUnit) -> policies.Policy:
    return policies.load(unit.workdir / "policy")


def _prepare(unit: EvaluateUnit) -> None:
    for id in unit.ids:
        build_for(id)  # what cannot be built says so when it is made


def _moved(unit: EvaluateUnit, root: pathlib.Path) -> EvaluateUnit:
    return unit._replace(workdir=root)


def _arrived(unit: EvaluateUnit, root: pathlib.Path) -> None:
    """Takes what was played elsewhere."""
    names = [f"{_RECORDINGS}/{id}.json" for id in unit.recorded]
    names += [str(result_path(pathlib.Path(), id, other=unit.other)) for id in unit.ids]
    for path, target in ((root / name, unit.workdir / name) for name in names):
        if path.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


def _play(
    config: EvaluateConfig,
    load: collections.abc.Callable[[EvaluateUnit], policies.Policy],
    unit: EvaluateUnit,
    advance: progress.Advance,
) -> dict[str, str]:
    """Plays and writes each as soon as it is finished; returns why one could not be played, empty where it was."""
    policy = load(unit)
    buckets = _buckets(config, policy)
    gallery = Gallery(unit.workdir / _RECORDINGS, dict.fromkeys(unit.recorded, ""))
    trials = [
        acting.Trial(
            codec=Codec(policy.cards[id], buckets[id]),
            make=gallery.watch(id, functools.partial(environments.make, id, config.num_envs)),
            rows=config.num_envs,
            episodes=episodes,
            key=key_of(config.seed, "evaluate", id),
            decoding=other_decoding(policy, id) if unit.other else policy.decoding,
        )
        for id, episodes in zip(unit.ids, unit.episodes, strict=True)
    ]
    reasons = {}
    for played in acting.play_trials(policy.cfg, policy.params, trials, config.rows, advance):
        id = played.trial.codec.card.id
        reasons[id] = "" if played.error is None else str(played.error)
        if played.error is None:
            gallery.write(id)
            _write(result_path(unit.workdir, id, other=unit.other), played, unit.digest)
    return reasons


def _write(path: pathlib.Path, played: acting.Played, digest: str) -> None:
    assert played.episodes is not None
    id, returns = played.trial.codec.card.id, played.episodes.returns.astype(np.float64)
    result = {"id": id, "policy": digest, "returns": returns.tolist(), "lengths": played.episodes.lengths.tolist()}
    if played.faults:
        result["faults"] = played.faults
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(result))

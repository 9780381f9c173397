"""The contract of `Environment` as a kit: every adapter, ours or a third party's, must pass `check_environment`."""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import Environment, StaleStateError
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.types import EnvironmentSpec, PyTree, TimeStep

from . import laws, listing, registry
from .catalog import entries
from .isolation.labels import ExpertReport

_Make = collections.abc.Callable[..., Environment]
_Choose = collections.abc.Callable[[int, TimeStep], PyTree]

SHORT_LIMIT = 5
"""The time limit, in steps, under which the laws of endings are checked: every environment then ends soon."""


class ConformanceError(LdmError, AssertionError):
    """An environment breaks a law of the contract.

    Attributes:
      law: the name of the law.
    """

    def __init__(self, id: str, law: str, text: str):
        super().__init__(id, law, text)
        self.law = law

    def __str__(self) -> str:
        id, law, text = self.args
        return f"{id} breaks the law of {law}: {text}"


def check_environment(make: str | _Make, *, batch_size: int = 8, steps: int = 40, seed: int = 0) -> None:
    """Checks that an environment keeps the contract; returns when it does.

    Args:
      make: an id of `environments.list_ids`, or a function that is called as `make(batch_size=B, time_limit=limit)` and
        returns a new `Environment`; `limit` is an integer, or None for the library's own.
      batch_size: B, at least 2. Few rows may start alike by chance even where starts are random.
      steps: steps of each of the longer runs.
      seed: of the keys and the random actions.

    Raises:
      ConformanceError: a law is broken; its text names the law, what was seen and what was expected.
      ConfigError: `batch_size` is below 2.
    """
    if batch_size < 2:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 2: some laws compare rows")
    id = make if isinstance(make, str) else getattr(make, "__name__", repr(make))
    build = functools.partial(registry.make, make) if isinstance(make, str) else make
    with _law(id, "making"):
        own, short = (build(batch_size=batch_size, time_limit=limit) for limit in (None, SHORT_LIMIT))
    id = getattr(getattr(own, "spec", None), "id", id)
    try:
        with _law(id, "the spec"):
            laws.check_spec(own, batch_size, None)
            laws.check_spec(short, batch_size, SHORT_LIMIT)
        if isinstance(make, str):
            with _law(id, "the catalog"):
                _check_catalog(own.spec)
        with _law(id, "sampling"):
            laws.check_sampling(own.spec.action_space, seed)
        if own.spec.jittable:
            _check_runs(id, _Compiled(own), _Compiled(short), steps, seed)
        else:
            _check_runs(id, own, short, steps, seed)
        if own.spec.jittable:
            with _law(id, "jit"):
                _check_pure(short, seed)
        else:
            with _law(id, "stale states"):
                _check_stale(own, seed)
    finally:
        with _law(id, "close"):
            for environment in (own, short):
                environment.close()
                environment.close()


def check_expert(
    make: str | _Make, name: str = "", *, batch_size: int = 4, steps: int = 40, seed: int = 0
) -> ExpertReport:
    """Checks that a live expert keeps the contract; returns what was counted of it when it does.

    Labels are in the space; labelling changes nothing of an episode, which is the same in every number as one without
    the expert; the same state gives the same label where the expert says what its labels follow from, and the same seed
    gives the same labels everywhere; and the worker had nothing to leave out.

    Args:
      make: an id of `environments.list_ids`, or a function that is called as `make(batch_size=B, expert=name)`, where
        the name is empty for none, and returns a new `Environment`.
      name: of the expert.
      batch_size: B.
      steps: of each run; every second one does what the expert says, the others are random.
      seed: of the keys and the random actions.

    Raises:
      ConformanceError: a law is broken; its text names the law, what was seen and what was expected.
    """
    id = make if isinstance(make, str) else getattr(make, "__name__", repr(make))
    build = functools.partial(registry.make, make) if isinstance(make, str) else make
    with _law(id, "making"):
        labelled, plain = (build(batch_size=batch_size, expert=expert) for expert in (name, ""))
    id, key = f"{labelled.spec.id} with {name}", jax.random.key(seed)
    try:
        with _law(id, "labels"):
            actions: list[PyTree] = []
            run = _run(labelled, key, steps, _half_labelled(labelled, seed, actions))
            for time_step in run:
                laws.check_labels(labelled, time_step)
            lost = [str(fault.text) for fault in getattr(labelled, "reports", ())]
            laws.require(not lost, f"beside it the environment had {len(lost)} faults: {'; '.join(lost[:2])}")
            report = typing.cast(typing.Any, labelled).expert_report
            wrong = {
                kind: report.counts[kind] for kind in ("slow", "raised", "nonsense", "drew") if report.counts[kind]
            }
            laws.require(
                not wrong, f"of {report.counts['asked']} questions {wrong} went wrong: {'; '.join(report.notes)}"
            )
            laws.require(report.counts["labels"], f"it had no answer to any of {report.counts['asked']} questions")
        with _law(id, "repeatable labels"):
            again = _run(labelled, key, steps, lambda t, _: actions[t])
            laws.check_same(run, again, "the same key and the same actions")
        with _law(id, "labelling"):
            without = _run(plain, key, steps, lambda t, _: actions[t])
            bare = [time_step._replace(expert=None) for time_step in run]
            laws.check_same(bare, without, "the same key and the same actions without the expert")
        return typing.cast(typing.Any, labelled).expert_report
    finally:
        labelled.close()
        plain.close()


def _half_labelled(environment: Environment, seed: int, actions: list[PyTree]) -> _Choose:
    """Random actions, and every second time those of the expert; each is kept in `actions`."""
    random = _random_actions(environment, seed)

    def choose(t: int, time_step: TimeStep) -> PyTree:
        action = random(t, time_step)
        if t % 2 and time_step.expert is not None:
            label, valid = time_step.expert

            def pick(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
                return np.where(valid.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)

            action = jax.tree.map(pick, action, label)
        actions.append(action)
        return action

    return choose


def _check_runs(id: str, own: Environment, short: Environment, steps: int, seed: int) -> None:
    key, other = jax.random.key(seed), jax.random.key(seed + 1)
    random_actions = _random_actions(own, seed)
    with _law(id, "time steps"):
        long = _run(own, key, steps, random_actions)
        brief = _run(short, key, 3 * SHORT_LIMIT, random_actions)
        for environment, run in ((own, long), (short, brief)):
            for time_step in run:
                laws.check_types(environment, time_step)
    with _law(id, "reset"):
        laws.check_reset(long[0])
    with _law(id, "reproducibility"):
        laws.check_same(long, _run(own, key, steps, random_actions), "the same key and the same actions")
    with _law(id, "the edges of the action space"):
        for edge in ("low", "high"):
            action = laws.edge_actions(own.spec.action_space, own.spec.batch_size, edge)
            _run(own, key, 3, _always(action))
    with _law(id, "next-step reset"):
        for run in (long, brief):
            laws.check_firsts(run)
        _check_ignored_action(short, key, brief, random_actions)
    with _law(id, "the time limit"):
        laws.check_limit(long, own.spec.time_limit, exact=False)
        laws.check_limit(brief, SHORT_LIMIT, exact=True)
    with _law(id, "independent rows"):
        _check_rows(own, key, other, steps, random_actions)


def _check_catalog(spec: EnvironmentSpec) -> None:
    known = entries.entries(spec.library).get(spec.id.partition("/")[2])
    if known is not None and known.verified and known.version == spec.version:
        listed = listing.spec(spec.id)
        for field in ("observation_space", "action_space", "time_limit"):
            said, found = getattr(listed, field), getattr(spec, field)
            laws.require(said == found, f"its {field} is {found}, but the catalog says {said}: verify the library anew")


@contextlib.contextmanager
def _law(id: str, law: str) -> collections.abc.Iterator[None]:
    try:
        yield
    except laws.BrokenError as error:
        raise ConformanceError(id, law, str(error)) from None
    except Exception as error:
        raise ConformanceError(id, law, f"it raised {error!r}") from error


class _Compiled:
    """A jittable environment whose functions are compiled once for all laws."""

    def __init__(self, environment: Environment):
        self.spec, self.close = environment.spec, environment.close
        self.reset, self.step = jax.jit(environment.reset), jax.jit(environment.step)


def _run(environment: Environment, key: jax.Array, steps: int, choose: _Choose) -> list[TimeStep]:
    """Time steps of `reset` and `steps` steps, as NumPy arrays; earlier ones must not change under later ones."""
    state, time_step = environment.reset(key)
    seen, copies = [time_step], [_copy(time_step)]
    for t in range(steps):
        state, time_step = environment.step(state, choose(t, copies[-1]))
        seen.append(time_step)
        copies.append(_copy(time_step))
    for t, (now, then) in enumerate(zip(seen, copies, strict=True)):
        laws.require(
            not laws.differing(_copy(now), then), f"time step {t} changed when the environment went on: copy the arrays"
        )
    return copies


def _copy(time_step: TimeStep) -> TimeStep:
    return jax.tree.map(np.array, time_step)


def _random_actions(environment: Environment, seed: int) -> _Choose:
    space, batch_size = environment.spec.action_space, environment.spec.batch_size
    sample = jax.jit(lambda key, mask: spaces.sample(key, space, batch_size, mask))

    def choose(t: int, time_step: TimeStep) -> PyTree:
        action = sample(jax.random.fold_in(jax.random.key(seed), t), time_step.action_mask)
        return action if environment.spec.jittable else jax.tree.map(np.asarray, action)

    return choose


def _always(action: PyTree) -> _Choose:
    return lambda t, time_step: action


def _but_at(step: int, action: PyTree, choose: _Choose) -> _Choose:
    return lambda t, time_step: action if t == step else choose(t, time_step)


def _check_ignored_action(environment: Environment, key: jax.Array, run: list[TimeStep], choose: _Choose) -> None:
    spec = environment.spec
    ends = [t for t, time_step in enumerate(run) if time_step.last.any()]
    laws.require(ends, f"no episode ended in {len(run) - 1} steps under a time limit of {SHORT_LIMIT}")
    rows, after = run[ends[0]].last, []
    for edge in ("low", "high"):
        ignored = laws.edge_actions(spec.action_space, spec.batch_size, edge)
        again = _run(environment, key, ends[0] + 1, _but_at(ends[0], ignored, choose))
        after.append(jax.tree.map(lambda leaf: leaf[rows], again[-1]))
    different = laws.differing(*after)
    laws.require(
        not different,
        f"after the end of an episode two different actions gave a different {different}: ignore the action and reset",
    )


def _check_rows(environment: Environment, key: jax.Array, other: jax.Array, steps: int, choose: _Choose) -> None:
    # All rows act alike; a row that only follows its key differs where another key makes a difference.
    def alike(t: int, time_step: TimeStep) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[:1].repeat(environment.spec.batch_size, 0), choose(t, time_step))

    one, two = (
        jax.tree.map(lambda *leaves: np.stack(leaves, 1), *_run(environment, k, steps, alike)) for k in (key, other)
    )
    random = laws.differing(jax.tree.map(lambda leaf: leaf[0], one), jax.tree.map(lambda leaf: leaf[0], two))
    first_row = jax.tree.map(lambda leaf: leaf[:1].repeat(len(leaf), 0), one)
    laws.require(
        not random or laws.differing(one, first_row),
        f"all rows are alike although another key gives another {random}: give each row its own seed",
    )


def _check_stale(environment: Environment, seed: int) -> None:
    action = laws.edge_actions(environment.spec.action_space, environment.spec.batch_size, "low")
    before_reset, _ = environment.reset(jax.random.key(seed))
    state, _ = environment.reset(jax.random.key(seed))
    later, _ = environment.step(state, action)
    for stale, what in ((before_reset, "from before a reset"), (state, "used before")):
        try:
            environment.step(stale, action)
        except StaleStateError:
            continue
        raise laws.BrokenError(f"a state {what} was accepted, expected StaleStateError")
    environment.step(later, action)


def _check_pure(environment: Environment, seed: int) -> None:
    steps = SHORT_LIMIT + 2
    action = laws.edge_actions(environment.spec.action_space, environment.spec.batch_size, "high")

    def rollout(key: jax.Array) -> TimeStep:
        state, first = environment.reset(key)
        _, rest = jax.lax.scan(lambda state, _: environment.step(state, action), state, None, steps)
        return jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, rest)

    keys = jax.random.split(jax.random.key(seed), 2)
    scanned = jax.jit(rollout)(keys[0])
    mapped = jax.tree.map(lambda leaf: leaf[0], jax.jit(jax.vmap(rollout))(keys))
    state, time_step = environment.reset(keys[0])
    plain = [time_step]
    for _ in range(steps):
        state, time_step = environment.step(state, action)
        plain.append(time_step)
    unjitted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plain)
    for what, result in (("jax.lax.scan under jax.jit", scanned), ("jax.vmap", mapped)):
        # Compilers reorder float arithmetic: numbers may differ in the last digits, nothing else may.
        different = laws.differing(_copy(unjitted), _copy(result), tolerance=1e-3)
        laws.require(not different, f"{what} gave a different {different} than calling step after step")

"""The contract of `Environment` as a kit: every adapter, ours or a third party's, must pass `check_environment`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import Environment, StaleStateError
from ldm_jax.types import Array, PyTree, TimeStep

from . import registry

Make = typing.Callable[..., Environment]
Choose = typing.Callable[[int, TimeStep], PyTree]

SHORT_LIMIT = 5
"""The time limit, in steps, under which the laws of endings are checked: every environment then ends soon."""


class ConformanceError(AssertionError):
    """An environment breaks a law of the contract.

    Attributes:
      law: the name of the law.
    """

    def __init__(self, id: str, law: str, text: str):
        super().__init__(f"{id} breaks the law of {law}: {text}")
        self.law = law


class _BrokenError(Exception):
    """What is wrong, before it is known of which environment and law."""


def check_environment(make: str | Make, *, batch_size: int = 8, steps: int = 40, seed: int = 0) -> None:
    """Checks that an environment keeps the contract; returns when it does.

    Args:
      make: an id of `environments.list_ids`, or a function that is called as `make(batch_size=B, time_limit=limit)` and
        returns a new `Environment`; `limit` is an integer, or None for the library's own.
      batch_size: B, at least 2. Few rows may start alike by chance even where starts are random.
      steps: steps of each of the longer runs.
      seed: of the keys and the random actions.

    Raises:
      ConformanceError: a law is broken; its text names the law, what was seen and what was expected.
      ValueError: `batch_size` is below 2.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}, expected at least 2: some laws compare rows")
    id = make if isinstance(make, str) else getattr(make, "__name__", repr(make))
    build = functools.partial(registry.make, make) if isinstance(make, str) else make
    with _law(id, "making"):
        own, short = (build(batch_size=batch_size, time_limit=limit) for limit in (None, SHORT_LIMIT))
    id = getattr(getattr(own, "spec", None), "id", id)
    try:
        with _law(id, "the spec"):
            _check_spec(own, batch_size, None)
            _check_spec(short, batch_size, SHORT_LIMIT)
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


def _check_runs(id: str, own: Environment, short: Environment, steps: int, seed: int) -> None:
    key, other = jax.random.key(seed), jax.random.key(seed + 1)
    random_actions = _random_actions(own, seed)
    with _law(id, "time steps"):
        long = _run(own, key, steps, random_actions)
        brief = _run(short, key, 3 * SHORT_LIMIT, random_actions)
        for environment, run in ((own, long), (short, brief)):
            for time_step in run:
                _check_types(environment, time_step)
    with _law(id, "reset"):
        _check_reset(long[0])
    with _law(id, "reproducibility"):
        _check_same(long, _run(own, key, steps, random_actions), "the same key and the same actions")
    with _law(id, "the edges of the action space"):
        for edge in ("low", "high"):
            action = _edge(own.spec.action_space, own.spec.batch_size, edge)
            _run(own, key, 3, _always(action))
    with _law(id, "next-step reset"):
        for run in (long, brief):
            _check_firsts(run)
        _check_ignored_action(short, key, brief, random_actions)
    with _law(id, "the time limit"):
        _check_limit(long, own.spec.time_limit, exact=False)
        _check_limit(brief, SHORT_LIMIT, exact=True)
    with _law(id, "independent rows"):
        _check_rows(own, key, other, steps, random_actions)


@contextlib.contextmanager
def _law(id: str, law: str) -> typing.Iterator[None]:
    try:
        yield
    except _BrokenError as error:
        raise ConformanceError(id, law, str(error)) from None
    except Exception as error:
        raise ConformanceError(id, law, f"it raised {error!r}") from error


def _require(condition: typing.Any, text: str) -> None:
    if not condition:
        raise _BrokenError(text)


class _Compiled:
    """A jittable environment whose functions are compiled once for all laws."""

    def __init__(self, environment: Environment):
        self.spec, self.close = environment.spec, environment.close
        self.reset, self.step = jax.jit(environment.reset), jax.jit(environment.step)


def _run(environment: Environment, key: Array, steps: int, choose: Choose) -> list[TimeStep]:
    """Time steps of `reset` and `steps` steps, as NumPy arrays; earlier ones must not change under later ones."""
    state, time_step = environment.reset(key)
    seen, copies = [time_step], [_copy(time_step)]
    for t in range(steps):
        state, time_step = environment.step(state, choose(t, copies[-1]))
        seen.append(time_step)
        copies.append(_copy(time_step))
    for t, (now, then) in enumerate(zip(seen, copies, strict=True)):
        _require(
            not _differing(_copy(now), then), f"time step {t} changed when the environment went on: copy the arrays"
        )
    return copies


def _copy(time_step: TimeStep) -> TimeStep:
    return jax.tree.map(np.array, time_step)


def _random_actions(environment: Environment, seed: int) -> Choose:
    space, batch_size = environment.spec.action_space, environment.spec.batch_size
    sample = jax.jit(lambda key, mask: spaces.sample(key, space, batch_size, mask))

    def choose(t: int, time_step: TimeStep) -> PyTree:
        action = sample(jax.random.fold_in(jax.random.key(seed), t), time_step.action_mask)
        return action if environment.spec.jittable else jax.tree.map(np.asarray, action)

    return choose


def _always(action: PyTree) -> Choose:
    return lambda t, time_step: action


def _but_at(step: int, action: PyTree, choose: Choose) -> Choose:
    return lambda t, time_step: action if t == step else choose(t, time_step)


def _check_spec(environment: Environment, batch_size: int, time_limit: int | None) -> None:
    _require(isinstance(environment, Environment), f"{type(environment).__name__} lacks spec, reset, step or close")
    spec = environment.spec
    _require(spec.batch_size == batch_size, f"batch_size is {spec.batch_size}, expected {batch_size} as asked for")
    if time_limit is not None:
        _require(spec.time_limit == time_limit, f"time_limit is {spec.time_limit}, expected {time_limit} as asked for")
    for what in ("version", "domain"):
        _require(isinstance(getattr(spec, what), str) and getattr(spec, what), f"{what} is {getattr(spec, what)!r}")
    for space in (spec.observation_space, spec.action_space):
        for leaf in spaces.leaves(space):
            if isinstance(leaf.space, gymnasium.spaces.Box):
                low, high = leaf.space.low, leaf.space.high
                _require((low <= high).all(), f"part {leaf.name!r} of {space} has a low above its high, or NaN")
                if np.issubdtype(leaf.space.dtype, np.floating):
                    lax = (np.isfinite(low) & (low < -spaces.UNBOUNDED)) | (
                        np.isfinite(high) & (high > spaces.UNBOUNDED)
                    )
                    _require(
                        not lax.any(), f"part {leaf.name!r} of {space} is bounded beyond {spaces.UNBOUNDED:g}: say inf"
                    )
    for leaf in spaces.leaves(spec.action_space):
        _require(not isinstance(leaf.space, gymnasium.spaces.Text), "actions cannot be Text")


def _check_types(environment: Environment, time_step: TimeStep) -> None:
    spec = environment.spec
    B = spec.batch_size
    for name, dtype in (("reward", np.float32), ("terminated", bool), ("truncated", bool), ("first", bool)):
        value = getattr(time_step, name)
        got, expected = f"{value.dtype}{list(value.shape)}", f"{np.dtype(dtype)}[{B}]"
        _require(got == expected, f"{name} is {got}, expected {expected}")
    _require(np.isfinite(time_step.reward).all(), f"the reward is {time_step.reward}, expected finite numbers")
    try:
        spaces.check(spec.observation_space, time_step.observation, B, "the observation")
    except spaces.SpaceError as error:
        raise _BrokenError(str(error)) from error
    structure = jax.tree.structure(spaces.zeros(spec.observation_space, (B,)))
    _require(
        str(jax.tree.structure(time_step.observation)) == str(structure),
        f"the observation has parts that are not in its space {spec.observation_space}",
    )
    for leaf in spaces.leaves(spec.observation_space):
        if isinstance(leaf.space, gymnasium.spaces.Text):
            _check_text(leaf, spaces.get(time_step.observation, leaf.path))
    mask = time_step.action_mask
    if mask is not None:
        sizes = [size for leaf in spaces.leaves(spec.action_space) for size in spaces.choices(leaf.space)]
        got, expected = f"{mask.dtype}{list(mask.shape)}", f"bool{[B, sum(sizes)]}"
        _require(got == expected, f"action_mask is {got}, expected {expected}")
        for slot, part in enumerate(np.split(mask, np.cumsum(sizes)[:-1], axis=1)):
            _require(
                part.any(1).all(), f"action_mask allows nothing in slot {slot}; allow all where nothing is ruled out"
            )


def _check_text(leaf: spaces.Leaf, value: np.ndarray) -> None:
    for row in value:
        text = row.tobytes().rstrip(b"\0")
        _require(b"\0" not in text, f"part {leaf.name!r} has zeros inside {text!r}, expected them only behind the text")
        strange = set(text.decode()) - set(leaf.space.character_set)
        _require(not strange, f"part {leaf.name!r} has the characters {sorted(strange)}, which its space does not")


def _check_reset(time_step: TimeStep) -> None:
    _require(time_step.first.all(), f"first is {time_step.first}, expected all true")
    _require((time_step.reward == 0).all(), f"the reward is {time_step.reward}, expected zeros")
    _require(not time_step.last.any(), "an episode ended at its first observation")


def _check_firsts(run: list[TimeStep]) -> None:
    for t, (before, after) in enumerate(itertools.pairwise(run), start=1):
        ended, first = before.last, after.first
        _require(
            (first == ended).all(), f"first is {first} at step {t}, expected it where an episode had ended: {ended}"
        )
        _require(
            (after.reward[first] == 0).all(), f"the reward is {after.reward[first]} where first is true, expected 0"
        )
        _require(not after.last[first].any(), f"an episode ended at its first observation, at step {t}")


def _check_ignored_action(environment: Environment, key: Array, run: list[TimeStep], choose: Choose) -> None:
    spec = environment.spec
    ends = [t for t, time_step in enumerate(run) if time_step.last.any()]
    _require(ends, f"no episode ended in {len(run) - 1} steps under a time limit of {SHORT_LIMIT}")
    rows, after = run[ends[0]].last, []
    for edge in ("low", "high"):
        ignored = _edge(spec.action_space, spec.batch_size, edge)
        again = _run(environment, key, ends[0] + 1, _but_at(ends[0], ignored, choose))
        after.append(jax.tree.map(lambda leaf: leaf[rows], again[-1]))
    different = _differing(*after)
    _require(
        not different,
        f"after the end of an episode two different actions gave a different {different}: ignore the action and reset",
    )


def _check_limit(run: list[TimeStep], limit: int, exact: bool) -> None:
    elapsed = np.zeros(run[0].first.shape, int)
    for time_step in run[1:]:
        elapsed = np.where(time_step.first, 0, elapsed + 1)
        _require((elapsed <= limit).all(), f"an episode has {elapsed.max()} steps, expected at most {limit}")
        _require(
            time_step.truncated[elapsed == limit].all(), f"an episode of {limit} steps, the limit, was not truncated"
        )
        if exact:
            early = time_step.truncated & (elapsed < limit)
            _require(not early.any(), f"an episode was truncated after {elapsed[early]} steps, expected {limit}")


def _check_same(run: list[TimeStep], again: list[TimeStep], what: str) -> None:
    for t, (one, other) in enumerate(zip(run, again, strict=True)):
        different = _differing(one, other)
        _require(not different, f"{what} gave a different {different} at step {t}")


def _check_rows(environment: Environment, key: Array, other: Array, steps: int, choose: Choose) -> None:
    # All rows act alike; a row that only follows its key differs where another key makes a difference.
    def alike(t: int, time_step: TimeStep) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[:1].repeat(environment.spec.batch_size, 0), choose(t, time_step))

    one, two = (
        jax.tree.map(lambda *leaves: np.stack(leaves, 1), *_run(environment, k, steps, alike)) for k in (key, other)
    )
    random = _differing(jax.tree.map(lambda leaf: leaf[0], one), jax.tree.map(lambda leaf: leaf[0], two))
    first_row = jax.tree.map(lambda leaf: leaf[:1].repeat(len(leaf), 0), one)
    _require(
        not random or _differing(one, first_row),
        f"all rows are alike although another key gives another {random}: give each row its own seed",
    )


def _check_stale(environment: Environment, seed: int) -> None:
    action = _edge(environment.spec.action_space, environment.spec.batch_size, "low")
    before_reset, _ = environment.reset(jax.random.key(seed))
    state, _ = environment.reset(jax.random.key(seed))
    later, _ = environment.step(state, action)
    for stale, what in ((before_reset, "from before a reset"), (state, "used before")):
        try:
            environment.step(stale, action)
        except StaleStateError:
            continue
        raise _BrokenError(f"a state {what} was accepted, expected StaleStateError")
    environment.step(later, action)


def _check_pure(environment: Environment, seed: int) -> None:
    steps = SHORT_LIMIT + 2
    action = _edge(environment.spec.action_space, environment.spec.batch_size, "high")

    def rollout(key: Array) -> TimeStep:
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
        different = _differing(_copy(unjitted), _copy(result), tolerance=1e-3)
        _require(not different, f"{what} gave a different {different} than calling step after step")


def _differing(one: TimeStep, other: TimeStep, tolerance: float = 0.0) -> str:
    """Names of the fields in which two time steps differ, joined by commas; empty where they are the same."""

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        if tolerance and np.issubdtype(a.dtype, np.floating):
            return np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        return np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating))

    names = [
        name for name in one._fields if not jax.tree.all(jax.tree.map(same, getattr(one, name), getattr(other, name)))
    ]
    return ", ".join(names)


def _edge(space: gymnasium.Space, batch_size: int, edge: str) -> PyTree:
    """A batch of the smallest or the largest actions; 3 stands for an unbounded side."""
    values: list[np.ndarray] = []
    for _, leaf in spaces.leaves(space):
        struct = spaces.leaf_shape_dtype(leaf)
        if isinstance(leaf, gymnasium.spaces.Box):
            value = np.clip(getattr(leaf, edge), -3, 3) if edge == "low" else np.clip(leaf.high, -3, 3)
            value = np.where(np.isfinite(getattr(leaf, edge)), getattr(leaf, edge), value)
        else:
            sizes = np.reshape(spaces.choices(leaf), struct.shape)
            value = spaces.start(leaf) + (np.zeros_like(sizes) if edge == "low" else sizes - 1)
        values.append(np.broadcast_to(value, (batch_size, *struct.shape)).astype(struct.dtype))
    return spaces.unflatten(space, values)

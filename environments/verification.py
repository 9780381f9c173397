"""Tries one environment: what the line of the catalog about it says was seen here."""

from __future__ import annotations

import dataclasses
import re
import time
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import Environment
from ldm_jax.types import PyTree, TimeStep

from . import registry
from .catalog import entries, taxonomy

STEPS = 100
_MAX_REASON_CHARS = 240
_WARM_UP = 2  # steps; compilation is no part of the rate


def verify_id(id: str, seed: int = 0) -> entries.Entry:
    """Makes one environment, resets it, steps it 100 times at random, and resets it again; checks all that it returns.

    Whatever goes wrong becomes the reason. What the catalog says of the id so far makes no difference.

    Args:
      id: `library/<the library's own id>`.
      seed: of the keys and the actions.
    """
    environment: Environment | None = None
    try:
        environment = registry.make_candidate(id)
        rate = _run(environment, seed)
    except Exception as error:  # the libraries may raise whatever they like
        return entry(id, environment, reason=reason_of(error))
    finally:
        if environment is not None:
            environment.close()
    return entry(id, environment, steps_per_s=rate)


def entry(
    id: str, environment: Environment | None = None, *, reason: str = "", steps_per_s: float = 0.0
) -> entries.Entry:
    """The line about an id, from what is known of it.

    Args:
      id: the id.
      environment: if it could be made.
      reason: why it does not work; empty if it does.
      steps_per_s: of one environment.
    """
    library, _, name = id.partition("/")
    spec = None if environment is None else environment.spec
    return entries.Entry(
        id=id,
        library=library,
        version=registry.version(library) if spec is None else spec.version,
        task=taxonomy.task(library, name),
        family=taxonomy.family(library, name),
        domain=registry.domain(library, name) if spec is None else spec.domain,
        observation_space=None if spec is None else spaces.to_json(spec.observation_space),
        action_space=None if spec is None else spaces.to_json(spec.action_space),
        time_limit=0 if spec is None else spec.time_limit,
        group=registry.group(library),
        verified=not reason,
        reason=reason,
        steps_per_s=float(f"{steps_per_s:.3g}"),
    )


def name_anew(line: entries.Entry) -> entries.Entry:
    """A line with what rules say taken from the rules of today; what was seen stays."""
    return dataclasses.replace(
        line,
        task=taxonomy.task(line.library, line.name),
        family=taxonomy.family(line.library, line.name),
        domain=registry.domain(line.library, line.name) or line.domain,
        group=registry.group(line.library),
        reason=reason_of(line.reason) if line.reason else "",
    )


def reason_of(error: BaseException | str) -> str:
    """The last words of an error in one short line, without folders of this machine."""
    text = error if isinstance(error, str) else (str(error) or type(error).__name__)
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["no words"]
    frames = [i for i, line in enumerate(lines) if re.search(r"line \d+, in ", line)]
    if frames:  # of a traceback, the error itself: it stands on the first line behind the frames that is not indented
        lines = [line for line in lines[frames[-1] + 1 :] if not line.startswith(" ")] or lines
    text = re.sub(r"(?<![:/\w])(/[\w.+-]+)+/", "", lines[0].strip())
    text = re.sub(r" \(fault \d+ since the reset.*$", "", text)
    text = re.sub(r"^(.*\bhang: [^;]*); its log ends: .*$", r"\1", text)  # they are of something else, long before
    text = re.sub(r"^\S+(?= declares spaces)", "it", text)
    text = re.sub(r"^\S+ cannot be made: |^\S+, step \d+ after the reset(, rows \[0\])?: ", "", text)
    return text if len(text) <= _MAX_REASON_CHARS else text[: _MAX_REASON_CHARS - 4] + " ..."


def _run(environment: Environment, seed: int) -> float:
    """Steps per second of the checked run."""
    keys = jax.random.split(jax.random.key(seed))
    reset, step = environment.reset, environment.step
    if environment.spec.jittable:
        reset, step = jax.jit(reset), jax.jit(step)
    state, time_step = reset(keys[0])
    _check(environment, time_step, first=True)
    generator = np.random.default_rng(seed)
    spent_s, previous = 0.0, time_step
    for t in range(STEPS):
        action = random_action(environment.spec.action_space, generator, time_step.action_mask)
        start = time.perf_counter()
        state, time_step = step(state, action)
        time_step = jax.tree.map(np.asarray, time_step)  # waits for what is computed
        if t >= _WARM_UP:
            spent_s += time.perf_counter() - start
        _check(environment, time_step, first=bool(previous.last[0]))
        previous = time_step
    _, time_step = reset(keys[1])
    _check(environment, time_step, first=True)
    return (STEPS - _WARM_UP) / max(spent_s, 1e-9)


def random_action(space: gymnasium.Space, generator: np.random.Generator, mask: typing.Any = None) -> PyTree:
    """A random action of one row.

    Args:
      space: the action space.
      generator: of randomness.
      mask: `bool [1, M]`, the choices allowed, or None.

    Returns:
      Follows the space with a leading 1.
    """
    allowed = None if mask is None else np.asarray(mask)[0]
    values, place = [], 0
    for leaf in spaces.leaves(space):
        struct = spaces.leaf_shape_dtype(leaf.space)
        if sizes := spaces.choices(leaf.space):
            chosen = []
            for size in sizes:
                possible = np.arange(size) if allowed is None else np.flatnonzero(allowed[place : place + size])
                chosen.append(generator.choice(possible))
                place += size
            value = np.reshape(chosen, struct.shape) + spaces.first_value(leaf.space)
        else:
            assert isinstance(leaf.space, gymnasium.spaces.Box)
            low, high = spaces.bounds(leaf.space)
            bounded = np.isfinite(low) & np.isfinite(high)
            uniform = generator.uniform(np.where(bounded, low, -1), np.where(bounded, high, 1))
            value = np.where(bounded, uniform, np.clip(generator.normal(size=low.shape), low, high))
        values.append(np.asarray(value, struct.dtype)[None])
    return spaces.unflatten(space, values)


def _check(environment: Environment, time_step: TimeStep, *, first: bool) -> None:
    """Raises a SpaceError or ValueError where a time step is not as the spec and the contract say."""
    spaces.check(environment.spec.observation_space, time_step.observation, 1, "the observation")
    reward = np.asarray(time_step.reward)
    if reward.shape != (1,) or not np.isfinite(reward).all():
        raise ValueError(f"the reward is {reward}, expected one finite number")
    if bool(time_step.first[0]) != first:
        raise ValueError(f"first is {bool(time_step.first[0])}, expected {first}")

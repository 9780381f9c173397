"""The laws of one spec and of the time steps of one run, which the conformance kit puts together."""

from __future__ import annotations

import itertools
import math
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax import spaces
from ldm_jax.environment import Environment
from ldm_jax.types import PyTree, TimeStep

_SAMPLES = (64, 4096)  # of an action space, fewer of a large one
_MAX_NUMBERS = 1 << 22  # in all samples of one space
_CELLS = 8
_DEVIATIONS = 6.0


class BrokenError(Exception):
    """What is wrong, before it is known of which environment and law."""


def require(condition: typing.Any, text: str) -> None:
    """Raises `BrokenError` where a condition does not hold."""
    if not condition:
        raise BrokenError(text)


def check_spec(environment: Environment, batch_size: int, time_limit: int | None) -> None:
    """Checks what is known before stepping: what was asked for, and spaces that can be carried."""
    require(isinstance(environment, Environment), f"{type(environment).__name__} lacks spec, reset, step or close")
    spec = environment.spec
    require(spec.batch_size == batch_size, f"batch_size is {spec.batch_size}, expected {batch_size} as asked for")
    if time_limit is not None:
        require(spec.time_limit == time_limit, f"time_limit is {spec.time_limit}, expected {time_limit} as asked for")
    for what in ("version", "domain"):
        require(isinstance(getattr(spec, what), str) and getattr(spec, what), f"{what} is {getattr(spec, what)!r}")
    for space in (spec.observation_space, spec.action_space):
        for leaf in spaces.leaves(space):
            if isinstance(leaf.space, gymnasium.spaces.Box):
                _check_box(leaf)
    for leaf in spaces.leaves(spec.action_space):
        require(not isinstance(leaf.space, gymnasium.spaces.Text), "actions cannot be Text")


def _check_box(leaf: spaces.Leaf) -> None:
    low, high = leaf.space.low, leaf.space.high
    require((low <= high).all(), f"part {leaf.name!r}, {leaf.space}, has a low above its high, or NaN")
    if np.issubdtype(leaf.space.dtype, np.floating):
        lax = np.isfinite(low) & np.isinf(spaces.bounds(leaf.space)[0])
        lax |= np.isfinite(high) & np.isinf(spaces.bounds(leaf.space)[1])
        require(not lax.any(), f"part {leaf.name!r}, {leaf.space}, has bounds so wide that they count as none: say inf")


def check_sampling(space: gymnasium.Space, seed: int) -> None:
    """Checks that random actions are spread evenly over the space, as the random policy must be.

    A component with bounds falls into cells of its range as often as they are large, up to six standard deviations of
    chance; one without bounds on a side is finite, on its side of the other bound, and not always the same.
    """
    size = sum(math.prod(spaces.leaf_shape_dtype(leaf.space).shape) for leaf in spaces.leaves(space))
    count = int(np.clip(_MAX_NUMBERS // max(size, 1), *_SAMPLES))
    tree = jax.jit(lambda key: spaces.sample(key, space, count))(jax.random.key(seed))
    for leaf in spaces.leaves(space):
        value = np.asarray(spaces.get(tree, leaf.path)).reshape(count, -1).astype(np.float64)
        what = f"samples of part {leaf.name!r}, {leaf.space},"
        require(np.isfinite(value).all(), f"{what} are not finite")
        if sizes := spaces.choices(leaf.space):
            low = np.ravel(spaces.first_value(leaf.space)) + np.zeros(len(sizes))
            _check_even(value - low, np.array(sizes), whole=True, what=what)
            continue
        low, high = (side.ravel() for side in spaces.bounds(leaf.space))
        require(((value >= low) & (value <= high)).all(), f"{what} are outside their bounds")
        bounded = np.isfinite(low) & np.isfinite(high)
        require((np.ptp(value[:, ~bounded], 0) > 0).all(), f"{what} are always the same")
        whole = not np.issubdtype(leaf.space.dtype, np.floating)
        low, width = low[bounded], (high - low)[bounded] + whole
        _check_even(value[:, bounded] - low, width, whole=whole, what=what)


def _check_even(value: np.ndarray, width: np.ndarray, *, whole: bool, what: str) -> None:
    """Checks that numbers `[N, components]` are uniform from 0 to their widths, or below them where they are whole."""
    if whole:
        cells = np.minimum(width, _CELLS)
        cell = np.floor(value * (cells / width))
        edges = np.ceil(np.arange(_CELLS + 1)[:, None] * (width / cells))
        share = np.diff(np.minimum(edges, width), axis=0) / width
    else:
        value, width = value[:, width > 0], width[width > 0]  # without ranges of one number
        cell = np.minimum(np.floor(value * (_CELLS / width)), _CELLS - 1)
        share = np.full((_CELLS, len(width)), 1 / _CELLS)
    expected = share * len(value)
    found = (cell == np.arange(_CELLS)[:, None, None]).sum(1)
    uneven = abs(found - expected) > _DEVIATIONS * np.sqrt(expected * (1 - share)) + 1e-9
    if uneven.any():
        i, component = np.argwhere(uneven)[0]
        raise BrokenError(
            f"{what} are not uniform: {found[i, component]} of {len(value)} fall into piece {i} of component "
            f"{component}, expected about {expected[i, component]:.0f}"
        )


def check_types(environment: Environment, time_step: TimeStep) -> None:
    """Checks shapes, dtypes and values of one time step."""
    spec = environment.spec
    B = spec.batch_size
    for name, dtype in (("reward", np.float32), ("terminated", bool), ("truncated", bool), ("first", bool)):
        value = getattr(time_step, name)
        got, expected = f"{value.dtype}{list(value.shape)}", f"{np.dtype(dtype)}[{B}]"
        require(got == expected, f"{name} is {got}, expected {expected}")
    require(np.isfinite(time_step.reward).all(), f"the reward is {time_step.reward}, expected finite numbers")
    try:
        spaces.check(spec.observation_space, time_step.observation, B, "the observation")
    except spaces.SpaceError as error:
        raise BrokenError(str(error)) from error
    structure = jax.tree.structure(spaces.zeros(spec.observation_space, (B,)))
    require(
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
        require(got == expected, f"action_mask is {got}, expected {expected}")
        for slot, part in enumerate(np.split(mask, np.cumsum(sizes)[:-1], axis=1)):
            require(
                part.any(1).all(), f"action_mask allows nothing in slot {slot}; allow all where nothing is ruled out"
            )


def _check_text(leaf: spaces.Leaf, value: np.ndarray) -> None:
    for row in value:
        text = row.tobytes().rstrip(b"\0")
        require(b"\0" not in text, f"part {leaf.name!r} has zeros inside {text!r}, expected them only behind the text")
        strange = set(text.decode()) - set(leaf.space.character_set)
        require(not strange, f"part {leaf.name!r} has the characters {sorted(strange)}, which its space does not")


def check_labels(environment: Environment, time_step: TimeStep) -> None:
    """Checks that a time step has labels, each in the action space and allowed, and none where an episode has ended."""
    space, B, label = environment.spec.action_space, environment.spec.batch_size, time_step.expert
    if label is None:
        raise BrokenError("the time step has no labels, though the environment was made with an expert")
    valid = np.asarray(label.valid)
    require(
        valid.dtype == bool and valid.shape == (B,), f"valid is {valid.dtype}{list(valid.shape)}, expected bool[{B}]"
    )
    require(not (valid & time_step.last).any(), "a label is valid at the end of an episode, whose action is ignored")
    start = 0
    for leaf in spaces.leaves(space):
        struct, value = spaces.leaf_shape_dtype(leaf.space), np.asarray(spaces.get(label.action, leaf.path))
        got, expected = f"{value.dtype}{list(value.shape)}", f"{np.dtype(struct.dtype)}{[B, *struct.shape]}"
        require(got == expected, f"part {leaf.name!r} of the labels is {got}, expected {expected}")
        flat = value[valid].reshape(int(valid.sum()), math.prod(struct.shape))
        if not (sizes := spaces.choices(leaf.space)):
            low, high = (np.broadcast_to(side, struct.shape).ravel() for side in spaces.bounds(leaf.space))
            require(((flat >= low) & (flat <= high)).all(), f"part {leaf.name!r} of a label is outside {leaf.space}")
            continue
        index = flat.astype(np.int64) - np.ravel(spaces.first_value(leaf.space))
        require(((index >= 0) & (index < sizes)).all(), f"part {leaf.name!r} of a label is outside {leaf.space}")
        if time_step.action_mask is not None:
            chosen = np.take_along_axis(time_step.action_mask[valid], index + start + np.cumsum([0, *sizes[:-1]]), 1)
            require(chosen.all(), f"part {leaf.name!r} of a label is not allowed by the action mask")
        start += sum(sizes)


def check_reset(time_step: TimeStep) -> None:
    """Checks that all rows of a time step start an episode."""
    require(time_step.first.all(), f"first is {time_step.first}, expected all true")
    require((time_step.reward == 0).all(), f"the reward is {time_step.reward}, expected zeros")
    require(not time_step.last.any(), "an episode ended at its first observation")


def check_firsts(run: list[TimeStep]) -> None:
    """Checks that `first` follows every end and nothing else."""
    for t, (before, after) in enumerate(itertools.pairwise(run), start=1):
        ended, first = before.last, after.first
        require(
            (first == ended).all(), f"first is {first} at step {t}, expected it where an episode had ended: {ended}"
        )
        require(
            (after.reward[first] == 0).all(), f"the reward is {after.reward[first]} where first is true, expected 0"
        )
        require(not after.last[first].any(), f"an episode ended at its first observation, at step {t}")


def check_limit(run: list[TimeStep], limit: int, *, exact: bool) -> None:
    """Checks that episodes are truncated at the limit, and no later; where `exact`, no earlier either."""
    elapsed = np.zeros(run[0].first.shape, int)
    for time_step in run[1:]:
        elapsed = np.where(time_step.first, 0, elapsed + 1)
        require((elapsed <= limit).all(), f"an episode has {elapsed.max()} steps, expected at most {limit}")
        require(
            time_step.truncated[elapsed == limit].all(), f"an episode of {limit} steps, the limit, was not truncated"
        )
        if exact:
            early = time_step.truncated & (elapsed < limit)
            require(not early.any(), f"an episode was truncated after {elapsed[early]} steps, expected {limit}")


def check_same(run: list[TimeStep], again: list[TimeStep], what: str) -> None:
    """Checks that two runs are the same in every number."""
    for t, (one, other) in enumerate(zip(run, again, strict=True)):
        different = differing(one, other)
        require(not different, f"{what} gave a different {different} at step {t}")


def differing(one: TimeStep, other: TimeStep, tolerance: float = 0.0) -> str:
    """Names of the fields in which two time steps differ, joined by commas; empty where they are the same."""

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        if tolerance and np.issubdtype(a.dtype, np.floating):
            return np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        return np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating))

    names = [
        name for name in one._fields if not jax.tree.all(jax.tree.map(same, getattr(one, name), getattr(other, name)))
    ]
    return ", ".join(names)


def edge_actions(space: gymnasium.Space, batch_size: int, edge: str) -> PyTree:
    """A batch of the smallest or the largest actions; 3 stands for an unbounded side."""
    values: list[np.ndarray] = []
    for _, leaf in spaces.leaves(space):
        struct = spaces.leaf_shape_dtype(leaf)
        if isinstance(leaf, gymnasium.spaces.Box):
            value = np.clip(getattr(leaf, edge), -3, 3) if edge == "low" else np.clip(leaf.high, -3, 3)
            value = np.where(np.isfinite(getattr(leaf, edge)), getattr(leaf, edge), value)
        else:
            sizes = np.reshape(spaces.choices(leaf), struct.shape)
            value = spaces.first_value(leaf) + (np.zeros_like(sizes) if edge == "low" else sizes - 1)
        values.append(np.broadcast_to(value, (batch_size, *struct.shape)).astype(struct.dtype))
    return spaces.unflatten(space, values)

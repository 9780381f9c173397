"""How values of a space are carried, as arrays of at most 32 bits: their shapes, dtypes, bounds and checks.

That is what JAX computes with: categories exactly or not at all, whole numbers exactly where their bounds fit into 32
bits, all other numbers to the precision of float32, a relative error of 6e-8. `leaf_shape_dtype` is that rule, and
`check_supported` says of a whole space whether it can be carried so.
"""

from __future__ import annotations

import gymnasium
import jax
import numpy as np
from gymnasium import spaces

from ldm_jax.spaces.structure import SpaceError, choices, first_value, get, leaves, text_bytes, unflatten
from ldm_jax.types import Array, PyTree

UNBOUNDED = 1e30
"""Bounds from here on count as infinite: some libraries write 3.4e38 where they mean it. Every other is a bound."""


def leaf_shape_dtype(space: gymnasium.Space) -> jax.ShapeDtypeStruct:
    """Shape and dtype in which time steps and actions carry one value of a leaf space.

    A Box of float64 is carried as float32; one of int64 or uint64 as int32 where its bounds fit, as float32 elsewhere;
    one of bool as uint8; every other in its own dtype.

    Raises:
      SpaceError: a space whose values cannot be carried, or that is no leaf.
    """
    if isinstance(space, spaces.Box):
        return jax.ShapeDtypeStruct(space.shape, _carried_dtype(space))
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
        first, count = np.asarray(space.start, np.float64), np.asarray(sizes, np.float64)
        if not _fit_int32(first, first + count - 1):
            raise SpaceError(f"got {space}, expected categories within int32; count them from 0 in the adapter")
        return jax.ShapeDtypeStruct(space.shape, np.int32)
    if isinstance(space, spaces.MultiBinary):
        return jax.ShapeDtypeStruct(space.shape, np.int8)
    if isinstance(space, spaces.Text):
        return jax.ShapeDtypeStruct((text_bytes(space),), np.uint8)
    raise SpaceError(f"got {space}, expected a leaf")


def _carried_dtype(space: spaces.Box) -> np.dtype:
    own = np.dtype(space.dtype)
    if own == np.bool_:
        return np.dtype(np.uint8)
    if own.itemsize <= 4:
        return own
    whole = not np.issubdtype(own, np.floating) and space.low.size > 0
    return np.dtype(np.int32 if whole and _fit_int32(space.low, space.high) else np.float32)


def _fit_int32(low: np.ndarray, high: np.ndarray) -> bool:
    return bool((low >= -(2.0**31)).all() and (high < 2.0**31).all())


def check_supported(space: gymnasium.Space, what: str) -> None:
    """Checks that a space can be carried here; every environment's are checked so when it is made.

    Args:
      space: of observations or of actions.
      what: whose it is, for the error ("the action space of gymnasium/Far-v0").

    Raises:
      SpaceError: names the part, and what to do in the adapter.
    """
    for leaf in leaves(space):
        try:
            leaf_shape_dtype(leaf.space)
        except SpaceError as error:
            raise SpaceError(f"{what}, part {leaf.name!r}: {error}") from error
        if not isinstance(leaf.space, spaces.Box):
            continue
        low, high = bounds(leaf.space)
        if not ((low <= high) & (low < UNBOUNDED) & (high > -UNBOUNDED)).all():
            raise SpaceError(
                f"{what}, part {leaf.name!r}, is bounded by NaN, by a low above its high, or to more than "
                f"{UNBOUNDED:g}, expected low <= high: mend {leaf.space} in the adapter"
            )


def carried_box(space: spaces.Box, *, inward: bool) -> spaces.Box:
    """A Box in the dtype that its values are carried in, infinite where its bounds count so.

    Args:
      space: what a library declares.
      inward: float64 bounds are rounded to the float32 next to them inside the Box, so that whatever lies within the
        result lies within the Box: for actions. Otherwise to the nearest, as the values are: for observations.

    Returns:
      The Box. Where no float32 lies between two bounds, both become the one beside them that is nearer to 0.
    """
    dtype = _carried_dtype(space)
    if not np.issubdtype(dtype, np.floating):
        return spaces.Box(space.low.astype(dtype), space.high.astype(dtype), space.shape, dtype.type)
    low, high = _round_inward(*bounds(space)) if inward else bounds(space)
    with np.errstate(over="ignore"):
        return spaces.Box(low.astype(dtype), high.astype(dtype), space.shape, dtype.type)


def _round_inward(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outermost float32 between two float64 bounds."""
    low_32, high_32 = _round_up(low), -_round_up(-high)
    nearer = np.where(np.abs(low_32) < np.abs(high_32), low_32, high_32)
    empty = low_32 > high_32
    return np.where(empty, nearer, low_32), np.where(empty, nearer, high_32)


def _round_up(value: np.ndarray) -> np.ndarray:
    """The lowest float32 at or above a float64, leaving out those next to 0, which XLA takes for 0."""
    tiny = np.finfo(np.float32).tiny
    with np.errstate(over="ignore", under="ignore"):
        nearest = value.astype(np.float32)
    above = np.where(nearest < value, np.nextafter(nearest, np.float32(np.inf)), nearest)
    return np.where(np.abs(value) < tiny, np.where(value > 0, tiny, np.float32(0)), above)


def zeros(space: gymnasium.Space, batch_shape: tuple[int, ...]) -> PyTree:
    """NumPy zeros in the structure of the space, each leaf `[*batch_shape, ...]` in its own dtype."""
    structs = [leaf_shape_dtype(leaf.space) for leaf in leaves(space)]
    return unflatten(space, [np.zeros(batch_shape + struct.shape, struct.dtype) for struct in structs])


def bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """`float64` low and high of a Box in its shape, infinite from `UNBOUNDED` on.

    The ends of a 64-bit integer type count as infinite too: Gymnasium writes infinity so.
    """
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    far = float(np.iinfo(space.dtype).max) if space.dtype in (np.int64, np.uint64) else UNBOUNDED
    return np.where(low <= -far, -np.inf, low), np.where(high >= far, np.inf, high)


def clip(space: gymnasium.Space, tree: PyTree) -> PyTree:
    """Clips the Box leaves of a batch to their bounds, which they never leave by rounding; other leaves pass.

    NumPy in, NumPy out; JAX in, JAX out.
    """
    pairs = ((leaf.space, get(tree, leaf.path)) for leaf in leaves(space))
    return unflatten(space, [clip_box(leaf, value) if isinstance(leaf, spaces.Box) else value for leaf, value in pairs])


def clip_box(space: spaces.Box, value: Array) -> Array:
    """Values `[..., *shape]`, whole numbers or not, clipped to a Box and in the dtype that it is carried in."""
    xp = value.__array_namespace__()
    dtype = _carried_dtype(space)
    if np.issubdtype(value.dtype, np.floating) or np.issubdtype(dtype, np.floating):
        low, high = _round_inward(space.low.astype(np.float64), space.high.astype(np.float64))
        with np.errstate(over="ignore"):  # of what has no bounds, in float16
            value = xp.clip(value.astype(np.float32), low, high).astype(dtype)
    if np.issubdtype(dtype, np.floating):
        return value
    # For real numbers too: between two of the largest whole numbers there may be no float32.
    return xp.clip(value, space.low.astype(dtype), space.high.astype(dtype)).astype(dtype)


def check(space: gymnasium.Space, tree: PyTree, batch_size: int, what: str) -> int:
    """Checks a batch of concrete values against a space.

    Real libraries do return numbers outside the bounds they declare, so those are counted, not refused.

    Args:
      space: the space of one value.
      tree: a batch of them, each leaf `[batch_size, ...]`.
      batch_size: B.
      what: what the values are, for the error ("the observation of gymnax/CartPole-v1").

    Returns:
      The number of rows with a Box element outside its bounds.

    Raises:
      SpaceError: a missing part, a wrong shape or dtype, NaN, or a category that does not exist.
    """
    outside = np.zeros(batch_size, bool)
    for leaf in leaves(space):
        name, kind = leaf.name, leaf.space
        try:
            value = np.asarray(get(tree, leaf.path))
        except (KeyError, IndexError, TypeError) as error:
            raise SpaceError(f"{what} has no part {name!r}, expected by its space {space}") from error
        struct = leaf_shape_dtype(kind)
        expected = (batch_size, *struct.shape)
        if value.shape != expected or value.dtype != struct.dtype:
            raise SpaceError(
                f"{what}, part {name!r}, is {value.dtype}{list(value.shape)}, "
                f"expected {struct.dtype}{list(expected)} by its space {kind}"
            )
        if np.issubdtype(value.dtype, np.floating) and np.isnan(value).any():
            rows = np.flatnonzero(np.isnan(value).reshape(batch_size, -1).any(1))
            raise SpaceError(f"{what}, part {name!r}, is NaN in rows {rows[:8].tolist()}")
        if isinstance(kind, spaces.Box):
            with np.errstate(over="ignore"):  # rounded as the values are
                low, high = (side.astype(struct.dtype) for side in (kind.low, kind.high))
            outside |= ((value < low) | (value > high)).reshape(batch_size, -1).any(1)
        elif sizes := choices(kind):
            index = (value - first_value(kind)).reshape(batch_size, -1)
            if ((index < 0) | (index >= np.array(sizes))).any():
                raise SpaceError(f"{what}, part {name!r}, has the value {value.min()} or {value.max()}, outside {kind}")
    return int(outside.sum())

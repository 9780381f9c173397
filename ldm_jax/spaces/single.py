"""One value of a space as a plain Gymnasium environment gives and takes it, and the arrays of one row that carry it."""

from __future__ import annotations

import typing

import gymnasium
import numpy as np
from gymnasium import spaces

from ldm_jax.spaces.structure import SpaceError, get, leaves, sorted_keys, unflatten
from ldm_jax.spaces.values import check, leaf_shape_dtype
from ldm_jax.types import PyTree


def from_gymnasium(space: gymnasium.Space, value: typing.Any, what: str) -> PyTree:
    """Brings one value to the arrays that carry it, with an axis of one row in front.

    Args:
      space: of the value.
      value: what `reset` or `step` of a Gymnasium environment returned; text is `str`, parts may be lists and numbers.
      what: whose it is, for the error ("the observation of Mine-v0").

    Returns:
      Each leaf `[1, ...]`, as in a `TimeStep`.

    Raises:
      SpaceError: names the part that is missing, of another shape or kind, NaN, or a category that does not exist.
    """
    carried = []
    for leaf in leaves(space):
        try:
            part = get(value, leaf.path)
        except (KeyError, IndexError, TypeError) as error:
            raise SpaceError(f"{what} has no part {leaf.name!r}, expected by its space {space}") from error
        carried.append(_carry(leaf.space, part, f"{what}, part {leaf.name!r},")[None])
    tree = unflatten(space, carried)
    check(space, tree, 1, what)
    return tree


def _carry(space: gymnasium.Space, value: typing.Any, what: str) -> np.ndarray:
    struct = leaf_shape_dtype(space)
    if isinstance(space, spaces.Text):
        text = np.frombuffer(str(value).encode(), np.uint8)
        if len(text) > struct.shape[0]:
            raise SpaceError(f"{what} has {len(text)} bytes, expected at most {struct.shape[0]} by its space {space}")
        return np.concatenate([text, np.zeros(struct.shape[0] - len(text), np.uint8)])
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise SpaceError(f"{what} is of type {array.dtype}, expected numbers by its space {space}")
    if array.shape != struct.shape:
        if array.size != 1 or struct.shape not in ((), (1,)):  # single numbers come with an axis and without
            raise SpaceError(
                f"{what} has shape {list(array.shape)}, expected {list(struct.shape)} by its space {space}"
            )
        array = array.reshape(struct.shape)
    if np.issubdtype(struct.dtype, np.integer) and array.dtype != struct.dtype:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise SpaceError(f"{what} is not finite, expected whole numbers by its space {space}")
        limits = np.iinfo(struct.dtype)
        array = np.clip(array, limits.min, limits.max)
    with np.errstate(over="ignore"):
        return array.astype(struct.dtype)


def to_gymnasium(space: gymnasium.Space, tree: PyTree) -> typing.Any:
    """Brings a batch of one action to what `step` of a Gymnasium environment takes.

    Args:
      space: the environment's own action space, which says the types.
      tree: each leaf `[1, ...]`.

    Returns:
      The action: NumPy's numbers and arrays, in the types that `space.sample()` gives.
    """
    if isinstance(space, spaces.Dict):
        sorted_keys(space)  # says which key is no text
        return {key: to_gymnasium(child, tree[key]) for key, child in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(to_gymnasium(child, part) for child, part in zip(space, tree, strict=True))
    value = np.asarray(tree)[0]
    if isinstance(space, spaces.Discrete):
        return np.dtype(space.dtype).type(value)
    return np.array(value, space.dtype).reshape(space.shape)

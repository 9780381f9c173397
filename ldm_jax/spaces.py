"""Gymnasium spaces as data: their leaves in canonical order, checks, clipping, sampling under jit, and JSON.

The canonical order of a nested space is that of its leaves, `Dict` by sorted key and `Tuple` by position. Everything
that concatenates or numbers parts of an observation or action does so in this order.
"""

from __future__ import annotations

import math
import typing
import urllib.parse

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from ldm_jax.errors import LdmError
from ldm_jax.types import Array, PyTree

UNBOUNDED = 1e6
"""Bounds beyond this count as unbounded: some libraries write 3.4e38 where they mean infinity."""


class SpaceError(LdmError, ValueError):
    """A space that is not supported, or a value that does not belong to its space."""


class Leaf(typing.NamedTuple):
    """A leaf of a nested space: the keys and positions that lead to it, and its space."""

    path: tuple[str | int, ...]
    space: typing.Any  # a gymnasium.Space; which kind decides what attributes it has

    @property
    def name(self) -> str:
        """The path as one word, `/` between keys; `value` for a space that is its own leaf.

        Each key is percent-encoded, so that different paths of a space have different names, which files can have too.
        """
        return "/".join(map(_word, self.path)) if self.path else "value"


def _word(key: str | int) -> str:
    word = urllib.parse.quote(str(key), safe="")
    # A key without characters, and folders' own names.
    return "%" if not word else word.replace(".", "%2E") if not word.strip(".") else word


def leaves(space: gymnasium.Space) -> tuple[Leaf, ...]:
    """The leaves of a space in canonical order.

    Raises:
      SpaceError: a kind of space that is not supported.
    """
    if isinstance(space, spaces.Dict):
        if odd := [key for key in space if not isinstance(key, str)]:
            raise SpaceError(f"got a Dict space with the key {odd[0]!r}, expected text keys; rename it in the adapter")
        children: list[tuple[str | int, gymnasium.Space]] = [(key, space[key]) for key in sorted(space)]
    elif isinstance(space, spaces.Tuple):
        children = list(enumerate(space))
    # MissionSpace of MiniGrid and the like subclass a kind without being one: exact types only.
    elif type(space) in (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text):
        return (Leaf((), space),)
    else:
        raise SpaceError(
            f"got a space of kind {type(space).__name__}, expected Box, Discrete, MultiDiscrete, MultiBinary, Text, "
            "Dict or Tuple; convert it in the adapter"
        )
    return tuple(Leaf((key, *leaf.path), leaf.space) for key, child in children for leaf in leaves(child))


def get(tree: PyTree, path: tuple[str | int, ...]) -> typing.Any:
    """The part of `tree` that `path` leads to."""
    for key in path:
        tree = tree[key]
    return tree


def unflatten(space: gymnasium.Space, values: typing.Sequence[typing.Any]) -> PyTree:
    """Puts one value per leaf, in canonical order, into the structure of the space."""
    iterator = iter(values)

    def build(node):
        if isinstance(node, spaces.Dict):
            return {key: build(node[key]) for key in sorted(node)}
        if isinstance(node, spaces.Tuple):
            return tuple(build(child) for child in node)
        return next(iterator)

    return build(space)


def text_bytes(space: spaces.Text) -> int:
    """Bytes that hold any text of the space: its maximum length times the longest UTF-8 character of its set."""
    return space.max_length * max(len(character.encode()) for character in space.character_set)


def leaf_shape_dtype(space: gymnasium.Space) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one value of a leaf space, as time steps and actions carry it."""
    if isinstance(space, spaces.Box):
        return jax.ShapeDtypeStruct(space.shape, space.dtype)
    if isinstance(space, spaces.Discrete):
        return jax.ShapeDtypeStruct((), np.int32)
    if isinstance(space, spaces.MultiDiscrete):
        return jax.ShapeDtypeStruct(space.shape, np.int32)
    if isinstance(space, spaces.MultiBinary):
        return jax.ShapeDtypeStruct(space.shape, np.int8)
    if isinstance(space, spaces.Text):
        return jax.ShapeDtypeStruct((text_bytes(space),), np.uint8)
    raise SpaceError(f"got {space}, expected a leaf")


def zeros(space: gymnasium.Space, batch_shape: tuple[int, ...]) -> PyTree:
    """NumPy zeros in the structure of the space, each leaf `[*batch_shape, ...]` in its own dtype."""
    structs = [leaf_shape_dtype(leaf.space) for leaf in leaves(space)]
    return unflatten(space, [np.zeros(batch_shape + struct.shape, struct.dtype) for struct in structs])


def bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """`float64` low and high of a Box in its shape, infinite where they are beyond `UNBOUNDED`."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return np.where(low < -UNBOUNDED, -np.inf, low), np.where(high > UNBOUNDED, np.inf, high)


def choices(space: gymnasium.Space) -> tuple[int, ...]:
    """The number of choices of each categorical component of a leaf space; empty for Box and Text."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.ravel())
    if isinstance(space, spaces.MultiBinary):
        return (2,) * math.prod(space.shape)
    return ()


def start(space: gymnasium.Space) -> typing.Any:
    """The smallest value of a categorical leaf space (`Discrete.start`, `MultiDiscrete.start`, 0)."""
    return space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0


def clip(space: gymnasium.Space, tree: PyTree) -> PyTree:
    """Clips the Box leaves of a batch to their bounds; other leaves pass. NumPy in, NumPy out; JAX in, JAX out."""
    clipped = []
    for path, leaf in leaves(space):
        value = get(tree, path)
        if isinstance(leaf, spaces.Box):
            xp = jnp if isinstance(value, jax.Array) else np
            value = xp.clip(value, leaf.low, leaf.high).astype(leaf.dtype)
        clipped.append(value)
    return unflatten(space, clipped)


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
            outside |= ((value < kind.low) | (value > kind.high)).reshape(batch_size, -1).any(1)
        elif sizes := choices(kind):
            index = (value - start(kind)).reshape(batch_size, -1)
            if ((index < 0) | (index >= np.array(sizes))).any():
                raise SpaceError(f"{what}, part {name!r}, has the value {value.min()} or {value.max()}, outside {kind}")
    return int(outside.sum())


def sample(key: Array, space: gymnasium.Space, batch_size: int, action_mask: Array | None = None) -> PyTree:
    """Samples a batch uniformly, under jit too: the random policy.

    Unbounded sides of a Box follow Gymnasium: normal where both are unbounded, exponential where one is.

    Args:
      key: typed key.
      space: a space without Text.
      batch_size: B.
      action_mask: `bool [B, M]` over the categorical choices (see `TimeStep`), or None.

    Returns:
      The batch, each leaf `[B, ...]`.
    """
    values, offset = [], 0
    for path, leaf in leaves(space):
        key, leaf_key = jax.random.split(key)
        struct = leaf_shape_dtype(leaf)
        shape = (batch_size, *struct.shape)
        if isinstance(leaf, spaces.Box):
            values.append(_sample_box(leaf_key, leaf, shape))
        elif sizes := choices(leaf):
            columns = []
            for slot_key, size in zip(jax.random.split(leaf_key, len(sizes)), sizes, strict=True):
                if action_mask is None:
                    columns.append(jax.random.randint(slot_key, (batch_size,), 0, size))
                else:
                    logits = jnp.where(action_mask[:, offset : offset + size], 0.0, -jnp.inf)
                    columns.append(jax.random.categorical(slot_key, logits))
                offset += size
            index = jnp.stack(columns, -1).reshape(shape)
            values.append((index + start(leaf)).astype(struct.dtype))
        else:
            raise SpaceError(f"cannot sample the part {path} of kind {type(leaf).__name__}")
    return unflatten(space, values)


def _sample_box(key: Array, space: spaces.Box, shape: tuple[int, ...]) -> Array:
    low, high = bounds(space)
    if not np.issubdtype(space.dtype, np.floating):
        return jax.random.randint(key, shape, jnp.asarray(space.low), jnp.asarray(space.high) + 1).astype(space.dtype)
    bounded_low, bounded_high = np.isfinite(low), np.isfinite(high)
    finite_low, finite_high = np.where(bounded_low, low, 0.0), np.where(bounded_high, high, 0.0)
    uniform_key, normal_key, exponential_key = jax.random.split(key, 3)
    exponential = jax.random.exponential(exponential_key, shape)
    value = jax.random.normal(normal_key, shape)
    value = jnp.where(bounded_low, finite_low + exponential, value)
    value = jnp.where(bounded_high & ~bounded_low, finite_high - exponential, value)
    uniform = finite_low + jax.random.uniform(uniform_key, shape) * (finite_high - finite_low)
    return jnp.where(bounded_low & bounded_high, uniform, value).astype(space.dtype)


def to_json(space: gymnasium.Space) -> dict[str, typing.Any]:
    """Describes a space by JSON values; `from_json` is its inverse."""
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {key: to_json(space[key]) for key in sorted(space)}}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [to_json(child) for child in space]}
    if isinstance(space, spaces.Box):
        low, high = _bounds_to_json(space.low), _bounds_to_json(space.high)
        return {"kind": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Text):
        charset = "".join(sorted(space.character_set))
        return {"kind": "Text", "min_length": space.min_length, "max_length": space.max_length, "charset": charset}
    raise SpaceError(f"got {space}, which has no description in JSON")


def from_json(description: dict[str, typing.Any]) -> gymnasium.Space:
    """Rebuilds a space from what `to_json` wrote.

    Raises:
      SpaceError: an unknown kind.
    """
    kind = description["kind"]
    if kind == "Dict":
        return spaces.Dict({key: from_json(child) for key, child in description["spaces"].items()})
    if kind == "Tuple":
        return spaces.Tuple([from_json(child) for child in description["spaces"]])
    if kind == "Box":
        shape, dtype = tuple(description["shape"]), np.dtype(description["dtype"])
        low, high = (_bounds_from_json(description[side], shape, dtype) for side in ("low", "high"))
        return spaces.Box(low, high, shape, dtype)
    if kind == "Discrete":
        return spaces.Discrete(description["n"], start=description["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.array(description["nvec"]), start=np.array(description["start"]))
    if kind == "MultiBinary":
        shape = description["shape"]
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if kind == "Text":
        lengths = {"min_length": description["min_length"], "max_length": description["max_length"]}
        return spaces.Text(**lengths, charset=description["charset"])
    raise SpaceError(f"got the space kind {kind!r} in JSON, which this version does not know")


def _bounds_to_json(values: np.ndarray) -> typing.Any:
    # JSON has no infinity: float() reads "inf" back. One number stands for a uniform bound.
    def number(value):
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    flat = values.ravel().tolist()
    if flat and all(value == flat[0] for value in flat):
        return number(flat[0])
    return [number(value) for value in flat]


def _bounds_from_json(values: typing.Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not isinstance(values, list):
        return np.full(shape, float(values) if isinstance(values, str) else values, dtype)
    numbers = [float(value) if isinstance(value, str) else value for value in values]
    return np.array(numbers, dtype).reshape(shape)

"""Spaces as JSON values."""

from __future__ import annotations

import math
import typing

import gymnasium
import numpy as np
from gymnasium import spaces

from ldm_jax.spaces.structure import SpaceError, sorted_keys


def to_json(space: gymnasium.Space) -> dict[str, typing.Any]:
    """Describes a space by JSON values; `from_json` is its inverse.

    Raises:
      SpaceError: a kind without a description, a key that is no text, or a bound that is NaN.
    """
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {key: to_json(space[key]) for key in sorted_keys(space)}}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [to_json(child) for child in space]}
    if isinstance(space, spaces.Box):
        low, high = _bounds_to_json(space.low), _bounds_to_json(space.high)
        return {"kind": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), **_dtype_to_json(space)}
    if isinstance(space, spaces.MultiDiscrete):
        sizes = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"kind": "MultiDiscrete", **sizes, **_dtype_to_json(space)}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "shape": [int(size) for size in space.shape]}
    if isinstance(space, spaces.Text):
        lengths = {"min_length": int(space.min_length), "max_length": int(space.max_length)}
        return {"kind": "Text", **lengths, "charset": "".join(sorted(space.character_set))}
    raise SpaceError(f"got {space}, which has no description in JSON")


def _dtype_to_json(space: gymnasium.Space) -> dict[str, str]:
    return {} if space.dtype == np.int64 else {"dtype": str(space.dtype)}


def from_json(description: dict[str, typing.Any]) -> gymnasium.Space:
    """Rebuilds a space from what `to_json` wrote.

    Raises:
      SpaceError: an unknown kind, or what describes no space.
    """
    try:
        with np.errstate(over="raise", invalid="raise"):
            return _from_json(description)
    except (KeyError, TypeError, ValueError, ArithmeticError, AssertionError, AttributeError) as error:
        if isinstance(error, SpaceError):
            raise
        raise SpaceError(f"got {str(description)[:200]}, which describes no space ({error!r})") from error


def _from_json(description: dict[str, typing.Any]) -> gymnasium.Space:
    kind = description["kind"]
    if kind == "Dict":
        return spaces.Dict({key: _from_json(child) for key, child in description["spaces"].items()})
    if kind == "Tuple":
        return spaces.Tuple([_from_json(child) for child in description["spaces"]])
    if kind == "Box":
        shape, dtype = tuple(description["shape"]), np.dtype(description["dtype"])
        low, high = (_bounds_from_json(description[side], shape, dtype) for side in ("low", "high"))
        return spaces.Box(low, high, shape, dtype)
    if kind == "Discrete":
        return spaces.Discrete(description["n"], start=description["start"], dtype=description.get("dtype", "int64"))
    if kind == "MultiDiscrete":
        dtype = np.dtype(description.get("dtype", "int64"))
        nvec, first = (np.array(description[side], dtype) for side in ("nvec", "start"))
        return spaces.MultiDiscrete(nvec, dtype, start=first)
    if kind == "MultiBinary":
        shape = description["shape"]
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if kind == "Text":
        lengths = {"min_length": description["min_length"], "max_length": description["max_length"]}
        return spaces.Text(**lengths, charset=description["charset"])
    raise SpaceError(f"got the space kind {kind!r} in JSON, which this version does not know")


def _bounds_to_json(values: np.ndarray) -> typing.Any:
    # JSON has no infinity: float() reads "inf" back. One number stands for a uniform bound.
    def number(value: typing.Any) -> typing.Any:
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    if np.isnan(values).any():
        raise SpaceError("got a Box with a bound that is NaN, expected a number; mend it in the adapter")

    flat = values.ravel().tolist()
    if flat and all(value == flat[0] for value in flat):
        return number(flat[0])
    return [number(value) for value in flat]


def _bounds_from_json(values: typing.Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not isinstance(values, list):
        return np.full(shape, float(values) if isinstance(values, str) else values, dtype)
    numbers = [float(value) if isinstance(value, str) else value for value in values]
    return np.array(numbers, dtype).reshape(shape)

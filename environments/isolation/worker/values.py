"""Options, spaces, actions, masks and observations of libraries as values that can be carried between interpreters.

Spaces of gymnasium and of gym are known by the names of their kinds. See `gym_api.py` for where this runs: the standard
library, numpy, and Python 3.7 or later are all it needs.
"""

import copy
import typing

import numpy as np

MISSION_BYTES = 512
"""MiniGrid does not say how long its missions are; the longest of BabyAI's have about 200 characters."""

PRINTABLE = "".join(map(chr, range(9, 14))) + "".join(map(chr, range(32, 127)))


class RefusedError(Exception):
    """The environment cannot be offered, whatever is tried."""


class OptionError(ValueError):
    """An option that cannot be carried exactly to another interpreter."""


class WrongError(Exception):
    """What an environment returned is not what it declared.

    Attributes:
      kind: `shape`, `nan`, `category` or `exception`.
      text: what was got and what was expected.
    """

    def __init__(self, kind, text):
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self):
        return self.text


# Options of `make`, as JSON values that say of which type they were


def encode_options(options):
    """The options of a library's `make` as JSON values; `decode_options` gives the same options back.

    Raises:
      OptionError: names an option that cannot be carried exactly.
    """
    for name in options:
        if type(name) is not str:
            raise OptionError(f"an option has the name {name!r}, expected text")
    try:
        return {name: _encode(value, name) for name, value in options.items()}
    except RecursionError:
        raise OptionError(f"the options {', '.join(options)} are nested too deep, or contain themselves") from None


def decode_options(options):
    """The options that `encode_options` was given, made anew: a library may change what it gets."""
    return {name: _decode(value) for name, value in options.items()}


def _encode(value, name):
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_encode(item, f"{name}[{place}]") for place, item in enumerate(value)]
    if kind in (tuple, set, frozenset):
        return {"kind": kind.__name__, "items": [_encode(item, f"{name}[{i}]") for i, item in enumerate(value)]}
    if kind is dict:
        items = [[_encode(key, f"{name}, a key,"), _encode(item, f"{name}[{key!r}]")] for key, item in value.items()]
        return {"kind": "dict", "items": items}
    if kind is bytes:
        return {"kind": "bytes", "items": value.hex()}
    if kind is complex:
        return {"kind": "complex", "items": [value.real, value.imag]}
    # Of numpy's own types; a structured dtype or one of objects does not go through its name.
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biufcSUMm":
        content = {"dtype": value.dtype.str, "shape": list(value.shape), "items": value.tobytes().hex()}
        return {"kind": "array" if kind is np.ndarray else "scalar", **content}
    raise OptionError(
        f"the option {name} is {repr(value)[:200]} of type {kind.__name__}, expected numbers, text, bytes, None, "
        "arrays of numbers, or lists, tuples, sets and dicts of them: nothing else goes to another interpreter as it is"
    )


def _decode(value):
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, items = value["kind"], value["items"]
    if kind == "dict":
        return {_decode(key): _decode(item) for key, item in items}
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "complex":
        return complex(*items)
    if kind in ("array", "scalar"):
        array = np.zeros(value["shape"], value["dtype"])
        if items:
            array = np.frombuffer(bytes.fromhex(items), value["dtype"]).reshape(value["shape"]).copy()
        return array if kind == "array" else array[()]
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_decode, items))


# Spaces, of gymnasium and of gym alike: known by the names of their kinds


KINDS = ("Dict", "Tuple", "Box", "Discrete", "MultiDiscrete", "MultiBinary", "Text", "MissionSpace")


def kind_of(space):
    """The nearest supported kind that a space is or descends from; empty for one of no such kind."""
    return next((kind.__name__ for kind in type(space).__mro__ if kind.__name__ in KINDS), "")


def describe(space):
    """A space as JSON values, in the form of `ldm_jax.spaces.to_json`.

    Raises:
      RefusedError: a kind that is not supported.
    """
    kind = kind_of(space)
    if kind == "Dict":
        if not all(isinstance(key, str) for key in space.spaces):
            keys = ", ".join(sorted(map(repr, space.spaces)))
            raise RefusedError(f"its Dict space has keys that are not strings: {keys}; rename them in a wrapper")
        return {"kind": "Dict", "spaces": {key: describe(space.spaces[key]) for key in sorted(space.spaces)}}
    if kind == "Tuple":
        return {"kind": "Tuple", "spaces": [describe(child) for child in space.spaces]}
    if kind == "Box":
        low, high = describe_bounds(space.low), describe_bounds(space.high)
        return {"kind": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if kind == "Discrete":
        return {"kind": "Discrete", "n": int(space.n), "start": int(getattr(space, "start", 0))}
    if kind == "MultiDiscrete":
        nvec = np.asarray(space.nvec)
        start = np.asarray(getattr(space, "start", np.zeros_like(nvec)))
        return {"kind": "MultiDiscrete", "nvec": nvec.tolist(), "start": start.tolist()}
    if kind == "MultiBinary":
        return {"kind": "MultiBinary", "shape": np.atleast_1d(space.shape if space.shape else space.n).tolist()}
    if kind == "Text":
        charset = "".join(sorted(space.character_set))
        return {"kind": "Text", "min_length": space.min_length, "max_length": space.max_length, "charset": charset}
    if kind == "MissionSpace":
        return {"kind": "Text", "min_length": 0, "max_length": MISSION_BYTES, "charset": "".join(sorted(PRINTABLE))}
    raise RefusedError(f"a space of kind {type(space).__name__} is not supported: {str(space)[:200]}")


def describe_bounds(values):
    """Bounds as a nested list, or as one number where they are all the same; infinity as a word."""

    def number(value):
        return str(value) if isinstance(value, float) and np.isinf(value) else value

    flat = np.ravel(values).tolist()
    if flat and all(value == flat[0] for value in flat):
        return number(flat[0])
    return [number(value) for value in flat]


def find_leaves(space, path=()):
    """(path, space) of each leaf in canonical order: Dict by sorted key, Tuple by position."""
    kind = kind_of(space)
    if kind == "Dict":
        children = [(key, space.spaces[key]) for key in sorted(space.spaces)]
    elif kind == "Tuple":
        children = list(enumerate(space.spaces))
    else:
        return [(path, space)]
    return [leaf for key, child in children for leaf in find_leaves(child, (*path, key))]


def build(space, leaves):
    """The values of an iterator, one per leaf in canonical order, in the structure and order of the space."""
    kind = kind_of(space)
    if kind == "Dict":
        values = {key: build(space.spaces[key], leaves) for key in sorted(space.spaces)}
        return {key: values[key] for key in space.spaces}
    if kind == "Tuple":
        return tuple(build(child, leaves) for child in space.spaces)
    return next(leaves)


# Actions


def make_reader(space, plain_integers):
    """A function from the actions of rows `[rows, ...]` to those of each row, of the type that `space.sample()` gives.

    All rows are converted at once: one number after another takes ten times as long.
    """
    kind, dtype, shape = kind_of(space), space.dtype, space.shape
    if kind == "Discrete":
        number = int if plain_integers else scalar_type(space)
        return np.ndarray.tolist if number is int else lambda slots: slots.astype(number)
    if kind == "Box" and shape == () and np.dtype(dtype).kind not in "biu":
        return lambda slots: [np.array(slot, dtype) for slot in slots]  # an array without a shape, and no scalar
    return lambda slots: np.array(slots, slots.dtype if dtype is None else dtype).reshape(len(slots), *shape)


def scalar_type(space):
    """The type of what a Discrete space samples: Python's integers in old Gym, numpy's since."""
    kind: typing.Any = next(each for each in type(space).__mro__ if each.__name__ == "Discrete")
    if type(space).sample is kind.sample:
        return int if type(kind(2).sample()) is int else np.dtype(space.dtype).type
    try:
        value = copy.deepcopy(space).sample()  # a copy: the library may draw from the space itself
    except Exception:
        return int
    return type(value) if isinstance(value, (int, np.integer)) else int


class Masks:
    """Which choices of an action space are allowed, as one row over its categorical slots in canonical order.

    Args:
      space: the action space.

    Attributes:
      size: choices of all slots; whole numbers of a Box are choices too.
    """

    def __init__(self, space):
        self._leaves = [(path, kind_of(leaf), choices(leaf)) for path, leaf in find_leaves(space)]
        self._sizes = np.array([size for _, _, sizes in self._leaves for size in sizes], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.size = int(self._sizes.sum())

    def row(self, mask):
        """`bool [size]` of what a library gave in `info["action_mask"]`, or True where it gave nothing.

        A slot without any allowed choice, as at the end of an episode, allows all: nothing can be chosen from nothing.

        Args:
          mask: an array or a list over the choices, one of those for each slot, the nest of the action space with those
            as leaves, or None.

        Raises:
          WrongError: it has another size than the action space.
        """
        if mask is None:
            return True
        parts = [self._part(mask, *leaf) for leaf in self._leaves]
        row = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(self._sizes) == 1:
            return row if row.any() else True
        allowed = np.logical_or.reduceat(row, self._starts)
        return row if allowed.all() else row | np.repeat(~allowed, self._sizes)

    def _part(self, mask, path, kind, sizes):
        for key in path:
            try:
                mask = mask[key]
            except (KeyError, IndexError, TypeError):
                mask = None
            if mask is None:
                break
        size = sum(sizes)
        if mask is None:
            return np.ones(size, bool)
        flat = flatten(mask)
        if kind == "MultiBinary" and flat.size == len(sizes) and flat.dtype.kind in "biu":
            # In Gymnasium's words: 0 and 1 are set, 2 is free.
            return np.stack([flat != 1, flat != 0], -1).ravel()
        if flat.size != size or flat.dtype.kind not in "biuf":
            raise WrongError(
                "shape", f"the action mask has {flat.size} entries of {flat.dtype}, expected {size} of bool"
            )
        return flat != 0


def flatten(mask):
    """The numbers of an array, or of lists and tuples of arrays of any lengths, one after another."""
    if isinstance(mask, (list, tuple)):
        return np.concatenate([flatten(part) for part in mask]) if mask else np.zeros(0, bool)
    return np.ravel(np.asarray(mask))


def choices(space):
    """The number of choices of each categorical slot of a leaf, whole numbers of a Box among them."""
    kind = kind_of(space)
    if kind == "Discrete":
        return [int(space.n)]
    if kind == "MultiDiscrete":
        return [int(n) for n in np.ravel(space.nvec)]
    if kind == "MultiBinary":
        return [2] * int(np.prod(space.shape if space.shape else space.n))
    if kind == "Box" and np.dtype(space.dtype).kind in "biu":
        return [int(high) - int(low) + 1 for low, high in zip(np.ravel(space.low), np.ravel(space.high))]
    return []


# Observations


def name_of(path):
    """How a part of an observation is called in errors."""
    words = "/".join(map(str, path))
    return f"the observation, part {words!r}," if path else "the observation"


def write(slot, path, kind, space, observation):
    """Writes one leaf of an observation into its place `[...]` of the arrays, if it has the shape it should have.

    Returns:
      Whether a number was beyond what the place can hold and was cut to it.

    Raises:
      WrongError: it has not.
    """
    value = observation
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise WrongError("shape", f"{name_of(path)} is missing") from None
    if kind in ("Text", "MissionSpace"):
        text = np.frombuffer(str(value).encode(), np.uint8)
        if len(text) > len(slot):
            raise WrongError("shape", f"{name_of(path)} has {len(text)} bytes, expected at most {len(slot)}")
        slot[...] = 0
        slot[: len(text)] = text
        return False
    value = np.asarray(value)
    if value.dtype == slot.dtype and value.shape == slot.shape:  # as most are
        slot[...] = value
        return False
    return write_converted(slot, path, kind, space, value)


def write_converted(slot, path, kind, space, value):
    """Writes an array of another type or shape than its place; see `write`."""
    if value.dtype == object or value.dtype.kind not in "biuf":
        raise WrongError("shape", f"{name_of(path)} is of type {value.dtype}, expected numbers")
    if value.shape != slot.shape:
        if value.size != slot.size or value.size != 1:  # scalars come as [1]
            expected = list(slot.shape)
            raise WrongError("shape", f"{name_of(path)} has shape {list(value.shape)}, expected {expected}")
        value = value.reshape(slot.shape)
    cut = False
    if slot.dtype.kind in "iu" and value.dtype != slot.dtype:
        limits = np.iinfo(slot.dtype)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise WrongError("nan", f"{name_of(path)} is not finite")
        if value.size and not (limits.min <= value.min() and value.max() <= limits.max):
            if kind != "Box":
                raise WrongError("category", f"{name_of(path)} has the value {value.ravel()[0]}, outside {space}")
            value, cut = np.clip(value, limits.min, limits.max), True
    slot[...] = value
    return cut

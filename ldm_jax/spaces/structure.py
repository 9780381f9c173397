"""The leaves of a nested space in canonical order, and trees of one value per leaf.

The canonical order is `Dict` by sorted key and `Tuple` by position. Everything that concatenates or numbers parts of an
observation or action does so in this order.
"""

from __future__ import annotations

import collections.abc
import functools
import hashlib
import math
import typing
import urllib.parse

import gymnasium
from gymnasium import spaces

from ldm_jax.errors import LdmError
from ldm_jax.types import PyTree

MAX_WORD = 200
"""Bytes of a key in the name of a leaf; file systems take 255."""


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


@functools.cache
def _word(key: str | int) -> str:
    word = urllib.parse.quote(str(key), safe="", errors="surrogatepass")
    if not word.strip("."):  # a key without characters, and folders' own names
        return word.replace(".", "%2E") or "%"
    if len(word) > MAX_WORD:  # encoded words never hold %%
        return f"{word[:100]}%%{hashlib.sha256(word.encode()).hexdigest()}"
    return word


def leaves(space: gymnasium.Space) -> tuple[Leaf, ...]:
    """The leaves of a space in canonical order.

    >>> import ldm_jax
    >>> from gymnasium.spaces import Box, Dict, Discrete, Tuple
    >>> space = Dict(speed=Box(-1, 1, (2,)), hand=Tuple([Discrete(4), Discrete(13)]))
    >>> [leaf.name for leaf in ldm_jax.spaces.leaves(space)]
    ['hand/0', 'hand/1', 'speed']

    Raises:
      SpaceError: a kind of space that is not supported.
    """
    children: collections.abc.Iterable[tuple[str | int, gymnasium.Space]]
    if isinstance(space, spaces.Dict):
        children = ((key, space[key]) for key in sorted_keys(space))
    elif isinstance(space, spaces.Tuple):
        children = enumerate(space)
    # MissionSpace of MiniGrid and the like subclass a kind without being one: exact types only.
    elif type(space) in (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text):
        return (Leaf((), space),)
    else:
        raise SpaceError(
            f"got a space of kind {type(space).__name__}, expected Box, Discrete, MultiDiscrete, MultiBinary, Text, "
            "Dict or Tuple; convert it in the adapter"
        )
    return tuple(Leaf((key, *leaf.path), leaf.space) for key, child in children for leaf in leaves(child))


def sorted_keys(space: spaces.Dict) -> list[str]:
    """The keys of a Dict space in canonical order; a SpaceError where one is no text."""
    if odd := [key for key in space if not isinstance(key, str)]:
        raise SpaceError(f"got a Dict space with the key {odd[0]!r}, expected text keys; rename it in the adapter")
    return sorted(space)


def get(tree: PyTree, path: tuple[str | int, ...]) -> typing.Any:
    """The part of `tree` that `path` leads to."""
    for key in path:
        tree = tree[key]
    return tree


def unflatten(space: gymnasium.Space, values: collections.abc.Iterable[typing.Any]) -> PyTree:
    """Puts one value per leaf, in canonical order, into the structure of the space."""
    iterator = iter(values)

    def build(node: gymnasium.Space) -> PyTree:
        if isinstance(node, spaces.Dict):
            return {key: build(node[key]) for key in sorted_keys(node)}
        if isinstance(node, spaces.Tuple):
            return tuple(build(child) for child in node)
        return next(iterator)

    return build(space)


def text_bytes(space: spaces.Text) -> int:
    """Bytes that hold any text of the space: its maximum length times the longest UTF-8 character of its set."""
    return space.max_length * max(len(character.encode()) for character in space.character_set)


def choices(space: gymnasium.Space) -> tuple[int, ...]:
    """The number of choices of each categorical component of a leaf space; empty for Box and Text."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.ravel())
    if isinstance(space, spaces.MultiBinary):
        return (2,) * math.prod(space.shape)
    return ()


def first_value(space: gymnasium.Space) -> typing.Any:
    """The smallest value of a categorical leaf space (`Discrete.start`, `MultiDiscrete.start`, 0)."""
    return space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0

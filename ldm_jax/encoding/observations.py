"""Any observation space as parts that the encoders know: numbers, categories, grids and texts."""

from __future__ import annotations

import dataclasses
import math

import gymnasium
import numpy as np
from gymnasium import spaces

from ldm_jax.spaces import Leaf, choices, first_value, get, leaf_shape_dtype, leaves
from ldm_jax.types import Array, PyTree

MIN_GRID_SIDE = 5
"""Arrays of two or three axes count as spatial from this side on; smaller ones are plain numbers or categories."""


@dataclasses.dataclass(frozen=True)
class ObservationLayout:
    """Which encoder each leaf of an observation space goes to, in canonical order.

    Attributes:
      numeric: Box leaves that are not spatial; all their numbers form one vector.
      categorical: Discrete, MultiDiscrete and MultiBinary leaves that are not spatial.
      grids: spatial leaves, small grids and images.
      texts: Text leaves.
    """

    numeric: tuple[Leaf, ...]
    categorical: tuple[Leaf, ...]
    grids: tuple[Leaf, ...]
    texts: tuple[Leaf, ...]

    @property
    def numbers(self) -> int:
        """The length of the numeric vector."""
        return sum(math.prod(leaf.space.shape) for leaf in self.numeric)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of choices of each categorical component."""
        return tuple(size for leaf in self.categorical for size in choices(leaf.space))


def observation_layout(space: gymnasium.Space) -> ObservationLayout:
    """Sorts the leaves of an observation space by the encoder they need.

    Raises:
      SpaceError: a kind of space that is not supported.
    """
    parts: dict[str, list[Leaf]] = {"numeric": [], "categorical": [], "grids": [], "texts": []}
    for leaf in leaves(space):
        if isinstance(leaf.space, spaces.Text):
            parts["texts"].append(leaf)
        elif is_spatial(leaf_shape_dtype(leaf.space).shape):
            parts["grids"].append(leaf)
        elif isinstance(leaf.space, spaces.Box):
            parts["numeric"].append(leaf)
        else:
            parts["categorical"].append(leaf)
    return ObservationLayout(**{name: tuple(found) for name, found in parts.items()})


def is_spatial(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is a grid or an image rather than a list of numbers."""
    return len(shape) in (2, 3) and sorted(shape)[-2] >= MIN_GRID_SIDE


def channels_last(value: Array, shape: tuple[int, ...]) -> Array:
    """Brings a spatial leaf `[..., *shape]` to `[..., height, width, channels]`.

    Libraries do not say which of three axes holds the channels, see `channel_axis`.
    """
    xp = value.__array_namespace__()
    if len(shape) == 2:
        return value[..., None]
    return xp.moveaxis(value, channel_axis(shape) - 3, -1)


def channel_axis(shape: tuple[int, ...]) -> int:
    """Which of the three axes of a spatial leaf holds the channels, the first or the last: the one rule of the project.

    It is the one beside a square, since boards, feature maps and rendered frames are square far more often than a
    height or width equals the number of channels, and may have more planes than cells a side: chess is (8, 8, 119), a
    map of features (64, 64, 128) or (64, 48, 48). Without a square it is the shorter one, as in images (210, 160, 3)
    and (3, 210, 160); of equals the last. No library puts channels between height and width.
    """
    if shape[0] == shape[1]:
        return 2
    return 0 if shape[1] == shape[2] or shape[0] < shape[2] else 2


def channels_last_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels of a spatial leaf."""
    if len(shape) == 2:
        return (*shape, 1)
    return (shape[0], shape[1], shape[2]) if channel_axis(shape) == 2 else (shape[1], shape[2], shape[0])


def numeric_vector(layout: ObservationLayout, observation: PyTree) -> Array:
    """All numbers of the numeric leaves, `float32 [..., numbers]`, unscaled; needs at least one numeric leaf."""
    return _concatenate(layout.numeric, observation, np.float32)


def categorical_vector(layout: ObservationLayout, observation: PyTree) -> Array:
    """All categorical components, counted from 0, `int32 [..., len(sizes)]`; needs at least one categorical leaf."""
    return _concatenate(layout.categorical, observation, np.int32)


def _concatenate(parts: tuple[Leaf, ...], observation: PyTree, dtype: type) -> Array:
    columns = []
    for leaf in parts:
        value = get(observation, leaf.path)
        xp = value.__array_namespace__()
        rank = len(leaf.space.shape)
        value = (value - first_value(leaf.space)).astype(dtype)
        columns.append(xp.reshape(value, (*value.shape[: value.ndim - rank], -1)))
    return columns[0] if len(columns) == 1 else xp.concatenate(columns, -1)

"""Any action space as a row of typed slots, and back.

A *categorical slot* is one choice out of n (`Discrete`, each component of `MultiDiscrete`, each bit of `MultiBinary`);
a *continuous slot* is one number of a `Box`. Slots keep the canonical order of the space's leaves. The *flat choices*
of a space, M in all, are the choices of its categorical slots one after the other: action masks and logits are laid out
so.
"""

from __future__ import annotations

import dataclasses
import functools
import typing

import gymnasium
import numpy as np
from gymnasium import spaces

from ldm_jax.spaces import (
    UNBOUNDED,
    SpaceError,
    bounds,
    choices,
    clip_box,
    first_value,
    get,
    leaf_shape_dtype,
    leaves,
    unflatten,
)
from ldm_jax.types import Array, PyTree

NOT_ALLOWED = -1e9
"""The logit of a choice that does not exist or is not allowed: finite, so that no gradient turns NaN."""
NOT_ALLOWED_FLOAT16 = -3e4
"""The same where logits are stored in float16; about half of the lowest that it holds."""


_NARROWEST = 4 * float(np.finfo(np.float32).tiny)


class Slots(typing.NamedTuple):
    """An action as slots; a pytree.

    Attributes:
      categorical: `int32 [..., K]`, index of the choice in each categorical slot, counted from 0.
      continuous: `float32 [..., C]`, each continuous slot scaled so that its range is -1 to 1.
    """

    categorical: Array
    continuous: Array


class Distribution(typing.NamedTuple):
    """What a policy says of its next action, each slot independent of the others; a pytree.

    Attributes:
      logits: `[..., M]` over the flat choices, unnormalized log-probabilities, very negative where not allowed.
      mean: `float32 [..., C]`, in the action space's own units.
      scale: `float32 [..., C]`, standard deviation in the same units; 0 for a point.
    """

    logits: Array
    mean: Array
    scale: Array


@dataclasses.dataclass(frozen=True, eq=False)
class ActionLayout:
    """The slots of an action space.

    Attributes:
      space: the action space.
      low: `float64 [C]`, where each continuous slot's range begins; finite.
      high: `float64 [C]`, where it ends.
      assumed: the places among the C of slots that the space gives no bound at one side or both: their range is what
        was said, and what lies beyond is never tried.
    """

    space: gymnasium.Space
    low: np.ndarray
    high: np.ndarray
    assumed: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActionLayout):
            return NotImplemented
        ends = np.array_equal(self.low, other.low) and np.array_equal(self.high, other.high)
        return ends and self.space == other.space and self.assumed == other.assumed

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of choices of each categorical slot; K of them."""
        return tuple(size for leaf in leaves(self.space) for size in choices(leaf.space))

    @property
    def categorical(self) -> int:
        """K, the number of categorical slots."""
        return len(self.sizes)

    @property
    def continuous(self) -> int:
        """C, the number of continuous slots."""
        return self.low.size

    @property
    def flat_choices(self) -> int:
        """M, the number of choices over all categorical slots."""
        return sum(self.sizes)


def action_layout(
    space: gymnasium.Space, low: np.ndarray | float | None = None, high: np.ndarray | float | None = None
) -> ActionLayout:
    """Lays an action space out in slots.

    >>> from gymnasium.spaces import Box, MultiDiscrete, Tuple
    >>> from ldm_jax.encoding import action_layout
    >>> layout = action_layout(Tuple([MultiDiscrete([3, 2]), Box(-1, 1, (4,))]))
    >>> layout.sizes, layout.flat_choices, layout.continuous
    ((3, 2), 5, 4)

    Args:
      space: the action space.
      low: `[C]` or one number, used where the space has no lower bound: the range seen in the data, or to be tried.
      high: `[C]` or one number, used where it has no upper bound.

    Returns:
      The layout.

    Raises:
      SpaceError: the space has a Text part, no part at all, or no bounds where none were given either.
    """
    lows, highs = [np.zeros(0)], [np.zeros(0)]
    for leaf in leaves(space):
        if isinstance(leaf.space, spaces.Text):
            raise SpaceError(f"the action space has a Text part {leaf.name!r}; actions are categorical or continuous")
        if isinstance(leaf.space, spaces.Box):
            leaf_low, leaf_high = bounds(leaf.space)
            lows.append(leaf_low.ravel())
            highs.append(leaf_high.ravel())
    space_low, space_high = np.concatenate(lows), np.concatenate(highs)
    assumed = np.flatnonzero(~np.isfinite(space_low) | ~np.isfinite(space_high)).tolist()
    if assumed and (low is None or high is None):
        raise SpaceError(f"the action space has no bounds in its continuous slots {assumed}: say the range to act in")
    low = np.where(np.isfinite(space_low), space_low, 0.0 if low is None else low)
    high = np.where(np.isfinite(space_high), space_high, 0.0 if high is None else high)
    low, high = (np.clip(side, -UNBOUNDED, UNBOUNDED) for side in (low, high))
    # A slot of no width, to float32, holds one value; the range around it only has to be a range.
    flat = ~(high - low > _NARROWEST)
    layout = ActionLayout(space, np.where(flat, low - 0.5, low), np.where(flat, low + 0.5, high), tuple(assumed))
    if layout.categorical + layout.continuous == 0:
        raise SpaceError(f"the action space {space} has no component to choose")
    return layout


def to_slots(layout: ActionLayout, action: PyTree) -> Slots:
    """Flattens actions `[..., leaf shape]` to slots; NumPy in, NumPy out, JAX in, JAX out."""
    categorical, continuous = [], []
    for path, leaf in leaves(layout.space):
        value = get(action, path)
        xp = value.__array_namespace__()
        rank = len(leaf.shape)
        if isinstance(leaf, spaces.Box):
            continuous.append(xp.reshape(value, (*value.shape[: value.ndim - rank], -1)).astype(np.float32))
        else:
            index = value - first_value(leaf)
            categorical.append(xp.reshape(index, (*value.shape[: value.ndim - rank], -1)).astype(np.int32))
    lead = (categorical or continuous)[0].shape[:-1]
    whole = xp.concatenate([*categorical, xp.zeros((*lead, 0), np.int32)], -1)
    numbers = xp.concatenate([*continuous, xp.zeros((*lead, 0), np.float32)], -1)
    return Slots(whole, normalize(layout, numbers))


def from_slots(layout: ActionLayout, slots: Slots) -> PyTree:
    """The inverse of `to_slots`; continuous slots are clipped to their Box and rounded where it holds integers."""
    categorical, continuous = slots.categorical, denormalize(layout, slots.continuous)
    xp = categorical.__array_namespace__()
    values, i, j = [], 0, 0
    for leaf in leaves(layout.space):
        struct = leaf_shape_dtype(leaf.space)
        size = int(np.prod(struct.shape, dtype=int))
        lead = categorical.shape[:-1]
        if isinstance(leaf.space, spaces.Box):
            value = xp.reshape(continuous[..., j : j + size], (*lead, *struct.shape))
            if not np.issubdtype(struct.dtype, np.floating):
                value = xp.round(value)
            value = clip_box(leaf.space, value)
            j += size
        else:
            value = xp.reshape(categorical[..., i : i + size], (*lead, *struct.shape)) + first_value(leaf.space)
            i += size
        values.append(value.astype(struct.dtype))
    return unflatten(layout.space, values)


def normalize(layout: ActionLayout, value: Array) -> Array:
    """Scales continuous slots `[..., C]` from their own units to -1..1."""
    middle, half = (layout.high + layout.low) / 2, (layout.high - layout.low) / 2
    return ((value - middle.astype(np.float32)) / half.astype(np.float32)).astype(np.float32)


def denormalize(layout: ActionLayout, value: Array) -> Array:
    """Scales continuous slots `[..., C]` from -1..1 to their own units."""
    middle, half = (layout.high + layout.low) / 2, (layout.high - layout.low) / 2
    return value * half.astype(np.float32) + middle.astype(np.float32)


def split_choices(layout: ActionLayout, flat: Array, slots: int, width: int, *, fill: float | bool) -> Array:
    """Cuts flat choices `[..., M]` into one padded row per categorical slot.

    Args:
      layout: the slots.
      flat: `[..., M]`, logits or an action mask.
      slots: K or more.
      width: the number of choices of the largest slot or more.
      fill: what to put where there is no choice.

    Returns:
      `[..., slots, width]`.
    """
    xp = flat.__array_namespace__()
    where = np.full((slots, width), layout.flat_choices, np.int32)
    offset = 0
    for k, size in enumerate(layout.sizes):
        where[k, :size] = offset + np.arange(size)
        offset += size
    padded = xp.concatenate([flat, xp.full((*flat.shape[:-1], 1), fill, flat.dtype)], -1)
    return padded[..., where]

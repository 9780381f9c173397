"""Buckets: the few padded widths that environments share, so that programs do not multiply with environments."""

from __future__ import annotations

import collections.abc
import dataclasses
import itertools

import gymnasium
import numpy as np

from ldm_jax.encoding import actions, observations
from ldm_jax.spaces import Leaf, SpaceError, leaf_shape_dtype, text_bytes

GRID_CELLS = 16
"""The spatial encoder works on at most this many cells a side; larger images are cut into patches first."""


@dataclasses.dataclass(frozen=True, order=True)
class Grid:
    """Padded shape of a spatial leaf: `side` x `side` x `channels`."""

    side: int
    channels: int
    dtype: str


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The widths that environments are padded to; environments of one bucket share compiled shapes.

    Attributes:
      numeric: W, numbers of the observation.
      categorical: P, categorical components of the observation.
      grids: of the spatial leaves.
      texts: L of each Text leaf.
      choice_slots: K, categorical action slots.
      choices: V, choices of the largest categorical slot.
      continuous_slots: C, continuous action slots.
    """

    numeric: int
    categorical: int
    grids: tuple[Grid, ...]
    texts: tuple[int, ...]
    choice_slots: int
    choices: int
    continuous_slots: int

    @property
    def name(self) -> str:
        """One word: what differs between buckets, for logs and metrics."""
        grids = "".join(f"_g{grid.side}x{grid.channels}{'i' if grid.dtype == 'uint8' else ''}" for grid in self.grids)
        texts = "".join(f"_t{size}" for size in self.texts)
        observation = f"n{self.numeric}_p{self.categorical}{grids}{texts}"
        return f"{observation}_k{self.choice_slots}x{self.choices}_c{self.continuous_slots}"


_WIDTHS = {
    "numeric": (0, 8, 32, 128, 256, 512, 2048, 8192),
    "categorical": (0, 1, 4, 16, 64, 256, 1024),
    "channels": (4, 16, 64, 128),
    "text": (128, 512, 2048),
    "choice_slots": (0, 1, 4, 16, 64, 320),
    "choices": (0, 8, 32, 128, 512, 2048, 8192),
    # 64 for the muscles of MyoSuite, some 600 environments: each slot goes through the head.
    "continuous_slots": (0, 2, 8, 32, 64, 128, 320),
}


def bucket_for(observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Bucket:
    """The smallest bucket that holds both spaces.

    Raises:
      SpaceError: a space is larger than the largest bucket.
    """
    seen = observations.observation_layout(observation_space)
    acted = actions.action_layout(action_space, low=-1.0, high=1.0)  # only counted
    return Bucket(
        numeric=_round_up("numeric", seen.numbers),
        categorical=_round_up("categorical", len(seen.sizes)),
        grids=tuple(_grid_for(leaf) for leaf in seen.grids),
        texts=tuple(_round_up("text", text_bytes(leaf.space)) for leaf in seen.texts),
        choice_slots=_round_up("choice_slots", acted.categorical),
        choices=_round_up("choices", max(acted.sizes, default=0)),
        continuous_slots=_round_up("continuous_slots", acted.continuous),
    )


def join_buckets(environments: collections.abc.Mapping[Bucket, int], most: int) -> dict[Bucket, Bucket]:
    """Joins buckets, those first that then pad least, until no more are left than asked for.

    A training step is compiled for all its buckets together, so that its size grows with their number. Only buckets
    with the same grids and texts are joined: one is left of each such kind, however few are asked for.

    Args:
      environments: the number of environments, or any weight, of each bucket.
      most: how many are to be left.

    Returns:
      The bucket that takes the place of each.
    """
    weights = dict(environments)
    members = {bucket: [bucket] for bucket in weights}
    while len(weights) > most:
        pairs = [
            pair
            for pair in itertools.combinations(sorted(weights), 2)
            if (pair[0].grids, pair[0].texts) == (pair[1].grids, pair[1].texts)
        ]
        if not pairs:
            break
        pair = min(pairs, key=lambda pair: sum(weights[one] * (_numbers(_hull(*pair)) - _numbers(one)) for one in pair))
        hull = _hull(*pair)
        weight, joined = sum(weights.pop(one) for one in pair), [old for one in pair for old in members.pop(one)]
        weights[hull] = weights.get(hull, 0) + weight
        members[hull] = members.get(hull, []) + joined
    return {old: bucket for bucket, olds in members.items() for old in olds}


def _hull(one: Bucket, two: Bucket) -> Bucket:
    widths = {field.name: max(getattr(one, field.name), getattr(two, field.name)) for field in dataclasses.fields(one)}
    return Bucket(**widths)


def _numbers(bucket: Bucket) -> int:
    """What a time step reads and predicts; a continuous slot predicts some 256 bins."""
    predicted = bucket.choice_slots * bucket.choices + 256 * bucket.continuous_slots
    return 2 * bucket.numeric + bucket.categorical + predicted


def _round_up(kind: str, size: int) -> int:
    for width in _WIDTHS[kind]:
        if size <= width:
            return width
    raise SpaceError(
        f"the space needs {kind} = {size}, the largest bucket has {_WIDTHS[kind][-1]}: shrink the space in its adapter"
    )


def _grid_for(leaf: Leaf) -> Grid:
    struct = leaf_shape_dtype(leaf.space)
    height, width, channels = observations.channels_last_shape(struct.shape)
    largest = max(height, width)
    if largest <= GRID_CELLS:
        return Grid(max(-(-largest // 4) * 4, GRID_CELLS // 2), _round_up("channels", channels), "float32")
    side = -(-largest // GRID_CELLS) * GRID_CELLS
    return Grid(side, _round_up("channels", channels), "uint8" if struct.dtype == np.uint8 else "float32")

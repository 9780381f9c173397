"""Buckets: the few padded widths that environments share, so that programs do not multiply with environments."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import heapq
import itertools
import typing

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


_NUMBERS = ("numeric", "categorical", "choice_slots", "choices", "continuous_slots")

_WIDTHS = {
    "numeric": (0, 8, 32, 128, 256, 512, 2048, 8192),
    "categorical": (0, 1, 4, 16, 64, 256, 1024),
    "channels": (4, 16, 64, 128),
    "text": (128, 512, 2048),
    "choice_slots": (0, 1, 4, 16, 64, 320),
    # Fine where it is wide: logits, masks and targets are as wide at every token.
    "choices": (0, 8, 32, 128, 256, 512, 1024, 2048, 3072, 4096, 5120, 6144, 8192),
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


def join_buckets(
    shares: collections.abc.Mapping[Bucket, float],
    most: int,
    work: collections.abc.Callable[[Bucket], float],
    *,
    each: float = 0.0,
    pad_parts: bool = False,
) -> dict[Bucket, Bucket]:
    """Joins buckets, the pair first that then costs least, while it saves anything or there are too many.

    A training step is compiled for all its buckets together, so that its size grows with their number, and each has
    products of its own, smaller ones.

    Args:
      shares: of the rows, of each bucket.
      most: how many are to be left; more are where nothing can be joined.
      work: what a row of a bucket costs.
      each: what a bucket costs by itself, as a part of the work of all rows in their own buckets.
      pad_parts: whether grids and texts are padded to larger ones, and to be there where there are none. The features
        of an image depend on the side that it is padded to, so that a model has to act in the buckets that it was
        trained in. Else only buckets with the same grids and texts are joined.

    Returns:
      The bucket that takes the place of each.
    """
    known = functools.cache(work)
    left = {number: (bucket, share) for number, (bucket, share) in enumerate(sorted(shares.items()))}
    members = {number: [bucket] for number, (bucket, _) in left.items()}
    each *= sum(share * known(bucket) for bucket, share in left.values())
    queue: list[tuple[float, int, int, Bucket]] = []

    def offer(one: int, two: int) -> None:
        (first, share), (second, other_share) = left[one], left[two]
        if hull := join_two(first, second, pad_parts=pad_parts):
            more = share * (known(hull) - known(first)) + other_share * (known(hull) - known(second))
            heapq.heappush(queue, (more, one, two, hull))

    for pair in itertools.combinations(left, 2):
        offer(*pair)
    while queue and (queue[0][0] < each or len(left) > most):
        _, one, two, hull = heapq.heappop(queue)
        if one in left and two in left:
            number = max(members) + 1
            members[number] = members[one] + members[two]
            share = left.pop(one)[1] + left.pop(two)[1]
            left[number] = hull, share
            for other in left.keys() - {number}:
                offer(other, number)
    groups = [members[number] for number in left]
    _move(groups, shares, known, pad_parts=pad_parts)
    hulls = [(_hull(group, pad_parts=pad_parts), group) for group in groups]
    return {old: hull for hull, group in hulls for old in group}


def _move(
    groups: list[list[Bucket]],
    shares: collections.abc.Mapping[Bucket, float],
    work: collections.abc.Callable[[Bucket], float],
    *,
    pad_parts: bool,
) -> None:
    """Moves single buckets to other groups while that costs less: pairs were joined without seeing what came later."""
    hulls = [_hull(group, pad_parts=pad_parts) for group in groups]
    weights = [sum(shares[bucket] for bucket in group) for group in groups]
    moved = True
    while moved:
        moved = False
        for bucket in sorted(shares):
            here = next(number for number, group in enumerate(groups) if bucket in group)
            if len(groups[here]) == 1:
                continue
            share = shares[bucket]
            rest = _hull([other for other in groups[here] if other != bucket], pad_parts=pad_parts)
            saved = weights[here] * work(hulls[here]) - (weights[here] - share) * work(rest)
            wider = {number: join_two(hull, bucket, pad_parts=pad_parts) for number, hull in enumerate(hulls)}
            costs = {
                number: (weights[number] + share) * work(hull) - weights[number] * work(hulls[number])
                for number, hull in wider.items()
                if hull and number != here
            }
            there = min(costs, key=costs.__getitem__, default=here)
            if there != here and costs[there] < saved * (1 - 1e-9):
                groups[here].remove(bucket)
                groups[there].append(bucket)
                hulls[here], hulls[there] = rest, typing.cast(Bucket, wider[there])
                weights[here], weights[there] = weights[here] - share, weights[there] + share
                moved = True


def _hull(buckets: collections.abc.Iterable[Bucket], *, pad_parts: bool) -> Bucket:
    hull = join_all(buckets, pad_parts=pad_parts)
    assert hull is not None  # they were joined in pairs
    return hull


def join_all(buckets: collections.abc.Iterable[Bucket], *, pad_parts: bool = False) -> Bucket | None:
    """The smallest bucket that holds what any of some does; None if there is none.

    Args:
      buckets: at least one.
      pad_parts: see `join_buckets`.
    """
    hull, *others = buckets
    for other in others:
        wider = join_two(hull, other, pad_parts=pad_parts)
        if wider is None:
            return None
        hull = wider
    return hull


def join_two(one: Bucket, two: Bucket, *, pad_parts: bool = False) -> Bucket | None:
    """The smallest bucket that holds what either of two does; None if there is none.

    Args:
      one: a bucket.
      two: another one.
      pad_parts: see `join_buckets`.
    """
    if not pad_parts and (one.grids, one.texts) != (two.grids, two.texts):
        return None
    grids = [_join_grids(*pair) for pair in itertools.zip_longest(one.grids, two.grids)]
    if None in grids:
        return None
    widths = {name: max(getattr(one, name), getattr(two, name)) for name in _NUMBERS}
    texts = tuple(map(max, itertools.zip_longest(one.texts, two.texts, fillvalue=0)))
    return Bucket(grids=tuple(grid for grid in grids if grid), texts=texts, **widths)


def _join_grids(one: Grid | None, two: Grid | None) -> Grid | None:
    if one is None or two is None:
        return one or two
    if one.dtype != two.dtype or (one.side <= GRID_CELLS) != (two.side <= GRID_CELLS):
        return None  # another encoder reads them
    return Grid(max(one.side, two.side), max(one.channels, two.channels), one.dtype)


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

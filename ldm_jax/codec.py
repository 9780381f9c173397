"""From time steps and actions to the padded arrays that the model reads, and from its predictions back to actions.

A `Codec` belongs to one environment and is made from its card. It pads everything to the widths of a `Bucket`, so that
environments with different spaces share the shapes of compiled programs. All functions take NumPy or JAX arrays with
any leading axes, so that the input pipeline and the acting policy run the same code.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import itertools
import typing

import gymnasium
import numpy as np

from ldm_jax import actions, observations
from ldm_jax.actions import Slots
from ldm_jax.cards import EnvironmentCard
from ldm_jax.signature import signature_vector, symlog
from ldm_jax.spaces import Leaf, SpaceError, get, leaf_shape_dtype, leaves, text_bytes, unflatten
from ldm_jax.types import Array, PyTree, TimeStep

GRID_CELLS = 16
"""The spatial encoder works on at most this many cells a side; larger images are cut into patches first."""


class Features(typing.NamedTuple):
    """What one token is made of; a pytree. The leading axes are any: `[T]` in a window, `[B]` when acting.

    Attributes:
      numeric: `float32 [..., W, 2]`, each number standardised by the card and as symlog of its raw value.
      categorical: `int32 [..., P]`, category of each component, counted from 0.
      grids: for each spatial leaf, `[..., side, side, channels]`, float32 or (images) uint8.
      texts: for each Text leaf, `uint8 [..., L]`.
      reward: `float32 [..., 2]`, symlog of the reward over the card's scale, and its sign.
      flags: `float32 [..., 3]`, terminated, truncated, first.
      previous: the previous action as slots, `[..., K]` and `[..., C]`.
      has_previous: `float32 [...]`, 0 where there was no previous action (or it was ignored).
      action_mask: `bool [..., K, V]`, allowed choices.
    """

    numeric: Array
    categorical: Array
    grids: tuple[Array, ...]
    texts: tuple[Array, ...]
    reward: Array
    flags: Array
    previous: Slots
    has_previous: Array
    action_mask: Array


class Signature(typing.NamedTuple):
    """What the model is told of the spaces it acts in: constants of an environment, without leading axes; a pytree.

    Attributes:
      vector: `float32 [SIGNATURE]`, kinds, sizes and ranges of the spaces; bounded.
      numeric_mask: `float32 [W]`, 1 where there is a number.
      categorical_mask: `float32 [P]`, 1 where there is a component.
      grid_masks: for each spatial leaf, `float32 [side, side]`, 1 where there is a cell.
      choice_mask: `bool [K, V]`, true where there is a choice.
      choice_slots: `float32 [K]`, 1 where there is a categorical slot.
      continuous_slots: `float32 [C]`, 1 where there is a continuous slot.
    """

    vector: Array
    numeric_mask: Array
    categorical_mask: Array
    grid_masks: tuple[Array, ...]
    choice_mask: Array
    choice_slots: Array
    continuous_slots: Array


class Targets(typing.NamedTuple):
    """What the model is to predict; a pytree.

    Attributes:
      probabilities: `float32 [..., K, V]`, the reference's distribution over the choices of each categorical slot.
      mean: `float32 [..., C]`, of the reference's continuous slots, scaled to -1..1.
      scale: `float32 [..., C]`, their standard deviation on the same scale; 0 for a point.
      weight: `float32 [...]`, 0 where there is no label, as at the last step of an episode.
      changed: `float32 [...]`, 1 where the label differs from the one before in the same episode.
    """

    probabilities: Array
    mean: Array
    scale: Array
    weight: Array
    changed: Array


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
    acted = actions.action_layout(action_space)
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
        return Grid(
            GRID_CELLS // 2 if largest <= GRID_CELLS // 2 else GRID_CELLS, _round_up("channels", channels), "float32"
        )
    side = -(-largest // GRID_CELLS) * GRID_CELLS
    return Grid(side, _round_up("channels", channels), "uint8" if struct.dtype == np.uint8 else "float32")


class Codec:
    """Encodes what an environment says and decodes what the model answers; immutable.

    Attributes:
      card: the environment's card.
      bucket: the widths padded to.
      signature: what the model is told of the spaces.
    """

    card: EnvironmentCard
    bucket: Bucket
    signature: Signature

    def __init__(self, card: EnvironmentCard, bucket: Bucket | None = None):
        """Prepares the constants.

        Args:
          card: the environment's card.
          bucket: widths to pad to, each at least what the spaces need. Default: the smallest bucket.

        Raises:
          SpaceError: a space that is not supported or too large, or a card whose statistics do not fit its spaces.
        """
        self.card = card
        self.bucket = bucket = bucket or bucket_for(card.observation_space, card.action_space)
        self.observation_layout = seen = observations.observation_layout(card.observation_space)
        statistics = card.statistics
        self.action_layout = acted = actions.action_layout(
            card.action_space, np.array(statistics.action_low), np.array(statistics.action_high)
        )
        if len(statistics.observation_mean) != seen.numbers or len(statistics.observation_deviation) != seen.numbers:
            raise SpaceError(
                f"the card of {card.id} has statistics of {len(statistics.observation_mean)} numbers, "
                f"its observation space has {seen.numbers}: collect its data again"
            )
        self._mean = np.array(statistics.observation_mean, np.float32)
        self._deviation = np.array(statistics.observation_deviation, np.float32)
        choice_mask = actions.split_choices(
            acted, np.ones(acted.flat_choices, bool), bucket.choice_slots, bucket.choices, False
        )
        self.signature = Signature(
            vector=signature_vector(seen, acted),
            numeric_mask=_ones(seen.numbers, bucket.numeric),
            categorical_mask=_ones(len(seen.sizes), bucket.categorical),
            grid_masks=tuple(map(_grid_mask, seen.grids, bucket.grids)),
            choice_mask=choice_mask,
            choice_slots=_ones(acted.categorical, bucket.choice_slots),
            continuous_slots=_ones(acted.continuous, bucket.continuous_slots),
        )

    def features(self, timestep: TimeStep, previous_action: PyTree, has_previous: Array) -> Features:
        """Encodes time steps.

        Args:
          timestep: leaves `[..., leaf shape]`.
          previous_action: what was executed one step before, `[..., leaf shape]`; anything where there was none.
          has_previous: `bool [...]`, whether there was a previous action; one before a `first` step never counts.

        Returns:
          The features, with the same leading axes.
        """
        bucket, seen, reward = self.bucket, self.observation_layout, timestep.reward
        xp = reward.__array_namespace__()
        lead = reward.shape
        numeric = xp.zeros((*lead, bucket.numeric, 2), np.float32)
        if seen.numeric:
            raw = observations.numeric_vector(seen, timestep.observation)
            standard = xp.clip((raw - self._mean) / self._deviation, -10.0, 10.0)
            numeric = _pad(xp.stack([standard, symlog(xp.clip(raw, -1e9, 1e9))], -1), bucket.numeric, -2)
        categorical = xp.zeros((*lead, bucket.categorical), np.int32)
        if seen.categorical:
            categorical = _pad(observations.categorical_vector(seen, timestep.observation), bucket.categorical, -1)
        scaled = reward / np.float32(self.card.statistics.reward_scale)
        flags = (timestep.terminated, timestep.truncated, timestep.first)
        previous = actions.to_slots(self.action_layout, previous_action)
        return Features(
            numeric=numeric,
            categorical=categorical,
            grids=tuple(
                _pad_grid(leaf, timestep.observation, grid) for leaf, grid in zip(seen.grids, bucket.grids, strict=True)
            ),
            texts=tuple(
                _pad(get(timestep.observation, leaf.path), size, -1)
                for leaf, size in zip(seen.texts, bucket.texts, strict=True)
            ),
            reward=xp.stack([symlog(scaled), xp.sign(reward)], -1).astype(np.float32),
            flags=xp.stack(flags, -1).astype(np.float32),
            previous=Slots(
                _pad(previous.categorical, bucket.choice_slots, -1),
                _pad(previous.continuous, bucket.continuous_slots, -1),
            ),
            has_previous=(has_previous & ~timestep.first).astype(np.float32),
            action_mask=self._action_mask(timestep.action_mask, lead, xp),
        )

    def _action_mask(self, flat: Array | None, lead: tuple[int, ...], xp: typing.Any) -> Array:
        bucket = self.bucket
        if flat is None:
            return xp.broadcast_to(self.signature.choice_mask, (*lead, bucket.choice_slots, bucket.choices))
        return actions.split_choices(self.action_layout, flat, bucket.choice_slots, bucket.choices, False)

    def window(self, arrays: dict[str, np.ndarray]) -> tuple[Features, Targets]:
        """Encodes a window of a stream as the trajectory store holds it.

        Args:
          arrays: by leaf name, each `[T, ...]` (see `data.collect`).

        Returns:
          Features and targets, each leaf `[T, ...]`.
        """
        observation = _from_names("observation", self.card.observation_space, arrays)
        action = _from_names("action", self.card.action_space, arrays)
        flags = (arrays["reward"], arrays["terminated"], arrays["truncated"], arrays["first"])
        timestep = TimeStep(observation, *flags, arrays.get("action_mask"))
        # The action before the window is not read, so the first token has none.
        previous = unflatten(
            self.card.action_space,
            [_shift(get(action, leaf.path)) for leaf in leaves(self.card.action_space)],
        )
        has_previous = np.arange(len(timestep.reward)) > 0
        features = self.features(timestep, previous, has_previous)
        label = actions.to_slots(self.action_layout, _from_names("reference_action", self.card.action_space, arrays))
        return features, self._targets(features, label, arrays)

    def _targets(self, features: Features, label: Slots, arrays: dict[str, np.ndarray]) -> Targets:
        bucket, layout = self.bucket, self.action_layout
        if "reference/logits" in arrays:
            logits = actions.split_choices(
                layout, arrays["reference/logits"].astype(np.float32), bucket.choice_slots, bucket.choices, -np.inf
            )
            logits = np.where(features.action_mask, logits, -np.inf)
            peak = np.max(logits, -1, keepdims=True, initial=-3e38)
            weights = np.exp(logits - peak)
            probabilities = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
        else:
            index = _pad(label.categorical, bucket.choice_slots, -1)
            probabilities = (index[..., None] == np.arange(bucket.choices)).astype(np.float32)
        if "reference/mean" in arrays:
            half = (layout.high - layout.low).astype(np.float32) / 2
            mean, scale = actions.normalise(layout, arrays["reference/mean"]), arrays["reference/scale"] / half
        else:
            mean, scale = label.continuous, np.zeros_like(label.continuous)
        differs = np.zeros(len(arrays["reward"]), bool)
        for slots in label:
            differs[1:] |= (slots[1:] != slots[:-1]).any(-1)
        return Targets(
            probabilities=probabilities * self.signature.choice_slots[:, None],
            mean=_pad(np.clip(mean, -1.0, 1.0), bucket.continuous_slots, -1),
            scale=_pad(scale.astype(np.float32), bucket.continuous_slots, -1),
            weight=arrays["label_mask"].astype(np.float32),
            changed=(differs & ~arrays["first"] & (np.arange(len(differs)) > 0)).astype(np.float32),
        )

    def action(self, slots: Slots) -> PyTree:
        """Turns predicted slots `[..., K or more]` and `[..., C or more]` into an action of the space."""
        layout = self.action_layout
        # A padded index can never be chosen; a slot smaller than its row is masked before.
        return actions.from_slots(
            layout, Slots(slots.categorical[..., : layout.categorical], slots.continuous[..., : layout.continuous])
        )


def _from_names(prefix: str, space: gymnasium.Space, arrays: dict[str, np.ndarray]) -> PyTree:
    return unflatten(space, [arrays[f"{prefix}/{leaf.name}"] for leaf in leaves(space)])


def _shift(value: np.ndarray) -> np.ndarray:
    return np.concatenate([value[:1], value[:-1]])


def _pad(value: Array, width: int, axis: int) -> Array:
    missing = width - value.shape[axis]
    if missing == 0:
        return value
    padding = [(0, 0)] * value.ndim
    padding[axis] = (0, missing)
    return value.__array_namespace__().pad(value, padding)


def _pad_grid(leaf: Leaf, observation: PyTree, grid: Grid) -> Array:
    value = observations.channels_last(get(observation, leaf.path), leaf_shape_dtype(leaf.space).shape)
    value = value.astype(grid.dtype)
    return _pad(_pad(_pad(value, grid.side, -3), grid.side, -2), grid.channels, -1)


def _grid_mask(leaf: Leaf, grid: Grid) -> np.ndarray:
    height, width, _ = observations.channels_last_shape(leaf_shape_dtype(leaf.space).shape)
    mask = np.zeros((grid.side, grid.side), np.float32)
    mask[:height, :width] = 1.0
    return mask


def _ones(count: int, width: int) -> np.ndarray:
    return (np.arange(width) < count).astype(np.float32)

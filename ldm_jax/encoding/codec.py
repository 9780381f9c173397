"""From time steps and actions to the padded arrays that the model reads, and from its predictions back to actions.

A `Codec` belongs to one environment and is made from its card. It pads everything to the widths of a `Bucket`, so that
environments with different spaces share the shapes of compiled programs. All functions take NumPy or JAX arrays with
any leading axes, so that the input pipeline and the acting policy run the same code.
"""

from __future__ import annotations

import typing

import numpy as np

from ldm_jax.cards import EnvironmentCard
from ldm_jax.encoding import actions, observations
from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.buckets import Bucket, Grid, bucket_for
from ldm_jax.encoding.signature import signature_vector, symlog
from ldm_jax.encoding.transition import Transition, from_leaves
from ldm_jax.spaces import Leaf, SpaceError, get, leaf_shape_dtype, leaves, unflatten
from ldm_jax.types import Array, PyTree, TimeStep

_FLOAT32 = np.finfo(np.float32)


class Features(typing.NamedTuple):
    """What one token is made of; a pytree. The leading axes are any: `[T]` in a window, `[B]` when acting.

    Attributes:
      numeric: `float32 [..., W, 2]`, each number standardized by the card and as symlog of its raw value.
      categorical: `int32 [..., P]`, category of each component, counted from 0.
      grids: for each spatial leaf, `[..., side, side, channels]`, float32 or (images) uint8; zeros where only
        the bucket has one.
      texts: for each Text leaf, `uint8 [..., L]`; the same.
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
      grid_masks: for each grid, `float32 [side, side]`, 1 where there is a cell; without any, there is no such leaf.
      text_mask: `float32 [texts]`, 1 where there is such a leaf.
      choice_mask: `bool [K, V]`, true where there is a choice.
      choice_slots: `float32 [K]`, 1 where there is a categorical slot.
      continuous_slots: `float32 [C]`, 1 where there is a continuous slot.
    """

    vector: Array
    numeric_mask: Array
    categorical_mask: Array
    grid_masks: tuple[Array, ...]
    text_mask: Array
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
        if len(statistics.observation_mean) != seen.numbers or len(statistics.observation_std) != seen.numbers:
            raise SpaceError(
                f"the card of {card.id} has statistics of {len(statistics.observation_mean)} numbers, "
                f"its observation space has {seen.numbers}: collect its data again"
            )
        # XLA takes numbers below the least normal one for 0, reciprocals too, and divides by them.
        least, most = _FLOAT32.tiny, 1 / _FLOAT32.tiny
        self._mean = np.clip(statistics.observation_mean, -_FLOAT32.max, _FLOAT32.max).astype(np.float32)
        self._std = np.clip(statistics.observation_std, least, most).astype(np.float32)
        self._reward_scale = np.float32(np.clip(statistics.reward_scale, least, most))
        choice_mask = actions.split_choices(
            acted, np.ones(acted.flat_choices, bool), bucket.choice_slots, bucket.choices, fill=False
        )
        self.signature = Signature(
            vector=signature_vector(seen, acted),
            numeric_mask=_ones(seen.numbers, bucket.numeric),
            categorical_mask=_ones(len(seen.sizes), bucket.categorical),
            grid_masks=(
                *map(_grid_mask, seen.grids, bucket.grids),
                *(np.zeros((grid.side, grid.side), np.float32) for grid in bucket.grids[len(seen.grids) :]),
            ),
            text_mask=_ones(len(seen.texts), len(bucket.texts)),
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
            with np.errstate(over="ignore"):
                standard = xp.clip((raw - self._mean) / self._std, -10.0, 10.0)
            numeric = _pad(xp.stack([standard, symlog(_finite(raw))], -1), bucket.numeric, -2)
        categorical = xp.zeros((*lead, bucket.categorical), np.int32)
        if seen.categorical:
            categorical = _pad(observations.categorical_vector(seen, timestep.observation), bucket.categorical, -1)
        with np.errstate(over="ignore"):
            scaled = _finite(reward / self._reward_scale)
        flags = (timestep.terminated, timestep.truncated, timestep.first)
        present = has_previous & ~timestep.first
        slots = actions.to_slots(self.action_layout, previous_action)
        # Where there was none, anything may stand there, NaN too.
        previous = Slots(*(xp.where(present[..., None], slot, xp.zeros_like(slot)) for slot in slots))
        return Features(
            numeric=numeric,
            categorical=categorical,
            grids=self._grids(timestep.observation, lead, xp),
            texts=self._texts(timestep.observation, lead, xp),
            reward=xp.stack([symlog(scaled), xp.sign(reward)], -1).astype(np.float32),
            flags=xp.stack(flags, -1).astype(np.float32),
            previous=Slots(
                _pad(previous.categorical, bucket.choice_slots, -1),
                _pad(previous.continuous, bucket.continuous_slots, -1),
            ),
            has_previous=present.astype(np.float32),
            action_mask=self._action_mask(timestep.action_mask, lead, xp),
        )

    def _grids(self, observation: PyTree, lead: tuple[int, ...], xp: typing.Any) -> tuple[Array, ...]:
        own, grids = self.observation_layout.grids, self.bucket.grids
        there = [_pad_grid(leaf, observation, grid) for leaf, grid in zip(own, grids[: len(own)], strict=True)]
        missing = grids[len(own) :]
        return *there, *(xp.zeros((*lead, grid.side, grid.side, grid.channels), grid.dtype) for grid in missing)

    def _texts(self, observation: PyTree, lead: tuple[int, ...], xp: typing.Any) -> tuple[Array, ...]:
        own, sizes = self.observation_layout.texts, self.bucket.texts
        there = [_pad(get(observation, leaf.path), size, -1) for leaf, size in zip(own, sizes[: len(own)], strict=True)]
        return *there, *(xp.zeros((*lead, size), np.uint8) for size in sizes[len(own) :])

    def _action_mask(self, flat: Array | None, lead: tuple[int, ...], xp: typing.Any) -> Array:
        bucket = self.bucket
        if flat is None:
            return xp.broadcast_to(self.signature.choice_mask, (*lead, bucket.choice_slots, bucket.choices))
        return actions.split_choices(self.action_layout, flat, bucket.choice_slots, bucket.choices, fill=False)

    def window(self, arrays: dict[str, np.ndarray]) -> tuple[Features, Targets]:
        """Encodes windows of streams as the trajectory store holds them.

        Args:
          arrays: by leaf name, each `[..., T, leaf shape]` (see `ldm_jax.encoding.transition`); a window is encoded
            alike alone and beside others.

        Returns:
          Features and targets, each leaf `[..., T, ...]`.
        """
        card = self.card
        transition = from_leaves(card.observation_space, card.action_space, arrays)
        timestep, action = transition.timestep, transition.action
        # The action before the window is not read, so the first token has none.
        axis = timestep.reward.ndim - 1
        previous = unflatten(
            card.action_space,
            [_shift(get(action, leaf.path), axis) for leaf in leaves(card.action_space)],
        )
        has_previous = np.arange(timestep.reward.shape[-1]) > 0
        features = self.features(timestep, previous, has_previous)
        return features, self._targets(features, transition)

    def _targets(self, features: Features, transition: Transition) -> Targets:
        bucket, layout, distribution = self.bucket, self.action_layout, transition.distribution
        label = actions.to_slots(layout, transition.reference_action)
        if distribution is not None:
            logits = actions.split_choices(
                layout, distribution.logits.astype(np.float32), bucket.choice_slots, bucket.choices, fill=-np.inf
            )
            logits = np.where(features.action_mask, logits, -np.inf)
            peak = np.max(logits, -1, keepdims=True, initial=-3e38)
            weights = np.exp(logits - peak)
            probabilities = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
        else:
            index = _pad(label.categorical, bucket.choice_slots, -1)
            probabilities = (index[..., None] == np.arange(bucket.choices)).astype(np.float32)
        if distribution is not None:
            half = (layout.high - layout.low).astype(np.float32) / 2
            mean, scale = actions.normalize(layout, distribution.mean), distribution.scale / half
        else:
            mean, scale = label.continuous, np.zeros_like(label.continuous)
        differs = np.zeros(transition.timestep.first.shape, bool)
        for slots in label:
            differs[..., 1:] |= (slots[..., 1:, :] != slots[..., :-1, :]).any(-1)
        differs[..., 1:] &= transition.label_mask[..., :-1]  # what was no label says nothing of a change
        return Targets(
            probabilities=probabilities * self.signature.choice_slots[:, None],
            mean=_pad(np.clip(mean, -1.0, 1.0), bucket.continuous_slots, -1),
            scale=_pad(scale.astype(np.float32), bucket.continuous_slots, -1),
            weight=transition.label_mask.astype(np.float32),
            changed=(differs & ~transition.timestep.first).astype(np.float32),
        )

    def action(self, slots: Slots) -> PyTree:
        """Turns predicted slots `[..., K or more]` and `[..., C or more]` into an action of the space."""
        layout = self.action_layout
        # A padded index can never be chosen; a slot smaller than its row is masked before.
        return actions.from_slots(
            layout, Slots(slots.categorical[..., : layout.categorical], slots.continuous[..., : layout.continuous])
        )


def _finite(value: Array) -> Array:
    return value.__array_namespace__().clip(value, -_FLOAT32.max, _FLOAT32.max)


def _shift(value: np.ndarray, axis: int) -> np.ndarray:
    step = (slice(None),) * axis
    return np.concatenate([value[(*step, slice(1))], value[(*step, slice(-1))]], axis)


def _pad(value: Array, width: int, axis: int) -> Array:
    shape = list(value.shape[axis:])
    shape[0] = width
    return _pad_end(value, tuple(shape), value.dtype)


def _pad_end(value: Array, shape: tuple[int, ...], dtype: typing.Any) -> Array:
    """Converts an array, and fills its last axes up with zeros to a shape."""
    axis = value.ndim - len(shape)
    if value.shape[axis:] == shape:
        return value.astype(dtype)
    if isinstance(value, np.ndarray):  # NumPy's own pad takes ten times as long for what is small
        padded = np.zeros((*value.shape[:axis], *shape), dtype)
        padded[(slice(None),) * axis + tuple(map(slice, value.shape[axis:]))] = value
        return padded
    padding = [(0, 0)] * axis + [(0, width - size) for width, size in zip(shape, value.shape[axis:], strict=True)]
    return value.__array_namespace__().pad(value.astype(dtype), padding)


def _pad_grid(leaf: Leaf, observation: PyTree, grid: Grid) -> Array:
    value = observations.channels_last(get(observation, leaf.path), leaf.space.shape)
    return _pad_end(value, (grid.side, grid.side, grid.channels), grid.dtype)


def _grid_mask(leaf: Leaf, grid: Grid) -> np.ndarray:
    height, width, _ = observations.channels_last_shape(leaf_shape_dtype(leaf.space).shape)
    mask = np.zeros((grid.side, grid.side), np.float32)
    mask[:height, :width] = 1.0
    return mask


def _ones(count: int, width: int) -> np.ndarray:
    return (np.arange(width) < count).astype(np.float32)

"""The batches that a model is trained on: the windows of a dataset, encoded for it, in buckets of equal shapes."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import typing

import jax
import numpy as np

from ldm_jax.encoding.buckets import join_buckets
from ldm_jax.encoding.codec import Codec
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Inputs
from ldm_jax.training.bucket_work import bucket_work
from ldm_jax.training.loss import Example
from ldm_jax.training.optimizer import TrainingConfig

from .mixture import ALL_STREAMS, BucketRows, Mixture, MixtureError, Streams, WindowSource
from .shares import DrawsConfig, allot, environment_shares
from .store import Dataset

MAX_BUCKETS = 16
"""A training step is one program for all of its buckets, so there are no more than these, however many environments."""


def make_codecs(
    dataset: Dataset,
    ids: collections.abc.Sequence[str],
    model: ModelConfig,
    max_buckets: int = MAX_BUCKETS,
    draws: DrawsConfig | None = None,
    each: float = 0.0,
    drawn_slots: int = TrainingConfig.drawn_slots,
) -> list[Codec]:
    """The codecs of environments, each checked to fit, in the buckets that cost least together.

    Args:
      dataset: has their cards.
      ids: the environments.
      model: that they have to fit, and whose arithmetic counts.
      max_buckets: those that cost least when joined are, until no more are left.
      draws: how often they are drawn.
      each: what a bucket costs by itself, see `join_buckets`.
      drawn_slots: of an action, as many as a step of training looks at.

    Raises:
      StoreError: the dataset has no such environment.
      CardError: a card without the fields needed.
      SpaceError: a space that is too large for any bucket.
      ConfigError: a space that is too large for the model.
    """
    codecs = [Codec(dataset.card(id)) for id in ids]
    for codec in codecs:
        model.check_fits(codec.bucket, codec.card.id, max(codec.observation_layout.sizes, default=0))
    own = {codec.bucket for codec in codecs}
    if len(own) <= (1 if each else max_buckets):
        return codecs  # nothing to choose, and to count what it costs takes a second
    shares = dict.fromkeys(own, 0.0)
    for codec, share in zip(codecs, _shares(dataset, ids, draws or DrawsConfig()), strict=True):
        shares[codec.bucket] += share
    joined = join_buckets(shares, max_buckets, bucket_work(model, drawn_slots), each=each, pad_parts=True)
    return [
        codec if joined[codec.bucket] == codec.bucket else Codec(codec.card, joined[codec.bucket]) for codec in codecs
    ]


def _shares(dataset: Dataset, ids: collections.abc.Sequence[str], draws: DrawsConfig) -> np.ndarray:
    steps = [sum(part.steps * part.streams for part in dataset.parts(id)) for id in ids]
    return environment_shares(draws, ids, steps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Encode:
    """Turns windows into rows; a value, unlike a closure, so that it travels to other processes.

    Attributes:
      codecs: of the source's environments.
      indices: of each, its `environment` in the batch.
    """

    codecs: tuple[Codec, ...]
    indices: tuple[int, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Encode) and self._described() == other._described()

    def __hash__(self) -> int:
        return hash(self.indices)

    def _described(self) -> list[tuple[object, ...]]:
        return [(index, codec.card, codec.bucket) for index, codec in zip(self.indices, self.codecs, strict=True)]

    def __call__(self, environment_index: int, leaves: dict[str, np.ndarray], seeds: np.ndarray) -> Example:
        codec, rows = self.codecs[environment_index], len(seeds)
        features, targets = codec.window(leaves)
        signature = jax.tree.map(lambda value: value[None].repeat(rows, 0), codec.signature)
        return Example(Inputs(features, signature), targets, np.full(rows, self.indices[environment_index], np.int32))


class Shape(typing.NamedTuple):
    """What batches are like, whatever they are drawn from.

    Attributes:
      window: T, steps of a window.
      rows: windows of a batch.
      seed: of the draws.
      draws: how often each environment is drawn.
      multiple: that the rows of each bucket are.
    """

    window: int
    rows: int
    seed: int
    draws: DrawsConfig = DrawsConfig()
    multiple: int = 1


def mix(
    dataset: Dataset,
    codecs: collections.abc.Sequence[Codec],
    shape: Shape,
    streams: Streams = ALL_STREAMS,
    share: tuple[int, int] = (0, 1),
) -> Mixture:
    """The batches: one bucket of rows for each set of padded widths, its share that of its environments.

    Args:
      dataset: where the windows lie.
      codecs: of all environments; a row's `environment` is the position in this list.
      shape: of the batches.
      streams: which streams are drawn from; environments that have none of them are left out.
      share: which of how many shares of the rows this process brings.

    Raises:
      MixtureError: no window can be drawn, or the rows cannot be shared.
      ConfigError: the draws or the rows contradict themselves.
    """
    members = collections.defaultdict(list)
    for index, codec in enumerate(codecs):
        if not streams.held_out or any(streams.count(part.streams) for part in dataset.parts(codec.card.id)):
            members[codec.bucket].append(index)
    if not members:
        raise MixtureError(
            f"no environment has {streams.every} streams in a part, to hold one of them out: collect more streams, or "
            "hold out more of them (a smaller number), or none (0)"
        )

    def source(indices: list[int], weights: np.ndarray) -> WindowSource:
        encode = _Encode(tuple(codecs[index] for index in indices), tuple(indices))
        ids = [codec.card.id for codec in encode.codecs]
        return WindowSource(dataset, ids, weights.tolist(), shape.window, shape.seed, encode, streams)

    wanted = _shares(dataset, [codec.card.id for codec in codecs], shape.draws)
    wanted /= wanted[[index for indices in members.values() for index in indices]].sum()
    buckets = sorted(members)
    parts = allot([wanted[members[bucket]] for bucket in buckets], shape.rows, shape.draws.floor, shape.multiple)
    return Mixture(
        {
            bucket.name: BucketRows(source(members[bucket], part.shares), part.rows)
            for bucket, part in zip(buckets, parts, strict=True)
        },
        *share,
    )

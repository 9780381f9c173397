"""What a model is trained on: the environments of a dataset that fit it, and batches of their windows."""

from __future__ import annotations

import collections.abc
import typing

import numpy as np

from data.batches import Shape, make_codecs, mix
from data.mixture import Mixture, MixtureError, Streams
from data.store import Dataset
from experiments.harness import progress
from experiments.harness.workdir import WorkdirError
from ldm_jax.cards import CardError
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import ModelConfig
from ldm_jax.spaces import SpaceError
from ldm_jax.training import padding
from ldm_jax.training.bucket_work import EACH_BUCKET

_SHARES_OVER = 100
"""Batches that realised shares are counted in."""


def _fitting_codecs(
    dataset: Dataset, ids: collections.abc.Sequence[str], model: ModelConfig, shape: Shape, held_out: int
) -> list[Codec]:
    codecs, reasons = list[Codec](), list[str]()
    for id in ids:
        try:
            (codec,) = make_codecs(dataset, [id], model)
            mix(dataset, [codec], Shape(shape.window, 1, shape.seed), Streams(held_out))
        except (CardError, ConfigError, MixtureError, SpaceError) as error:
            reasons.append(str(error) if id in str(error) else f"{id}: {error}")
        else:
            codecs.append(codec)
    if not codecs:
        raise ConfigError(f"no environment can be trained on: {'; '.join(reasons[:3])}")
    for reason in reasons:
        progress.logger.warning("left out: %s", reason)
    return codecs


class Batches(typing.NamedTuple):
    """The batches of a run, this process's share.

    Attributes:
      codecs: of each environment index.
      train: those to train on.
      held_out: those of the streams held out, or None.
    """

    codecs: list[Codec]
    train: Mixture
    held_out: Mixture | None

    @property
    def rows(self) -> dict[str, int]:
        """The rows of each bucket, over all processes."""
        return {name: bucket.rows for name, bucket in self.train.buckets.items()}

    def shares(self, step: int) -> dict[str, float]:
        """The share that each environment had of the rows of the last hundred batches, up to that of a step."""
        counts = dict.fromkeys((codec.card.id for codec in self.codecs), 0)
        first = max(step - _SHARES_OVER, 0)
        for source, rows in self.train.buckets.values():
            drawn = np.bincount(source.environments(range(first * rows, step * rows)), minlength=len(source.ids))
            counts |= dict(zip(source.ids, drawn.tolist(), strict=True))
        total = sum(counts.values())
        return {id: count / total for id, count in counts.items()}


def make_batches(
    dataset: Dataset,
    ids: collections.abc.Sequence[str],
    model: ModelConfig,
    shape: Shape,
    drawn_slots: int,
    held_out: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """The batches of the environments that a model can be trained on; the log says which are left out, and why.

    Args:
      dataset: has the data.
      ids: the environments; empty for all.
      model: that they have to fit.
      shape: of the batches.
      drawn_slots: of an action, as many as a step of training looks at: what a bucket costs depends on it.
      held_out: each so-many-th stream is kept from training; 0 for none.
      share: which of how many shares of the rows this process brings.

    Raises:
      StoreError: the dataset has no such environment.
      ConfigError: none of them fits; says why.
      MixtureError: nothing can be held out, or the rows cannot be shared.
    """
    if not (ids := ids or dataset.ids):
        raise WorkdirError(f"the dataset {dataset.url} has no environment: collect first, or see why all were refused")
    fitting = [codec.card.id for codec in _fitting_codecs(dataset, ids, model, shape, held_out)]
    codecs = make_codecs(dataset, fitting, model, draws=shape.draws, each=EACH_BUCKET, drawn_slots=drawn_slots)

    def drawn(streams: Streams) -> Mixture:
        return mix(dataset, codecs, shape, streams, share)

    return Batches(codecs, drawn(Streams(held_out)), drawn(Streams(held_out, held_out=True)) if held_out else None)


def log_padding(mixture: Mixture, step: int) -> None:
    """Says which shares of what is computed with are not padding, in the batch of a step."""
    progress.log("useful", **padding.measure_useful(mixture[step])._asdict())

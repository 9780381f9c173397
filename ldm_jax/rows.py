"""Rows of any environments of one bucket, acting as one batch: what a codec knows is data here, not code.

Observations are encoded and actions decoded in NumPy, by the codec of each environment; the one compiled program in
between knows the shapes of the model, the widths of the bucket and the number of rows, and nothing else. So it serves
every environment of the bucket, and a row's actions do not depend on who else is in the batch.
"""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.acting import ActingError, Decoding, decode, resolve_decoding
from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.buckets import Bucket
from ldm_jax.encoding.codec import Codec, Features, Signature
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.decoder import Cache, init_cache
from ldm_jax.model.network import Inputs, Params, make_model
from ldm_jax.types import Array, Key

_FORMS: tuple[Decoding, ...] = ("greedy", "mode", "sample")


class Draws(typing.NamedTuple):
    """How each of R rows takes its actions; a pytree.

    Attributes:
      seed: `uint32 [R, 2]`, of the row's own randomness.
      step: `uint32 [R]`, how often the row has acted.
      form: `int32 [R]`, which of greedy, mode and sample, counted from 0.
      fresh: `bool [R]`, the row has seen nothing: what the cache holds of it is forgotten first.
    """

    seed: Array
    step: Array
    form: Array
    fresh: Array


def seeds(key: Key, rows: int) -> np.ndarray:
    """Seeds `uint32 [rows, 2]` of the randomness of rows, the same in any batch and any kind of process."""
    return np.asarray(jax.random.bits(key, (rows, 2), np.uint32))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def act_rows(params: Params, cache: Cache, inputs: Inputs, draws: Draws, *, cfg: ModelConfig) -> tuple[Cache, Slots]:
    """One step of R rows: compiled once for each configuration, bucket and number of rows.

    Args:
      params: of the model.
      cache: of R rows; its arrays are used up.
      inputs: features and signature of one bucket, leaves `[R, ...]`.
      draws: how each row takes its action.
      cfg: shapes of the model.

    Returns:
      The cache with one more step, and the actions as slots `[R, K]` and `[R, C]`.
    """
    cache = cache._replace(length=jnp.where(draws.fresh, 0, cache.length))
    now = Inputs(jax.tree.map(lambda leaf: leaf[:, None], inputs.features), inputs.signature)
    predictions, after = make_model(cfg).apply(params, {"rows": now}, cache)
    assert after is not None  # one was given
    said = jax.tree.map(lambda leaf: leaf[:, 0], predictions["rows"])
    keys = jax.vmap(jax.random.fold_in)(
        jax.random.wrap_key_data(jnp.asarray(draws.seed), impl="threefry2x32"), draws.step
    )
    forms = [jax.vmap(functools.partial(decode, cfg, decoding=form))(said, key=keys) for form in _FORMS]
    chosen = [draws.form[:, None] == i for i in range(len(forms))]
    return after, jax.tree.map(lambda *options: jnp.select(chosen, options), *forms)


class Seats:
    """R places for rows of environments of one bucket; a row comes with an empty context and leaves when it is done.

    Attributes:
      bucket: widths of what the rows see and do.
      rows: R.
    """

    def __init__(self, cfg: ModelConfig, params: Params, bucket: Bucket, rows: int):
        """Makes room.

        Args:
          cfg: shapes of the model.
          params: of the model, on the device.
          bucket: of the environments.
          rows: R.
        """
        self.bucket, self.rows = bucket, rows
        self._cfg, self._params = cfg, params
        # Of their own: arrays that share memory cannot be used up.
        self._cache = jax.tree.map(jnp.copy, init_cache(cfg, rows))
        self._free = np.ones(rows, bool)
        self._features: Features | None = None
        self._signature: Signature | None = None
        self._draws = Draws(
            np.zeros((rows, 2), np.uint32), np.zeros(rows, np.uint32), np.zeros(rows, np.int32), np.ones(rows, bool)
        )
        self._slots: Slots | None = None

    @property
    def free(self) -> int:
        """The number of free places."""
        return int(self._free.sum())

    @property
    def waiting(self) -> bool:
        """Whether actions are on their way."""
        return self._slots is not None

    def seat(self, codec: Codec, seeds: np.ndarray, decoding: Decoding) -> np.ndarray:
        """Gives places to the rows of an environment.

        Args:
          codec: of the environment, of this bucket.
          seeds: of each row, see `seeds`.
          decoding: how its actions are taken.

        Returns:
          The places, `int [len(seeds)]`.

        Raises:
          ActingError: another bucket, or not so many free places.
        """
        if codec.bucket != self.bucket:
            raise ActingError(f"{codec.card.id} is of bucket {codec.bucket.name}, expected {self.bucket.name}")
        if len(seeds) > self.free:
            raise ActingError(f"{codec.card.id} brings {len(seeds)} rows, expected at most {self.free}, the free ones")
        places = np.flatnonzero(self._free)[: len(seeds)]
        self._free[places] = False
        self._signature = _written(self._signature, codec.signature, places, self.rows)
        self._draws.seed[places], self._draws.step[places] = seeds, 0
        self._draws.form[places] = _FORMS.index(resolve_decoding(decoding, codec.card))
        return places

    def leave(self, places: np.ndarray) -> None:
        """Frees places for others."""
        self._free[places] = True

    def write(self, places: np.ndarray, features: Features) -> None:
        """Says what the rows at some places see, `[len(places), ...]`; not while actions are on their way."""
        self._features = _written(self._features, features, places, self.rows)

    def send(self) -> None:
        """Lets all rows act once; does not wait for what they do.

        Raises:
          ActingError: the actions of the last time were not received, or nothing was written.
        """
        if self._slots is not None or self._features is None or self._signature is None:
            raise ActingError("a batch acts out of order, expected: seat, then in turn write, send and receive")
        self._draws.fresh[:] = self._draws.step == 0
        inputs = Inputs(self._features, self._signature)
        self._cache, self._slots = act_rows(self._params, self._cache, inputs, self._draws, cfg=self._cfg)

    def receive(self) -> Slots:
        """Waits for the actions of all rows, `[R, K]` and `[R, C]`.

        Raises:
          ActingError: none were sent for.
        """
        if self._slots is None:
            raise ActingError("a batch has no actions on their way, expected: write, send, then receive")
        # What was written is read until now: on a CPU it is not copied.
        slots, self._slots = jax.tree.map(np.asarray, self._slots), None
        self._draws.step[:] += np.uint32(1)
        return slots


_Tree = typing.TypeVar("_Tree", Features, Signature)


def _written(buffers: _Tree | None, values: _Tree, places: np.ndarray, rows: int) -> _Tree:
    """Puts values, with an axis of the places or without, into buffers `[rows, ...]`, made if there are none."""
    lead: int = isinstance(values, Features)
    if buffers is None:
        buffers = jax.tree.map(lambda leaf: np.zeros((rows, *leaf.shape[lead:]), leaf.dtype), values)
    for buffer, value in zip(jax.tree.leaves(buffers), jax.tree.leaves(values), strict=True):
        buffer[places] = value
    return buffers

"""Rows of any environments of one bucket, acting as one batch: what a codec knows is data here, not code.

Observations are encoded and actions decoded in NumPy, by the codec of each environment; the one compiled program in
between knows the shapes of the model, the widths of the bucket and the number of rows, and nothing else. So it serves
every environment of the bucket, and a row's actions do not depend on who else is in the batch.
"""

from __future__ import annotations

import collections.abc
import functools
import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.acting.agent import ActingError
from ldm_jax.acting.decoding import Decoding, decode, resolve_decoding
from ldm_jax.cards import EnvironmentCard
from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.codec import Codec, Features, Signature
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.decoder import Cache, init_cache
from ldm_jax.model.heads import Predictions
from ldm_jax.model.network import Inputs, Params, make_model
from ldm_jax.spaces import zeros
from ldm_jax.types import Array, Key, PyTree, TimeStep

_FORMS: tuple[Decoding, ...] = ("greedy", "mode", "sample")


class RowDraws(typing.NamedTuple):
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


def form_of(decoding: Decoding, card: EnvironmentCard) -> int:
    """The `form` of `RowDraws` for a decoding in the environment of a card."""
    return _FORMS.index(resolve_decoding(decoding, card))


def seeds(key: Key, rows: int) -> np.ndarray:
    """Seeds `uint32 [rows, 2]` of the randomness of rows, the same in any batch and any kind of process."""
    return np.asarray(jax.random.bits(key, (rows, 2), np.uint32))


def _act_rows(
    params: Params, cache: Cache, inputs: Inputs, draws: RowDraws, *, cfg: ModelConfig
) -> tuple[Cache, Slots]:
    """One step of R rows.

    Args:
      params: of the model.
      cache: of R rows.
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
    taken = [_take(cfg, form, said, keys) for form in ("greedy", "mode")]
    # Most batches have no row that draws: they are not to pay for it.
    drawn = (draws.form == _FORMS.index("sample")).any()
    taken.append(jax.lax.cond(drawn, lambda: _take(cfg, "sample", said, keys), lambda: taken[0]))
    chosen = [draws.form[:, None] == i for i in range(len(_FORMS))]
    return after, jax.tree.map(lambda *options: jnp.select(chosen, options), *taken)


def _take(cfg: ModelConfig, decoding: Decoding, predictions: Predictions, keys: Array) -> Slots:
    """The actions of rows, each with a key of its own."""
    return jax.vmap(lambda one, key: decode(cfg, one, decoding, key))(predictions, keys)


act_rows = jax.jit(_act_rows, static_argnames="cfg")
"""One step of R rows, compiled once for each configuration, bucket and number of rows."""


class _Packed(typing.NamedTuple):
    """Where the arrays of a pytree lie in one buffer of bytes; hashable."""

    leaves: tuple[tuple[int, tuple[int, ...], str], ...]
    structure: typing.Any

    @classmethod
    def of(cls, tree: PyTree) -> _Packed:
        leaves, structure = jax.tree.flatten(tree)
        offsets = itertools.accumulate((-(-leaf.nbytes // _ALIGNED) * _ALIGNED for leaf in leaves), initial=0)
        return cls(
            tuple((offset, leaf.shape, leaf.dtype.name) for offset, leaf in zip(offsets, leaves, strict=False)),
            structure,
        )

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return max(offset + math.prod(shape) * np.dtype(dtype).itemsize for offset, shape, dtype in self.leaves)

    def views(self, buffer: np.ndarray) -> PyTree:
        """The arrays, as parts of the buffer."""
        return self._read(buffer, lambda part, shape, dtype: part.view(dtype).reshape(shape))

    def unpack(self, buffer: Array) -> PyTree:
        """The arrays, where they are computed with."""
        return self._read(buffer, _from_bytes)

    def _read(self, buffer: Array, read: collections.abc.Callable[[typing.Any, tuple[int, ...], str], Array]) -> PyTree:
        leaves = []
        for offset, shape, dtype in self.leaves:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            leaves.append(read(buffer[offset : offset + size], shape, dtype))
        return jax.tree.unflatten(self.structure, leaves)


_ALIGNED = 64
"""Bytes."""


def _from_bytes(part: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    width = np.dtype(dtype).itemsize
    if dtype == "bool":
        return part.reshape(shape) != 0
    return part.reshape(shape) if width == 1 else jax.lax.bitcast_convert_type(part.reshape(*shape, width), dtype)


@functools.partial(jax.jit, static_argnames=("cfg", "packed"), donate_argnames="cache")
def act_packed(
    params: Params, cache: Cache, signature: Signature, buffer: Array, *, packed: _Packed, cfg: ModelConfig
) -> tuple[Cache, Slots]:
    """`act_rows` in place, of what lies in one buffer: to hand over many small arrays takes longer than to act.

    Args:
      params: of the model.
      cache: of R rows; its arrays are used up.
      signature: leaves `[R, ...]`.
      buffer: `uint8`, with features and draws.
      packed: where they lie in it.
      cfg: shapes of the model.

    Returns:
      As `act_rows`.
    """
    features, draws = packed.unpack(buffer)
    return _act_rows(params, cache, Inputs(features, signature), draws, cfg=cfg)


class Seats:
    """R places for rows of environments of one bucket; a row comes with an empty context and leaves when it is done.

    Attributes:
      bucket: widths of what the rows see and do.
      rows: R.
    """

    def __init__(self, cfg: ModelConfig, params: Params, codec: Codec, rows: int):
        """Makes room.

        Args:
          cfg: shapes of the model.
          params: of the model, on the device.
          codec: of one of the environments; the others' have the same bucket.
          rows: R.
        """
        self.bucket, self.rows = codec.bucket, rows
        self._cfg, self._params = cfg, params
        self._cache = init_cache(cfg, rows)
        self._free = np.ones(rows, bool)
        features, self._signature, _ = _nothing(codec, rows)
        nobody = np.zeros(rows, np.uint32)
        draws = RowDraws(np.zeros((rows, 2), np.uint32), nobody, nobody.astype(np.int32), np.ones(rows, bool))
        self._packed = _Packed.of((features, draws))
        self._buffer = np.zeros(self._packed.size, np.uint8)
        self._features, self._draws = self._packed.views(self._buffer)
        self._told: Signature | None = None
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
        _put(self._signature, codec.signature, places)
        self._told = None
        self._draws.seed[places], self._draws.step[places] = seeds, 0
        self._draws.form[places] = _FORMS.index(resolve_decoding(decoding, codec.card))
        return places

    def leave(self, places: np.ndarray) -> None:
        """Frees places for others."""
        self._free[places] = True

    def write(self, places: np.ndarray, features: Features) -> None:
        """Says what the rows at some places see, `[len(places), ...]`; not while actions are on their way."""
        _put(self._features, features, places)

    def warm_up(self) -> None:
        """Compiles what is not compiled yet, by letting nobody act; any thread may do so, before anyone is seated."""
        self._send()
        self.receive()

    def send(self) -> None:
        """Lets all rows act once; does not wait for what they do.

        Raises:
          ActingError: the actions of the last time were not received, or nobody is seated.
        """
        if self._slots is not None or self._free.all():
            raise ActingError("a batch acts out of order, expected: seat, then in turn write, send and receive")
        self._send()

    def _send(self) -> None:
        self._draws.fresh[:] = self._draws.step == 0
        if self._told is None:
            self._told = jax.tree.map(jnp.array, self._signature)  # copied: the next one is written into it
        self._cache, self._slots = act_packed(
            self._params, self._cache, self._told, self._buffer, packed=self._packed, cfg=self._cfg
        )

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


def _nothing(codec: Codec, rows: int) -> Inputs:
    """Buffers `[rows, ...]` for what rows of the codec's bucket see, with zeros in them."""
    seen, acted = (zeros(space, (rows,)) for space in (codec.card.observation_space, codec.card.action_space))
    no_R = np.zeros(rows, bool)
    nothing = TimeStep(observation=seen, reward=np.zeros(rows, np.float32), terminated=no_R, truncated=no_R, first=no_R)
    features = codec.features(nothing, acted, no_R)
    signature = jax.tree.map(lambda leaf: np.zeros((rows, *leaf.shape), leaf.dtype), codec.signature)
    return Inputs(jax.tree.map(np.zeros_like, features), signature)


def _put(buffers: PyTree, values: PyTree, places: np.ndarray) -> None:
    for buffer, value in zip(jax.tree.leaves(buffers), jax.tree.leaves(values), strict=True):
        buffer[places] = value

"""The mixture: every training batch as a pure function of one integer, and an iterator that reads ahead."""

from __future__ import annotations

import bisect
import collections
import collections.abc
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import operator
import typing

import jax
import numpy as np

from ldm_jax.errors import LdmError
from ldm_jax.types import PyTree

from .store import Dataset, Part, Request, read_stacked

LENGTH = 1 << 62
"""What a source without an end says its length is."""


class MixtureError(LdmError, ValueError):
    """A mixture that cannot be drawn: weights, lengths, or windows that do not stack."""


def _whole(name: str, value: typing.Any, least: int) -> int:
    """A whole number, of whatever type, as Python's; no comparison would find a NaN."""
    try:
        whole = operator.index(value)
    except TypeError as error:
        raise MixtureError(f"{name} is {value!r}, expected a whole number") from error
    if whole < least:
        raise MixtureError(f"{name} is {whole}, expected at least {least}")
    return whole


class Transform(typing.Protocol):
    """Turns windows of one environment into rows of a batch; the shapes must be equal within a bucket."""

    def __call__(self, environment_index: int, leaves: dict[str, np.ndarray], seeds: np.ndarray) -> PyTree:
        """Makes the rows.

        Args:
          environment_index: position of the environment in the source's `ids`.
          leaves: one array `[N, L, ...]` per leaf of the store, in its own dtype.
          seeds: `uint64 [N]`, 64 bits that belong to each window, for what is random in the transform.

        Returns:
          A pytree of NumPy arrays `[N, ...]`; a row depends on its own window alone.
        """


class Window(typing.NamedTuple):
    """Where a window lies, and the seed that belongs to it."""

    environment_index: int
    part: Part
    stream: int
    start: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Streams:
    """Which streams of a part are drawn from: all but each `every`-th, or those alone; 0 for all.

    Attributes:
      every: how many streams there are to each one held out.
      held_out: whether the ones held out are meant.

    Raises:
      MixtureError: nothing can be held out so.
    """

    every: int = 0
    held_out: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", _whole("every", self.every, 0))
        if self.every == 1 or (self.held_out and not self.every):
            raise MixtureError(f"every {self.every}th stream cannot be held out; expected 2 or more, or 0 for none")

    def count(self, streams: int) -> int:
        """How many of a part's streams are meant."""
        kept = streams // self.every if self.every else 0
        return kept if self.held_out else streams - kept

    def locate(self, index: int) -> int:
        """The stream in the part that is number `index` of those meant."""
        if self.held_out:
            return (index + 1) * self.every - 1
        return index + index // (self.every - 1) if self.every else index


ALL_STREAMS = Streams()


class WindowSource:
    """Windows of many environments, drawn by weight; a Grain random-access source.

    Item i is the same whoever asks and in whatever order: a hash of the seed and i chooses the environment by weight,
    then one of all the environment's windows, uniformly. Windows do not cross parts: a part shorter than a window gives
    none.

    Args:
      dataset: parts written later are not drawn from.
      ids: the environments.
      weights: positive, one per environment; only their ratios count.
      window_length: L, in steps.
      seed: of the draws.
      transform: see `Transform`.
      streams: which streams of each part are drawn from.

    Raises:
      MixtureError: weights that are not positive or not finite, an id named twice, or an environment whose parts hold
        no window to draw.
      StoreError: the dataset has no such environment.
    """

    def __init__(
        self,
        dataset: Dataset,
        ids: collections.abc.Sequence[str],
        weights: collections.abc.Sequence[float],
        window_length: int,
        seed: int,
        transform: Transform,
        streams: Streams = ALL_STREAMS,
    ):
        self.ids, self._streams, self._transform = tuple(ids), streams, transform
        self.window_length = window_length = _whole("window_length", window_length, 1)
        self.seed = operator.index(seed)
        self.weights = tuple(map(float, weights))
        if not self.ids or len(self.ids) != len(self.weights):
            raise MixtureError(
                f"got {len(self.ids)} ids and {len(self.weights)} weights, expected as many, at least one"
            )
        if twice := [id for id, count in collections.Counter(self.ids).items() if count > 1]:
            raise MixtureError(f"{twice[0]} is named twice, expected each id once; give it a weight instead")
        for id, weight in zip(self.ids, self.weights, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise MixtureError(
                    f"the weight of {id} is {weight}, expected a positive number; leave {id} out instead"
                )
        # Over the largest: their sum may be infinite.
        relative = np.array(self.weights) / max(self.weights)
        self._cumulative = np.cumsum(relative) / relative.sum()
        self._parts = [self._long_enough(dataset, id) for id in self.ids]
        # The last window of each part, plus one, in the numbering of all windows of the environment.
        self._ends = [
            list(itertools.accumulate((part.steps - window_length + 1) * streams.count(part.streams) for part in parts))
            for parts in self._parts
        ]
        digest = hashlib.blake2b(json.dumps([self.seed, self.ids]).encode(), digest_size=24).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def _long_enough(self, dataset: Dataset, id: str) -> list[Part]:
        parts = dataset.parts(id)
        if long_enough := [part for part in parts if part.steps >= self.window_length]:
            if any(self._streams.count(part.streams) for part in long_enough):
                return long_enough
            raise MixtureError(
                f"each {self._streams.every}th stream is held out, but the parts of {id} have at most "
                f"{max(part.streams for part in long_enough)}: collect more streams or hold out more of them"
            )
        raise MixtureError(
            f"a window is {self.window_length} steps, but the longest part of {id} has "
            f"{max(part.steps for part in parts)}: collect longer streams or shorten the window"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with what is drawn: the environments, their data, weights, window length or seed."""
        data = [
            [[part.name, sorted(record.checksum for record in part.record.leaves.values())] for part in parts]
            for parts in self._parts
        ]
        described = json.dumps(
            [self.ids, self.weights, self.window_length, self.seed, data, dataclasses.astuple(self._streams)]
        )
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WindowSource)
            and self.fingerprint == other.fingerprint
            and self._transform == other._transform
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def environments(self, indices: collections.abc.Sequence[int]) -> np.ndarray:
        """`int64 [I]`, the position in `ids` of the environment of each of the given items."""
        return self._choose(_draws(self._keys[:1], np.asarray(indices, np.uint64))[0])

    def _choose(self, draws: np.ndarray) -> np.ndarray:
        chosen = np.searchsorted(self._cumulative, _unit(draws), side="right")
        return np.minimum(chosen, len(self.ids) - 1)  # the cumulative sum may end below 1

    def locate(self, indices: collections.abc.Sequence[int]) -> list[Window]:
        """The windows of the given items, without reading them."""
        environment_draw, window_draw, seeds = _draws(self._keys, np.asarray(indices, np.uint64))
        windows = []
        for environment, unit, seed in zip(
            self._choose(environment_draw).tolist(), _unit(window_draw).tolist(), seeds.tolist(), strict=True
        ):
            ends = self._ends[environment]
            window = min(int(unit * ends[-1]), ends[-1] - 1)
            position = bisect.bisect_right(ends, window)
            part = self._parts[environment][position]
            first = ends[position - 1] if position else 0
            stream, start = divmod(window - first, part.steps - self.window_length + 1)
            windows.append(Window(environment, part, self._streams.locate(stream), start, seed))
        return windows

    def read(self, indices: collections.abc.Sequence[int]) -> PyTree:
        """The given items, stacked; the windows of one environment are read and transformed together.

        Args:
          indices: of the items, at least one.

        Returns:
          What the transform makes of each, in arrays `[N, ...]`.

        Raises:
          StoreError: a part is damaged.
          MixtureError: the transform makes rows of different structure, shape or dtype.
        """
        windows, length = self.locate(indices), self.window_length
        places = collections.defaultdict[int, list[int]](list)
        for place, window in enumerate(windows):
            places[window.environment_index].append(place)
        rows = _Rows(len(windows))
        for environment, own in places.items():
            drawn = [windows[place] for place in own]
            leaves = read_stacked(
                [Request(part, part.leaf_names, start, start + length, stream) for _, part, stream, start, _ in drawn]
            )
            seeds = np.array([window.seed for window in drawn], np.uint64)
            rows.put(own, self._transform(environment, leaves, seeds))
        return rows.stacked()

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> PyTree:
        return jax.tree.map(operator.itemgetter(0), self.read([index]))

    def __repr__(self) -> str:
        return f"WindowSource({len(self.ids)} environments, {self.window_length} steps, {self.fingerprint})"


class _Rows:
    """The rows of a batch, which come in groups and are written to their places once."""

    def __init__(self, count: int):
        self._count = count
        self._structure: typing.Any = None
        self._arrays = list[np.ndarray]()

    def put(self, places: list[int], rows: PyTree) -> None:
        """Writes rows, a pytree of arrays `[N, ...]`, to N places."""
        values, structure = jax.tree.flatten(rows)
        if self._structure is None:
            self._structure = structure
            self._arrays = [np.empty((self._count, *value.shape[1:]), value.dtype) for value in values]
        if structure != self._structure:
            raise MixtureError(f"one has the structure {structure}, another {self._structure}")
        for array, value in zip(self._arrays, values, strict=True):
            if (value.shape[1:], value.dtype) != (array.shape[1:], array.dtype):
                got, other = (f"{one.dtype}{list(one.shape[1:])}" for one in (value, array))
                raise MixtureError(f"one has an array {got} where another has {other}")
            array[places] = value

    def stacked(self) -> PyTree:
        """All of them."""
        return jax.tree.unflatten(self._structure, self._arrays)


class BucketRows(typing.NamedTuple):
    """A source and the number of its rows in every global batch."""

    source: WindowSource
    rows: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Batches of several buckets, one of which is `mixture[s]`; a Grain random-access source.

    The global batch s holds the items `s * rows` to `(s + 1) * rows` of each bucket, whatever the number of hosts; each
    host has an equal, contiguous share of the rows. So s is all there is to keep for a resume.

    Attributes:
      buckets: by name.
      process_index: this host.
      process_count: the number of hosts; divides the rows of every bucket.

    Raises:
      MixtureError: there is no bucket, or rows that the hosts cannot share equally.
    """

    buckets: collections.abc.Mapping[str, BucketRows]
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if not self.buckets:
            raise MixtureError("got no bucket, expected at least one")
        for name in ("process_index", "process_count"):
            object.__setattr__(self, name, _whole(name, getattr(self, name), 0))
        if not 0 <= self.process_index < self.process_count:
            raise MixtureError(f"process_index is {self.process_index}, expected 0 to {self.process_count - 1}")
        for name, bucket in self.buckets.items():
            if _whole(f"rows of {name}", bucket.rows, 0) < 1 or bucket.rows % self.process_count:
                raise MixtureError(
                    f"bucket {name!r} has {bucket.rows} rows, expected a positive multiple of the "
                    f"{self.process_count} hosts"
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with what the batches hold, not with the hosts; keep it beside s and compare before a resume."""
        described = json.dumps(
            sorted((name, source.fingerprint, rows) for name, (source, rows) in self.buckets.items())
        )
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return LENGTH // max(bucket.rows for bucket in self.buckets.values())

    def __getitem__(self, step: int) -> dict[str, PyTree]:
        return {name: self._rows(name, *bucket, step) for name, bucket in self.buckets.items()}

    def _rows(self, name: str, source: WindowSource, rows: int, step: int) -> PyTree:
        share = rows // self.process_count
        first = step * rows + self.process_index * share
        try:
            return source.read(range(first, first + share))
        except MixtureError as error:
            raise MixtureError(f"the rows of bucket {name!r} differ in structure or shape: {error}") from error

    def batches(self, start: int = 0, prefetch: int = 4) -> collections.abc.Iterator[dict[str, PyTree]]:
        """Yields `mixture[start]`, `mixture[start + 1]`, ... without end, read ahead by a thread.

        Args:
          start: s of the first batch.
          prefetch: batches to hold ready.

        Returns:
          An iterator; `close()` it, or drop it, to stop the thread.

        Raises:
          StoreError: a part is damaged.
          MixtureError: the rows of a bucket do not stack.
        """
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        iterator = iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()


def _draws(keys: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Hashes: `uint64 [K, I]` of keys `uint64 [K]` and indices `uint64 [I]`.

    Source: SplitMix64, Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    state = keys[:, None] + (indices[None] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _unit(draws: np.ndarray) -> np.ndarray:
    """The upper 53 bits as `float64` in [0, 1)."""
    return (draws >> np.uint64(11)) * 2.0**-53

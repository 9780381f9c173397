"""The trajectory store: one group of immutable parts per environment, made visible by one manifest.

    <url>/manifest.json                     written last, replaced as a whole
    <url>/<id>/card-<hash>.json             the environment card
    <url>/<id>/part-00001/<leaf>            one zarr3 array [T, B, ...] per leaf
    <url>/<id>/part-00001/episodes.npy      the episode index, one NumPy record per episode

What the manifest does not name does not exist, so a writer may die anywhere: it loses the part in flight and no more. A
claim file beside a part in flight keeps two writers from using one folder; the next writer of the group takes over the
claim, and the leftovers, of a writer that died.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import os
import random
import re
import secrets
import socket
import sys
import time
import typing

import numpy as np
import tensorstore as ts

from ldm_jax.cards import EnvironmentCard

from . import manifest
from .manifest import ArrayRecord, EpisodeIndex, GroupRecord, Groups, PartRecord, StoreError

MANIFEST = "manifest.json"
CACHE_BYTES = 1 << 30
"""Bound on the decoded chunks that one process keeps in memory."""
CLAIM_AGE_S = 24 * 3600.0
"""A claim from another machine counts as abandoned after this."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """An immutable part of a group: T steps of B streams of consecutive episodes."""

    kvstore: ts.KvStore
    id: str
    record: PartRecord

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.record.name

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """The names of the leaves, sorted."""
        return tuple(sorted(self.record.leaves))

    @functools.cached_property
    def steps(self) -> int:
        """T, the steps of every stream."""
        return next(iter(self.record.leaves.values())).metadata["shape"][0]

    @functools.cached_property
    def streams(self) -> int:
        """B, the number of streams."""
        return next(iter(self.record.leaves.values())).metadata["shape"][1]

    @functools.cached_property
    def episodes(self) -> EpisodeIndex:
        """The episode index, read at the first use.

        Raises:
          StoreError: it is damaged or missing.
        """
        data = self.kvstore.read(f"{self.id}/{self.name}/{manifest.EPISODES}").result().value
        if manifest.checksum(data) != self.record.episodes:
            raise self._damaged(manifest.EPISODES, "its checksum differs from the manifest's")
        return manifest.decode_episodes(data)

    def leaf(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape, without `[T, B]`, and dtype of a leaf; raises StoreError where there is none."""
        metadata = self._leaf_record(name).metadata
        return tuple(metadata["shape"][2:]), np.dtype(metadata["data_type"])

    def read(self, names: collections.abc.Sequence[str], start: int, stop: int, stream: int) -> dict[str, np.ndarray]:
        """Reads steps `start` to `stop` of one stream; see `read_many`."""
        return read_many([Request(self, tuple(names), start, stop, stream)])[0]

    @functools.cached_property
    def _arrays(self) -> dict[str, ts.TensorStore]:
        return {}

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            spec = _array_spec(self.kvstore, f"{self.id}/{self.name}/", name, self._leaf_record(name).metadata)
            self._arrays[name] = ts.open(spec, open=True, assume_metadata=True, context=_context()).result()
        return self._arrays[name]

    def _leaf_record(self, name: str) -> ArrayRecord:
        if name not in self.record.leaves:
            raise StoreError(f"{self.name} of {self.id} has no leaf {name!r}, only {', '.join(self.leaf_names)}")
        return self.record.leaves[name]

    def _result(self, name: str, future: ts.Future) -> np.ndarray:
        try:
            return np.asarray(future.result())
        except (ValueError, OSError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, leaf: str, reason: object) -> StoreError:
        return StoreError(
            f"{self.name} of {self.id}, leaf {leaf!r}, cannot be read: {reason}. Where the file is missing, truncated "
            f"or damaged, delete the group (data.store.remove_group) and collect {self.id} again"
        )


class Request(typing.NamedTuple):
    """A window to read: steps `start` to `stop` of stream `stream` of a part."""

    part: Part
    names: tuple[str, ...]
    start: int
    stop: int
    stream: int


def read_many(requests: collections.abc.Sequence[Request]) -> list[dict[str, np.ndarray]]:
    """Reads many windows at once, of one part or of many.

    Args:
      requests: the windows; steps in [0, T], streams in [0, B).

    Returns:
      For each window, one array `[stop - start, ...]` per leaf, in its own dtype.

    Raises:
      StoreError: there is no such leaf, step or stream, or a part is damaged.
    """
    pending = []
    for part, names, start, stop, stream in requests:
        if not (0 <= start < stop <= part.steps and 0 <= stream < part.streams):
            raise StoreError(
                f"got steps {start} to {stop} of stream {stream}, but {part.name} of {part.id} has {part.steps} steps "
                f"and {part.streams} streams"
            )
        pending.append((part, [(name, part._array(name)[start:stop, stream].read()) for name in names]))
    return [{name: part._result(name, future) for name, future in futures} for part, futures in pending]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset as it stood when it was opened or written to through this object; `open_dataset` sees later parts."""

    url: str
    kvstore: ts.KvStore
    groups: Groups

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the environments, sorted."""
        return tuple(sorted(self.groups))

    def card(self, id: str) -> EnvironmentCard:
        """The card of an environment.

        Raises:
          StoreError: the dataset has no such id, or its card is damaged.
        """
        name = self._group(id).card
        data = self.kvstore.read(f"{id}/{name}").result().value
        if name != manifest.card_name(data):
            raise StoreError(
                f"the card {name} of {id} in {self.url} is missing or damaged: delete the group and collect {id} again"
            )
        return EnvironmentCard.from_json(json.loads(data))

    def parts(self, id: str) -> tuple[Part, ...]:
        """The parts of an environment, in the order of their names.

        Raises:
          StoreError: the dataset has no such id.
        """
        return tuple(Part(self.kvstore, id, record) for record in self._group(id).parts)

    def _group(self, id: str) -> GroupRecord:
        if id not in self.groups:
            near = difflib.get_close_matches(id, self.ids)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(self.ids)} environments, see `ids`"
            raise StoreError(f"the dataset {self.url} has no environment {id!r}: {hint}")
        return self.groups[id]


def open_dataset(url: str | os.PathLike[str]) -> Dataset:
    """Opens a dataset.

    Args:
      url: a path, or a `file://`, `memory://`, `s3://` or `gs://` URL.

    Returns:
      The dataset as it is now.

    Raises:
      StoreError: there is no dataset, something else is there, or it has another schema version.
    """
    kvstore = _open_kvstore(url)
    groups, _ = _read_manifest(str(url), kvstore)
    if groups is None:
        raise StoreError(f"there is no dataset at {url}: make one with create_dataset, or check the path")
    return Dataset(str(url), kvstore, groups)


def create_dataset(url: str | os.PathLike[str]) -> Dataset:
    """Makes an empty dataset, or opens the one that is there.

    Args:
      url: a path, or a `file://`, `memory://`, `s3://` or `gs://` URL.

    Returns:
      The dataset as it is now.

    Raises:
      StoreError: something else is there, it has another schema version, or the place cannot be written.
    """
    kvstore = _open_kvstore(url)
    groups, generation = _read_manifest(str(url), kvstore)
    if groups is None:
        # Conditional: of two that create at once, one does and the other opens.
        _write(str(url), kvstore, MANIFEST, manifest.encode({}), generation)
    return open_dataset(url)


def append_part(
    dataset: Dataset, card: EnvironmentCard, leaves: collections.abc.Mapping[str, np.ndarray], episodes: EpisodeIndex
) -> Dataset:
    """Writes a new part of the group of `card.id`, made if need be, and then shows it in the manifest.

    Args:
      dataset: where to write; parts that others have written since it was opened are kept.
      card: the environment's card; it replaces the group's.
      leaves: arrays `[T, B, ...]`, all with the same T and B and, but for these, shaped as in the group's other parts.
      episodes: the episode index.

    Returns:
      The dataset with the new part, and with what others have written.

    Raises:
      StoreError: arrays that do not fit, or a place that cannot be written. The dataset is then as before.
    """
    id, url, kvstore = card.id, dataset.url, dataset.kvstore
    manifest.check_id(id)
    arrays = {name: np.asarray(value) for name, value in leaves.items()}
    groups = open_dataset(url).groups
    manifest.check_leaves(id, arrays, groups)
    index = manifest.encode_episodes(id, episodes, *next(iter(arrays.values())).shape[:2])
    card_data = json.dumps(card.to_json(), sort_keys=True).encode()
    card_name = manifest.card_name(card_data)
    records = {
        name: ArrayRecord(manifest.array_metadata(value), manifest.checksum(value)) for name, value in arrays.items()
    }
    with _claimed(url, kvstore, id) as (name, is_ours):
        _write_arrays(url, kvstore, f"{id}/{name}/", arrays, records)
        _write(url, kvstore, f"{id}/{name}/{manifest.EPISODES}", index)
        if kvstore.read(f"{id}/{card_name}").result().value != card_data:
            _write(url, kvstore, f"{id}/{card_name}", card_data)
        part = PartRecord(name, records, manifest.checksum(index))

        def add(groups: Groups) -> Groups:
            manifest.check_leaves(id, arrays, groups)
            if not is_ours():
                raise StoreError(f"{name} of {id} in {url} was removed while it was being written: collect {id} again")
            # By name: a write whose answer was lost is tried again.
            parts = {other.name: other for other in groups[id].parts} if id in groups else {}
            parts = dict(sorted((parts | {name: part}).items()))
            return groups | {id: GroupRecord(card_name, tuple(parts.values()))}

        return Dataset(url, kvstore, _commit(url, kvstore, add))


def remove_group(dataset: Dataset, id: str) -> Dataset:
    """Removes an environment: from the manifest first, then its files.

    Args:
      dataset: where it is.
      id: the environment.

    Returns:
      The dataset without it.

    Raises:
      StoreError: the dataset has no such id, or the place cannot be written.
    """

    def remove(groups: Groups) -> Groups:
        Dataset(dataset.url, dataset.kvstore, groups)._group(id)
        return {other: group for other, group in groups.items() if other != id}

    groups = _commit(dataset.url, dataset.kvstore, remove)
    # Only what is this group's: the id `a/b/c` has its folder inside that of `a/b`.
    own = re.compile(re.escape(f"{id}/") + r"(part-\d{5,}/|part-\d{5,}\.claim$|card-[0-9a-f]+\.json$)")
    keys = dataset.kvstore.list(_under(f"{id}/")).result()
    for key in {match[0] for match in map(own.match, map(bytes.decode, keys)) if match}:
        if key.endswith("/"):
            dataset.kvstore.delete_range(_under(key)).result()
        else:
            dataset.kvstore.write(key, None).result()
    return Dataset(dataset.url, dataset.kvstore, groups)


def verify(dataset: Dataset) -> None:
    """Reads everything again and compares it with the checksums in the manifest.

    Args:
      dataset: what to read.

    Raises:
      StoreError: names the first damaged part and leaf.
    """
    for id in dataset.ids:
        dataset.card(id)
        for part in dataset.parts(id):
            _ = part.episodes
            for name in part.leaf_names:
                value = part._result(name, part._array(name).read())
                if manifest.checksum(value) != part.record.leaves[name].checksum:
                    raise part._damaged(name, "its checksum differs from the manifest's")


@functools.cache
def _context() -> ts.Context:
    # One for the process: the cache is then bounded as a whole, and `memory://` names one place.
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _open_kvstore(url: str | os.PathLike[str]) -> ts.KvStore:
    text = os.fspath(url)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        spec: typing.Any = text.rstrip("/") + "/"
    else:
        spec = {"driver": "file", "path": os.path.join(os.path.abspath(text), "")}
    try:
        return ts.KvStore.open(spec, context=_context()).result()
    except (ValueError, OSError) as error:
        raise StoreError(f"cannot open {url}: {error}. Expected a path or a file, memory, s3 or gs URL") from error


def _array_spec(kvstore: ts.KvStore, folder: str, leaf: str, metadata: manifest.Json) -> manifest.Json:
    return {
        "driver": "zarr3",
        "kvstore": (kvstore / f"{folder}{manifest.leaf_folder(leaf)}/").spec().to_json(),
        "metadata": metadata,
        # Parts are immutable, so what is cached stays right; a group removed and written again is opened again.
        "recheck_cached_data": "open",
        # A lost file is an error, not zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _write_arrays(
    url: str, kvstore: ts.KvStore, folder: str, arrays: dict[str, np.ndarray], records: dict[str, ArrayRecord]
) -> None:
    specs = {name: _array_spec(kvstore, folder, name, records[name].metadata) for name in arrays}
    try:
        opened = {name: ts.open(spec, create=True, context=_context()) for name, spec in specs.items()}
        for future in [opened[name].result().write(value) for name, value in arrays.items()]:
            future.result()
    except (ValueError, OSError) as error:
        raise _unwritable(url, folder, error) from error


@contextlib.contextmanager
def _claimed(
    url: str, kvstore: ts.KvStore, id: str
) -> collections.abc.Iterator[tuple[str, collections.abc.Callable[[], bool]]]:
    """Claims an empty folder for a part while it is written; gives its name and whether the claim still stands."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "time_s": time.time(), "token": secrets.token_hex(8)}
    data = json.dumps(owner).encode()

    def shown() -> set[str]:
        groups, _ = _read_manifest(url, kvstore)
        return {part.name for part in groups[id].parts} if groups and id in groups else set()

    def is_ours() -> bool:
        return kvstore.read(f"{id}/{name}.claim").result().value == data

    def clear() -> None:
        kvstore.delete_range(_under(f"{id}/{name}/")).result()

    taken = shown()
    for number in itertools.count(1):
        name = f"part-{number:05d}"
        if name in taken:
            continue
        read = kvstore.read(f"{id}/{name}.claim").result()
        if read.state == "value" and not _is_abandoned(read.value):
            continue
        if not _write(url, kvstore, f"{id}/{name}.claim", data, read.stamp.generation):
            continue
        # Only now: whoever had the claim before may have shown the part since.
        if name not in shown():
            break
        kvstore.write(f"{id}/{name}.claim", None).result()
    try:
        clear()
        yield name, is_ours
    except BaseException:
        # An interrupt may come when the part is already shown.
        if is_ours() and name not in shown():
            clear()
        raise
    finally:
        if is_ours():
            kvstore.write(f"{id}/{name}.claim", None).result()


def _is_abandoned(claim: bytes) -> bool:
    owner = json.loads(claim)
    if owner["host"] != socket.gethostname() or os.name != "posix":
        return time.time() - owner["time_s"] > CLAIM_AGE_S
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _commit(url: str, kvstore: ts.KvStore, change: collections.abc.Callable[[Groups], Groups]) -> Groups:
    """Replaces the manifest by a changed one; where another writer was faster, changes what that one wrote."""
    for attempt in range(200):
        groups, generation = _read_manifest(url, kvstore)
        if groups is None:
            raise StoreError(f"the {MANIFEST} of {url} disappeared: was the dataset deleted while it was written to?")
        groups = change(groups)
        if _write(url, kvstore, MANIFEST, manifest.encode(groups), generation):
            return groups
        time.sleep(random.uniform(0, min(1.0, 0.002 * 2**attempt)))
    raise StoreError(
        f"the {MANIFEST} of {url} changed at each of 200 attempts to write it: too many writers, try later"
    )


def _read_manifest(url: str, kvstore: ts.KvStore) -> tuple[Groups | None, bytes]:
    """The groups, None where the place is empty, and the generation of the manifest."""
    try:
        read = kvstore.read(MANIFEST).result()
        if read.state == "value":
            return manifest.decode(url, read.value), read.stamp.generation
        empty = _is_empty(kvstore)
    except StoreError:
        raise
    except (ValueError, OSError) as error:
        raise StoreError(f"cannot read {MANIFEST} at {url}: {error}") from error
    if not empty:
        raise manifest.foreign(url, f"it has files but no {MANIFEST}")
    return None, read.stamp.generation


def _is_empty(kvstore: ts.KvStore) -> bool:
    spec = kvstore.spec().to_json()
    if spec["driver"] == "file":
        # Names only, and of one folder: a foreign one may be a whole disk. A lock is left by a creator that died.
        path = spec["path"]
        return not os.path.isdir(path) or not {*os.listdir(path)} - {f"{MANIFEST}.__lock"}
    return not kvstore.list().result()


def _write(url: str, kvstore: ts.KvStore, key: str, data: bytes, generation: bytes | None = None) -> bool:
    """Writes a file whole; with `generation` only if the file is still that one, and says whether it was."""
    try:
        _cut_leftover(kvstore, key)
        return bool(kvstore.write(key, data, if_equal=generation).result().generation)
    except (ValueError, OSError) as error:
        raise _unwritable(url, key, error) from error


def _cut_leftover(kvstore: ts.KvStore, key: str) -> None:
    """Empties the lock file of a key if a writer that died has left it.

    TensorStore writes into the lock file and renames it, but does not cut it first: what a dead writer left would stay
    as the end of a shorter file. Only on Linux is its lock one that can be asked for here.
    """
    spec = kvstore.spec().to_json()
    if spec["driver"] != "file" or sys.platform != "linux":
        return
    import fcntl

    lock = os.path.join(spec["path"], f"{key}.__lock")
    try:
        with open(lock, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that lived has renamed it by now: it is then the file itself.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                file.truncate(0)
    except (FileNotFoundError, BlockingIOError):
        return


def _under(folder: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(folder, folder[:-1] + "0")  # "0" follows "/"


def _unwritable(url: str, key: str, error: Exception) -> StoreError:
    return StoreError(f"cannot write {key} at {url}: {error}. Choose a place with room that this user may write")

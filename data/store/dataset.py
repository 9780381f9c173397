"""Reading: a dataset as it stood when it was opened, its cards, and windows of its parts."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import os
import typing

import numpy as np

from ldm_jax.cards import EnvironmentCard
from ldm_jax.errors import did_you_mean

from . import layout, manifest, records
from .chunks import ChunkReader
from .manifest import EPISODES, MANIFEST, RECORDS, EpisodeIndex, Json, StoreError
from .reading import Request, read_many
from .records import ArrayRecord, GroupRecord, Groups, PartRecord
from .storage import READ_ERRORS, File, PendingRead, Storage, reason


@dataclasses.dataclass(frozen=True, repr=False)
class Part:
    """An immutable part of a group: T steps of B streams of consecutive episodes."""

    storage: Storage
    id: str
    record: PartRecord = dataclasses.field(hash=False)

    def __repr__(self) -> str:
        return f"Part({self.id}/{self.name}, {self.steps} steps of {self.streams} streams)"

    def __getstate__(self) -> dict[str, typing.Any]:
        # Not what is open: another process opens it anew.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.record.name

    @functools.cached_property
    def leaf_names(self) -> tuple[str, ...]:
        """The names of the leaves, sorted."""
        return tuple(sorted(self.record.leaves))

    @functools.cached_property
    def steps(self) -> int:
        """T, the steps of every stream."""
        return self.record.steps

    @functools.cached_property
    def streams(self) -> int:
        """B, the number of streams."""
        return self.record.streams

    @functools.cached_property
    def episodes(self) -> EpisodeIndex:
        """The episode index, read at the first use.

        Raises:
          StoreError: it is damaged or missing, or cannot be read.
        """
        data = self.storage.read(f"{self._folder}{EPISODES}").content
        if data is None or manifest.checksum(data) != self.record.episodes:
            raise self._failure(EPISODES, "it is missing" if data is None else "its checksum differs", [EPISODES])
        return manifest.decode_episodes(data)

    def leaf(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape, without `[T, B]`, and dtype of a leaf; raises StoreError where there is none."""
        found = self._leaf_record(name).layout
        return found.shape[2:], np.dtype(found.dtype)

    def read(self, names: collections.abc.Sequence[str], start: int, stop: int, stream: int) -> dict[str, np.ndarray]:
        """Reads steps `start` to `stop` of one stream; see `read_many`."""
        return read_many([Request(self, tuple(names), start, stop, stream)])[0]

    def read_leaf(self, name: str) -> np.ndarray:
        """Reads a leaf `[T, B, ...]` whole and compares it with its checksum, and its zarr.json with what was written.

        Raises:
          StoreError: there is no such leaf, or it is damaged or cannot be read.
        """
        record, folder = self._leaf_record(name), f"{self._folder}{layout.leaf_folder(name)}"
        try:
            self.storage.check_array(folder, record.layout.metadata)
        except READ_ERRORS as error:
            why = f"its zarr.json is not what was written, by another program perhaps ({reason(error)})"
            raise self._failure(name, why, [f"{layout.leaf_folder(name)}zarr.json"]) from error
        value = self._result(name, self._reader(name).array.read())
        if manifest.checksum(value) != record.checksum:
            raise self._leaf_failure(name, "its checksum differs from the record's")
        return value

    @property
    def _folder(self) -> str:
        return f"{self.id}/{self.name}/"

    @functools.cached_property
    def _readers(self) -> dict[str, ChunkReader]:
        return {}

    def _reader(self, name: str) -> ChunkReader:
        if name not in self._readers:
            folder = f"{self._folder}{layout.leaf_folder(name)}"
            self._readers[name] = ChunkReader(self.storage.open_array(folder, self._leaf_record(name).layout.metadata))
        return self._readers[name]

    def _leaf_record(self, name: str) -> ArrayRecord:
        if name not in self.record.leaves:
            raise StoreError(f"{self.name} of {self.id} has no leaf {name!r}, only {', '.join(self.leaf_names)}")
        return self.record.leaves[name]

    def _result(self, name: str, future: PendingRead) -> np.ndarray:
        try:
            return np.asarray(future.result())
        except READ_ERRORS as error:
            raise self._leaf_failure(name, reason(error)) from error

    def _leaf_failure(self, name: str, why: str) -> StoreError:
        record = self.record.leaves[name]
        files = [f"{layout.leaf_folder(name)}{key}" for key in layout.shard_keys(record.layout)]

        def is_sound() -> bool:
            try:
                return manifest.checksum(np.asarray(self._reader(name).array.read().result())) == record.checksum
            except READ_ERRORS:
                return False

        return self._failure(name, why, files, is_sound)

    def _failure(
        self,
        leaf: str,
        why: str,
        files: collections.abc.Sequence[str],
        is_sound: collections.abc.Callable[[], bool] = lambda: False,
    ) -> StoreError:
        return _diagnose(
            self.storage,
            f"{self.name} of {self.id}, leaf {leaf!r}, cannot be read: {why}",
            [f"{self._folder}{file}" for file in files],
            self.id,
            is_listed=lambda group: self.record in group.parts,
            is_sound=is_sound,
            remedy=_remedy(self.id),
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
    """A dataset as it stood when it was opened or written to through this object; `open_dataset` sees later parts."""

    storage: Storage
    groups: Groups = dataclasses.field(hash=False)
    configuration: Json = dataclasses.field(hash=False)

    def __repr__(self) -> str:
        steps = sum(part.steps * part.streams for group in self.groups.values() for part in group.parts)
        return f"Dataset({self.url}, {len(self.groups)} environments, {_short(steps)} steps)"

    @property
    def url(self) -> str:
        """Where it is: an absolute path or a URL."""
        return self.storage.url

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids of the environments, sorted."""
        return tuple(sorted(self.groups))

    def card(self, id: str) -> EnvironmentCard:
        """The card of an environment.

        Raises:
          StoreError: the dataset has no such id, or its card is damaged or cannot be read.
        """
        return read_card(self.storage, id, self.group(id).card)

    def parts(self, id: str) -> tuple[Part, ...]:
        """The parts of an environment, in the order of their names.

        Raises:
          StoreError: the dataset has no such id.
        """
        return tuple(Part(self.storage, id, record) for record in self.group(id).parts)

    def group(self, id: str) -> GroupRecord:
        """What the record of an environment says; raises StoreError where the dataset has no such id."""
        if id not in self.groups:
            hint = did_you_mean(id, self.ids) or f"; it has {len(self.ids)} environments, see `ids`"
            raise StoreError(f"the dataset {self.url} has no environment {id!r}{hint}")
        return self.groups[id]


def open_dataset(url: str | os.PathLike[str]) -> Dataset:
    """Opens a dataset.

    Args:
      url: a path, or a `file://`, `memory://`, `s3://` or `gs://` URL.

    Returns:
      The dataset as it is now.

    Raises:
      StoreError: there is no dataset, something else is there, it has another schema version, or it cannot be read.

    >>> import data
    >>> from data.store import create_dataset
    >>> create_dataset("memory://example")
    Dataset(memory://example, 0 environments, 0 steps)
    >>> data.open_dataset("memory://example").ids
    ()
    """
    storage = Storage(os.fspath(url))
    content = read_manifest(storage).content
    if content is None:
        raise StoreError(
            f"there is no dataset at {url}: check the path; experiments.collect makes one, and create_dataset"
        )
    return Dataset(storage, read_groups(storage), manifest.decode_manifest(storage.url, content))


def read_manifest(storage: Storage) -> File:
    """Reads the manifest that is there now; its content is None where the place is empty.

    Raises:
      StoreError: something else is there, it has another schema version, or it cannot be read.
    """
    found = storage.read(MANIFEST)
    if found.content is None and not storage.is_empty():
        # The manifest is the first file of a dataset: where another writer makes it meanwhile, it is there by now.
        found = storage.read(MANIFEST)
        if found.content is None:
            if storage.read(f"dataset/{MANIFEST}").content is not None:  # of a run
                raise StoreError(
                    f"{storage.url} is not a dataset: pass {storage.url.rstrip('/')}/dataset, which is one"
                )
            raise manifest.foreign(storage.url, f"it has files but no {MANIFEST}")
    if found.content is not None:
        manifest.decode_manifest(storage.url, found.content)
    return found


def read_groups(storage: Storage) -> Groups:
    """Reads the records of all groups that are there now.

    Raises:
      StoreError: they cannot be read.
    """
    keys = {id: key for key in storage.list(RECORDS) if (id := records.id_of_record(key)) is not None}
    ids = sorted(keys)
    contents = storage.read_all([keys[id] for id in ids])
    # None where it was removed since it was listed.
    return Groups(storage.url, {id: data for id, data in zip(ids, contents, strict=True) if data is not None})


class ShownRecord(typing.NamedTuple):
    """A group as it is shown now, None where there is none, and the generation that a write can insist on."""

    group: GroupRecord | None
    generation: bytes


def read_record(storage: Storage, id: str) -> ShownRecord:
    """Reads the record of one group, whatever the number of groups.

    Raises:
      StoreError: it is damaged or cannot be read.
    """
    found = storage.read(records.record_key(id))
    group = None if found.content is None else records.decode_group(storage.url, id, found.content)
    return ShownRecord(group, found.generation)


def read_card(storage: Storage, id: str, name: str) -> EnvironmentCard:
    """Reads the card of an environment by the name of its file; raises StoreError where it is damaged or missing."""
    data = storage.read(f"{id}/{name}").content
    if data is None or name != manifest.card_name(data):
        raise _diagnose(
            storage,
            f"the card {name} of {id} in {storage.url} is {'missing' if data is None else 'damaged'}",
            [f"{id}/{name}"],
            id,
            is_listed=lambda group: group.card == name,
            is_sound=lambda: False,
            remedy=_remedy(id),
        )
    return EnvironmentCard.from_json(json.loads(data))


def _diagnose(
    storage: Storage,
    what: str,
    keys: collections.abc.Sequence[str],
    id: str,
    *,
    is_listed: collections.abc.Callable[[GroupRecord], bool],
    is_sound: collections.abc.Callable[[], bool],
    remedy: str,
) -> StoreError:
    """Says why something cannot be read, and to delete it only where it is proved to be damaged.

    Args:
      storage: where it is.
      what: what cannot be read and how that showed.
      keys: the files that hold it.
      id: of its environment.
      is_listed: whether the record of its environment still says that it is there.
      is_sound: whether it can be read now and is what it was.
      remedy: what to do if it is damaged.
    """
    try:
        if read_manifest(storage).content is None:
            return StoreError(f"{what}. The dataset is gone from {storage.url}: was its disk unmounted, or it removed?")
        group, _ = read_record(storage, id)
        if group is None or not is_listed(group):
            return StoreError(f"{what}. It was removed or replaced since the dataset was opened: open it again")
        missing = [key for key in keys if storage.read(key).content is None]
    except StoreError as error:
        return StoreError(f"{what}. Nothing is known to be damaged: {error}. See to its permissions, disk or network")
    if not missing and is_sound():
        return StoreError(f"{what}. It can be read now, and is whole: see to its disk or network, and try again")
    return StoreError(f"{what}. {f'The file {missing[0]} is missing' if missing else 'It is damaged'}: {remedy}")


def _remedy(id: str) -> str:
    return f"delete the group (data.store.remove_group) and collect {id} again"


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)

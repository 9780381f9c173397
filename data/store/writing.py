"""Writing: datasets are made, and parts and groups are added and removed, each whole or not at all."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import secrets
import socket
import time
import typing

import numpy as np

from ldm_jax.cards import EnvironmentCard, check_matches
from ldm_jax.types import EnvironmentSpec

from . import layout, manifest, records
from .dataset import Dataset, open_dataset, read_card, read_manifest, read_record
from .manifest import EPISODES, MANIFEST, EpisodeIndex, StoreError
from .records import ArrayRecord, GroupRecord, PartRecord
from .storage import Storage

CLAIM_AGE_S = 24 * 3600.0
"""A claim from another machine counts as abandoned after this."""


def create_dataset(
    url: str | os.PathLike[str], configuration: collections.abc.Mapping[str, typing.Any] | None = None
) -> Dataset:
    """Makes an empty dataset, or opens the one that is there.

    Args:
      url: a path, or a `file://`, `memory://`, `s3://` or `gs://` URL.
      configuration: what its data follow, as JSON can hold it; kept in the manifest. Where the dataset is there, it
        must be the one that it was made with; None for any.

    Returns:
      The dataset as it is now.

    Raises:
      StoreError: something else is there, it has another schema version, it was made with another configuration, or
        the place cannot be written.
    """
    storage = Storage(os.fspath(url))
    found = read_manifest(storage)
    if found.content is None:
        # Conditional: of two that create at once, one does and the other opens.
        storage.write(MANIFEST, manifest.encode_manifest(configuration or {}), found.generation)
    dataset = open_dataset(storage.url)
    if configuration is not None:
        manifest.check_same_configuration(storage.url, dataset.configuration, configuration)
    return dataset


def append_part(
    dataset: Dataset, card: EnvironmentCard, leaves: collections.abc.Mapping[str, np.ndarray], episodes: EpisodeIndex
) -> Dataset:
    """Writes a new part of the group of `card.id`, made if need be, and then shows it in the record of that group.

    Args:
      dataset: where to write; parts that others have written since it was opened are kept. What it takes to append
        does not grow with the number of its environments.
      card: the environment's card; it replaces the group's, which must be of the same environment.
      leaves: arrays `[T, B, ...]` by the names of `ldm_jax.encoding.transition`, all with the same T and B and, but
        for these, shaped as in the group's other parts; all numbers finite.
      episodes: the episode index.

    Returns:
      The dataset with the new part, and with what others have written of this environment.

    Raises:
      CardError: the group is of another version of the library, of other spaces or of another time limit.
      StoreError: arrays that do not fit, or a place that cannot be written. The dataset is then as before.
    """
    id, storage = card.id, dataset.storage
    manifest.check_folder_name(id)
    arrays = {name: np.asarray(value) for name, value in leaves.items()}
    manifest.check_part(card, arrays)
    index = manifest.encode_episodes(id, episodes, *next(iter(arrays.values())).shape[:2])
    _check_is_there(storage)
    before = read_record(storage, id).group
    _check_fits_group(storage, before, card, arrays)
    card_data = json.dumps(card.to_json(), sort_keys=True).encode()
    card_name = manifest.card_name(card_data)
    leaf_records = {
        name: ArrayRecord(layout.layout_of(value), manifest.checksum(value)) for name, value in arrays.items()
    }
    with _claimed(storage, id) as claim:
        storage.write_arrays(
            {
                f"{claim.folder}{layout.leaf_folder(name)}": (leaf_records[name].layout.metadata, value)
                for name, value in arrays.items()
            }
        )
        storage.write(f"{claim.folder}{EPISODES}", index)
        if storage.read(f"{id}/{card_name}").content != card_data:
            storage.write(f"{id}/{card_name}", card_data)
        part = PartRecord(claim.name, leaf_records, manifest.checksum(index))

        def add(group: GroupRecord | None) -> GroupRecord:
            # Again: another writer may have made the group meanwhile.
            _check_fits_group(storage, group, card, arrays)
            if not claim.stands() or (before and not group):
                raise StoreError(
                    f"{claim.name} of {id} in {storage.url} was removed while it was being written: collect {id} again"
                )
            # By name: a write whose answer was lost is tried again.
            parts = {other.name: other for other in group.parts} if group else {}
            return GroupRecord(card_name, tuple(dict(sorted((parts | {claim.name: part}).items())).values()))

        return _commit(dataset, id, add)


def _check_is_there(storage: Storage) -> None:
    if read_manifest(storage).content is None:
        raise StoreError(
            f"the {MANIFEST} of {storage.url} disappeared: was the dataset deleted while it was written to?"
        )


def _check_fits_group(
    storage: Storage, group: GroupRecord | None, card: EnvironmentCard, arrays: dict[str, np.ndarray]
) -> None:
    if group is not None:
        # A card says of its environment what a spec does.
        live = typing.cast(EnvironmentSpec, card)
        check_matches(read_card(storage, card.id, group.card), live, f"the group of {card.id} in {storage.url}")
        records.check_fits_group(card.id, arrays, group)


def remove_group(dataset: Dataset, id: str) -> Dataset:
    """Removes an environment: claims its parts, removes its record, then its files.

    Args:
      dataset: where it is.
      id: the environment.

    Returns:
      The dataset without it.

    Raises:
      StoreError: the dataset has no such id, or the place cannot be written.
    """
    storage = dataset.storage

    def remove(group: GroupRecord | None) -> None:
        if group is None:
            open_dataset(dataset.url).group(id)  # says which there are

    owner = _owner()
    named = [_Claim(storage, id, name, owner) for name in sorted(_shown_names(storage, id))]
    try:
        # Parts that no record names are damage, unless a claim says that somebody was at work, and was killed.
        for claim in named:
            claim.write()
        removed = _commit(dataset, id, remove)
    except BaseException:
        with contextlib.suppress(StoreError):
            for claim in named:
                if claim.stands() and claim.is_shown():
                    storage.delete(claim.key)
        raise
    # Only what is this group's: the id `a/b/c` has its folder inside that of `a/b`.
    own = re.compile(re.escape(f"{id}/") + r"(?:(part-\d{5,})(?:/|\.claim$)|card-[0-9a-f]+\.json$)")
    left = [match for match in map(own.match, storage.list(f"{id}/")) if match]
    claims = [_Claim(storage, id, name, owner) for name in sorted({match[1] for match in left if match[1]})]
    # Under a claim: not what another writer is writing or has shown since.
    taken = [claim for claim in claims if claim.take()]
    for claim in taken:
        storage.delete(claim.folder)
        storage.delete(claim.key)
    if len(taken) == len(claims) and not _shown_names(storage, id):
        for match in left:
            if not match[1]:
                storage.delete(match[0])
    return removed


@dataclasses.dataclass(frozen=True)
class _Claim:
    """The right to write a part: a file beside its folder that names the writer."""

    storage: Storage
    id: str
    name: str
    content: bytes

    @property
    def folder(self) -> str:
        """The part's, with a slash at its end."""
        return f"{self.id}/{self.name}/"

    @property
    def key(self) -> str:
        """The claim's file."""
        return f"{self.id}/{self.name}.claim"

    def stands(self) -> bool:
        """Whether no other writer, or a removal of the group, has taken it away."""
        return self.storage.read(self.key).content == self.content

    def is_shown(self) -> bool:
        """Whether the group's record has a part of this name."""
        return self.name in _shown_names(self.storage, self.id)

    def write(self) -> bool:
        """Writes the claim if no other writer has one; says whether it stands."""
        found = self.storage.read(self.key)
        if found.content is not None and not _is_abandoned(found.content):
            return found.content == self.content
        return self.storage.write(self.key, self.content, found.generation)

    def take(self) -> bool:
        """Claims the name if no other writer has it; says whether it was so."""
        if not self.write():
            return False
        # Only now: whoever had the claim before may have shown the part since.
        if self.is_shown():
            self.storage.delete(self.key)
            return False
        return True


def _owner() -> bytes:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "time_s": time.time(), "token": secrets.token_hex(8)}
    return json.dumps(owner).encode()


@contextlib.contextmanager
def _claimed(storage: Storage, id: str) -> collections.abc.Iterator[_Claim]:
    """Claims an empty folder for a part while it is written, and empties it again after an error."""
    content, taken = _owner(), _shown_names(storage, id)
    claims = (_Claim(storage, id, f"part-{number:05d}", content) for number in itertools.count(1))
    claim = next(claim for claim in claims if claim.name not in taken and claim.take())
    try:
        storage.delete(claim.folder)
        yield claim
    except BaseException:
        # The error counts, not that a place which is not there any more cannot be cleared up.
        with contextlib.suppress(StoreError):
            # An interrupt may come when the part is already shown.
            if claim.stands() and not claim.is_shown():
                storage.delete(claim.folder)
        raise
    finally:
        with contextlib.suppress(StoreError):
            if claim.stands():
                storage.delete(claim.key)


def _shown_names(storage: Storage, id: str) -> set[str]:
    group, _ = read_record(storage, id)
    return {part.name for part in group.parts} if group else set()


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


def _commit(
    dataset: Dataset, id: str, change: collections.abc.Callable[[GroupRecord | None], GroupRecord | None]
) -> Dataset:
    """Replaces the record of a group by a changed one; where another writer was faster, changes what that one wrote."""
    storage = dataset.storage
    for attempt in range(200):
        _check_is_there(storage)
        group, generation = read_record(storage, id)
        changed = change(group)
        record = None if changed is None else records.encode_group(id, changed)
        if storage.write(records.record_key(id), record, generation):
            return dataclasses.replace(dataset, groups=dataset.groups.replace(id, record))
        time.sleep(random.uniform(0, min(1.0, 0.002 * 2**attempt)))
    raise StoreError(
        f"the record of {id} in {storage.url} changed at each of 200 attempts to write it: too many writers, try later"
    )

"""What a dataset says of its environments: one small checksummed record each, decoded when it is asked for.

Nothing here reads or writes.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import sys
import typing
import urllib.parse

import numpy as np

from .layout import ArrayLayout
from .manifest import RECORDS, Json, StoreError, seal, unseal


class ArrayRecord(typing.NamedTuple):
    """A leaf: how it lies on disk, so that it opens without a read, and the checksum of its values."""

    layout: ArrayLayout
    checksum: str


class PartRecord(typing.NamedTuple):
    """A part: its folder's name, its leaves by name, and the checksum of its episode index."""

    name: str
    leaves: dict[str, ArrayRecord]
    episodes: str

    @property
    def steps(self) -> int:
        """T, the steps of every stream."""
        return next(iter(self.leaves.values())).layout.shape[0]

    @property
    def streams(self) -> int:
        """B, the number of streams."""
        return next(iter(self.leaves.values())).layout.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of its leaves in memory."""
        return sum(record.layout.nbytes for record in self.leaves.values())


class GroupRecord(typing.NamedTuple):
    """An environment: the name of its card's file and its parts, in the order of their names."""

    card: str
    parts: tuple[PartRecord, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Groups(collections.abc.Mapping[str, GroupRecord]):
    """The groups of a dataset by id, kept as the bytes of their records: thousands take a few megabytes.

    Attributes:
      url: of the dataset, for errors.
      records: by id, what `encode_group` made.
    """

    url: str
    records: dict[str, bytes] = dataclasses.field(hash=False)

    def __getitem__(self, id: str) -> GroupRecord:
        return decode_group(self.url, id, self.records[id])

    def __contains__(self, id: object) -> bool:
        return id in self.records

    def __iter__(self) -> collections.abc.Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def replace(self, id: str, record: bytes | None) -> Groups:
        """The groups with another record of one, or without it where that is None."""
        others = {other: data for other, data in self.records.items() if other != id}
        return Groups(self.url, others if record is None else others | {id: record})


def record_key(id: str) -> str:
    """The file of an environment's record."""
    return f"{RECORDS}{urllib.parse.quote(id, safe='')}.json"


def id_of_record(key: str) -> str | None:
    """The environment that `record_key` made a key of; None for any other file."""
    id = urllib.parse.unquote(key.removeprefix(RECORDS).removesuffix(".json"))
    return id if key == record_key(id) else None


def encode_group(id: str, group: GroupRecord) -> bytes:
    """The record of a group as JSON bytes that end in their own checksum; `decode_group` is the inverse."""
    parts = {
        part.name: {
            "leaves": {name: [*record.layout, record.checksum] for name, record in sorted(part.leaves.items())},
            "episodes": part.episodes,
        }
        for part in group.parts
    }
    body = json.dumps({"id": id, "card": group.card, "parts": parts}, separators=(",", ":")).encode()
    return seal(body)


def decode_group(url: str, id: str, data: bytes) -> GroupRecord:
    """Reads the record of a group.

    Args:
      url: of the dataset, for the error.
      id: of the environment.
      data: what `encode_group` wrote.

    Returns:
      The group.

    Raises:
      StoreError: it is damaged, or another program wrote it.
    """
    try:
        record = json.loads(unseal(data))
        if record["id"] != id:
            raise ValueError(f"it is that of {record['id']}")
        return GroupRecord(record["card"], tuple(_part(*item) for item in record["parts"].items()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"the record {record_key(id)} of {url} is damaged or was changed by another program: {error}; restore it, "
            f"or delete that file and collect {id} again"
        ) from error


def _part(name: str, description: Json) -> PartRecord:
    leaves = {
        sys.intern(leaf): ArrayRecord(_layout(tuple(shape), *rest), value)
        for leaf, (shape, *rest, value) in description["leaves"].items()
    }
    return PartRecord(name, leaves, description["episodes"])


@functools.lru_cache(4096)
def _layout(*fields: typing.Any) -> ArrayLayout:
    # Thousands of groups share a few hundred layouts.
    return ArrayLayout(*fields)


def check_fits_group(id: str, leaves: dict[str, np.ndarray], group: GroupRecord) -> None:
    """Checks that a new part has the leaves of its group's other parts: a mask, say, is in all of them or in none.

    Raises:
      StoreError: names the first leaf that differs.
    """
    first = group.parts[0]
    expected = {name: (record.layout.shape[2:], record.layout.dtype) for name, record in first.leaves.items()}
    got = {name: (value.shape[2:], value.dtype.name) for name, value in leaves.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise StoreError(
                f"leaf {name!r} of {id} is {got.get(name, 'missing')}, but {expected.get(name, 'missing')} in "
                f"{first.name}: all parts of a group have the same leaves; write to another dataset"
            )

"""Verifying: everything is read again and compared with its checksums."""

from __future__ import annotations

import collections.abc
import re
import typing

from .dataset import Dataset, read_record
from .manifest import EPISODES, StoreError
from .records import record_key

_PART_FILE = re.compile(r"(.+/part-\d{5,})/")

Step = collections.abc.Callable[[], object]


class Damage(typing.NamedTuple):
    """What is damaged or cannot be read: a file of an environment, or a leaf of one of its parts, and why."""

    id: str
    part: str
    file: str
    error: StoreError


def find_damage(
    dataset: Dataset, progress: collections.abc.Callable[[int], object] = lambda nbytes: None
) -> collections.abc.Iterator[Damage]:
    """Reads everything again and compares it with its checksums.

    Args:
      dataset: what to read; what others remove meanwhile counts as damage.
      progress: called with the bytes, uncompressed, that were read since the last call.

    Yields:
      All that is damaged or cannot be read.
    """
    for id in dataset.ids:
        try:
            parts = dataset.parts(id)
        except StoreError as error:
            yield Damage(id, "", "record", error)
            continue
        yield from _try(id, "", "card", lambda id=id: dataset.card(id))  # type: ignore[misc]
        for part in parts:
            yield from _try(id, part.name, EPISODES, lambda part=part: part.episodes)  # type: ignore[misc]
            for name in part.leaf_names:
                yield from _try(id, part.name, name, lambda part=part, name=name: part.read_leaf(name))  # type: ignore[misc]
                progress(part.record.leaves[name].layout.nbytes)
    yield from _find_unnamed(dataset)


def _find_unnamed(dataset: Dataset) -> collections.abc.Iterator[Damage]:
    """Finds parts that no record names, since one was removed; what a writer has in flight or left has a claim."""
    keys = dataset.storage.list("")
    claimed = {key.removesuffix(".claim") for key in keys if key.endswith(".claim")}
    found = {match[1] for key in keys if (match := _PART_FILE.match(key))}
    for folder in sorted(found - claimed):
        id, _, part = folder.rpartition("/")
        try:
            group, _ = read_record(dataset.storage, id)
        except StoreError:
            continue  # it was told of above
        if not group or part not in {record.name for record in group.parts}:
            why = f"no record of {dataset.url} names it: restore {record_key(id)}, or collect {id} again"
            yield Damage(id, part, "record", StoreError(why))


def _try(id: str, part: str, file: str, read: Step) -> collections.abc.Iterator[Damage]:
    try:
        read()
    except StoreError as error:
        yield Damage(id, part, file, error)


def verify_dataset(dataset: Dataset) -> None:
    """Reads everything again and compares it with its checksums.

    Args:
      dataset: what to read.

    Raises:
      StoreError: names the first part and leaf that is damaged or cannot be read.
    """
    for damage in find_damage(dataset):
        raise damage.error

"""Merging: the parts of one dataset are copied into another, where both are of one kind."""

from __future__ import annotations

import collections.abc

from ldm_jax.cards import EnvironmentCard
from ldm_jax.errors import differences

from .dataset import Dataset
from .manifest import StoreError, check_same_configuration
from .records import PartRecord
from .writing import append_part


def check_mergeable(target: Dataset, source: Dataset) -> None:
    """Checks that the parts of one dataset may stand beside those of another.

    Args:
      target: where they would be written.
      source: where they are.

    Raises:
      StoreError: the configurations differ, or the cards of an environment that is in both, apart from what was
        measured on its data; names what differs.
    """
    check_same_configuration(target.url, target.configuration, source.configuration)
    for id in source.ids:
        if id in target.groups:
            found, wanted = (_compared(dataset.card(id)) for dataset in (target, source))
            if differing := differences(found, wanted):
                raise StoreError(
                    f"{id} is another one in {source.url} than in {target.url}: {'; '.join(differing)}. Labels of two "
                    "references, or of two versions, cannot be merged: leave one of them out"
                )


def copy_parts(
    target: Dataset, source: Dataset, progress: collections.abc.Callable[[int], object] = lambda nbytes: None
) -> Dataset:
    """Copies the parts of one dataset into another; those that are there already stay, so it may be done again.

    The card of an environment that is in both is the one whose statistics were measured on more steps.

    Args:
      target: where to write.
      source: where they are; all that is copied is compared with its checksums.
      progress: called with the bytes, uncompressed, that were copied since the last call.

    Returns:
      The target with the new parts.

    Raises:
      StoreError: see `check_mergeable`; or a part is damaged, or the place cannot be written. What was copied stays.
    """
    check_mergeable(target, source)
    for id in source.ids:
        card = source.card(id)
        there: set[tuple[object, ...]] = set()
        if id in target.groups:
            card = max(card, target.card(id), key=lambda each: each.statistics.steps)
            there = {_content(part.record) for part in target.parts(id)}
        for part in source.parts(id):
            if _content(part.record) not in there:
                target = append_part(
                    target, card, {name: part.read_leaf(name) for name in part.leaf_names}, part.episodes
                )
            progress(part.record.nbytes)
    return target


def _compared(card: EnvironmentCard) -> dict[str, object]:
    return {name: value for name, value in card.to_json().items() if name != "statistics"}


def _content(record: PartRecord) -> tuple[object, ...]:
    leaves = ((name, each.layout.shape, each.checksum) for name, each in record.leaves.items())
    return record.episodes, *sorted(leaves)

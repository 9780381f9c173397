"""Windows of parts, many at once."""

from __future__ import annotations

import collections.abc
import typing

import numpy as np

from .chunks import ChunkKey, ChunkReader, PendingCopy
from .manifest import StoreError
from .storage import PendingRead

if typing.TYPE_CHECKING:
    from .dataset import Part


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
      StoreError: there is no such leaf, step or stream, or a part is damaged or cannot be read.
    """
    windows = [_room(request, ()) for request in requests]
    _fill(requests, windows)
    return windows


def read_stacked(requests: collections.abc.Sequence[Request]) -> dict[str, np.ndarray]:
    """Reads windows of equal length of one environment at once, into one array per leaf.

    Args:
      requests: at least one; see `read_many`.

    Returns:
      One array `[N, stop - start, ...]` per leaf, in its own dtype.

    Raises:
      StoreError: as `read_many`.
    """
    stacked = _room(requests[0], (len(requests),))
    _fill(requests, [{name: value[i] for name, value in stacked.items()} for i in range(len(requests))])
    return stacked


def _room(request: Request, lead: tuple[int, ...]) -> dict[str, np.ndarray]:
    part, names, start, stop, _ = request
    leaves = ((name, part.leaf(name)) for name in names)
    return {name: np.empty((*lead, max(0, stop - start), *shape), dtype) for name, (shape, dtype) in leaves}


def _fill(
    requests: collections.abc.Sequence[Request], windows: collections.abc.Sequence[dict[str, np.ndarray]]
) -> None:
    """Reads windows into arrays; all chunks that are not in memory are read at the same time."""
    missing: list[tuple[Part, str, PendingCopy]] = []
    for (part, names, start, stop, stream), window in zip(requests, windows, strict=True):
        if not (0 <= start < stop <= part.steps and 0 <= stream < part.streams):
            raise StoreError(
                f"got steps {start} to {stop} of stream {stream}, but {part.name} of {part.id} has {part.steps} steps "
                f"and {part.streams} streams"
            )
        for name in names:
            for copy in part._reader(name).copy(window[name], start, stream):
                missing.append((part, name, copy))
    reads: dict[tuple[ChunkReader, ChunkKey], PendingRead] = {}
    for _, _, (reader, key, _, _) in missing:
        if (reader, key) not in reads:
            reads[reader, key] = reader.begin(key)
    for part, name, (reader, key, destination, steps) in missing:
        chunk = part._result(name, reads[reader, key])
        destination[...] = chunk[steps]
        reader.keep(key, chunk)

"""Windows of one stored array, copied from decoded chunks that a process keeps as long as there is room for them."""

from __future__ import annotations

import collections
import collections.abc
import threading
import typing

import numpy as np

from .storage import PendingRead, StoredArray

CACHE_BYTES = 1 << 30
"""Bound on the decoded chunks that one process keeps in memory."""
OBJECT_BYTES = 256
"""What a chunk takes beside its values."""

ChunkKey = tuple[int, int]
"""Stream, and number of the chunk along its steps."""


class ChunkCache:
    """Decoded chunks of any number of arrays, up to so many bytes; those kept first make room first.

    Windows are drawn at random, so that nothing is gained by noting which chunk was used last, and a hit costs no more
    than a look into a dict. Threads may share it.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes, self._bytes = limit_bytes, 0
        self._kept = collections.deque[tuple[dict[ChunkKey, np.ndarray], ChunkKey]]()
        self._lock = threading.Lock()

    def keep(self, chunks: dict[ChunkKey, np.ndarray], key: ChunkKey, chunk: np.ndarray) -> None:
        """Puts a chunk into the chunks of its array, and takes out the oldest ones of any that there is no room for."""
        with self._lock:
            if key in chunks:
                return
            chunks[key] = chunk
            self._kept.append((chunks, key))
            self._bytes += chunk.nbytes + OBJECT_BYTES
            while self._bytes > self._limit_bytes:
                others, old = self._kept.popleft()
                self._bytes -= others.pop(old).nbytes + OBJECT_BYTES


_CACHE = ChunkCache(CACHE_BYTES)  # one for the process: its memory is then bounded as a whole


class ChunkReader:
    """An array `[T, B, ...]` of a part, read by whole chunks of one stream.

    Attributes:
      array: where it is stored.
      chunk_steps: how many steps of a stream are decoded together.
    """

    def __init__(self, array: StoredArray, cache: ChunkCache = _CACHE):
        self.array, self._cache = array, cache
        self.chunk_steps = typing.cast(tuple[int, ...], array.chunk_layout.read_chunk.shape)[0]
        self._chunks: dict[ChunkKey, np.ndarray] = {}

    def copy(self, destination: np.ndarray, start: int, stream: int) -> list[PendingCopy]:
        """Copies the steps from `start` on of a stream.

        Args:
          destination: `[L, ...]`, what is to be filled.
          start: the first step.
          stream: which of the B.

        Returns:
          What has to be read before the rest of the destination can be filled.
        """
        chunk_steps, stop, missing = self.chunk_steps, start + len(destination), []
        for number in range(start // chunk_steps, (stop - 1) // chunk_steps + 1):
            origin, key = number * chunk_steps, (stream, number)
            first, last = max(start, origin), min(stop, origin + chunk_steps)
            piece = destination[first - start : last - start]
            chunk = self._chunks.get(key)
            if chunk is None:
                missing.append(PendingCopy(self, key, piece, slice(first - origin, last - origin)))
            else:
                piece[...] = chunk[first - origin : last - origin]
        return missing

    def begin(self, key: ChunkKey) -> PendingRead:
        """Starts to read a chunk."""
        stream, number = key
        start = number * self.chunk_steps
        return self.array[start : min(start + self.chunk_steps, self.array.shape[0]), stream].read()

    def keep(self, key: ChunkKey, chunk: np.ndarray) -> None:
        """Keeps a chunk as long as there is room."""
        self._cache.keep(self._chunks, key, chunk)


class PendingCopy(typing.NamedTuple):
    """A piece of a window whose chunk is not in memory.

    Attributes:
      reader: of the array.
      key: of the chunk.
      destination: what is to be filled.
      steps: of the chunk, that belong there.
    """

    reader: ChunkReader
    key: ChunkKey
    destination: np.ndarray
    steps: slice

"""How a leaf lies on disk: one sharded zarr3 array, described by a few numbers from which its zarr.json follows."""

from __future__ import annotations

import functools
import itertools
import math
import typing

import numpy as np

from .manifest import SHARD_BYTES, Json, checksum

CHUNK_BYTES = 128 << 10
CHUNK_STEP_RANGE = (16, 1024)
"""A chunk is what one read decodes: about CHUNK_BYTES of one stream, since windows are 64 to 1,024 steps of one."""
BLOCK_BYTES = 4 << 20
"""What is compressed together: less, as Blosc would choose, would hide one frame of a stack from the next."""
WORD_BYTES = 200
"""A longer part of a leaf's name is cut in its folder's: file systems end names at 255 bytes, and locks add to them."""


class ArrayLayout(typing.NamedTuple):
    """How an array is divided: `chunk_steps` of one stream are a chunk, `shard_steps` of `shard_streams` a file.

    Attributes:
      shape: `[T, B, ...]`.
      dtype: the name of its numbers' type.
      chunk_steps: steps of a chunk.
      shard_steps: steps of a shard, a multiple of `chunk_steps`.
      shard_streams: streams of a shard.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_steps: int
    shard_steps: int
    shard_streams: int

    @property
    def metadata(self) -> Json:
        """The zarr.json; not to be changed, as all arrays of this layout share it."""
        return _metadata(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def layout_of(value: np.ndarray) -> ArrayLayout:
    """Chooses the layout of an array `[T, B, ...]`."""
    (steps, streams, *inner), size = value.shape, value.dtype.itemsize
    step_bytes = max(1, size * math.prod(inner))
    chunk_steps = min(steps, max(CHUNK_STEP_RANGE[0], min(CHUNK_STEP_RANGE[1], CHUNK_BYTES // step_bytes)))
    chunks = max(1, SHARD_BYTES // (chunk_steps * step_bytes))
    shard_streams = min(streams, chunks)
    shard_steps = chunk_steps * min(math.ceil(steps / chunk_steps), max(1, chunks // shard_streams))
    return ArrayLayout(value.shape, value.dtype.name, chunk_steps, shard_steps, shard_streams)


@functools.lru_cache(4096)
def _metadata(layout: ArrayLayout) -> Json:
    whole = [max(1, length) for length in layout.shape[2:]]
    size = np.dtype(layout.dtype).itemsize
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [layout.chunk_steps, 1, *whole],
        "codecs": [little_endian if size > 1 else {"name": "bytes"}, _compression(size), {"name": "crc32c"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    shard = [layout.shard_steps, layout.shard_streams, *whole]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(layout.shape),
        "data_type": layout.dtype,
        "fill_value": False if layout.dtype == "bool" else 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _compression(size: int) -> Json:
    """The codec that was smallest for numbers of so many bytes; docs/performance.md has the others beside it."""
    if size == 1:
        # A window as long as the chunk, so that a frame is found again in the stack of the next step.
        return {"name": "zstd", "configuration": {"level": 3}}
    # The first bytes of all numbers together, then the second: those of one kind are alike.
    shuffle = {"shuffle": "shuffle", "typesize": size, "blocksize": BLOCK_BYTES}
    return {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 3, **shuffle}}


def shard_keys(layout: ArrayLayout) -> list[str]:
    """The files of an array, without its zarr.json, inside its folder."""
    shard = (layout.shard_steps, layout.shard_streams)
    counts = [math.ceil(length / size) for length, size in zip(layout.shape[:2], shard, strict=True)]
    rest = [1 if length else 0 for length in layout.shape[2:]]
    return ["/".join(map(str, ("c", *index))) for index in itertools.product(*map(range, counts + rest))]


def leaf_folder(name: str) -> str:
    """The folder of a leaf inside its part's, with a slash at its end; names of a schema suit files."""
    return "".join(f"{_short_word(word)}/" for word in name.split("/"))


def _short_word(word: str) -> str:
    # "%~" is in no name of a leaf: there, two digits follow a percent sign.
    return word if len(word) <= WORD_BYTES else f"{word[: WORD_BYTES - 40]}%~{checksum(word.encode())}"

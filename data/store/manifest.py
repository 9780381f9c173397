"""What a dataset says of itself: the manifest as values, how an array is laid out on disk, and what a part may hold.

Nothing here reads or writes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import typing

import numpy as np

from ldm_jax.cards import EnvironmentCard
from ldm_jax.encoding.transition import check_leaves
from ldm_jax.errors import LdmError
from ldm_jax.spaces import SpaceError

MANIFEST_FORMAT = "ldm_jax trajectories"
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
EPISODES = "episodes.npy"
CHUNK_BYTES = 128 << 10
CHUNK_STEP_RANGE = (16, 1024)
"""A chunk is what one read decodes: about CHUNK_BYTES of one stream, since windows are 64 to 1,024 steps of one."""
SHARD_BYTES = 64 << 20
"""A shard is one file, held in memory while it is written."""
WORD_BYTES = 200
"""A longer part of a leaf's name is cut in its folder's: file systems end names at 255 bytes, and locks add to them."""
DTYPES = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)

Json = dict[str, typing.Any]


class StoreError(LdmError, ValueError):
    """A dataset that is missing, foreign, damaged, of another schema version, or cannot be read or written."""


class EpisodeIndex(typing.NamedTuple):
    """The episodes of a part, as arrays `[E]` of equal length; equal where all their values are.

    Attributes:
      start: `int64 [E]`, the row of the episode's first observation in its stream.
      length: `int64 [E]`, its steps.
      return_: `float64 [E]`, the sum of its rewards.
      seed: `int64 [E]`, the seed it came from.
      noise: `float32 [E]`, its noise level in [0, 1].
      stream: `int32 [E]`, its stream in [0, B).
    """

    start: np.ndarray
    length: np.ndarray
    return_: np.ndarray
    seed: np.ndarray
    noise: np.ndarray
    stream: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EpisodeIndex) and all(map(np.array_equal, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other


EPISODE_DTYPE = np.dtype(list(zip(EpisodeIndex._fields, ("<i8", "<i8", "<f8", "<i8", "<f4", "<i4"), strict=True)))


class ArrayRecord(typing.NamedTuple):
    """A leaf: its zarr.json, so that it opens without a read, and the checksum of its values."""

    metadata: Json
    checksum: str


class PartRecord(typing.NamedTuple):
    """A part: its folder's name, its leaves by name, and the checksum of its episode index."""

    name: str
    leaves: dict[str, ArrayRecord]
    episodes: str

    @property
    def steps(self) -> int:
        """T, the steps of every stream."""
        return next(iter(self.leaves.values())).metadata["shape"][0]

    @property
    def streams(self) -> int:
        """B, the number of streams."""
        return next(iter(self.leaves.values())).metadata["shape"][1]


class GroupRecord(typing.NamedTuple):
    """An environment: the name of its card's file and its parts, in the order of their names."""

    card: str
    parts: tuple[PartRecord, ...]


Groups = dict[str, GroupRecord]


def encode_manifest(groups: Groups) -> bytes:
    """The manifest as JSON bytes; `decode_manifest` is the inverse."""
    # Leaves of one shape and dtype share their metadata, or it would be nearly all of the manifest.
    table: dict[str, Json] = {}

    def leaf(record: ArrayRecord) -> list[str]:
        digest = checksum(json.dumps(record.metadata, sort_keys=True).encode())[:12]
        table[digest] = record.metadata
        return [digest, record.checksum]

    described = {}
    for id, group in sorted(groups.items()):
        parts = {
            part.name: {
                "leaves": {name: leaf(record) for name, record in sorted(part.leaves.items())},
                "episodes": part.episodes,
            }
            for part in group.parts
        }
        described[id] = {"card": group.card, "parts": parts}
    manifest = {"format": MANIFEST_FORMAT, "schema_version": SCHEMA_VERSION, "groups": described, "metadata": table}
    return json.dumps(manifest, separators=(",", ":")).encode()


def decode_manifest(url: str, data: bytes) -> Groups:
    """Reads a manifest.

    Args:
      url: where it is from, for the error.
      data: what `encode_manifest` wrote.

    Returns:
      The groups.

    Raises:
      StoreError: it is something else, or of another schema version.
    """
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise foreign(url, f"its {MANIFEST} is no JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise foreign(url, f"its {MANIFEST} is not one of {MANIFEST_FORMAT!r}")
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise StoreError(
            f"the dataset {url} has the schema version {version}, this program reads and writes {SCHEMA_VERSION}: "
            "collect anew into another folder, or use the program that wrote it"
        )
    try:
        table = manifest["metadata"]
        return {
            id: GroupRecord(group["card"], tuple(_part(table, *item) for item in group["parts"].items()))
            for id, group in manifest["groups"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"the {MANIFEST} of {url} was changed by another program: {error!r}; restore it") from error


def _part(table: Json, name: str, description: Json) -> PartRecord:
    leaves = {leaf: ArrayRecord(table[digest], value) for leaf, (digest, value) in description["leaves"].items()}
    return PartRecord(name, leaves, description["episodes"])


def foreign(url: str, reason: str) -> StoreError:
    """The error for a folder that holds something else."""
    return StoreError(f"{url} is not a dataset: {reason}. Choose an empty folder; nothing was touched")


def checksum(value: np.ndarray | bytes) -> str:
    """The BLAKE2b digest of the bytes, of an array in row-major order, as 32 hexadecimal digits."""
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if isinstance(value, np.ndarray) else value
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def card_name(data: bytes) -> str:
    """The file name of a card, which says what the card is: a card is never changed."""
    return f"card-{checksum(data)[:16]}.json"


def leaf_folder(name: str) -> str:
    """The folder of a leaf inside its part's, with a slash at its end; names of a schema suit files."""
    return "".join(f"{_short_word(word)}/" for word in name.split("/"))


def _short_word(word: str) -> str:
    # "%~" is in no name of a leaf: there, two digits follow a percent sign.
    return word if len(word) <= WORD_BYTES else f"{word[: WORD_BYTES - 40]}%~{checksum(word.encode())}"


def array_metadata(value: np.ndarray) -> Json:
    """The zarr.json of an array.

    Args:
      value: `[T, B, ...]`.

    Returns:
      zarr3 metadata: compressed chunks of one stream, gathered in shards of many, each with its CRC.
    """
    (steps, streams, *inner), size = value.shape, value.dtype.itemsize
    step_bytes = max(1, size * math.prod(inner))
    chunk_steps = min(steps, max(CHUNK_STEP_RANGE[0], min(CHUNK_STEP_RANGE[1], CHUNK_BYTES // step_bytes)))
    chunks = max(1, SHARD_BYTES // (chunk_steps * step_bytes))
    shard_streams = min(streams, chunks)
    shard_steps = chunk_steps * min(math.ceil(steps / chunk_steps), max(1, chunks // shard_streams))
    whole = [max(1, length) for length in inner]
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    shuffle = {"shuffle": "shuffle", "typesize": size} if size > 1 else {"shuffle": "noshuffle"}
    blosc = {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 3, "blocksize": 0, **shuffle}}
    sharding = {
        "chunk_shape": [chunk_steps, 1, *whole],
        "codecs": [little_endian if size > 1 else {"name": "bytes"}, blosc, {"name": "crc32c"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(value.shape),
        "data_type": value.dtype.name,
        "fill_value": False if value.dtype == bool else 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_steps, shard_streams, *whole]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def shard_keys(metadata: Json) -> list[str]:
    """The files of an array, without its zarr.json, inside its folder."""
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    counts = [math.ceil(length / size) for length, size in zip(metadata["shape"], shard, strict=True)]
    return ["/".join(map(str, ("c", *index))) for index in itertools.product(*map(range, counts))]


def check_folder_name(id: str) -> None:
    """Raises StoreError for an id that cannot name a folder."""
    if any(character < " " or character == "\\" for character in id) or {"", ".", ".."} & {*id.split("/")}:
        raise StoreError(f"got the id {id!r}, which cannot name a folder")


def check_part(card: EnvironmentCard, leaves: dict[str, np.ndarray]) -> None:
    """Checks that the leaves of a new part are those of its card's spaces, and nothing in them would poison a model.

    Args:
      card: the environment's.
      leaves: arrays `[T, B, ...]`, see `ldm_jax.encoding.transition`.

    Raises:
      StoreError: leaves that do not fit each other, the spaces or the store, or numbers that are not finite.
    """
    id = card.id
    if not leaves:
        raise StoreError(f"got a part of {id} without leaves, expected arrays [T, B, ...]")
    shape = next(iter(leaves.values())).shape[:2]
    for name, value in leaves.items():
        if value.ndim < 2 or value.shape[:2] != shape or 0 in shape:
            raise StoreError(
                f"leaf {name!r} of {id} has the shape {value.shape}, expected to start with {shape}: T steps of B "
                "streams, the same for all leaves and none of them 0"
            )
        if value.dtype.name not in DTYPES or not value.dtype.isnative:
            raise StoreError(f"leaf {name!r} of {id} is {value.dtype!r}, expected one of {', '.join(DTYPES)}")
    shapes = {name: (value.shape[2:], value.dtype) for name, value in leaves.items()}
    try:
        check_leaves(card.observation_space, card.action_space, shapes, id)
    except SpaceError as error:
        raise StoreError(str(error)) from error
    for name, value in leaves.items():
        _check_finite(id, name, value)


def _check_finite(id: str, name: str, value: np.ndarray) -> None:
    if not np.issubdtype(value.dtype, np.floating):
        return
    # A block at a time: what is asked of each number takes a quarter of its memory.
    block = max(1, SHARD_BYTES * len(value) // max(1, value.nbytes))
    for begin in range(0, len(value), block):
        wrong = ~np.isfinite(value[begin : begin + block])
        if wrong.any():
            step, stream, *inner = np.argwhere(wrong)[0].tolist()
            raise StoreError(
                f"leaf {name!r} of {id} is {value[(begin + step, stream, *inner)]} at step {begin + step} of stream "
                f"{stream}, expected finite numbers: a model would learn from it; nothing was stored"
            )


def check_fits_group(id: str, leaves: dict[str, np.ndarray], group: GroupRecord) -> None:
    """Checks that a new part has the leaves of its group's other parts: a mask, say, is in all of them or in none.

    Raises:
      StoreError: names the first leaf that differs.
    """
    first = group.parts[0]
    expected = {
        name: (tuple(metadata["shape"][2:]), metadata["data_type"]) for name, (metadata, _) in first.leaves.items()
    }
    got = {name: (value.shape[2:], value.dtype.name) for name, value in leaves.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise StoreError(
                f"leaf {name!r} of {id} is {got.get(name, 'missing')}, but {expected.get(name, 'missing')} in "
                f"{first.name}: all parts of a group have the same leaves; write to another dataset"
            )


def encode_episodes(id: str, episodes: EpisodeIndex, steps: int, streams: int) -> bytes:
    """The episode index as the bytes of a .npy file of records.

    Args:
      id: the environment, for the error.
      episodes: the index.
      steps: T of the part.
      streams: B of the part.

    Returns:
      What `decode_episodes` reads.

    Raises:
      StoreError: columns of unequal length, a number that cannot be kept, or an episode outside the part.
    """
    columns = [np.asarray(column) for column in episodes]
    shapes = [column.shape for column in columns]
    if len({*shapes}) != 1 or len(shapes[0]) != 1:
        raise StoreError(f"the episode index of {id} has columns of the shapes {shapes}, expected [E] for all")
    records = np.zeros(shapes[0], EPISODE_DTYPE)
    for field, column in zip(EpisodeIndex._fields, columns, strict=True):
        with np.errstate(invalid="ignore"):
            records[field] = column
        wrong = ~np.isfinite(records[field]) if records[field].dtype.kind == "f" else records[field] != column
        if wrong.any():
            expected = "a finite number" if records[field].dtype.kind == "f" else f"of {records[field].dtype}"
            raise StoreError(f"the {field} of an episode of {id} is {column[wrong.argmax()]}, expected {expected}")
    start, length, stream = records["start"], records["length"], records["stream"]
    bad = (start < 0) | (length < 0) | (start + length > steps) | (stream < 0) | (stream >= streams)
    if bad.any():
        got = EpisodeIndex(*records[bad.argmax()].item())
        raise StoreError(f"episode {bad.argmax()} of {id} is {got}, outside {steps} steps of {streams} streams")
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    return buffer.getvalue()


def decode_episodes(data: bytes) -> EpisodeIndex:
    """Reads what `encode_episodes` wrote."""
    records = np.load(io.BytesIO(data), allow_pickle=False)
    return EpisodeIndex(*(np.ascontiguousarray(records[field]) for field in EpisodeIndex._fields))

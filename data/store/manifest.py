"""What a dataset says of itself: its manifest, what a part may hold, and the episode index.

Nothing here reads or writes.
"""

from __future__ import annotations

import collections.abc
import hashlib
import io
import json
import typing
import urllib.parse

import numpy as np

from ldm_jax.cards import EnvironmentCard
from ldm_jax.encoding.transition import check_leaves
from ldm_jax.errors import LdmError, differences
from ldm_jax.spaces import SpaceError

MANIFEST_FORMAT = "ldm_jax trajectories"
SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
"""The file that says what a folder is: a dataset, and of which configuration."""
RECORDS = "manifest/"
"""The folder of the records of environments."""
ID_BYTES = 240
"""File systems end names at 255 bytes, and a record is named by its id, with three bytes for a slash."""
EPISODES = "episodes.npy"
SHARD_BYTES = 64 << 20
"""A shard is one file, held in memory while it is written."""
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

    def ended(self, steps: int) -> np.ndarray:
        """`bool [E]`: which ended within their part of so many steps; its end cuts off the last of a stream."""
        return self.start + self.length < steps

    def failed(self, steps: int, random_return: float) -> np.ndarray:
        """`bool [E]`: which ended with no more than a random policy gets on average; they are data as all others."""
        return self.ended(steps) & (self.return_ <= random_return)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EpisodeIndex) and all(map(np.array_equal, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other


EPISODE_DTYPE = np.dtype(list(zip(EpisodeIndex._fields, ("<i8", "<i8", "<f8", "<i8", "<f4", "<i4"), strict=True)))


def encode_manifest(configuration: collections.abc.Mapping[str, typing.Any]) -> bytes:
    """The manifest of a dataset as JSON bytes; `decode_manifest` is the inverse."""
    manifest = {"format": MANIFEST_FORMAT, "schema_version": SCHEMA_VERSION, "configuration": dict(configuration)}
    return seal(json.dumps(manifest, separators=(",", ":")).encode())


def decode_manifest(url: str, data: bytes) -> Json:
    """Reads a manifest.

    Args:
      url: where it is from, for the error.
      data: what `encode_manifest` wrote.

    Returns:
      The configuration that the dataset was made with.

    Raises:
      StoreError: it is something else, of another schema version, or damaged.
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
        return json.loads(unseal(data))["configuration"]
    except (KeyError, ValueError) as error:
        raise StoreError(f"the {MANIFEST} of {url} was changed by another program: {error}; restore it") from error


def seal(body: bytes) -> bytes:
    """A JSON object as bytes, with its checksum as one more field; `unseal` is the inverse."""
    return body[:-1] + _checksum_field(body)


def unseal(data: bytes) -> bytes:
    """What `seal` was given; raises ValueError where any byte is another one."""
    end = len(_checksum_field(b""))
    body = data[:-end] + b"}"
    if data[-end:] != _checksum_field(body):
        raise ValueError("its checksum differs")
    return body


def _checksum_field(body: bytes) -> bytes:
    return f',"checksum":"{checksum(body)}"}}'.encode()


def check_same_configuration(
    url: str, made: collections.abc.Mapping[str, typing.Any], wanted: collections.abc.Mapping[str, typing.Any]
) -> None:
    """Raises StoreError, naming what differs, where a dataset was made with another configuration than is wanted."""
    # As they are read back: a tuple is a list there.
    if differing := differences(*(json.loads(json.dumps(dict(each))) for each in (made, wanted))):
        raise StoreError(
            f"the dataset {url} was made with another configuration: {'; '.join(differing)}. Give the same one, or "
            "write to another folder"
        )


def foreign(url: str, reason: str) -> StoreError:
    """The error for a folder that holds something else."""
    return StoreError(
        f"{url} is not a dataset: {reason}. Pass one, or an empty folder to make one in; nothing was touched"
    )


def checksum(value: np.ndarray | bytes) -> str:
    """The BLAKE2b digest of the bytes, of an array in row-major order, as 32 hexadecimal digits."""
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if isinstance(value, np.ndarray) else value
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def card_name(data: bytes) -> str:
    """The file name of a card, which says what the card is: a card is never changed."""
    return f"card-{checksum(data)[:16]}.json"


def check_folder_name(id: str) -> None:
    """Raises StoreError for an id that cannot name a folder, or whose folder or record would not be its own."""
    first, *_ = words = id.split("/")
    if any(character < " " or character == "\\" for character in id) or {"", ".", ".."} & {*words}:
        raise StoreError(f"got the id {id!r}, which cannot name a folder")
    if first in {RECORDS.rstrip("/"), MANIFEST} or len(urllib.parse.quote(id, safe="")) > ID_BYTES:
        raise StoreError(
            f"got the id {id!r}, which cannot name a folder: expected at most {ID_BYTES} bytes, and another "
            f"library than {first!r}"
        )


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

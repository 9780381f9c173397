"""Where a dataset lies: files and arrays in a folder, a bucket or memory. The one file that knows TensorStore."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import os
import re
import sys
import typing

import numpy as np
import tensorstore as ts

from .manifest import MANIFEST, Json, StoreError

INDEX_CACHE_BYTES = 64 << 20
"""Bound on what TensorStore keeps of a process's reads, for the indices of shards; chunks are kept by `chunks`."""
BUCKET_RETRIES = 8
"""Of a request to a bucket that has answered once: a minute without an answer is no end of a run."""
ANSWERED_S = 15.0
"""How long a bucket may take to answer for the first time."""
FIRST_RETRIES = 3
"""Of the first request."""
READS_AT_ONCE = 256
"""Bound on the small files that are asked for before the first of them has come."""
READ_ERRORS = (ValueError, OSError, RuntimeError)
"""What TensorStore raises where a file or a place is at fault."""
_SILENT = re.compile(r"\bUNAVAILABLE\b|\bDEADLINE_EXCEEDED\b|retry attempts failed")
StoredArray = ts.TensorStore
PendingRead = ts.Future


class File(typing.NamedTuple):
    """A file as it was read: its content, None where there is none, and the generation that a write can insist on."""

    content: bytes | None
    generation: bytes


@dataclasses.dataclass(frozen=True)
class Storage:
    """A folder, bucket or place in memory, opened; equal to any other of its URL, and pickled by it.

    Attributes:
      url: given as a path, relative or with `~`, or as a URL; kept as one that means the same in any working directory.

    Raises:
      StoreError: no such kind of URL.
    """

    url: str

    def __post_init__(self) -> None:
        text = os.fspath(self.url)
        is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
        text = re.sub("^file://~", f"file://{os.path.expanduser('~')}", text)
        # A symbolic link is kept: it may be pointed elsewhere.
        text = text.rstrip("/") if is_url else os.path.abspath(os.path.expanduser(text))
        object.__setattr__(self, "url", text)
        _ = self._kvstore
        if self.url.startswith(("s3://", "gs://")):
            self._check_reachable()

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    @functools.cached_property
    def _kvstore(self) -> ts.KvStore:
        return self._open(_context())

    def _open(self, context: ts.Context) -> ts.KvStore:
        spec: typing.Any = f"{self.url}/"
        if self.url.startswith("s3://"):
            spec = _s3_spec(self.url)
        elif "://" not in self.url:
            spec = {"driver": "file", "path": os.path.join(self.url, "")}
        try:
            return ts.KvStore.open(spec, context=context).result()
        except READ_ERRORS as error:
            raise StoreError(
                f"cannot open {self.url}: {reason(error)}. Expected a path or a file, memory, s3 or gs URL"
            ) from error

    def _check_reachable(self) -> None:
        """Raises StoreError where nothing answers: whatever is answered is said when the place is used."""
        try:
            self._open(_context(FIRST_RETRIES)).read(MANIFEST).result(timeout=ANSWERED_S)
        except (*READ_ERRORS, TimeoutError) as error:
            if isinstance(error, TimeoutError) or _SILENT.search(str(error)):
                why = reason(error) or f"no answer within {ANSWERED_S:g} s"
                raise StoreError(f"cannot reach {self.url}: {why}. See to the network, and to its endpoint") from error

    @functools.cached_property
    def _folder(self) -> str | None:
        """The path, where the files are on a file system."""
        spec = self._kvstore.spec().to_json()
        return spec["path"] if spec["driver"] == "file" else None

    @property
    def _hint(self) -> str:
        """What else to look at where the place is a bucket."""
        if not self.url.startswith(("s3://", "gs://")):
            return ""
        return ". See to the bucket's name, your credentials and what they permit"

    def read(self, key: str) -> File:
        """Reads a file whole; raises StoreError where it cannot be read, which is not to say that it is not there."""
        try:
            found = self._kvstore.read(key).result()
        except READ_ERRORS as error:
            raise self._unreadable(f"read {key}", error) from error
        return File(found.value if found.state == "value" else None, found.stamp.generation)

    def read_all(self, keys: collections.abc.Sequence[str]) -> list[bytes | None]:
        """Reads files whole, many at a time; None where there is none.

        Raises:
          StoreError: one of them cannot be read.
        """
        contents: list[bytes | None] = []
        for begin in range(0, len(keys), READS_AT_ONCE):
            pending = [(key, self._kvstore.read(key)) for key in keys[begin : begin + READS_AT_ONCE]]
            for key, future in pending:
                try:
                    found = future.result()
                except READ_ERRORS as error:
                    raise self._unreadable(f"read {key}", error) from error
                contents.append(found.value if found.state == "value" else None)
        return contents

    def write(self, key: str, content: bytes | None, generation: bytes | None = None) -> bool:
        """Writes a file whole or not at all.

        Args:
          key: its name.
          content: what to write; None to delete it.
          generation: only write if the file is still the one that was read so.

        Returns:
          Whether it was written.

        Raises:
          StoreError: the place cannot be written, or has no room.
        """
        try:
            self._cut_leftover(key)
            return bool(self._kvstore.write(key, content, if_equal=generation).result().generation)
        except READ_ERRORS as error:
            raise self._unwritable(key, error) from error

    def delete(self, key: str) -> None:
        """Deletes a file or, where the key ends in a slash, all files under it; nothing happens where there is none."""
        try:
            if key.endswith("/"):
                self._kvstore.delete_range(_under(key)).result()
            else:
                self._kvstore.write(key, None).result()
        except READ_ERRORS as error:
            raise self._unwritable(key, error) from error

    def list(self, folder: str) -> list[str]:
        """The names of all files under a folder, whose name ends in a slash; of all there are where it is empty."""
        try:
            return [key.decode() for key in self._kvstore.list(_under(folder)).result()]
        except READ_ERRORS as error:
            raise self._unreadable(f"list {folder}", error) from error

    def is_empty(self) -> bool:
        """Whether there is nothing but what a dataset's maker that died may have left."""
        try:
            if self._folder is None:
                return not self._kvstore.list().result()
            # Names only, and of one folder: a foreign one may be a whole disk.
            return not os.path.isdir(self._folder) or not {*os.listdir(self._folder)} - {f"{MANIFEST}.__lock"}
        except READ_ERRORS as error:
            raise self._unreadable("list files", error) from error

    def open_array(self, folder: str, metadata: Json) -> StoredArray:
        """Opens an array that is there, without reading anything.

        Args:
          folder: its own; ends in a slash.
          metadata: its zarr.json.
        """
        spec = self._array_spec(folder, metadata)
        return ts.open(spec, open=True, assume_metadata=True, context=_context()).result()

    def check_array(self, folder: str, metadata: Json) -> None:
        """Raises what `READ_ERRORS` names where the zarr.json in a folder is missing, damaged or not this one."""
        ts.open(
            self._array_spec(folder, metadata) | {"recheck_cached_metadata": True},
            open=True,
            context=_context(),
        ).result()

    def stored_bytes(self, folder: str) -> int | None:
        """Bytes of all files under a folder, whose name ends in a slash; None where the place does not say."""
        if self._folder is None:
            return None
        walked = os.walk(os.path.join(self._folder, folder))
        return sum(os.path.getsize(os.path.join(place, name)) for place, _, names in walked for name in names)

    def write_arrays(self, arrays: collections.abc.Mapping[str, tuple[Json, np.ndarray]]) -> None:
        """Writes arrays by the names of their folders, which end in a slash, each with its zarr.json.

        Raises:
          StoreError: the place cannot be written, or has no room; some of them may be there then.
        """
        pending: dict[str, ts.Future] = {}

        def wait() -> None:
            errors = {folder: future.exception() for folder, future in pending.items()}
            for folder, error in errors.items():
                if error is not None:
                    raise self._unwritable(folder, error) from error

        for folder, (metadata, _) in arrays.items():
            pending[folder] = ts.open(self._array_spec(folder, metadata), create=True, context=_context())
        wait()
        for folder, (_, value) in arrays.items():
            pending[folder] = pending[folder].result().write(value).commit
        # For all, whatever becomes of one: nothing may still be written when the caller clears up.
        wait()

    def _array_spec(self, folder: str, metadata: Json) -> Json:
        return {
            "driver": "zarr3",
            "kvstore": (self._kvstore / folder).spec().to_json(),
            "metadata": metadata,
            # Parts are immutable, so what is cached stays right; a group removed and written again is opened again.
            "recheck_cached_data": "open",
            # A lost file is an error, not zeros.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }

    def _cut_leftover(self, key: str) -> None:
        """Empties the lock file of a key if a writer that died has left it.

        TensorStore writes into the lock file and renames it, but does not cut it first: what a dead writer left would
        stay as the end of a shorter file. Only on Linux is its lock one that can be asked for here.
        """
        if self._folder is None or sys.platform != "linux":
            return
        import fcntl

        lock = os.path.join(self._folder, f"{key}.__lock")
        try:
            with open(lock, "r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A writer that lived has renamed it by now: it is then the file itself.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                    file.truncate(0)
        except (FileNotFoundError, BlockingIOError):
            return

    def _unreadable(self, what: str, error: BaseException) -> StoreError:
        return StoreError(f"cannot {what} at {self.url}: {reason(error)}{self._hint}")

    def _unwritable(self, key: str, error: BaseException) -> StoreError:
        return StoreError(
            f"cannot write {key} at {self.url}: {reason(error)}. Choose a place with room that this user may write"
            f"{self._hint}"
        )


def _s3_spec(url: str) -> Json:
    """The place that an `s3://` URL names, found as Amazon's own programs find it: by their environment variables."""
    bucket, _, path = url.removeprefix("s3://").partition("/")
    spec: Json = {"driver": "s3", "bucket": bucket, "path": f"{path}/" if path else ""}
    environ = os.environ
    if endpoint := environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": environ.get("AWS_REGION") or "us-east-1"}
    if "AWS_ACCESS_KEY_ID" in environ:
        # Else it looks for files, and says on the error stream that there are none.
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def reason(error: BaseException) -> str:
    """What went wrong, in one line, without where in TensorStore's own sources or what else a server answered."""
    text = re.sub(r" \[(http_response|x-amz)\S*=.*", "", str(error), flags=re.DOTALL)
    text = re.sub(r"\s*\[(source locations|tensorstore_spec|os_error_code)=.*?\](?=\s|$|\[)", "", text)
    return " ".join(text.replace("\0", "/").split())


@functools.cache
def _context(max_retries: int = BUCKET_RETRIES) -> ts.Context:
    # One for the process: the cache is then bounded as a whole, and `memory://` names one place.
    retries = {"max_retries": max_retries, "initial_delay": "500ms", "max_delay": "16s"}
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": INDEX_CACHE_BYTES},
            "s3_request_retries": retries,
            "gcs_request_retries": retries,
        }
    )


def _under(folder: str) -> ts.KvStore.KeyRange:
    if not folder:
        return ts.KvStore.KeyRange()
    return ts.KvStore.KeyRange(folder, folder[:-1] + "0")  # "0" follows "/"

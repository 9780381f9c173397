"""The catalog: what was found out about every id of every library, in `catalog/<library>.jsonl`.

It is the one place of ids and of the reasons why some do not work. It is made by trying each id, is shipped with the
package, and is read one library at a time when it is first asked for, without importing any library.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import pathlib
import types
import typing

from ldm_jax import files
from ldm_jax.errors import LdmError

CATALOG = pathlib.Path(__file__).parent


class CatalogError(LdmError, ValueError):
    """A file of the catalog that is not as it should be."""


@dataclasses.dataclass(frozen=True, repr=False)
class Entry:
    """One line: an id, and what came of trying it.

    Attributes:
      id: `library/<the library's own id>`.
      library: the library.
      version: the version that was tried.
      task: the task that it shares with other ids, see `taxonomy.task`.
      family: the tasks that differ in size, reward, difficulty or seed alone, see `taxonomy.family`.
      domain: what the task is about.
      observation_space: of one environment, as `ldm_jax.spaces.from_json` takes it; None where it could not be made.
      action_space: the same for actions.
      time_limit: steps after which an episode is truncated, imposed where the library has no limit; 0 if not known.
      group: the group among `images/` whose interpreter serves it; empty where an adapter in this interpreter does.
      verified: whether it could be made, was reset, stepped 100 times with every observation in its space and every
        number finite, and reset again.
      reason: why it does not work; empty where it does.
      steps_per_s: of one environment in one process, on the machine where the catalog was made; 0 where it was not
        verified. An order of magnitude.
    """

    id: str
    library: str
    version: str
    task: str
    family: str
    domain: str
    observation_space: dict[str, typing.Any] | None
    action_space: dict[str, typing.Any] | None
    time_limit: int
    group: str
    verified: bool
    reason: str
    steps_per_s: float

    def __post_init__(self) -> None:
        if self.verified == bool(self.reason):
            raise CatalogError(f"{self.id} is verified or has a reason, got {self.verified} and {self.reason!r}")

    def __repr__(self) -> str:
        """Short: spaces are seen by `environments.spec`."""
        return f"Entry({self.id!r}, {self.domain}, {self.action or 'unknown action'}, {self.reason or 'verified'})"

    @property
    def name(self) -> str:
        """The library's own id."""
        return self.id.partition("/")[2]

    @property
    def isolated(self) -> bool:
        """Whether the library needs an interpreter of its own."""
        return bool(self.group)

    @property
    def observation(self) -> str:
        """The kind of the observation space, `Box`, `Dict`, ...; empty where it is not known."""
        return self.observation_space["kind"] if self.observation_space else ""

    @property
    def action(self) -> str:
        """The kind of the action space, `Discrete`, `Box`, ...; empty where it is not known."""
        return self.action_space["kind"] if self.action_space else ""

    def to_line(self) -> str:
        """As one line of JSON; `from_line` is the inverse."""
        return json.dumps({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, **_COMPACT)

    @classmethod
    def from_line(cls, line: str) -> Entry:
        """From what `to_line` wrote.

        Raises:
          CatalogError: it is not such a line.
        """
        try:
            return cls(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise CatalogError(f"got the line {line[:80]!r}, expected an entry of the catalog: {error}") from error


_COMPACT: dict[str, typing.Any] = {"ensure_ascii": False, "separators": (",", ":")}


def catalogued() -> list[str]:
    """The libraries that are in the catalog."""
    return sorted(path.stem for path in CATALOG.glob("*.jsonl"))


def entries(library: str) -> collections.abc.Mapping[str, Entry]:
    """What is known of a library's environments, by the library's own ids; nothing where it is not in the catalog."""
    path = CATALOG / f"{library}.jsonl"
    if "/" in library or not path.exists():
        return types.MappingProxyType({})
    status = path.stat()
    return _read(path, (status.st_mtime_ns, status.st_size))  # read again once it was written anew


def entries_of(libraries: collections.abc.Iterable[str]) -> list[Entry]:
    """The entries of some libraries, in order.

    Args:
      libraries: their names.
    """
    return [entry for library in libraries for entry in entries(library).values()]


@functools.lru_cache(maxsize=256)
def _read(path: pathlib.Path, written: tuple[int, int]) -> collections.abc.Mapping[str, Entry]:
    return types.MappingProxyType({entry.name: entry for entry in read_entries(path)})


def read_entries(path: pathlib.Path) -> list[Entry]:
    """The entries of one file.

    Raises:
      CatalogError: a line is not as it should be.
    """
    return [Entry.from_line(line) for line in path.read_text("utf-8").splitlines()]


def write_entries(path: pathlib.Path, found: collections.abc.Iterable[Entry]) -> None:
    """Writes entries to a file, sorted by id, at once or not at all."""
    files.write(path, "".join(entry.to_line() + "\n" for entry in sorted(found, key=lambda entry: entry.id)))

"""The experts that act in the environments of the catalog: which ids each is for, as data, in `expert_lists/*.jsonl`.

An expert is a policy that nobody trains: one that a library ships, or a rule or a search on what a library exposes. The
lists say what it is called and what it may be asked; its program is among `bridges/experts`, and runs beside the
simulator (kind `live`) or on what is shown, whichever library shows it (kind `observation`).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import fnmatch
import functools
import json
import pathlib
import typing

from ldm_jax.errors import LdmError

LISTS = pathlib.Path(__file__).parent / "expert_lists"

_KINDS = ("live", "observation")


class ExpertError(LdmError, ValueError):
    """A list of experts that is not as it should be, or an expert that an environment does not have."""


@dataclasses.dataclass(frozen=True)
class ExpertInfo:
    """What is known of an expert without running it.

    Attributes:
      name: of the expert, unique among those of an id.
      version: of its program; raised when what it does changes. With the version of the library it says which it was.
      kind: `live`, where it runs beside the simulator and labels time steps, as `environments.make(id, expert=name)`
        has them, or `observation`, where it is a function of what is observed and runs anywhere.
      privileged: whether it reads what the policy cannot see: hidden state, or the future.
      labels_any_state: whether it says what to do wherever another policy has led; else it is to be replayed.
      shipped: whether its library brings it; else it is a rule or a search of ours.
      module: the file of its program, among `environments/bridges/experts` where it is live.
      ids: patterns, as of file names, of the ids that it is for.
      exclude: patterns of ids among them that it is not for, each with the reason.
    """

    name: str
    version: str
    kind: str
    privileged: bool
    labels_any_state: bool
    shipped: bool
    module: str
    ids: tuple[str, ...]
    exclude: collections.abc.Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ExpertError(f"the expert {self.name!r} is of kind {self.kind!r}, expected {' or '.join(_KINDS)}")
        for field in ("privileged", "labels_any_state", "shipped"):
            if not isinstance(getattr(self, field), bool):
                raise ExpertError(f"{field} of the expert {self.name!r} is {getattr(self, field)!r}, expected a bool")
        for pattern in (*self.ids, *self.exclude):
            if not pattern.partition("/")[2] or "*" in pattern.partition("/")[0]:
                raise ExpertError(f"the expert {self.name!r} is for {pattern!r}, expected library/pattern of its ids")

    def serves(self, id: str) -> bool:
        """Whether it is for an id."""
        return _matches(self.ids, id) and not _matches(self.exclude, id)


def experts(id: str) -> tuple[ExpertInfo, ...]:
    """The experts of an id: a look at the lists, which imports no library.

    >>> import environments
    >>> [expert.name for expert in environments.experts("minigrid/BabyAI-GoToLocal-v0")]
    ['babyai-bot']

    Args:
      id: `library/<the library's own id>`; one that nobody knows has no experts.

    Raises:
      ExpertError: a list is not as it should be.
    """
    return tuple(expert for expert in _by_library().get(id.partition("/")[0], ()) if expert.serves(id))


def find_expert(id: str, name: str) -> ExpertInfo:
    """The expert of an id by its name.

    Raises:
      ExpertError: the id has none of that name; says which it has.
    """
    known = experts(id)
    for expert in known:
        if expert.name == name:
            return expert
    has = f"it has {', '.join(expert.name for expert in known)}" if known else "it has none"
    raise ExpertError(f"{id} has no expert {name!r}: {has} (environments.experts says which)")


def read_list(path: pathlib.Path) -> list[ExpertInfo]:
    """The experts of one list.

    Raises:
      ExpertError: a line is not as it should be.
    """
    return [_read(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _read(line: str) -> ExpertInfo:
    try:
        fields: dict[str, typing.Any] = json.loads(line)
        return ExpertInfo(**{**fields, "ids": tuple(fields["ids"])})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ExpertError):
            raise
        raise ExpertError(f"got the line {line[:80]!r}, expected an expert of a list: {error!r}") from error


@functools.cache
def _by_library() -> dict[str, list[ExpertInfo]]:
    found: dict[str, list[ExpertInfo]] = {}
    for path in sorted(LISTS.glob("*.jsonl")):
        for expert in read_list(path):
            for library in dict.fromkeys(pattern.partition("/")[0] for pattern in expert.ids):
                found.setdefault(library, []).append(expert)
    return found


def _matches(patterns: collections.abc.Iterable[str], id: str) -> bool:
    return any(fnmatch.fnmatchcase(id, pattern) for pattern in patterns)

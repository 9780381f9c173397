"""Which entries of the catalog are meant: terms on their fields, and a draw among what these leave.

A selection is a text of terms with blanks between, which all have to hold: `library=nasim,minigrid action=Discrete
time_limit<=500 per_family=1 limit=100`. Fields are those of an entry; values are without regard to case, with `_` for a
blank, and may be patterns as of file names. The draw is by one rule: a seed puts all ids of the catalog into a line;
`per_family=n` keeps the first n of each family in that line (of each library, task, domain likewise) and then
`limit=n` the first n of all. So a smaller limit draws a part of what a larger one draws, and a new library in the
catalog does not shuffle the others.
"""

from __future__ import annotations

import collections
import collections.abc
import difflib
import fnmatch
import hashlib
import re
import shlex
import types
import typing

from ldm_jax.errors import LdmError, did_you_mean

from .entries import Entry
from .experts import experts

_WORDS = (
    "id",
    "library",
    "version",
    "task",
    "family",
    "domain",
    "observation",
    "action",
    "group",
    "verified",
    "expert",
)
_NUMBERS = ("time_limit", "steps_per_s")
_PER = ("per_library", "per_task", "per_family", "per_domain")
_DRAWS = (*_PER, "limit", "seed")
_TERM = re.compile(r"(\w+)(<=|>=|=)(.*)", re.DOTALL)
_SHOWN = 8  # values that an error names


class SelectionError(LdmError, ValueError):
    """A selection that cannot be read, or that nothing in the catalog answers to."""


class Term(typing.NamedTuple):
    """One condition on an entry.

    Attributes:
      field: of the entry.
      relation: `=`, or for numbers `<=` and `>=` too.
      values: of which one has to hold.
    """

    field: str
    relation: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.field}{self.relation}{','.join(self.values)}"

    def holds(self, entry: Entry) -> bool:
        """Whether an entry is meant."""
        return any(self.matches(value, entry) for value in self.values)

    def matches(self, value: str, entry: Entry) -> bool:
        """Whether an entry is meant by one of the values."""
        if self.field in _NUMBERS:
            found, wanted = getattr(entry, self.field), float(value)
            return {"=": found == wanted, "<=": found <= wanted, ">=": found >= wanted}[self.relation]
        return fnmatch.fnmatchcase(_plain(_value(entry, self.field)), _plain(value).replace("[", "[[]"))


class Selection(typing.NamedTuple):
    """What is selected.

    Attributes:
      terms: all of which have to hold.
      draws: the numbers of the draw, by their names: `per_family`, `limit`, `seed`, ...
    """

    terms: tuple[Term, ...]
    draws: collections.abc.Mapping[str, int]

    def apply(self, entries: collections.abc.Iterable[Entry]) -> list[Entry]:
        """The entries that are selected, in their order.

        Raises:
          SelectionError: none is; says which term left none, and which values would.
        """
        everything = left = list(entries)
        for i, term in enumerate(self.terms):
            unknown = [value for value in term.values if not any(term.matches(value, entry) for entry in everything)]
            if unknown and term.field in _WORDS:
                raise _nothing(term._replace(values=tuple(unknown)), everything, ())
            before, left = left, [entry for entry in left if term.holds(entry)]
            if not left:
                raise _nothing(term, before, self.terms[:i])
        return self._draw(left)

    def _draw(self, entries: list[Entry]) -> list[Entry]:
        line = sorted(entries, key=lambda entry: place_in_line(self.draws.get("seed", 0), entry.id))
        for name in _PER:
            if name in self.draws:
                seen: collections.Counter[str] = collections.Counter()
                kept = []
                for entry in line:
                    value = _value(entry, name.removeprefix("per_"))
                    seen[value] += 1
                    if seen[value] <= self.draws[name]:
                        kept.append(entry)
                line = kept
        drawn = {entry.id for entry in line[: self.draws.get("limit", len(line))]}
        return [entry for entry in entries if entry.id in drawn]


def parse(text: str) -> Selection:
    """Reads a selection.

    Args:
      text: terms with blanks between; values with blanks in quotes.

    Raises:
      SelectionError: a term that cannot be read; names the nearest fields.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SelectionError(f"the selection {text!r} cannot be read: {error}") from error
    terms: list[Term] = []
    draws: dict[str, int] = {}
    for word in words:
        found = _TERM.fullmatch(word)
        if not found or not found[3]:
            raise SelectionError(f"got {word!r} in the selection, expected field=value, as in library=nasim,minigrid")
        name, relation, value = found.groups()
        if name in _DRAWS:
            if relation != "=" or not value.isdecimal() or (name != "seed" and int(value) < 1):
                raise SelectionError(f"got {word!r} in the selection, expected a positive whole number")
            draws[name] = int(value)
        else:
            terms.append(_term(name, relation, tuple(value.split(","))))
    if not any(term.field == "verified" for term in terms):
        terms.insert(0, Term("verified", "=", ("yes",)))
    return Selection(tuple(terms), types.MappingProxyType(draws))


def _term(name: str, relation: str, values: tuple[str, ...]) -> Term:
    known = (*_WORDS, *_NUMBERS)
    if name not in known:
        fields = (*known, *_DRAWS)
        hint = did_you_mean(name, fields)
        raise SelectionError(f"entries of the catalog have no field {name!r}, but {', '.join(fields)}{hint}")
    if name in _NUMBERS:
        for value in values:
            try:
                float(value)
            except ValueError:
                raise SelectionError(f"{name} is {value!r} in the selection, expected a number") from None
    elif relation != "=":
        raise SelectionError(f"got {name}{relation} in the selection, but only {' and '.join(_NUMBERS)} are numbers")
    return Term(name, relation, values)


def _nothing(term: Term, entries: list[Entry], before: tuple[Term, ...]) -> SelectionError:
    """The error about a term that leaves nothing of the entries that the terms before it leave."""
    where = f"of {' '.join(map(str, before))}" if before else "of the catalog"
    if term.field in _NUMBERS:
        numbers = [getattr(entry, term.field) for entry in entries]
        there = f"{term.field} is {min(numbers):g} to {max(numbers):g} there"
    else:
        counted = collections.Counter(_value(entry, term.field) for entry in entries)
        near = difflib.get_close_matches(_plain(term.values[0]), [*map(_plain, counted)], n=3, cutoff=0.5)
        named = sorted(
            (value for value in counted if _plain(value) in near), key=lambda value: near.index(_plain(value))
        )
        known = [value or "(none)" for value, _ in counted.most_common(_SHOWN)]
        there = f"did you mean {' or '.join(named)}? " if named else ""
        there += f"{term.field} is {' or '.join(known)}{' or another' if len(counted) > _SHOWN else ''} there"
    return SelectionError(f"{term} leaves none of the {len(entries):,} environments {where}: {there}")


def _value(entry: Entry, field: str) -> str:
    if field in ("verified", "expert"):
        return "yes" if (entry.verified if field == "verified" else experts(entry.id)) else "no"
    return getattr(entry, field)


def _plain(value: str) -> str:
    return value.casefold().replace("_", " ")


def place_in_line(seed: int, name: str) -> bytes:
    """Where a seed puts an id, or whatever has a name, in the line that is drawn from: what it sorts by."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()

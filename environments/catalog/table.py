"""Entries of the catalog as a table, for the eye."""

from __future__ import annotations

import collections.abc
import dataclasses
import html
import typing

from .entries import Entry

_SHOWN = 20  # rows; of longer tables the first ones are shown
_HEAD = ("id", "domain", "observation", "action", "limit", "steps/s")
_NUMBERS = 2  # of the columns, the last ones


@dataclasses.dataclass(frozen=True, repr=False)
class Table(collections.abc.Sequence[Entry]):
    """An immutable sequence of entries that shows itself as a table.

    Attributes:
      entries: in order.
    """

    entries: tuple[Entry, ...]

    def __init__(self, entries: collections.abc.Iterable[Entry]):
        object.__setattr__(self, "entries", tuple(entries))

    @property
    def ids(self) -> list[str]:
        """The ids, as `make` takes them."""
        return [entry.id for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    @typing.overload
    def __getitem__(self, index: int) -> Entry: ...

    @typing.overload
    def __getitem__(self, index: slice) -> Table: ...

    def __getitem__(self, index: int | slice) -> Entry | Table:
        return Table(self.entries[index]) if isinstance(index, slice) else self.entries[index]

    def __repr__(self) -> str:
        rows = [_HEAD, *map(_row, self.entries[:_SHOWN])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [" ".join(map(_pad, row, widths, range(len(row)))).rstrip() for row in rows]
        return "\n".join([self._title(), *lines, *self._rest()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in _row(entry)) for entry in self.entries[:_SHOWN]]
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        notes = "".join(f"<p>{line}</p>" for line in self._rest())
        return f"<p>{self._title()}</p><table><tr>{head}</tr>{body}</table>{notes}"

    def _title(self) -> str:
        libraries = len({entry.library for entry in self.entries})
        return f"{_count(len(self), 'environment')} of {_count(libraries, 'library', 'libraries')}"

    def _rest(self) -> list[str]:
        return [f"... and {len(self) - _SHOWN:,} more"] if len(self) > _SHOWN else []


def _row(entry: Entry) -> tuple[str, ...]:
    spaces = (_brief(space) for space in (entry.observation_space, entry.action_space))
    numbers = f"{entry.time_limit:,}", f"{entry.steps_per_s:,.0f}"
    return (entry.id, entry.domain, *spaces, *(number if number != "0" else "" for number in numbers))


def _brief(space: dict[str, typing.Any] | None) -> str:
    """The kind and the size of a space: `Box(84, 84, 3)`, `Discrete(4)`, `Dict(2)`."""
    if space is None:
        return ""
    sizes = {"Discrete": "n", "MultiDiscrete": "nvec", "Text": "max_length"}
    size = space["spaces"] if "spaces" in space else space[sizes.get(space["kind"], "shape")]
    if "spaces" in space:
        inside = str(len(size))
    elif isinstance(size, list) and space["kind"] != "MultiDiscrete":
        inside = ", ".join(map(str, size))
    else:
        inside = str(size) if isinstance(size, int) or len(size) <= 4 else f"{len(size)} slots"
    return f"{space['kind']}({inside})"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column >= len(_HEAD) - _NUMBERS else cell.ljust(width)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"

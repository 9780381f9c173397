"""The card of a dataset as a page: what is in it, how it was made, and what is not in it and why."""

from __future__ import annotations

import collections
import collections.abc
import itertools
import typing

import numpy as np

from experiments.report.document import JsonValue, Tile, assemble, details, reasons, section, short, tiles
from experiments.report.figures import count

_NOISES = np.linspace(0, 1, 11)
_SHARES = (0.1, 0.5, 0.9)


class CardRow(typing.NamedTuple):
    """What a card says of one environment.

    Attributes:
      id: of the environment.
      domain: what it is about.
      transitions: steps of all streams.
      raw: bytes, uncompressed.
      stored: bytes of its files; None where the place does not say.
      random: mean return of the random policy.
      reference: the same of the reference.
      returns: `float64 [E]`, of episodes.
      noise: `float32 [E]`, of the same episodes.
      labels: the share of steps that have a label.
      by: whose labels they are.
    """

    id: str
    domain: str
    transitions: int
    raw: int
    stored: int | None
    random: float
    reference: float
    returns: np.ndarray
    noise: np.ndarray
    labels: float
    by: str


def render_data_card(
    name: str,
    rows: collections.abc.Sequence[CardRow],
    refused: collections.abc.Mapping[str, collections.abc.Sequence[tuple[str, str]]],
    origin: collections.abc.Mapping[str, object],
) -> str:
    """The page as HTML.

    Args:
      name: of the dataset.
      rows: of its environments.
      refused: by cause, ids that are not in it and why.
      origin: names and values of what it was made of.
    """
    transitions, domains = sum(row.transitions for row in rows), len({row.domain for row in rows})
    episodes = sum(len(row.returns) for row in rows)
    lead = (
        f"{transitions:,} transitions of {len(rows):,} environments in {domains:,} domains: what was seen, what was "
        "done there, and what a reference policy would have done. All numbers are told by records, cards and the index "
        "of episodes; the transitions themselves were not read."
    )
    raw, stored = _per_transition(rows)
    headline = tiles(
        [
            Tile("Environments", f"{len(rows):,}", f"{domains:,} domains"),
            Tile("Transitions", count(transitions), f"{transitions:,}"),
            Tile("Episodes that ended", count(episodes), f"{episodes:,}"),
            Tile("Bytes a transition", _bytes(raw), "in memory"),
            Tile("Stored", _bytes(stored), "bytes a transition, on disk"),
            Tile("Left out", f"{sum(map(len, refused.values())):,}", "refused or failed"),
        ]
    )
    body = [headline, *_sections(refused, origin)]
    return assemble(f"Data card: {name}", lead, "".join(body), _compact(rows), ("data_card.js",))


def _sections(
    refused: collections.abc.Mapping[str, collections.abc.Sequence[tuple[str, str]]],
    origin: collections.abc.Mapping[str, object],
) -> list[str]:
    return [
        section(
            "domains",
            "By domain",
            "Each line is an environment's median return, placed between the random policy (0) and its reference (1); "
            "the box holds the middle half of the environments and the bar is their median.",
            '<div data-draw="groups"></div>',
        ),
        section(
            "noise",
            "Noise and what it costs",
            "Episodes are played by the reference with noise, from none (0) to nothing but random actions (1). Bars: "
            "the share of episodes at each level. Line: the median of z over environments of their mean return there.",
            '<div class="chart" data-draw="noise"></div>',
        ),
        section(
            "environments",
            "Environment by environment",
            "Returns of episodes that ended: the median, with the tenth and the ninetieth part, between random (0) and "
            "reference (1).",
            '<div data-draw="table"></div>',
        ),
        section(
            "refused",
            "Refused and failed",
            "Environments that were asked for and are not in the data, and why; told by the references beside it.",
            reasons(refused) if refused else '<p class="note">None is known.</p>',
        ),
        section("provenance", "Where it comes from", "", f'<div class="provenance">{details(origin)}</div>'),
    ]


def _per_transition(rows: collections.abc.Sequence[CardRow]) -> tuple[float | None, float | None]:
    transitions = sum(row.transitions for row in rows)
    if not transitions:
        return None, None
    told = [row.stored for row in rows if row.stored is not None]
    return sum(row.raw for row in rows) / transitions, sum(told) / transitions if len(told) == len(rows) else None


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 1000 else count(value)


def _z(row: CardRow, values: np.ndarray) -> list[float | None]:
    span = row.reference - row.random
    return [short(float(value - row.random) / span, 4) for value in values] if span else [None] * len(values)


def _compact(rows: collections.abc.Sequence[CardRow]) -> JsonValue:
    """What the page draws, in columns."""
    quantiles = [np.quantile(row.returns, _SHARES) if len(row.returns) else None for row in rows]
    places = [[None] * 3 if found is None else _z(row, found) for row, found in zip(rows, quantiles, strict=True)]
    return {
        "id": [row.id for row in rows],
        "domain": [row.domain for row in rows],
        "transitions": [row.transitions for row in rows],
        "raw": [short(row.raw / max(1, row.transitions), 4) for row in rows],
        "stored": [None if row.stored is None else short(row.stored / max(1, row.transitions), 4) for row in rows],
        "episodes": [len(row.returns) for row in rows],
        "random": [short(row.random) for row in rows],
        "reference": [short(row.reference) for row in rows],
        "median": [None if found is None else short(float(found[1])) for found in quantiles],
        "z": places,
        "labels": [short(row.labels, 4) for row in rows],
        "by": [row.by for row in rows],
        "noise": [
            [short(float(row.noise.min()), 2), short(float(row.noise.max()), 2)] if len(row.noise) else []
            for row in rows
        ],
        "levels": _levels(rows),
    }


def _levels(rows: collections.abc.Sequence[CardRow]) -> JsonValue:
    """Episodes and z at each level of noise; the middles of the levels are their places."""
    episodes, found = np.zeros(len(_NOISES) - 1), collections.defaultdict[int, list[float]](list)
    for row in rows:
        level = np.clip(np.digitize(row.noise, _NOISES) - 1, 0, len(_NOISES) - 2)
        for place in np.unique(level):
            here = row.returns[level == place]
            episodes[place] += len(here)
            (z,) = _z(row, np.array([here.mean()]))
            if z is not None:
                found[int(place)].append(z)
    total = max(1.0, episodes.sum())
    return {
        "x": [short(float(low + high) / 2, 3) for low, high in itertools.pairwise(_NOISES)],
        "share": [short(float(each) / total, 3) for each in episodes],
        **{
            name: [short(float(np.quantile(found[i], q)), 3) if found[i] else None for i in range(len(episodes))]
            for name, q in (("low", 0.25), ("middle", 0.5), ("high", 0.75))
        },
    }

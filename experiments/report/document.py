"""Puts a page together: one HTML file with its style, its scripts and its data inside, which asks no network.

Names and reasons come from libraries, and a page is passed on: what comes from outside is text wherever it stands, and
a browser is told to run only the scripts that were put in here.
"""

from __future__ import annotations

import base64
import collections.abc
import functools
import hashlib
import html
import importlib.resources
import json
import math
import string
import typing

from ldm_jax.evaluation.aggregates import number

_PLOTS = "uplot.min.js"
JsonValue = typing.Any


class Tile(typing.NamedTuple):
    """A number of the headline: its name, the number, and what stands below it."""

    name: str
    value: str
    note: str = ""


def assemble(title: str, lead: str, body: str, data: JsonValue, scripts: collections.abc.Sequence[str]) -> str:
    """Makes a page.

    Args:
      title: of the page, as text.
      lead: the sentences below it, as text.
      body: the sections, as HTML.
      data: what the scripts draw, JSON values.
      scripts: the files in this folder that draw them.

    Returns:
      HTML.

    Raises:
      ValueError: `data` holds NaN or infinity.
    """
    sources = [_file(_PLOTS), *(_file(name) for name in ("page.js", "charts.js", "table.js", *scripts))]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in sources
    )
    return string.Template(_file("template.html")).substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}",
        style=_file("uplot.min.css") + _file("page.css"),
        body=body,
        data=embed(data),
        scripts="\n".join(f"<script>{each}</script>" for each in sources),
    )


def embed(data: JsonValue) -> str:
    """JSON that can stand inside a page: no text in it can end the element that it stands in, or begin another.

    Raises:
      ValueError: it holds NaN or infinity.
    """
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return (
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def tiles(items: collections.abc.Iterable[Tile]) -> str:
    """The numbers of the headline, as HTML."""
    inside = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(note)}</small></dd></div>"
        for name, value, note in items
    )
    return f'<dl class="tiles">{inside}</dl>'


def section(id: str, heading: str, note: str, content: str) -> str:
    """A section of the page.

    Args:
      id: of the element, which the menu at the top leads to.
      heading: of the section, as text.
      note: how it is to be read, as text.
      content: HTML.
    """
    said = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<section id="{id}"><h2>{html.escape(heading)}</h2>{said}{content}</section>'


def details(items: collections.abc.Mapping[str, object]) -> str:
    """Names and values, as HTML."""
    inside = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>" for name, value in items.items()
    )
    return f'<dl class="details">{inside}</dl>'


def reasons(causes: collections.abc.Mapping[str, collections.abc.Sequence[tuple[str, str]]]) -> str:
    """Environments that are left out, by cause, as HTML that opens by cause; the largest first.

    Args:
      causes: by cause, ids and their reasons.
    """
    parts = []
    for cause, members in sorted(causes.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = "".join(f"<li><code>{html.escape(id)}</code> {html.escape(reason)}</li>" for id, reason in members)
        opened = " open" if sum(map(len, causes.values())) <= 12 else ""
        parts.append(
            f"<details{opened}><summary>{html.escape(cause)} <b>{len(members):,}</b></summary>"
            f"<ul>{lines}</ul></details>"
        )
    return f'<div class="reasons">{"".join(parts)}</div>'


def short(value: float | None, digits: int = 5) -> float | None:
    """A number with few digits, None where it is none: what is drawn needs no more, and a page stays small."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def spread(name: str, estimate: JsonValue) -> Tile:
    """A tile of an estimate and its interval."""
    if estimate is None:
        return Tile(name, "-")
    low, value, high = (number(estimate[key], ".3f") for key in ("low", "value", "high"))
    return Tile(name, value, f"[{low}, {high}]")


@functools.cache
def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")

"""How references and the model learned, by domain, from what their training wrote down."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import json
import math
import pathlib
import typing

import numpy as np

from experiments.report.document import JsonValue, short

_POINTS = 200
"""A line of more points than this is averaged down to so many."""
_GRID = np.linspace(0, 1, 21)
_SPAN = (-1.0, 1.5)
"""Of z while a reference learns: one that is lost for a while must not press the others together."""


def reference_curves(
    references: pathlib.Path, environments: collections.abc.Iterable[collections.abc.Mapping[str, typing.Any]]
) -> JsonValue:
    """How far the references had come from random to what they are scored with, against the share of their training.

    Args:
      references: the folder of the references of a run.
      environments: those of a `scores.json`; one without z, or whose reference was not trained by steps, has no curve.

    Returns:
      By domain, the quartiles of z over its references along the training, and how many there are.
    """
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for item in environments:
        if item["z"] is None:
            continue
        points = _curve(references / item["id"])
        if len(points) >= 2:
            steps, returns = np.array(points, np.float64).T
            z = np.clip((returns - item["random"]) / (item["reference"] - item["random"]), *_SPAN)
            found[item["domain"]].append(np.interp(_GRID, steps / steps[-1], z))
    domains = {domain: _quartiles(np.array(curves)) for domain, curves in sorted(found.items())}
    return {"x": [short(x) for x in _GRID], "domains": domains}


def _curve(directory: pathlib.Path) -> list[list[float]]:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # one that is damaged costs its own curve
        return json.loads((directory / "reference.json").read_text("utf-8"))["reference"]["curve"]
    return []


def _quartiles(values: np.ndarray) -> JsonValue:
    low, middle, high = ([short(x, 3) for x in line] for line in np.quantile(values, (0.25, 0.5, 0.75), axis=0))
    return {"count": len(values), "low": low, "middle": middle, "high": high}


def context_curves(environments: collections.abc.Iterable[collections.abc.Mapping[str, typing.Any]]) -> JsonValue:
    """The quartiles of z over environments from the first episode on a context to the last.

    Args:
      environments: those of a `scores.json`.

    Returns:
      The numbers of the episodes, and the quartiles of all environments and by domain.
    """
    found: dict[str, list[list[float]]] = collections.defaultdict(list)
    for item in environments:
        if line := item.get("z_by_episode"):
            found[item["domain"]].append(line)
    episodes = min((len(line) for lines in found.values() for line in lines), default=0)
    domains = {domain: np.array([line[:episodes] for line in lines]) for domain, lines in sorted(found.items())}
    return {
        "x": [*range(1, episodes + 1)],
        "all": _quartiles(np.concatenate([*domains.values()])) if domains else None,
        "domains": {domain: _quartiles(lines) for domain, lines in domains.items()},
    }


def training_curves(rows: collections.abc.Sequence[collections.abc.Mapping[str, typing.Any]]) -> JsonValue:
    """The losses of the pretraining against tokens.

    Args:
      rows: of `metrics.jsonl`.

    Returns:
      Tokens, and beside them loss, excess loss, that of windows held out, and the excess loss of each domain.
    """
    rows = [row for row in rows if _finite(row.get("tokens"))]
    domains = sorted({domain for row in rows for domain in row.get("kl_by_domain") or ()})
    size = max(1, math.ceil(len(rows) / _POINTS))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return {
        "x": [short(_mean(row["tokens"] for row in group)) for group in groups],
        "loss": [_mean(row.get("loss") for row in group) for group in groups],
        "kl": [_mean(row.get("kl") for row in group) for group in groups],
        "held": [_mean((row.get("held_out") or {}).get("kl") for row in group) for group in groups],
        "domains": {
            domain: [_mean((row.get("kl_by_domain") or {}).get(domain) for row in group) for group in groups]
            for domain in domains
        },
    }


def _mean(values: collections.abc.Iterable[typing.Any]) -> float | None:
    finite = [value for value in values if _finite(value)]
    return short(sum(finite) / len(finite), 4) if finite else None


def _finite(value: typing.Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

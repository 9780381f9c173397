"""Writes what an evaluation found as a folder: `scores.json`, `curve.png` and one self-contained `index.html`."""

from __future__ import annotations

import collections.abc
import html
import importlib.resources
import json
import pathlib
import string
import types
import typing

from experiments.report import figures
from ldm_jax import files
from ldm_jax.evaluation.aggregates import count_reaching, number

Scores = dict[str, typing.Any]
ENOUGH = 0.8
"""The threshold that the page names first and colours by."""


def write_report(
    directory: pathlib.Path,
    scores: Scores,
    training: collections.abc.Sequence[dict[str, typing.Any]],
    title: str,
    details: collections.abc.Mapping[str, object] = types.MappingProxyType({}),
) -> pathlib.Path:
    """Writes the report of an evaluation.

    Each file is written aside and then renamed, so a reader never meets half of one.

    Args:
      directory: the report's own folder; made if missing.
      scores: contents of `scores.json`, from `ldm_jax.evaluation.aggregates.scores_json`.
      training: rows of the training's metrics, each with `tokens` and any of `loss` and `kl`; may be empty.
      title: heading of the page.
      details: what the reader should know of the run (seed, steps, versions), shown at the end of the page.

    Returns:
      The path of the page.

    Raises:
      ValueError: `scores` holds NaN or infinity.
    """
    page = render_report(scores, training, title, details)
    contents = {
        "scores.json": (json.dumps(scores, indent=2, allow_nan=False) + "\n").encode(),
        "curve.png": figures.curve_picture(scores, "png"),
        "index.html": page.encode(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.write(directory / name, content)
    return directory / "index.html"


def render_report(
    scores: Scores,
    training: collections.abc.Sequence[dict[str, typing.Any]],
    title: str,
    details: collections.abc.Mapping[str, object] = types.MappingProxyType({}),
) -> str:
    """The page as HTML; the arguments are those of `write_report`."""
    template = string.Template(importlib.resources.files(__package__).joinpath("template.html").read_text("utf-8"))
    admitted = [item for item in scores["environments"] if item["z"] is not None]
    refused = [item for item in scores["environments"] if item["z"] is None]
    span = _span(admitted)
    ordered = sorted(admitted, key=lambda item: (-item["z"], item["id"]))
    rows = [_row(item, span) for item in ordered] + [_refused(item) for item in refused]
    shown = {"Model parameters": f"{scores['parameters']:,}", "Decoding": scores["decoding"], **details}
    return template.substitute(
        title=html.escape(title),
        lead=html.escape(_lead(scores)),
        tiles="".join(_tile(*tile) for tile in _tiles(scores)),
        confidence=f"{100 * scores['confidence']:g} %",
        curve=figures.curve_picture(scores, "svg").decode(),
        training=_training(training),
        axis=figures.axis(span),
        rows="\n".join(rows),
        details="".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in shown.items()
        ),
    )


def _lead(scores: Scores) -> str:
    return (
        f"One set of parameters, {scores['registered']} environments. {scores['admitted']} are admitted, because their "
        f"reference policy is clearly better than random; the model is scored in those alone. In "
        f"{count_reaching(scores, ENOUGH)} of them it comes at least {ENOUGH:.0%} of the way from random to reference."
    )


def _tiles(scores: Scores) -> list[tuple[str, str, str]]:
    def estimate(name: str) -> tuple[str, str]:
        found = scores[name]
        if found is None:
            return "-", ""
        return number(found["value"], ".3f"), f"[{number(found['low'], '.3f')}, {number(found['high'], '.3f')}]"

    admitted = f"of {scores['admitted']} admitted"
    return [
        ("Admitted", str(scores["admitted"]), f"of {scores['registered']} registered"),
        (f"z ≥ {ENOUGH}", str(count_reaching(scores, ENOUGH)), admitted),
        ("Matching the reference", str(scores["matches"]), admitted),
        ("Interquartile mean of z", *estimate("iqm")),
        ("Optimality gap", *estimate("optimality_gap")),
        ("Parameters", figures.count(scores["parameters"]), f"{scores['decoding']} decoding"),
    ]


def _tile(name: str, value: str, note: str) -> str:
    return f'<div class="tile"><dt>{name}</dt><dd>{html.escape(value)}<small>{html.escape(note)}</small></dd></div>'


def _span(admitted: list[Scores]) -> tuple[float, float]:
    # One far outlier must not press all others into a corner: beyond these bounds an arrow is drawn.
    ends = [item[name] for item in admitted for name in ("z_low", "z", "z_high") if item[name] is not None]
    return max(-1.0, min([-0.1, *ends])), min(2.0, max([1.25, *ends]))


def _row(item: Scores, span: tuple[float, float]) -> str:
    z, low, high = (number(item[name], ".2f") for name in ("z", "z_low", "z_high"))
    chart = figures.interval_chart(item["z_low"], item["z"], item["z_high"], span, f"z = {z} [{low}, {high}]")
    returns = "".join(_return(item[name], item[f"{name}_error"]) for name in ("random", "reference", "model"))
    kind = "" if item["z"] >= ENOUGH else ' class="below"'
    return (
        f'<tr{kind}>{_name(item)}{returns}<td class="chart">{chart}</td>'
        f"<td><b>{z}</b><small>[{low}, {high}]{_other(item)}</small></td>"
        f"<td>{number(item['z_first_episode'], '.2f')}</td><td>{number(item['reference_distance'], '+.2f')}</td>"
        f"{_target(item)}</tr>"
    )


def _other(item: Scores) -> str:
    """What was reached in the form of decoding that the environment is not scored in, where it was played."""
    if not (other := item.get("other")):
        return ""
    return f"<br>{html.escape(other['decoding'])}: {number(other['z'], '.2f')}"


def _refused(item: Scores) -> str:
    reason = html.escape(f"refused: {item['reason']}")
    return f'<tr>{_name(item)}<td class="reason" colspan="7">{reason}</td>{_target(item)}</tr>'


def _name(item: Scores) -> str:
    episodes = f" · {item['episodes']:,} episodes" if item["episodes"] else ""
    return f"<td>{html.escape(item['id'])}<span>{html.escape(item['domain'])}{episodes}</span></td>"


def _return(mean: float | None, error: float | None) -> str:
    return f"<td>{number(mean)}<small>± {number(error, '.2g')}</small></td>" if mean is not None else "<td>-</td>"


def _target(item: Scores) -> str:
    target, random, reference = item["public_target"], item["random"], item["reference"]
    if target is None:
        return "<td></td>"
    share = ""
    if item["admitted"] and target != random:
        share = f"<small>ref. {(reference - random) / (target - random):.0%}</small>"
    return f"<td>{number(target)}{share}</td>"


def _training(rows: collections.abc.Sequence[dict[str, typing.Any]]) -> str:
    if not rows:
        return "<figcaption>No training metrics were given to this report.</figcaption>"
    return figures.training_picture(rows, "svg").decode()

"""Writes what an evaluation found as a folder: `scores.json`, `curve.png` and one self-contained `index.html`."""

from __future__ import annotations

import collections
import collections.abc
import html
import json
import pathlib
import types
import typing

from experiments.report import figures
from experiments.report.document import JsonValue, Tile, assemble, details, reasons, section, short, spread, tiles
from experiments.report.learning import context_curves, training_curves
from ldm_jax import files
from ldm_jax.evaluation.aggregates import count_reaching, number

Scores = dict[str, typing.Any]
ENOUGH = 0.8
"""The threshold that the page names first and colours by."""
_BYTES = 2_500_000  # of all recordings in a page
_NUMBERS = ("random", "reference", "model", "z", "z_low", "z_high", "z_first_episode", "reference_distance")
_ERRORS = ("random_error", "reference_error", "model_error", "public_target")


class FinishedRun(typing.NamedTuple):
    """What a page shows of a run.

    Attributes:
      name: of the run, for a page of several.
      scores: contents of `scores.json`, from `ldm_jax.evaluation.aggregates.scores_json`.
      training: rows of the training's metrics, each with `tokens` and any of `loss` and `kl`; may be empty.
      references: `learning.reference_curves`; empty where there are none.
      rollouts: what `rollouts.Recorder` wrote, of a few environments.
      provenance: by heading, names and values of what the run was made of.
    """

    name: str
    scores: Scores
    training: collections.abc.Sequence[collections.abc.Mapping[str, typing.Any]] = ()
    references: JsonValue = types.MappingProxyType({"x": (), "domains": types.MappingProxyType({})})
    rollouts: collections.abc.Sequence[JsonValue] = ()
    provenance: collections.abc.Mapping[str, collections.abc.Mapping[str, object]] = types.MappingProxyType({})


def write_report(directory: pathlib.Path, run: FinishedRun) -> pathlib.Path:
    """Writes the report of an evaluation.

    Each file is written aside and then renamed, so a reader never meets half of one.

    Args:
      directory: the report's own folder; made if missing.
      run: what is shown.

    Returns:
      The path of the page.

    Raises:
      ValueError: the scores hold NaN or infinity.
    """
    page = render_report([run])
    contents = {
        "scores.json": (json.dumps(run.scores, indent=2, allow_nan=False) + "\n").encode(),
        "curve.png": figures.curve_picture(run.scores),
        "index.html": page.encode(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.write(directory / name, content)
    return directory / "index.html"


def render_report(runs: collections.abc.Sequence[FinishedRun]) -> str:
    """The page as HTML.

    Args:
      runs: one, or several to be shown side by side.

    Raises:
      ValueError: the scores hold NaN or infinity.
    """
    title = "One policy, many environments" if len(runs) == 1 else f"{' against '.join(run.name for run in runs)}"
    data = {"enough": ENOUGH, "runs": [_compact(run) for run in runs]}
    return assemble(title, _lead(runs), "".join(_sections(runs)), data, ("rollouts.js", "report.js"))


def _sections(runs: collections.abc.Sequence[FinishedRun]) -> collections.abc.Iterator[str]:
    confidence = f"{100 * runs[0].scores['confidence']:g} %"
    yield "".join(_headline(run, several=len(runs) > 1) for run in runs)
    if len(runs) > 1:
        yield '<div class="differences" data-draw="differences"></div>'
    yield section(
        "curve",
        "How many environments, at which threshold",
        "z places the model's mean return between the random policy (0) and the environment's reference policy (1). "
        f"The curve is the share of admitted environments with z at least the threshold; its {confidence} band is a "
        "bootstrap of all three returns. The dashed curve counts an environment only if the lower end of its interval "
        "reaches the threshold.",
        '<div class="chart" data-draw="curve"></div>',
    )
    yield section(
        "groups",
        "By domain and library",
        "Each line is an environment; the box holds the middle half of them and the bar is their median. "
        f"The number beside it is the share with z at least {ENOUGH}.",
        '<div data-draw="groups"></div>',
    )
    yield section(
        "environments",
        "Environment by environment",
        f"Intervals are {confidence} bootstrap intervals over independent rows. What is below {ENOUGH} has the second "
        "colour. A row opens to returns, errors, the first episode on an empty context, and the public target.",
        '<div data-draw="table"></div>',
    )
    yield section(
        "context",
        "Score against context",
        "z of the first episode on an empty context, of the second, and so on: the median over environments, with the "
        "middle half.",
        '<div data-draw="context"></div>',
    )
    yield section(
        "learning",
        "Learning",
        "Excess loss is the cross-entropy minus the entropy of the targets themselves: 0 is a perfect copy of the "
        "references.",
        f"{_training(runs)}"
        '<h3>References</h3><p class="note">From random (0) to what each is scored with (1), along its own training: '
        'the median of those that were trained by steps, with the middle half.</p><div data-draw="references"></div>',
    )
    yield section(
        "rollouts",
        "Rollouts",
        "The first steps of the first row of a few environments, as the model was evaluated in them: what it sees, "
        "where that is a picture, or the path of its observation.",
        '<div data-draw="rollouts"></div>',
    )
    yield _left_out(runs)
    yield section(
        "provenance", "Where it comes from", "", "".join(_provenance(run, several=len(runs) > 1) for run in runs)
    )


def _training(runs: collections.abc.Sequence[FinishedRun]) -> str:
    if not any(run.training for run in runs):
        return '<p class="note">No training metrics were given to this report.</p>'
    return '<div class="chart" data-draw="training"></div><div data-draw="domains"></div>'


def _lead(runs: collections.abc.Sequence[FinishedRun]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs side by side, each in its own colour. Differences are the later run minus the first."
    scores = runs[0].scores
    return (
        f"One set of parameters, {scores['registered']:,} environments. {scores['admitted']:,} are admitted, because "
        "their reference policy is clearly better than random; the model is scored in those alone. In "
        f"{count_reaching(scores, ENOUGH):,} of them it comes at least {ENOUGH:.0%} of the way to the reference."
    )


def _headline(run: FinishedRun, *, several: bool) -> str:
    scores, admitted = run.scores, f"of {run.scores['admitted']:,} admitted"
    shown = tiles(
        [
            Tile(f"z ≥ {ENOUGH}", f"{count_reaching(scores, ENOUGH):,}", admitted),
            Tile("Matching the reference", f"{scores['matches']:,}", admitted),
            Tile("Admitted", f"{scores['admitted']:,}", f"of {scores['registered']:,} registered"),
            spread("Interquartile mean of z", scores["iqm"]),
            spread("Optimality gap", scores["optimality_gap"]),
            Tile("Parameters", figures.count(scores["parameters"]), f"{scores['decoding']} decoding"),
        ]
    )
    return f'<h2 class="run">{html.escape(run.name)}</h2>{shown}' if several else shown


def _left_out(runs: collections.abc.Sequence[FinishedRun]) -> str:
    parts = []
    for run in runs:
        causes: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
        for item in run.scores["environments"]:
            if item["z"] is None:
                causes[_cause(item)].append((item["id"], f"refused: {item['reason']}"))
        head = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(head + (reasons(causes) if causes else '<p class="note">None.</p>'))
    counts = sum(run.scores["registered"] - run.scores["admitted"] for run in runs)
    note = "Environments that are registered and have no score, and why." if counts else ""
    said = " ".join(f"{run.scores['admitted']} admitted of {run.scores['registered']} registered." for run in runs)
    return section("refused", "Refused and failed", f"{said} {note}".strip(), "".join(parts))


def _cause(item: Scores) -> str:
    """Why an environment has no score, in a few words that many share."""
    reason = item["reason"]
    if item["reference"] is None:
        return "No reference, or none that can be read"
    for part, cause in (
        ("not better than random", "The reference is not better than random"),
        ("standard errors apart", "The reference is not clearly better than random"),
        ("play more of them", "Too few episodes to tell z"),
        ("not trained there", "The policy was not trained there"),
    ):
        if part in reason:
            return cause
    return "The evaluation failed"


def _provenance(run: FinishedRun, *, several: bool) -> str:
    parts = [f"<h3>{html.escape(run.name)}</h3>"] if several else []
    shown = {"Model parameters": f"{run.scores['parameters']:,}", "Decoding": run.scores["decoding"]}
    parts.append(f"<h4>Model</h4>{details(shown)}")
    for heading, values in run.provenance.items():
        if heading == "Configuration":
            parts += [
                f"<details><summary>Configuration: {html.escape(stage)}</summary>"
                f"<pre>{html.escape(json.dumps(value, indent=1))}</pre></details>"
                for stage, value in values.items()
            ]
        else:
            parts.append(f"<h4>{html.escape(heading)}</h4>{details(values)}")
    return f'<div class="provenance">{"".join(parts)}</div>'


def _compact(run: FinishedRun) -> JsonValue:
    """What the page draws of a run, in columns: a table of thousands stays small."""
    scores, environments = run.scores, run.scores["environments"]
    share = max(1, scores["admitted"])
    table: JsonValue = {name: [item[name] for item in environments] for name in ("id", "library", "domain")}
    table |= {name: [short(item.get(name), 4) for item in environments] for name in (*_NUMBERS, *_ERRORS)}
    table["episodes"] = [item["episodes"] for item in environments]
    table["reason"] = [item["reason"] if item["z"] is None else "" for item in environments]
    table["other"] = [_other(item) for item in environments]
    table["by_episode"] = [[short(z, 3) for z in item.get("z_by_episode") or ()][:64] for item in environments]
    kept, room = list[JsonValue](), _BYTES
    for recording in run.rollouts:
        if (room := room - len(json.dumps(recording))) > 0:
            kept.append(recording)
    return {
        "name": run.name,
        **{name: scores[name] for name in ("registered", "admitted", "matches", "iqm", "optimality_gap")},
        "reaching": count_reaching(scores, ENOUGH),
        "curve": {
            "tau": [point["tau"] for point in scores["curve"]],
            **{name: [short(point[key] / share, 4) for point in scores["curve"]] for name, key in _CURVE},
            "conservative": [short(point["count"] / share, 4) for point in scores["curve_conservative"]],
        },
        "table": table,
        "context": context_curves(environments),
        "training": training_curves(run.training),
        "references": _plain(run.references),
        "rollouts": kept,
    }


_CURVE = (("share", "count"), ("low", "low"), ("high", "high"))


def _plain(curves: JsonValue) -> JsonValue:
    return {"x": [*curves["x"]], "domains": {**curves["domains"]}}


def _other(item: Scores) -> str:
    """What was reached in the form of decoding that the environment is not scored in, where it was played."""
    other = item.get("other")
    return f"{other['decoding']}: {number(other['z'], '.2f')}" if other else ""

"""Reads what finished runs left in their folders, and writes one page of one of them, or of several side by side."""

from __future__ import annotations

import collections.abc
import contextlib
import json
import pathlib
import typing

from experiments.harness.metrics_log import read_rows
from experiments.report.document import JsonValue
from experiments.report.learning import reference_curves
from experiments.report.page import FinishedRun, render_report
from experiments.report.rollouts import FEW
from ldm_jax import files
from ldm_jax.errors import LdmError

PROVENANCE, ROLLOUTS, SCORES = "provenance.json", "rollouts", "scores.json"
_MOST = 8  # runs side by side, each in a colour of its own


class ReportError(LdmError, ValueError):
    """A folder that has no finished evaluation, or a page that cannot be written."""


def report_runs(folders: collections.abc.Sequence[pathlib.Path], path: pathlib.Path) -> pathlib.Path:
    """Writes one self-contained page of a run, or of several side by side.

    Args:
      folders: the runs' own folders, the ones given as `--workdir`; at least one.
      path: of the page, replaced whole; folders above it are made.

    Returns:
      The path of the page.

    Raises:
      ReportError: no folder was given, or too many were, one of them holds no finished evaluation, or the page cannot
        be written.
    """
    if not 1 <= len(folders) <= _MOST:
        raise ReportError(f"got {len(folders)} runs, expected the folders of 1 to {_MOST}, such as runs/quickstart")
    runs = [read_run(folder) for folder in folders]
    page = render_report([run._replace(name=name) for run, name in zip(runs, _names(folders), strict=True)])
    return write_page(path, page)


def write_page(path: pathlib.Path, page: str) -> pathlib.Path:
    """Writes a page, and the folders above it.

    Raises:
      ReportError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, page)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error}. Give another path") from error
    return path


def read_run(folder: pathlib.Path, scores: JsonValue = None) -> FinishedRun:
    """Reads what a page shows of a run.

    Args:
      folder: of the run.
      scores: contents of its `report/scores.json`, where they are known already.

    Returns:
      The run; what it did not leave behind is empty.

    Raises:
      ReportError: there are no scores, or they are damaged.
    """
    scores = scores or _read_scores(folder)
    return FinishedRun(
        name=folder.resolve().name,
        scores=scores,
        training=read_rows(folder / "metrics.jsonl"),
        references=reference_curves(folder / "references", scores["environments"]),
        rollouts=_read_rollouts(folder / "report" / ROLLOUTS, scores["environments"]),
        provenance=_read_json(folder / "report" / PROVENANCE) or {},
    )


def _names(folders: collections.abc.Sequence[pathlib.Path]) -> list[str]:
    """The folders' own names, with those above them where they are the same; with numbers where nothing tells them."""
    parts = [folder.resolve().parts[1:] for folder in folders]
    for depth in range(1, 4):
        names = ["/".join(part[-depth:]) for part in parts]
        if len({*names}) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, 1)]


def _read_scores(folder: pathlib.Path) -> dict[str, typing.Any]:
    path = folder / "report" / SCORES
    again = f"python -m experiments.evaluate --workdir={folder} writes it"
    try:
        found = json.loads(path.read_text("utf-8"))
        found["environments"], found["curve"], found["registered"]
    except (FileNotFoundError, NotADirectoryError) as error:
        above = next((each for each in folder.resolve().parents if (each / "report" / SCORES).exists()), None)
        hint = again if folder.is_dir() else "expected the folder of a run, such as runs/quickstart"
        hint = f"pass {above}, which does" if above else hint
        raise ReportError(f"{folder} holds no finished run, there is no report/{path.name} in it: {hint}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ReportError(f"cannot read {path}: {error}; {again} again") from error
    return found


def _read_rollouts(folder: pathlib.Path, environments: collections.abc.Iterable[JsonValue]) -> list[JsonValue]:
    """The recordings of environments that have scores; another id or a damaged file shows nothing."""
    if not folder.exists():
        return []
    found = [_read_json(folder / f"{item['id']}.json") for item in environments if item["z"] is not None]
    return [recording for recording in found if recording and "kind" in recording][:FEW]


def _read_json(path: pathlib.Path) -> JsonValue:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text("utf-8"))
    return None

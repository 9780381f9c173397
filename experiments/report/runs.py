"""Reads what finished runs left in their folders, and writes one page of one of them, or of several side by side."""

from __future__ import annotations

import collections.abc
import json
import pathlib
import typing

from experiments.harness.metrics_log import read_rows
from experiments.report.page import render_report
from ldm_jax import files
from ldm_jax.errors import LdmError


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
      ReportError: no folder was given, one of them holds no finished evaluation, or the page cannot be written.
    """
    if not folders:
        raise ReportError("got no run, expected the folder of at least one, such as runs/quickstart")
    page = render_report(read_scores(folders[0]), read_rows(folders[0] / "metrics.jsonl"), folders[0].resolve().name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, page)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error}. Give another path") from error
    return path


def read_scores(folder: pathlib.Path) -> dict[str, typing.Any]:
    """The contents of a run's `report/scores.json`.

    Raises:
      ReportError: there is none, or it is damaged.
    """
    path = folder / "report" / "scores.json"
    again = f"python -m experiments.evaluate --workdir={folder} writes it"
    try:
        found = json.loads(path.read_text("utf-8"))
        found["environments"], found["curve"], found["registered"]
    except FileNotFoundError as error:
        raise ReportError(f"{folder} holds no finished run, there is no {path.name} in its report/: {again}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ReportError(f"cannot read {path}: {error}; {again} again") from error
    return found

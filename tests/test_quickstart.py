"""The quickstart, end to end at smoke scale: killed in each stage it goes on where it was, and bad input is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data.store import open_dataset, verify_dataset
from environments import UnknownEnvironmentError
from experiments import collect, pretrain, publish, quickstart, references
from experiments.harness.flags import rebuild
from experiments.harness.workdir import WorkdirError, pin_config, resolved
from ldm_jax import policy
from ldm_jax.environment import LibraryMissingError

STAGES = ("reference id=", "collected id=", "pretrain step=20", "evaluated id=")
"""What the log says when a stage has finished its first unit, but not all of them."""


def _command(workdir, *flags):
    return [sys.executable, "-m", "experiments.quickstart", f"--workdir={workdir}", "--preset=smoke", *flags]


def _run(workdir: pathlib.Path, kill_at: str = "") -> tuple[list[str], int]:
    """Runs the quickstart and returns its lines and its exit code; kills it where the line `kill_at` appears."""
    lines = []
    with subprocess.Popen(
        _command(workdir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        for line in process.stdout:
            lines.append(line.rstrip())
            if kill_at and kill_at in line:
                workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(process.pid, signal.SIGKILL)
                _await_end(workers)
                break
    return lines, process.returncode


def _await_end(pids: list[str], timeout_s: float = 10.0) -> None:
    """Waits until processes whose parent was killed have noticed: none may work on beside those of the next start."""
    until = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if _is_alive(pid)]:
        assert time.monotonic() < until, f"the workers {alive} outlive the process that started them"
        time.sleep(0.1)


def _is_alive(pid: str) -> bool:
    try:
        # the state follows the name, which stands in brackets
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _units(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
    """Files that finished units left, with the time of their last change."""
    files = [*workdir.glob("references/**/reference.json"), *workdir.glob("evaluation/**/*.json")]
    if (workdir / "dataset" / "manifest.json").exists():
        dataset = open_dataset(workdir / "dataset")
        parts = [workdir / "dataset" / id / part.name for id in dataset.ids for part in dataset.parts(id)]
        files += [path for part in parts for path in part.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed in each of its stages, and the log of every start."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    logs, seen = [], {}
    for stage in STAGES:
        lines, code = _run(workdir, stage)
        assert code == -signal.SIGKILL, "\n".join(lines)
        logs.append(lines)
        seen |= _units(workdir)
    lines, code = _run(workdir)
    assert code == 0, "\n".join(lines)
    return workdir, [*logs, lines], seen


def test_no_finished_environment_is_repeated(killed):
    workdir, logs, seen = killed
    now = _units(workdir)
    assert {path: now.get(path) for path in seen} == seen, "a finished unit was written again"
    lines = "\n".join(line for log in logs for line in log)
    for word in ("reference", "collected", "evaluated"):
        ids = re.findall(rf"\b{word} id=(\S+)", lines)
        # A worker may finish a unit without living to say so; what it said, it said once.
        assert len(ids) == len(set(ids)), f"{word}: {ids}"
    assert re.findall(r"pretrain step=(\d+)", lines) == ["20", "40", "60"]


def test_the_end_is_a_table_and_a_report(killed):
    workdir, logs, _ = killed
    last = logs[-1]
    report = workdir / "report"
    assert last[-1] == f"report: {report / 'index.html'}"
    assert any("admitted 3 of 3" in line for line in last[-5:])
    scores = json.loads((report / "scores.json").read_text())
    assert scores["registered"] == 3 and scores["admitted"] == 3
    assert [item["id"] for item in scores["environments"]] == list(quickstart.SMOKE.environments)
    for item in scores["environments"]:
        assert item["episodes"] == 100 and item["random"] < item["reference"] and item["z_low"] <= item["z"]
    assert (report / "curve.png").stat().st_size > 1000 and (report / "index.html").stat().st_size > 1000
    assert scores["environments"][1]["public_target"] == 500.0
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 60
    for stage in ("quickstart", "references", "collect", "pretrain", "evaluate"):
        assert json.loads((workdir / f"{stage}.json").read_text())
    verify_dataset(open_dataset(workdir / "dataset"))


def test_what_is_published_is_what_was_evaluated_with_a_card_that_says_so(killed, tmp_path, monkeypatch):
    workdir, _, _ = killed
    folders = str(tmp_path / "policies"), str(tmp_path / "pages")
    publish.run(publish.PublishConfig("smoke", *folders, "make smoke", "It is a smoke."), workdir)
    monkeypatch.setattr(policy, "_RELEASED", tmp_path / "policies")
    assert policy.load("smoke") == policy.load(workdir / "policy")
    scores = json.loads((workdir / "report" / "scores.json").read_text())["environments"]
    told = json.loads((tmp_path / "policies" / "smoke" / "scores.json").read_text())
    assert {id: each["z"] for id, each in told.items()} == {item["id"]: item["z"] for item in scores}
    card, page = ((tmp_path / path).read_text("utf-8") for path in ("policies/smoke/README.md", "pages/smoke.md"))
    for text in (card, page):
        assert "3 environments, 3 admitted" in text and "| pretrain | 0.0" in text and "\n\nIt is a smoke.\n" in text
        assert all(f"| {item['id']} | " in text for item in scores)
    before = sorted((tmp_path / "policies").rglob("*"))
    publish.run(publish.PublishConfig("smoke", *folders, "make smoke"), workdir)
    assert sorted((tmp_path / "policies").rglob("*")) == before  # weights that are there are not written anew
    assert "make smoke" in page and 'ldm_jax.load("smoke")' in card
    assert {path.name for path in (tmp_path / "pages" / "smoke").iterdir()} == {"curve.png", "report.html"}


def test_what_was_not_evaluated_is_not_published(killed, tmp_path):
    workdir, _, _ = killed
    shutil.copytree(workdir, tmp_path / "run")
    config = publish.PublishConfig("smoke", str(tmp_path / "policies"), str(tmp_path / "pages"))
    with pytest.raises(WorkdirError, match="no name was given"):
        publish.run(dataclasses.replace(config, name=""), workdir)
    known = policy.load(workdir / "policy")
    dataclasses.replace(known, decoding="mode").save(tmp_path / "run" / "policy")
    with pytest.raises(WorkdirError, match="not the one of its report"):
        publish.run(config, tmp_path / "run")
    (tmp_path / "run" / "report" / "scores.json").unlink()
    with pytest.raises(WorkdirError, match="holds no finished run"):
        publish.run(config, tmp_path / "run")
    assert not (tmp_path / "policies").exists()


def test_a_run_never_killed_gives_the_same(killed, tmp_path):
    workdir, _, _ = killed
    shutil.copytree(workdir / "references", tmp_path / "references")
    shutil.copy(workdir / "references.json", tmp_path)
    collect.run(quickstart.SMOKE.collect, tmp_path, quickstart.SMOKE.environments)
    first, second = (open_dataset(path / "dataset") for path in (workdir, tmp_path))
    assert first.ids == second.ids
    for id in first.ids:
        (a,), (b,) = first.parts(id), second.parts(id)
        assert a.leaf_names == b.leaf_names and first.card(id) == second.card(id)
        for name in a.leaf_names:
            assert a.record.leaves[name].checksum == b.record.leaves[name].checksum, f"{name} of {id} differs"
    pretrain.run(quickstart.SMOKE.pretrain, tmp_path)
    one, other = (policy.load(path / "policy").params for path in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_examples_of_the_readme_run(killed, capsys):
    workdir, _, _ = killed
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    acting, choosing = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert acting.count("runs/quickstart/policy") == 1 and len(acting.splitlines()) <= 20
    exec(acting.replace("runs/quickstart/policy", str(workdir / "policy")), {})
    printed = capsys.readouterr().out
    assert (
        re.search(r"mean return -?\d.* z -?\d", printed) and len(re.findall(r"episode \d: return -?\d", printed)) == 5
    )
    names = {}
    exec(choosing, names)
    assert "nasim/Tiny-v0" in names["attacks"]
    assert names["dungeons"] and all(id.startswith("minihack/") for id in names["dungeons"])


@pytest.mark.parametrize("page", ["quickstart.md", "data.md"])
def test_the_examples_of_the_pages_run(killed, page):
    workdir, _, _ = killed
    text = (pathlib.Path(__file__).parents[1] / "docs" / page).read_text().replace("runs/quickstart", str(workdir))
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples and str(workdir) in examples[0]
    for example in examples:
        exec(example, {})


def test_another_configuration_is_refused(killed):
    workdir, _, _ = killed
    before = _units(workdir)
    other = dataclasses.replace(
        quickstart.SMOKE, references=dataclasses.replace(quickstart.SMOKE.references, seed=1, workers=1)
    )
    with pytest.raises(WorkdirError, match=r"references\.seed was 0 there and is 1 now") as caught:
        quickstart.run(other, workdir)
    assert "workers" not in str(caught.value), "what changes no result may differ"
    assert _units(workdir) == before


@pytest.mark.parametrize(
    ("id", "error", "words"),
    [
        ("gymnax/CartPol-v1", UnknownEnvironmentError, "gymnax/CartPole-v1"),
        ("nowhere/CartPole-v1", UnknownEnvironmentError, "nowhere"),
    ],
)
def test_unknown_ids_are_refused_before_anything_is_done(tmp_path, id, error, words):
    with pytest.raises((error, LibraryMissingError), match=words):
        quickstart.run(quickstart.SMOKE, tmp_path / "run", ("gymnax/Catch-bsuite", id))
    with pytest.raises((error, LibraryMissingError), match=words):
        references.run(references.ReferencesConfig(), tmp_path / "run", ("gymnax/Catch-bsuite", id))
    assert not (tmp_path / "run").exists()


def test_the_same_id_twice_is_refused(tmp_path):
    with pytest.raises(WorkdirError, match="twice"):
        quickstart.run(quickstart.SMOKE, tmp_path / "run", ("gymnax/Catch-bsuite",) * 2)


def test_a_foreign_workdir_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WorkdirError, match=r"thesis\.tex"):
        quickstart.run(quickstart.SMOKE, tmp_path)
    (tmp_path / "references").mkdir()
    with pytest.raises(WorkdirError, match="references"):
        references.run(references.ReferencesConfig(), tmp_path, ("gymnax/Catch-bsuite",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["references", "thesis.tex"]


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot use the workdir"):
        quickstart.run(quickstart.SMOKE, tmp_path / "file" / "run")


def test_a_damaged_configuration_is_said(tmp_path):
    (tmp_path / "quickstart.json").write_text("{")
    with pytest.raises(WorkdirError, match="cannot use the workdir"):
        quickstart.run(quickstart.SMOKE, tmp_path)


def test_stages_say_what_they_miss(tmp_path):
    with pytest.raises(WorkdirError, match=r"experiments\.references"):
        collect.run(collect.CollectStageConfig(), tmp_path)
    with pytest.raises(WorkdirError, match="--environments"):
        references.run(references.ReferencesConfig(), tmp_path, ())


def test_the_command_line_says_errors_in_one_line(tmp_path):
    for flags, words in [
        (["--environments=gymnax/Catch"], "gymnax/Catch-bsuite"),
        (["--config.pretrain.stepps=3"], "stepps"),
        (["--config.pretrain.window=3"], "window is 3"),
    ]:
        done = subprocess.run(_command(tmp_path / "run", *flags), capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_flags_rebuild_the_configuration():
    values = dataclasses.asdict(quickstart.SMOKE)
    assert rebuild(quickstart.SMOKE, values) == quickstart.SMOKE
    values["collect"]["data"]["streams"] = 4
    assert rebuild(quickstart.SMOKE, values).collect.data.streams == 4


def test_pin_config_is_the_same_for_the_same_configuration(tmp_path):
    for workers in (1, 2):
        pin_config(tmp_path / "run", "references", references.ReferencesConfig(workers=workers), owns=("references",))
    assert json.loads((tmp_path / "run" / "references.json").read_text()) == resolved(references.ReferencesConfig())


def test_the_list_of_environments_has_no_task_twice():
    names = [re.sub(r"-(v\d+|bsuite|misc|MinAtar)$", "", id.partition("/")[2]) for id in quickstart.ENVIRONMENTS]
    assert len(set(names)) == len(names) >= 12

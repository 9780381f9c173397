"""The folder of a run: one process at a time works in it, wherever the process goes, whatever it is called."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from experiments.harness.ids import parse_ids
from experiments.harness.mesh import HostsConfig
from experiments.harness.stage import stage
from experiments.harness.workdir import WorkdirError, lock
from experiments.pretrain import PretrainConfig

HOLD = """
import pathlib, sys
from experiments.harness.workdir import lock
with lock(pathlib.Path(sys.argv[1]), "collect"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that works in the folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_at_work_is_refused_and_says_who_works_there(tmp_path, other):
    said = rf"experiments\.collect is at work there, process {other.pid} of .*since 2"
    with pytest.raises(WorkdirError, match=said), lock(tmp_path / "run", "pretrain"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(WorkdirError, match="is in use"), lock(tmp_path / "link", "pretrain"):
        pass
    other.communicate("")
    with lock(tmp_path / "run", "pretrain"):
        pass


def test_a_lock_dies_with_its_process(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / ".lock").exists(), "nobody cleaned up"
    with lock(tmp_path / "run", "collect"):
        pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_who_holds_a_lock_may_lock_again_but_another_thread_may_not(tmp_path):
    refused = []

    def work():
        try:
            with lock(tmp_path, "collect"):
                pass
        except WorkdirError as error:
            refused.append(error)

    with lock(tmp_path, "quickstart"):
        with lock(tmp_path, "collect"):
            pass
        assert (tmp_path / ".lock").exists(), "the outer one still holds"
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_a_lock_leaves_no_folder_behind_but_what_was_written_into_it(tmp_path):
    with lock(tmp_path / "a" / "b", "collect"):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path / "a" / "b", "collect"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_many_processes_at_once_hold_it_one_after_the_other(tmp_path):
    # Each takes and gives up the lock many times, the folder with it: none may meet another one inside.
    code = """
import os, pathlib, sys
from experiments.harness.workdir import WorkdirError, lock
folder, done = pathlib.Path(sys.argv[1]), 0
while done < 200:
    try:
        with lock(folder / "run", "collect"):
            mark = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            os.unlink(folder / "inside")
            os.close(mark)
            done += 1
    except WorkdirError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


@stage("nothing")
def _stage(config, workdir, environments=()):
    return workdir, environments, (workdir / ".lock").exists()


def test_a_stage_gets_an_absolute_folder_that_keeps_links_and_its_list_of_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "latest").symlink_to(tmp_path)
    config = PretrainConfig()
    assert _stage(config, pathlib.Path("run"), (" a/A", "b/B ", "")) == (tmp_path / "run", ("a/A", "b/B"), True)
    assert _stage(config, workdir="~/mine", environments="a/A, b/B") == (tmp_path / "home/mine", ("a/A", "b/B"), True)
    assert _stage(config, pathlib.Path("latest")) == (tmp_path / "latest", (), True)
    with pytest.raises(WorkdirError, match="holds a/A twice"):
        _stage(config, "run", ("a/A", " a/A"))
    with pytest.raises(WorkdirError, match="expected the path of a folder"):
        _stage(config, 7)


def test_one_process_of_several_hosts_locks_for_all(tmp_path):
    configs = [PretrainConfig(hosts=HostsConfig("localhost:1", 2, process)) for process in range(2)]
    assert [_stage(config, tmp_path)[2] for config in configs] == [True, False]


def test_a_list_of_ids_is_read_in_one_way():
    assert parse_ids("a/A, b/B,,") == parse_ids(["a/A ", "b/B", ""]) == ("a/A", "b/B")
    with pytest.raises(WorkdirError, match="holds a/A twice"):
        parse_ids("a/A,b/B, a/A")


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="cannot use the workdir"), lock(tmp_path / "file", "collect"):
        pass
    assert os.listdir(tmp_path) == ["file"]

"""Processes of scripts: each unit answers for itself, and none outlives the one that started it."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.harness import processes
from experiments.harness.engine import run_units
from experiments.harness.units import DIED, OUT_OF_MEMORY, OUT_OF_TIME, Job, Limits


def _answer(value, connection):
    connection.send((value, os.getpid()))


def _sleep(connection):
    connection.send(os.getpid())
    time.sleep(60)


def _work(folder, unit, advance):
    """A unit that does what its name says, and leaves a file with its process."""
    (folder / str(unit)).write_text(str(os.getpid()))
    advance(3)
    match unit:
        case "exits":
            os._exit(7)
        case "gives up":
            sys.exit(3)
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hangs":
            time.sleep(600)
        case "leaks":
            held = [bytearray(b"x") * (64 << 20) for _ in range(40)]
            time.sleep(600 + len(held))
        case "raises":
            raise OSError(28, "no space left")
        case "loses":
            raise ConnectionResetError(104, "the bucket is gone")
    return f"{unit}: done"


def _work_in(folder, units, **options):
    return [*run_units(units, Job(functools.partial(_work, folder)), **options)]


def _is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _await_end(pid, timeout_s=10.0):
    until = time.monotonic() + timeout_s
    while _is_alive(pid):
        assert time.monotonic() < until, f"{pid} lives on"
        time.sleep(0.05)


def test_a_child_answers_from_a_process_of_its_own_and_then_the_pipe_ends():
    with processes.child(_answer, {"a": 1}) as (process, connection):
        value, pid = connection.recv()
        assert value == {"a": 1} and pid == process.pid != os.getpid()
        with pytest.raises(EOFError):
            connection.recv()


def test_a_child_is_killed_when_the_block_ends():
    with processes.child(_sleep) as (process, receiver):
        receiver.recv()
    assert process.exitcode == -signal.SIGKILL


def test_a_unit_that_ends_its_process_hangs_or_leaks_costs_nothing_but_itself(tmp_path):
    units = ["a", "exits", "b", "gives up", "crashes", "hangs", "c", "leaks", "d"]
    steps = []
    limits = Limits(seconds=20, memory_gb=1.5)
    found = {each.unit: each for each in _work_in(tmp_path, units, workers=2, limits=limits, advance=steps.append)}
    assert {*found} == {*units} and len(found) == len(units)
    for unit in "abcd":
        assert found[unit].result == f"{unit}: done" and not found[unit].cause
    for unit, cause, words in [
        ("exits", DIED, "with status 7"),
        ("gives up", DIED, "with status 3"),
        ("crashes", DIED, "by SIGSEGV"),
        ("hangs", OUT_OF_TIME, "more than 20 s"),
        ("leaks", OUT_OF_MEMORY, "more than 1.5 GB"),
    ]:
        assert found[unit].result is None and found[unit].cause == cause and words in found[unit].reason
    assert sum(steps) >= 3 * 4, "of those that have ended well, every step is told"
    for unit in units:
        assert not _is_alive(int((tmp_path / unit).read_text()))


def test_one_process_works_on_many_units_and_is_replaced_before_it_is_worn(tmp_path):
    units = [*range(36)]
    assert [each.unit for each in _work_in(tmp_path, units, workers=1)] == units
    pids = [(tmp_path / str(unit)).read_text() for unit in units]
    assert len({*pids}) == 2 and pids == sorted(pids, key=pids.index) and str(os.getpid()) not in pids


@pytest.mark.parametrize(("unit", "number"), [("raises", 28), ("loses", 104)])
def test_what_a_unit_raises_ends_everything_with_its_traceback(unit, number, tmp_path):
    with pytest.raises(OSError, match=r"no space left|the bucket is gone") as caught:
        _work_in(tmp_path, ["hangs", unit, "a"], workers=2)
    assert caught.value.errno == number and "in _work" in "".join(caught.value.__notes__)
    assert not (tmp_path / "a").exists()
    if (tmp_path / "hangs").exists():
        _await_end(int((tmp_path / "hangs").read_text()))


def test_units_are_ended_with_whoever_waits_for_them(tmp_path):
    working = run_units(["hangs", "a"], Job(functools.partial(_work, tmp_path)), workers=2)
    with contextlib.closing(working):
        assert next(working).unit == "a"
        while not (tmp_path / "hangs").exists():
            time.sleep(0.05)
    _await_end(int((tmp_path / "hangs").read_text()))


def test_without_processes_units_run_here_in_their_order(tmp_path):
    assert [each.result for each in _work_in(tmp_path, ["a", "b"], workers=0)] == ["a: done", "b: done"]
    assert (tmp_path / "a").read_text() == str(os.getpid())


@pytest.mark.parametrize("kind", ["child", "units"])
def test_processes_die_with_the_one_that_was_killed(kind, tmp_path):
    block = {
        "child": "with processes.child(test_processes._sleep) as (_, connection): connection.recv(); time.sleep(60)",
        "units": "job = units.Job(functools.partial(test_processes._work, folder)); "
        "[*engine.run_units(['hangs'], job, workers=1)]",
    }[kind]
    program = tmp_path / "program.py"
    program.write_text(
        "import functools, pathlib, sys, time\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import test_processes\nfrom experiments.harness import engine, processes, units\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "if __name__ == '__main__':\n"
        f"    {block}\n"
    )
    with subprocess.Popen([sys.executable, str(program)]) as parent:
        pid = _await_child(parent.pid)
        os.kill(pid, signal.SIGINT)  # Ctrl-C, which a terminal sends to all
        time.sleep(0.5)
        assert _is_alive(pid)
        parent.kill()
    _await_end(pid)


def _await_child(pid, timeout_s=60.0):
    """The process that a process has started and that ignores SIGINT by now."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            status = pathlib.Path(f"/proc/{child}/status").read_text()
            ignored = next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1]
            if (
                int(ignored, 16) & 1 << (signal.SIGINT - 1)
                and b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
            ):
                return int(child)
        time.sleep(0.05)
    raise AssertionError("it has started nothing")

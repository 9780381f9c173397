"""Processes of scripts: they answer, and none outlives the one that started it, however that one ends."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.harness import processes


def _answer(value, sender):
    sender.send((value, os.getpid()))


def _sleep(sender):
    sender.send(os.getpid())
    time.sleep(60)


def _nothing(*args):
    pass


def _put_and_sleep(queue):
    queue.put(os.getpid())


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
    with processes.child(_answer, {"a": 1}) as (process, receiver):
        value, pid = receiver.recv()
        assert value == {"a": 1} and pid == process.pid != os.getpid()
        with pytest.raises(EOFError):
            receiver.recv()


def test_a_child_is_killed_when_the_block_ends():
    with processes.child(_sleep) as (process, receiver):
        receiver.recv()
    assert process.exitcode == -signal.SIGKILL


def test_an_error_ends_the_pool_at_once():
    queue = processes.make_queue()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), processes.pool(1, _put_and_sleep, queue) as pool:
        for _ in range(3):
            pool.submit(time.sleep, 60)
        pid = queue.get()
        raise KeyboardInterrupt
    _await_end(pid)
    assert time.monotonic() - begun < 30


def test_what_was_submitted_is_waited_for():
    with processes.pool(2, _nothing) as pool:
        futures = [pool.submit(pow, 2, n) for n in range(5)]
    assert [future.result(0) for future in futures] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("kind", ["child", "pool"])
def test_processes_die_with_the_one_that_was_killed(kind, tmp_path):
    block = {
        "child": "processes.child(test_processes._sleep) as (_, receiver): print(receiver.recv(), flush=True)",
        "pool": "processes.pool(1, test_processes._put_and_sleep, queue) as pool: print(queue.get(), flush=True)",
    }[kind]
    if kind == "pool":
        block = block.replace(": ", ": pool.submit(time.sleep, 60); ", 1)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import test_processes\nfrom experiments.harness import processes\n"
        "if __name__ == '__main__':\n"
        "    queue = processes.make_queue()\n"
        f"    with {block}; time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as parent:
        pid = parent.stdout.readline().strip()
        os.kill(int(pid), signal.SIGINT)  # Ctrl-C, which a terminal sends to all
        time.sleep(0.5)
        assert _is_alive(pid)
        parent.kill()
    _await_end(pid)

"""Units on a real Ray cluster of two machines, which are two nodes of Ray's on this one; one of them is lost."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import test_evaluate

from data.collect import CollectConfig
from data.references import load_reference
from data.store import open_dataset, verify_dataset
from experiments import collect, evaluate, references
from experiments.harness import cluster, outcomes
from experiments.harness.engine import run_units
from experiments.harness.units import (
    DIED,
    LOCAL,
    LOST,
    NOT_BUILT,
    OUT_OF_MEMORY,
    OUT_OF_TIME,
    ClusterError,
    Engine,
    Job,
    Limits,
    Needs,
    Travel,
)

ray = pytest.importorskip("ray")
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def machines():
    """Two nodes; the test that loses the second one adds another."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_register_timeout_seconds", "600")  # a busy machine is not a lost one
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        )
        nodes = Cluster(initialize_head=True, head_node_args=NODE)
        nodes.add_node(**NODE)
        try:
            yield nodes
        finally:
            nodes.shutdown()


def _do(folder, unit, advance):
    """A unit that does what its name says; `folder` is where each leaves that it was begun."""
    with (folder / f"{unit}-{time.time_ns()}").open("w") as file:
        file.write(str(os.getpid()))
    advance(3)
    match unit.partition(" ")[0]:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(600)
        case "leak":
            held = [bytearray(b"x") * (64 << 20) for _ in range(30)]
            time.sleep(600 + len(held))
        case "wait":
            until = time.monotonic() + 600
            while not (folder / "go").exists() and time.monotonic() < until:
                time.sleep(0.05)
        case "lose":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        case "raise":
            raise ValueError("a fault of ours")
    return f"{unit}: done"


def _prepare(folder, unit):
    if unit == "hang to build":
        time.sleep(600)
    return "not built" if unit == "unbuildable" else None


def begun(folder, unit):
    return len([*folder.glob(f"{unit}-*")])


def work(machines, folder, units, **options):
    job = Job(functools.partial(_do, folder), functools.partial(_prepare, folder))
    options = {"needs": Needs(1, 0.1), **options}
    return run_units(units, job, workers=0, engine=Engine("ray", machines.address), **options)


def test_what_becomes_of_a_unit_is_the_same_as_here(machines, tmp_path):
    units = ["a", "crash", "hang", "leak", "unbuildable", "hang to build", "b"]
    limits, steps = Limits(seconds=30, memory_gb=1.2, build_seconds=8), []
    found = {each.unit: each for each in work(machines, tmp_path, units, limits=limits, advance=steps.append)}
    assert {*found} == {*units}
    assert [found[unit].result for unit in "ab"] == ["a: done", "b: done"]
    assert found["unbuildable"].result == "not built" and not begun(tmp_path, "unbuildable")
    for unit, cause, words in [
        ("crash", DIED, "by SIGSEGV"),
        ("hang", OUT_OF_TIME, "more than 30 s"),
        ("leak", OUT_OF_MEMORY, "more than 1.2 GB"),
        ("hang to build", NOT_BUILT, "not built within 8 s"),
    ]:
        assert found[unit].result is None and found[unit].cause == cause and words in found[unit].reason
    assert sum(steps) >= 6


class Writing(tuple):
    """A unit with a folder: `(name, root)`."""

    __slots__ = ()


def _write(seen, unit, advance):
    name, root = unit
    assert root != seen
    number = int((root / "given" / "number").read_text())
    (root / name).mkdir()
    (root / name / "big").write_bytes(bytes([number]) * 40_000_000)  # more than one piece
    return number


def _moved(unit, root):
    return Writing((unit[0], root))


def test_what_a_unit_reads_gets_there_and_what_it_writes_gets_back_whole(machines, tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "number").write_text("7")
    leftover = tmp_path / ".arriving" / "x.tar"
    leftover.parent.mkdir()
    leftover.write_text("of a run that was killed")
    seen = []

    def arrived(unit, root):
        assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == [unit[0], f"{unit[0]}/big"]
        (root / unit[0]).replace(tmp_path / unit[0])
        seen.append(unit[0])

    travel = Travel(tmp_path, lambda unit: ["given", "not there"], _moved, arrived)
    units = [Writing((name, tmp_path)) for name in ("a", "b")]
    job = Job(functools.partial(_write, tmp_path))
    engine = Engine("ray", machines.address)
    found = [*run_units(units, job, workers=0, engine=engine, needs=Needs(1, 0.1), travel=travel)]
    assert sorted(each.unit for each in found) == units and {each.result for each in found} == {7}
    for name in ("a", "b"):
        assert (tmp_path / name / "big").read_bytes() == bytes([7]) * 40_000_000
    assert sorted(seen) == ["a", "b"] and not (tmp_path / ".arriving").exists()


def test_references_data_and_scores_made_on_a_cluster_are_those_that_are_made_here(machines, tmp_path):
    id, engine = "envpool/FrozenLake-v1", Engine("ray", machines.address)
    making = references.ReferencesConfig(budget=0.01, num_envs=16, episodes=16, workers=0)
    collecting = collect.CollectStageConfig(data=CollectConfig(streams=4, steps=64, block=64), workers=0)
    for workdir, where in ((tmp_path / "here", LOCAL), (tmp_path / "there", engine)):
        references.run(making, workdir, (id,), engine=where)
        collect.run(collecting, workdir, (id,), engine=where)
    here, there = (load_reference(tmp_path / name / "references" / id) for name in ("here", "there"))
    assert here.policy.reference == there.policy.reference and here.reference_returns == there.reference_returns
    made, arrived = (open_dataset(tmp_path / name / "dataset") for name in ("here", "there"))
    verify_dataset(arrived)
    assert arrived.configuration == made.configuration and arrived.ids == made.ids == (id,)
    assert arrived.card(id) == made.card(id) and arrived.group(id).parts == made.group(id).parts, "checksums and all"
    scored = {}
    for workdir, where in ((tmp_path / "here", LOCAL), (tmp_path / "there", engine)):
        shutil.rmtree(workdir / "references")
        test_evaluate.lay_out(workdir, test_evaluate.OLD)
        scored[where] = evaluate.run(dataclasses.replace(test_evaluate.CONFIG, together=1), workdir, engine=where)
        assert {outcomes.read_outcome(workdir / "evaluation" / id).verdict for id in test_evaluate.OLD} == {"evaluated"}
    assert scored[LOCAL]["environments"] == scored[engine]["environments"]
    assert not any((tmp_path / "there").rglob(".arriving*"))


def test_a_lost_machine_costs_the_units_in_flight_and_they_run_elsewhere(machines, tmp_path):
    waits = [f"wait {number}" for number in range(4)]  # as many as there are cores
    steps, wanted = [], 3 * 6

    def lose():
        _await(lambda: all(begun(tmp_path, unit) for unit in waits))
        machines.remove_node(next(iter(machines.worker_nodes)), allow_graceful=False)
        # Its processes end a little later, and what they finished until then would count.
        _await(lambda: sum(bool(_alive(tmp_path, unit)) for unit in waits) == 2)
        (tmp_path / "go").touch()

    losing = threading.Thread(target=lose)
    losing.start()
    found = [*work(machines, tmp_path, ["a", *waits, "b"], advance=steps.append)]
    losing.join()
    machines.add_node(**NODE)
    assert sorted((each.unit, each.result) for each in found) == sorted(
        (unit, f"{unit}: done") for unit in ("a", *waits, "b")
    )
    assert sorted(begun(tmp_path, unit) for unit in waits) == [1, 1, 2, 2]
    assert begun(tmp_path, "a") == begun(tmp_path, "b") == 1, "nothing finished is done twice"
    assert sum(steps) == wanted, "what was lost does not count"


def test_a_unit_that_is_lost_again_and_again_has_failed(machines, tmp_path):
    lost, other = sorted(work(machines, tmp_path, ["lose", "a"]), key=lambda each: each.cause, reverse=True)
    assert lost.cause == LOST and "3 times" in lost.reason and begun(tmp_path, "lose") == 3
    assert other.result == "a: done"


def test_what_a_unit_raises_ends_everything_as_it_does_here(machines, tmp_path):
    with pytest.raises(ValueError, match="a fault of ours") as caught:
        [*work(machines, tmp_path, ["raise", "hang"])]
    assert "in _do" in "".join(caught.value.__notes__) and begun(tmp_path, "raise") == 1
    _await(lambda: not _alive(tmp_path, "hang"))


def test_a_unit_that_no_machine_has_room_for_is_said(machines, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "ROOM_S", 0.0)
    for needs in (Needs(64, 0.1), Needs(1, 1e6)):
        with pytest.raises(ClusterError, match=r"no machine of the cluster has as much: they have 2 and"):
            [*work(machines, tmp_path, ["a"], needs=needs)]


def test_a_cluster_that_begins_nothing_is_said(machines, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cluster, "NOTICE_S", 0.0)
    with caplog.at_level("INFO", logger="ldm_jax"):
        assert [each.result for each in work(machines, tmp_path, ["a"])] == ["a: done"]
    assert "waiting units=1 reason=no machine has begun one" in caplog.text


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster can be reached"),
        ("ray://127.0.0.1:10001", "expected host:port"),
        ("here", "expected host:port"),
    ],
)
def test_an_address_where_there_is_no_cluster_is_said_at_once(address, words):
    with pytest.raises(ClusterError, match=words):
        [*run_units(["a"], Job(_do), workers=0, engine=Engine("ray", address))]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_another_program_at_an_address_is_not_taken_for_a_cluster(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"no Ray cluster can be reached .* another program answers there"):
            [*run_units(["a"], Job(_do), workers=0, engine=Engine("ray", address))]


DRIVER = """
import pathlib, sys, functools
import test_cluster
from experiments.harness.engine import run_units
from experiments.harness.units import Engine, Job, Needs, Travel
root, address = pathlib.Path(sys.argv[1]), sys.argv[2]
(root / "given").mkdir(exist_ok=True)
(root / "given" / "number").write_text("7")
units = [test_cluster.Writing((str(n), root)) for n in range(7) if not (root / str(n)).exists()]
arrived = lambda unit, folder: (folder / unit[0]).replace(root / unit[0])
travel = Travel(root, lambda unit: ["given"], test_cluster._moved, arrived)
job = Job(functools.partial(test_cluster._write, root))
for each in run_units(units, job, workers=0, engine=Engine("ray", address), needs=Needs(1, 0.1), travel=travel):
    print(each.unit[0], flush=True)
"""


def test_a_driver_that_is_killed_at_any_moment_goes_on_and_repeats_nothing(machines, tmp_path):
    counts, finished = [], {}
    command = [sys.executable, "-c", DRIVER, str(tmp_path), machines.address]
    for killed_after_s in (0.0, random.Random(5).random(), None):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            if killed_after_s is not None:
                process.stdout.readline()  # the first unit that it finishes; the others may be finished soon after
                time.sleep(killed_after_s)
                process.kill()
            process.communicate(timeout=300)
        now = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("[0-9]/big")}
        assert now.items() >= finished.items() and (len(now) > len(finished) or len(finished) == 7)
        finished = now
        counts.append(len(now))
    assert 0 < counts[0] < 7 and process.returncode == 0
    assert sorted(finished) == [str(number) for number in range(7)]
    for name in finished:
        assert (tmp_path / name / "big").stat().st_size == 40_000_000
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.isdecimal()) == ["given"]


def _await(holds, timeout_s=300.0):
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def _alive(folder, unit):
    pids = [path.read_text() for path in folder.glob(f"{unit}-*")]
    return any(pathlib.Path("/proc", pid or "0", "cmdline").exists() for pid in pids)

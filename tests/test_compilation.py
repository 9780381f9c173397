"""Compiled programs are kept from one process to the next, wherever that is possible, and nothing ends a run for it."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.harness import compilation

PROGRAM = """
import logging, sys
logging.basicConfig(format="%(message)s")
from experiments.harness import compilation
compilation.keep_programs(sys.argv[1])
import jax
jax.monitoring.register_event_listener(lambda name, **_: name.endswith("cache_hits") and print("kept before"))
print(jax.jit(lambda x: x + 1)(1))
"""


def start(folder, script=PROGRAM, **variables):
    """Compiles one program, every one of which is kept; returns what was printed and logged."""
    environment = {name: value for name, value in os.environ.items() if name != compilation.FOLDER}
    environment |= {"JAX_PLATFORMS": "cpu", compilation.SECONDS: "0", **variables}
    ran = subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines(), ran.stderr.splitlines()


def programs(folder):
    return sorted(path for path in folder.iterdir() if path.name.endswith("-cache"))


def test_what_one_process_compiled_another_one_loads_and_what_is_broken_is_made_anew(tmp_path):
    folder = tmp_path / "new" / "cache"
    assert start(folder) == (["2"], [])
    kept = programs(folder)
    assert kept and start(folder) == (["kept before"] * len(kept) + ["2"], [])
    for path in kept:
        path.write_bytes(path.read_bytes()[:-20])  # as a full disk or a kill leaves it
    assert start(folder) == (["2"], [])
    assert start(folder) == (["kept before"] * len(kept) + ["2"], [])


def test_a_folder_that_cannot_be_used_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    out, log = start(tmp_path / "file" / "cache")
    assert out == ["2"] and len(log) == 1
    assert log[0].startswith("compiled programs are not kept: ") and "give another --compilation_cache" in log[0]


def test_a_disk_that_fills_is_said_in_one_line(tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n" + PROGRAM
    out, log = start(tmp_path, f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{limited}")
    assert out == ["2"] and len(log) == 1 and "not kept" in log[0] and "make room" in log[0]
    assert not programs(tmp_path), "half a program"


@pytest.mark.parametrize("folder", ["", "elsewhere"])
def test_the_variable_of_jax_and_an_empty_folder_turn_it_off(folder, tmp_path):
    out, log = start(tmp_path / "cache", JAX_COMPILATION_CACHE_DIR="") if folder else start("")
    assert out == ["2"] and not log and not list(tmp_path.iterdir())


def test_a_folder_is_cut_back_to_what_was_used_last(tmp_path):
    for age in range(6):
        path = tmp_path / f"program-{age}-cache"
        path.write_bytes(bytes(1000))
        os.utime(path, (10_000 - age, 10_000 - age))
    compilation.cut_back(tmp_path, 10_000)
    assert len(programs(tmp_path)) == 6
    compilation.cut_back(tmp_path, 3500)
    assert [path.name for path in programs(tmp_path)] == [f"program-{age}-cache" for age in range(3)]
    compilation.cut_back(tmp_path, 0)
    assert not programs(tmp_path)


def test_the_folder_is_beside_our_other_caches_and_of_this_kind_of_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path))
    folder = pathlib.Path(compilation.default_folder())
    assert folder.parent == tmp_path / "xla" and folder.name.startswith(os.uname().machine)
    monkeypatch.delenv("LDM_JAX_CACHE")
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert compilation.default_folder() == ""

"""The benchmarks of rates run, and end in what they promise; how fast anything is, no test says."""

import importlib.util
import json
import math
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
LITTLE = ["--repetitions=1", "--seconds=0.001"]


@pytest.fixture
def last_line(capsys):
    """Runs a benchmark and reads its last line; the benchmarks are not part of what is installed."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)

    def run(name, *arguments):
        importlib.import_module(f"benchmarks.{name}").main([*LITTLE, *arguments])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def is_rate(value):
    return isinstance(value, float) and math.isfinite(value) and value > 0


def test_isolation_is_compared_with_this_process(last_line):
    result = last_line("isolation", "--no-container")
    assert (
        is_rate(result["venv_to_in_process"]) and is_rate(result["venv_round_trip_us"]) and is_rate(result["step_us"])
    )
    assert all(is_rate(ratios["venv"]) for ratios in result["ratios"].values())
    assert result["scaling"]["venv"]["1"] == 1.0 and is_rate(result["scaling"]["venv"]["2"])
    # What was not measured is said to be so.
    assert result["container_to_in_process"] is result["round_trip_us"] is result["scaling"]["container"] is None
    assert result["no_container"]


def test_our_loop_is_compared_with_each_library_s_own(last_line):
    result = last_line("rollout", "--headline-only")
    for key in ("gymnax_to_raw", "envpool_to_raw", "worker_to_raw"):
        line = result["table"][result["headline"][key]]
        assert is_rate(result[key]) and result[key] == line["ratio"]
        # One repetition: the ratio is that of the two rates.
        assert line["ratio"] == pytest.approx(line["ours"] / line["raw"])
    assert is_rate(result["workers"]["1"]) and is_rate(result["workers"]["2"])


def test_acting_is_compared_with_recomputing_and_with_memory(last_line):
    result = last_line("acting", "--sizes=nano", "--windows=16", "--rows=2,5", "--memory_gb=0.00002")
    (line,) = result["table"]
    assert (line["size"], line["window"], line["rows"]) == ("nano", 16, 2), "the larger one is left out"
    for key in ("acting_to_memory", "cached_to_recompute"):
        assert is_rate(result[key]) and result[key] == line[key]
    assert is_rate(result["growth"]) and is_rate(line["decisions_per_s"]) and is_rate(line["latency_ms"])


def test_a_comparison_takes_ratios_within_each_round(last_line):
    from benchmarks.timing import Times

    times = Times({"slow": [2.0, 8.0, 2.0], "fast": [1.0, 2.0, 1.0]})
    assert times.speed("fast", "slow") == 2.0 and times.speed("slow", "fast") == 0.5
    assert times.median("slow") == 2.0

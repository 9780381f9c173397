"""How the house is kept: sizes, names, and the one way of a transition through the files, read from the sources."""

import ast
import collections
import fnmatch
import pathlib
import re

import pytest
from sources import PACKAGES, ROOT, SOURCES, imports, relative_path, tree

LONGEST_MODULE, LONGEST_FUNCTION = 400, 60

# Names that several modules define on purpose, with the modules that may: each is one thing, behind one interface.
ONE_INTERFACE = {
    # what an adapter is
    **dict.fromkeys(
        ("LIBRARY", "candidates", "domain", "make"), ("environments/adapters/*", "environments/registry.py")
    ),
    # what a bridge is
    "register": ("environments/bridges/*",),
    # what a module of experts beside their simulators is
    "EXPERTS": ("environments/bridges/experts/*",),
    # what a reference's algorithm is
    **dict.fromkeys(("settle", "learn", "agent", "example"), ("data/references/*",)),
    # what a script is
    **dict.fromkeys(("run", "main", "launch", "foresee"), ("experiments/*",)),
}


def test_no_module_is_too_long_to_read():
    sizes = {relative_path(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert not {path: size for path, size in sizes.items() if size > LONGEST_MODULE}


def test_no_function_is_too_long_to_read():
    wrong = {}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > LONGEST_FUNCTION:
                    wrong[f"{relative_path(path)}:{node.name}"] = size
    assert not wrong


def public_names(path):
    """What a module defines at its top, without what it imports."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = [node.name]
        elif isinstance(node, ast.Assign):
            found = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found = [node.target.id]
        else:
            found = []
        yield from (name for name in found if not name.startswith("_"))


def test_one_name_means_one_thing():
    homes = collections.defaultdict(list)
    for path in SOURCES:
        place = relative_path(path)
        if not place.startswith("environments/isolation/worker/"):  # it can import nothing of ours
            for name in public_names(path):
                if not any(fnmatch.fnmatch(place, pattern) for pattern in ONE_INTERFACE.get(name, ())):
                    homes[name].append(place)
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def positional_timesteps(path):
    for node in ast.walk(tree(path)):
        called = node.func if isinstance(node, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name == "TimeStep" and len(node.args) > 1:
            yield f"{relative_path(path)}:{node.lineno}"


def test_time_steps_are_made_by_keywords():
    # Three of its fields are booleans of one shape: two of them swapped would be silent.
    everything = [path for folder in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert not [place for path in everything for place in positional_timesteps(path)]


# The one way

STATION = re.compile(r"^## \d+\. .*?: (`.+`)$", re.MULTILINE)


def stations():
    """The files of docs/how-it-works.md from `step` to gradient, in the order of the data."""
    text = (ROOT / "docs" / "how-it-works.md").read_text("utf-8")
    return [file for files in STATION.findall(text) for file in re.findall(r"`([^`]+)`", files)]


def test_a_reader_follows_a_transition_through_files_that_exist():
    files = stations()
    assert files[0].startswith("environments/") and files[-1] == "ldm_jax/training/step.py"
    assert len(files) >= 10 and len(set(files)) == len(files)
    assert not [file for file in files if not (ROOT / file).is_file()]


@pytest.mark.parametrize("position", range(1, len(stations())))
def test_a_station_imports_nothing_of_the_stations_after_it(position):
    files = stations()
    later = {file.removesuffix(".py").replace("/", ".") for file in files[position:]}
    here = pathlib.Path(files[position - 1])
    wrong = [
        item
        for item in imports(ROOT / here)
        if any(item.module == name or item.module.startswith(f"{name}.") for name in later)
    ]
    assert not wrong

"""Who may import whom, read from the syntax trees, and what an import may do, seen in a fresh interpreter."""

import ast
import configparser
import os
import pathlib
import re
import subprocess
import sys

import pytest
from sources import PACKAGES, ROOT, SOURCES, imports, name, relative_path, tree

# Libraries with a home: these files alone import them. A folder's name ends in a slash.
HOMES = {
    "tensorstore": {"data/store/storage.py"},
    "grain": {"data/mixture.py"},
    "minari": {"data/minari_format.py", "benchmarks/store.py"},
    "orbax": {"ldm_jax/training/checkpoints.py"},
    "podman": {"environments/isolation/containers.py"},
    "ray": {"experiments/harness/cluster.py"},
    "flax": {f"ldm_jax/model/{name}.py" for name in ("layers", "encoders", "decoder", "heads", "network")},
    "absl": {"experiments/"},
    "ml_collections": {"experiments/"},
    "tensorboardX": {"experiments/harness/metrics_log.py"},
    "tqdm": {"experiments/"},
    "matplotlib": {"experiments/report/"},
    "imageio_ffmpeg": {"experiments/watching.py"},
    "shtab": {"experiments/command_line.py"},
}
# Each environment library is imported by the adapter of its name, inside functions.
LIBRARIES = ("gymnax", "envpool", "jumanji", "pgx", "navix", "xminigrid", "brax", "craftax")
# `import ldm_jax` in a notebook brings what the core computes with and nothing of the rest.
HEAVY = ("tensorstore", "grain", "orbax", "matplotlib", "absl.flags", "tqdm", "pandas", "podman", "ray", *LIBRARIES)
# Each folder, and the folders it may import.
MAY_IMPORT = {"ldm_jax": {"ldm_jax"}, "environments": {"ldm_jax", "environments"}, "data": {"ldm_jax", "data"}}
# The rooms of the core, modules and folders, floor by floor: each imports itself and what is on the floors below.
FLOORS = (
    {"errors"},
    {"types"},
    {"environment", "spaces", "files"},
    {"cards", "sharding", "rollout"},
    {"encoding"},
    {"model", "measuring"},
    {"training", "evaluation"},
    {"acting"},
    {"policy"},
    {"episodes", "live"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


ALL = [item for path in SOURCES for item in imports(path)]


def test_every_home_exists():
    assert not [home for homes in HOMES.values() for home in homes if not (ROOT / home).exists()]


def within(path, homes):
    return any(path == home or (home.endswith("/") and path.startswith(home)) for home in homes)


# Who imports whom


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_data_goes_down_the_list_of_folders_and_never_back_up(package):
    allowed = MAY_IMPORT[package]
    wrong = [
        item for item in ALL if item.path.startswith(f"{package}/") and item.top in PACKAGES and item.top not in allowed
    ]
    assert not wrong


def room(module):
    """Of a module of the core: `ldm_jax.encoding.codec` is in `encoding`."""
    return module.split(".")[1]


def test_every_module_of_the_core_has_a_floor():
    entries = (ROOT / "ldm_jax").iterdir()
    rooms = {path.stem for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}
    assert rooms == set(FLOOR)


def test_rooms_of_the_core_import_only_rooms_below_them():
    inside = [
        item for item in ALL if item.top == "ldm_jax" and re.match(r"ldm_jax/(\w+/|(?!__init__)\w+\.py)", item.path)
    ]
    assert len(inside) > 100
    wrong = []
    for item in inside:
        own, other = room(item.path.removesuffix(".py").replace("/", ".")), room(item.module)
        # A name of the package itself, such as `from ldm_jax import Policy`, would bring all of it.
        if other not in FLOOR or (own != other and FLOOR[other] >= FLOOR[own]):
            wrong.append(item)
    assert not wrong


def test_environments_import_only_the_contract_of_the_core():
    allowed = tuple(f"ldm_jax.{room}" for room in ("types", "errors", "environment", "spaces", "files"))
    wrong = [
        item
        for item in ALL
        if item.path.startswith("environments/") and item.top == "ldm_jax" and not item.module.startswith(allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["data", "environments"])
def test_packages_with_bare_names_import_themselves_relatively(package):
    wrong = [item for item in ALL if item.path.startswith(f"{package}/") and item.top == package and not item.relative]
    assert not wrong


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_alone(library):
    wrong = [item for item in ALL if item.top == library and not within(item.path, HOMES[library])]
    assert not wrong


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_environment_library_is_imported_in_its_adapter_alone_and_lazily(library):
    home = f"environments/adapters/{library}.py"
    found = [item for item in ALL if item.top == library]
    assert found, f"no file imports {library}, expected {home}"
    assert not [item for item in found if item.path != home or not item.lazy]


def test_every_adapter_is_known_to_this_test():
    # Gymnasium's spaces are the vocabulary of every part, so that it is no library with a home.
    adapters = {path.stem for path in (ROOT / "environments" / "adapters").glob("*.py")} - {"__init__", "gymnasium"}
    assert adapters <= set(LIBRARIES), "name the adapter's library in LIBRARIES"


def test_the_program_in_other_interpreters_imports_the_standard_library_and_numpy_alone():
    allowed = {*sys.stdlib_module_names, "numpy", "pkg_resources"}  # the last one where Python is 3.7
    found = [item for item in ALL if item.path.startswith("environments/isolation/worker/")]
    own = "environments.isolation.worker."  # the files that are given to those interpreters
    assert found and not [item for item in found if item.top not in allowed and not item.module.startswith(own)]


def test_bridges_import_their_library_lazily_and_nothing_else():
    allowed = {*sys.stdlib_module_names, "numpy", "gymnasium"}
    found = [item for item in ALL if item.path.startswith("environments/bridges/")]
    assert found and not [item for item in found if item.top not in allowed and not item.lazy]
    assert not [item for item in found if item.top in PACKAGES]


# What only scripts do


def calls(path):
    return [(node.lineno, name(node.func)) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def test_only_experiments_print_set_jax_up_make_meshes_and_look_at_the_working_directory():
    forbidden = re.compile(
        r"(print|input|breakpoint|jax\.config\.update|config\.update|(os\.)?getcwd|os\.chdir|(pathlib\.)?Path\.cwd"
        r"|(jax\.)?(make_mesh|set_mesh)|jax\.sharding\.(set_mesh|use_mesh|Mesh)|Mesh|logging\.basicConfig)"
    )
    # One adapter keeps libraries from taking the process elsewhere with them.
    places = ("experiments/", "environments/adapters/gymnasium.py")
    paths = [path for path in SOURCES if not relative_path(path).startswith(places)]
    wrong = [
        f"{relative_path(path)}:{line} calls {call}"
        for path in paths
        for line, call in calls(path)
        if forbidden.fullmatch(call)
    ]
    assert not wrong


def test_the_report_prints_nothing():
    # It is called with its folder; only the scripts around it talk to the user.
    wrong = [
        call for path in (ROOT / "experiments" / "report").glob("*.py") for _, call in calls(path) if call == "print"
    ]
    assert not wrong


def test_no_module_runs_anything_when_imported_but_definitions():
    # A bare call at the top of a module is a side effect, except under `if __name__ == "__main__"`.
    wrong = [
        f"{relative_path(path)}:{node.lineno}"
        for path in SOURCES
        for node in tree(path).body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        # Pytrees, flags and derivatives can only be defined by calling.
        and not re.search(r"\.(register_\w+|DEFINE_\w+|mark_\w+|defvjp)$", name(node.value.func))
    ]
    assert not wrong


# What an import does


def run_python(code):
    # From a folder without any sources, as a notebook would; no backend is named, so that one that starts is seen.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


LOADED = f"""
import sys, jax._src.xla_bridge as bridge
assert not bridge._backends, "a backend was started"
print(*[name for name in {HEAVY} if name in sys.modules])
"""


def test_importing_the_core_starts_no_backend_and_brings_nothing_it_does_not_compute_with():
    assert run_python("import ldm_jax" + LOADED) == []


def test_importing_the_environments_brings_no_environment_library():
    assert run_python("import environments" + LOADED) == []


def test_importing_all_modules_starts_no_backend():
    modules = [relative_path(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in SOURCES]
    run_python("\n".join(f"import {module}" for module in modules) + LOADED)


# What is shipped


def test_every_package_is_shipped_with_its_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    found = [relative_path(path.parent).replace("/", ".") for path in SOURCES if path.name == "__init__.py"]
    assert sorted(listed) == sorted(found)
    # A folder of sources without __init__.py would be left out of the wheel without a word.
    assert {relative_path(path.parent).replace("/", ".") for path in SOURCES} == set(listed)
    for package, patterns in setup["options.package_data"].items():
        assert all(list((ROOT / package.replace(".", "/")).glob(pattern)) for pattern in patterns.split())


@pytest.mark.skipif("LDM_JAX_TESTS_INSTALLED" not in os.environ, reason="only `make test` installs the wheel")
def test_the_tests_see_the_installed_wheel():
    import ldm_jax
    from experiments.report import page

    for module in (ldm_jax, page):
        assert "site-packages" in module.__file__ and not module.__file__.startswith(str(ROOT / "ldm_jax"))
    (home,) = run_python("import data, environments, ldm_jax; print(ldm_jax.__file__)")
    assert home == ldm_jax.__file__
    installed = pathlib.Path(ldm_jax.__file__).parents[1]
    for package in PACKAGES:
        there = sorted(path.relative_to(installed) for path in (installed / package).rglob("*.py"))
        assert there == sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))
    assert (installed / "experiments" / "report" / "template.html").exists()
    assert not (installed / "tests").exists() and not (installed / "benchmarks").exists()


def test_no_tracked_file_names_a_machine_s_folders_or_a_package_registry():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Written in pieces, so that this file does not find itself.
    homes = "|".join(("/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/", "/wo" + "rk/"))
    registries = "|".join(
        ("pypi" + r"\.org", "pythonhosted" + r"\.org", "--(extra-)?index" + "-url", "find" + "-links")
    )
    pattern = re.compile(rf"(?<![\w.$}}])({homes})|{registries}")
    wrong = []
    for relative in filter(None, names.split("\0")):
        path = ROOT / relative
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            wrong += [f"{relative}: {match[0]}" for match in pattern.finditer(content.decode("utf-8", "replace"))]
    assert not wrong

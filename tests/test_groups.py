"""Libraries with an interpreter of their own: their descriptions, their virtual environments, and the registry."""

import dataclasses
import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import containers_here
import jax
import numpy as np
import pytest

import environments
import ldm_jax
from environments import registry, verification
from environments.catalog import entries
from environments.isolation import Isolation, containers, groups, venvs

GROUPS = sorted(groups.GROUPS.glob("*/group.json"))
HERE = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def group(tmp_path, cache, monkeypatch):
    """A group whose one library is in this repository, and whose requirements are none."""
    folder = tmp_path / "images" / "corridor"
    folder.mkdir(parents=True)
    library = pathlib.Path(__file__).parent / "misbehaving_library"
    description = {
        "python": HERE,
        "libraries": {
            "corridor": {
                "api": "gymnasium",
                "imports": ["misbehaving"],
                "distribution": "gymnasium",
                "domain": "test",
                "exclude": {"Crash-v0": "it crashes"},
            }
        },
    }
    (folder / "group.json").write_text(json.dumps(description))
    (folder / "requirements.txt").write_text("# nothing\n")
    monkeypatch.setattr(groups, "GROUPS", tmp_path / "images")
    groups.isolated_libraries.cache_clear()
    monkeypatch.setattr(containers, "problem", lambda: "this test is about virtual environments")
    # What pip would install is borrowed from the environment that runs the tests.
    monkeypatch.setattr(venvs, "_install", lambda *arguments: _borrow(library, *arguments))
    (tmp_path / "catalog").mkdir()
    monkeypatch.setattr(entries, "CATALOG", tmp_path / "catalog")
    yield folder
    groups.isolated_libraries.cache_clear()


def _write_catalog():
    """A line for one id that works and one for one that does not."""
    works, crashes = verification.entry("corridor/Steady-v0"), verification.entry("corridor/Crash-v0", reason="it died")
    entries.write_entries(entries.CATALOG / "corridor.jsonl", [works, crashes])


def _borrow(library, spec, base, folder, log, count):
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(f"{os.path.dirname(os.path.dirname(np.__file__))}\n{library}\n")


# Descriptions.


def test_every_group_is_described_and_pinned_exactly():
    assert len(GROUPS) >= 4
    for path in GROUPS:
        libraries = groups.read_group(path)
        names = {line.partition("==")[0].lower() for line in venvs.pinned(path.parent / "requirements.txt")}
        for library in libraries:
            assert library.worker["distribution"].lower() in names
            assert library.worker["api"] in names
            assert library.version != "unknown"


@pytest.mark.parametrize("line", ["numpy>=2", "numpy", "git+https://somewhere/x", "-r other.txt"])
def test_requirements_that_are_not_exact_are_refused(tmp_path, line):
    path = tmp_path / "requirements.txt"
    path.write_text(f"numpy==2.0.0  # fine\n{line}\n")
    with pytest.raises(ValueError, match="expected `name==version`"):
        venvs.pinned(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda group: group.pop("python"), "python"),
        (lambda group: group.update(pyhton="3.9"), "unknown fields pyhton"),
        (lambda group: group["libraries"]["corridor"].update(sed="x"), "unknown fields sed"),
        (lambda group: group["libraries"]["corridor"].pop("domain"), "lacks the fields domain"),
    ],
)
def test_a_wrong_description_is_named(group, change, text):
    path = group / "group.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"does not describe a group of libraries: .*{text}"):
        groups.read_group(path)


def test_the_hash_follows_what_makes_a_difference(group):
    (library,) = groups.read_group(group / "group.json")
    spec = library.venv
    assert spec.digest == dataclasses.replace(spec, apt=("libx",)).digest
    digests = {spec.digest, dataclasses.replace(spec, python="3.9").digest}
    digests.add(dataclasses.replace(spec, build=("wheel==1",)).digest)
    spec.requirements.write_text("numpy==2.0.0\n")
    assert len(digests | {spec.digest}) == 4


def test_what_was_built_is_imported_under_the_variables_of_its_libraries(group, tmp_path):
    (tmp_path / "headless.py").write_text("import os\n\nassert os.environ['DISPLAY_NONE'] == '1'\n")
    path = group / "group.json"
    description = json.loads(path.read_text())
    description["libraries"]["corridor"].update(imports=["headless"], variables={"DISPLAY_NONE": "1"})
    path.write_text(json.dumps(description))
    (library,) = groups.read_group(path)
    for spec, status in ((library.venv, 0), (dataclasses.replace(library.venv, variables=()), 1)):
        command = [sys.executable, "-c", spec.trial]
        environment = {"PYTHONPATH": str(tmp_path)}
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == status


# Interpreters.


def test_interpreters_are_found_on_the_path_and_in_the_folders_of_version_managers(tmp_path, monkeypatch):
    assert venvs.find_python(HERE, "this test") == sys._base_executable

    def put(path, version):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    put(tmp_path / "bin" / "python3.98", "pyenv: python3.98: command not found")
    for patch in (9, 10):
        put(tmp_path / "pyenv" / "versions" / f"3.98.{patch}" / "bin" / "python3.98", "3.98")
    assert venvs.find_python("3.98", "this test").endswith("3.98.10/bin/python3.98")
    with pytest.raises(ldm_jax.LibraryMissingError, match=r"Python 3.97 is needed for this test.*apt-get install"):
        venvs.find_python("3.97", "this test")
    put(tmp_path / "bin" / "python3.97", "3.8")
    with pytest.raises(ldm_jax.LibraryMissingError, match=r"not usable: .*/python3.97 \(another version\)"):
        venvs.find_python("3.97", "this test")


# From an id to an environment.


def test_an_environment_is_built_once_and_made_like_any_other(group, cache, caplog):
    assert not any(id.startswith("corridor/") for id in environments.list_ids())
    environment = environments.make("corridor/Steady-v0", 2, isolation=Isolation(workers=1))
    assert "building the virtual environment corridor" in caplog.text
    assert isinstance(environment, ldm_jax.Environment)
    state, _ = environment.reset(jax.random.key(0))
    environment.step(state, np.zeros(2, np.int32))
    environment.close()
    caplog.clear()
    environments.make("corridor/Steady-v0", isolation="venv").close()
    assert not caplog.records
    folders = [path for path in (cache / "venvs").iterdir() if path.is_dir()]
    assert len(folders) == 1
    # What a killed build leaves, and an interpreter that is gone, are built over.
    (folders[0].with_suffix(".building") / "lib").mkdir(parents=True)
    (folders[0] / "bin" / "python").unlink()
    environments.make("corridor/Steady-v0").close()
    assert [path for path in (cache / "venvs").iterdir() if path.is_dir()] == folders


def test_a_bridge_puts_ids_into_the_registry_of_a_library_that_has_none(group, tmp_path, monkeypatch):
    folder = tmp_path / "bridges"
    folder.mkdir()
    # It has the name of its library, and hides it from nobody.
    (folder / "misbehaving.py").write_text(
        "import gymnasium\n\n\ndef register():\n    import misbehaving\n\n"
        "    gymnasium.register('Bridged', entry_point=misbehaving.Steady)\n"
    )
    monkeypatch.setattr(groups, "BRIDGES", folder)
    path = group / "group.json"
    description = json.loads(path.read_text())
    library = description["libraries"]["corridor"]
    library["bridge"] = "misbehaving"
    path.write_text(json.dumps(description))
    assert "corridor/Bridged" in environments.list_ids("corridor")
    environment = environments.make("corridor/Bridged", 2, isolation=Isolation(workers=1))
    state, _ = environment.reset(jax.random.key(0))
    environment.step(state, np.zeros(2, np.int32))
    environment.close()
    library["bridge"] = "elsewhere"
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="has the bridge 'elsewhere', which is not in"):
        groups.read_group(path)


def test_what_is_not_in_the_catalog_is_asked_from_the_library(group, cache, caplog):
    found = environments.list_ids("corridor")
    assert "building the virtual environment corridor" in caplog.text
    assert "corridor/Steady-v0" in found and "corridor/Crash-v0" not in found
    assert not any("CartPole" in id for id in found), "ids of other packages in the same registry"
    assert found == [id for id in environments.list_ids() if id.startswith("corridor/")]
    assert registry.candidates("corridor")["Crash-v0"] == "it crashes"
    with pytest.raises(ldm_jax.EnvironmentFaultError, match="has no environment 'Stedy-v0'"):
        environments.make("corridor/Stedy-v0")


def test_names_and_kinds_of_isolation_are_checked_before_anything_is_built(group, cache):
    _write_catalog()
    assert environments.list_ids("corridor") == ["corridor/Steady-v0"]
    assert environments.list_ids("corridor", verified=False) == ["corridor/Crash-v0"]
    with pytest.raises(environments.UnknownEnvironmentError, match="did you mean corridor/Steady-v0"):
        environments.make("corridor/Stedy-v0")
    with pytest.raises(environments.UnknownEnvironmentError, match="not offered: it died"):
        environments.make("corridor/Crash-v0")
    with pytest.raises(ValueError, match="isolation is 'jail', expected one of"):
        environments.make("corridor/Steady-v0", isolation="jail")
    with pytest.raises(ValueError, match="runs in this interpreter"):
        environments.make("gymnax/CartPole-v1", isolation="venv")
    assert not cache.exists()


def test_where_there_is_no_podman_auto_is_a_virtual_environment_and_container_says_what_is_missing(group, cache):
    with pytest.raises(ldm_jax.LibraryMissingError, match="corridor cannot run in a container: this test"):
        environments.make("corridor/Steady-v0", isolation="container")
    environments.make("corridor/Steady-v0").close()
    assert groups.isolated_libraries()["corridor"].is_built


def test_what_has_to_be_built_is_what_will_be_used_and_an_image_that_fails_is_not_tried_each_time(group, monkeypatch):
    environments.make("corridor/Steady-v0").close()
    assert registry.unbuilt_group("corridor") == ""
    tried = []

    def fail(spec):
        tried.append(spec)
        raise ldm_jax.LibraryMissingError("no network")

    monkeypatch.setattr(containers, "problem", lambda: None)
    monkeypatch.setattr(containers, "build_image", fail)
    assert registry.unbuilt_group("corridor") == "corridor", "its image comes before the virtual environment"
    for _ in range(2):
        registry.build_group("corridor")
        assert registry.unbuilt_group("corridor") == "" and len(tried) == 1
    monkeypatch.setattr(containers, "TRIED_AGAIN_S", -1.0)
    assert registry.unbuilt_group("corridor") == "corridor"


def test_a_build_that_fails_leaves_nothing_but_its_log(tmp_path, cache, caplog):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such-package-anywhere==1.0\n")
    spec = venvs.VenvSpec("broken", HERE, requirements, (), ("math",), ("libmissing0",))
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(ldm_jax.LibraryMissingError, match=r"(?s)apt-get install libmissing0.*no-such-package"):
            venvs.build(spec)
    assert [path.suffix for path in (cache / "venvs").iterdir()].count(".log") == 1
    assert not [path for path in (cache / "venvs").iterdir() if path.is_dir()]


# The real groups, whose packages are downloaded: three at every run, the rest with `make test PYTEST="-m builds"`.

ALWAYS = {("nasim", "venv"), ("procgen", "container"), ("gym-classics", "container")}
"""A virtual environment, and a container of the oldest and of the newest Python."""


def _cases():
    for path in GROUPS:
        for library in groups.read_group(path):
            for kind in ("venv", "container"):
                marks = () if (library.name, kind) in ALWAYS else (pytest.mark.builds,)
                yield pytest.param(library.name, kind, marks=marks, id=f"{path.parent.name}-{library.name}-{kind}")


@pytest.mark.parametrize(("name", "kind"), _cases())
def test_two_ids_of_every_library_pass_the_kit(name, kind):
    library = groups.isolated_libraries()[name]
    if kind == "container":
        containers_here.need()
    expected = "sha256:[0-9a-f]{64}" if kind == "container" else f"venv:{library.venv.digest}"
    ids = environments.list_ids(name)
    for id in (ids[0], ids[-1]):
        environments.check_environment(
            lambda batch_size, time_limit, id=id: environments.make(
                id, batch_size, time_limit=time_limit, isolation=kind
            )
        )
    environment = environments.make(id, isolation=kind)
    environment.close()
    assert re.fullmatch(expected, environment.spec.image_digest)


@pytest.mark.builds
def test_procgen_runs_on_python_3_9_with_the_old_gym():
    environment = environments.make("procgen/procgen-coinrun-v0", 2, isolation="venv")
    assert environment.spec.version == "0.10.7" and environment.spec.observation_space.shape == (64, 64, 3)
    environment.close()

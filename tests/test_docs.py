"""The pages of docs/: all are found, what they name exists, what they show runs, and the notebooks stay small."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import typing

import pytest
import yaml
from sources import ROOT

from experiments import command_line
from experiments.harness import flags

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
WRITTEN = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
RUN = ("environments.md", "references.md", "evaluation.md", "add-an-algorithm.md")
"""Pages whose examples need nothing but the packages; those that need a run are run by tests/test_quickstart.py."""


def load_hooks():
    specification = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """Fenced code of a language, without its indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def flatten(nav):
    for entry in nav:
        if isinstance(entry, dict):
            (entry,) = entry.values()
        yield from flatten(entry) if isinstance(entry, list) else [entry]


# Found


def test_every_page_is_in_the_navigation_once():
    listed = list(flatten(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    made = {path for path, _ in HOOKS.generated_pages() if path.endswith(".md")}
    assert sorted(listed) == sorted({path.relative_to(DOCS).as_posix() for path in PAGES} | made)


def test_every_room_with_a_stub_is_in_the_reference():
    stubs = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("[a-z]*/**/*.pyi")}
    assert {room for room in stubs if room.split(".")[0] in ("ldm_jax", "environments", "data")} <= {*HOOKS.ROOMS}


def test_every_public_name_is_in_the_reference_with_a_docstring():
    pages = "\n".join(HOOKS.api_pages().values())
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    targets = {}
    for room in HOOKS.ROOMS:
        for each in HOOKS.list_names(room):
            if each.is_module:
                assert each.path in HOOKS.ROOMS or f"## {each.path}\n" in pages, f"{each.path} is not in the reference"
            else:
                targets.setdefault(each.target, []).append(each.path)
    assert len(targets) > 100
    for target, paths in targets.items():
        assert len(shown & {*paths}) == 1, f"{paths} is in the reference {len(shown & {*paths})} times"
        module, name = target.rsplit(".", 1)
        assert is_documented(module, name), f"{target} has no docstring"


def is_documented(module, name):
    """Whether a name of a module has a docstring, a constant one below it; read from the source."""
    folder = ROOT.joinpath(*module.split("."))
    path = folder.with_suffix(".py")
    if folder.is_dir():  # a room: its stub says where its names are
        path = folder / ("__init__.pyi" if (folder / "__init__.pyi").exists() else "__init__.py")
    body = ast.parse(path.read_text("utf-8")).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            levels = node.level - folder.is_dir()
            above = module.split(".")[: -levels or None] if node.level else []
            return is_documented(".".join([*above, *filter(None, [node.module])]), name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return bool(ast.get_docstring(node))
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_links_of_a_page_lead_to_files(page):
    made = {DOCS / path for path, _ in HOOKS.generated_pages()}
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text("utf-8"))
    local = [link for link in links if not re.match(r"\w+:", link)]
    targets = {link: (page.parent / link).resolve() for link in local}
    assert not [link for link, target in targets.items() if not target.exists() and target not in made]


# As written


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_examples_of_a_page_import_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("ldm_jax", "environments", "data"):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], block


@pytest.mark.parametrize("page", RUN)
def test_examples_of_a_page_run(page, capsys):
    names = {"__name__": "__main__"}
    for block in blocks(DOCS / page, "python"):
        exec(compile(block, page, "exec"), names)
    if page == "evaluation.md":
        assert capsys.readouterr().out == "0.5\n"


def commands(page):
    """Commands of the blocks of a page, continued lines joined, remarks left out."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and not words[0].startswith("#"):
                yield words


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_commands_of_a_page_name_scripts_and_flags_that_exist(page):
    for words in commands(page):
        if "-m" in words and (module := words[words.index("-m") + 1]).startswith(("experiments.", "benchmarks.")):
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            assert path.exists(), f"{name_of(page)}: no {module}"
            if module.startswith("experiments."):
                check_flags(module, words[words.index("-m") + 2 :])
        elif words[0] == "ldm-jax" and words[1] != "dataset":
            command_line.parser().parse_args(words[1:])
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert not [word for word in targets if f"\n{word}:" not in (ROOT / "Makefile").read_text()], words


def check_flags(module, words):
    script = importlib.import_module(module)
    sources = inspect.getsource(script) + inspect.getsource(flags)
    for word in words:
        given = re.match(r"--(?:no)?([\w.]+)", word)
        if given and given[1].startswith("config."):
            config = typing.get_type_hints(inspect.unwrap(script.run))["config"]
            for field in given[1].split(".")[1:]:
                fields = {each.name for each in dataclasses.fields(config)}
                assert field in fields, f"{module} has no --{given[1]}"
                config = typing.get_type_hints(config)[field]
        elif given:
            assert f'"{given[1]}"' in sources or f'"{given[0][2:]}"' in sources, f"{module} has no --{given[1]}"


# Notebooks


def test_there_are_six_notebooks():
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_short_light_and_shows_pictures(path):
    text = path.read_text("utf-8")
    cells = json.loads(text)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert len(cells) < 25 and len(text) < 200_000
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work)/", text), "a path of somebody's machine"

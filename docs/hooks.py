"""Pages that follow from what the repository holds: the API reference, the executed notebooks and the changelog.

MkDocs calls `on_files`; the rest is plain functions, which `tests/test_docs.py` looks at without building anything.
"""

from __future__ import annotations

import ast
import base64
import collections.abc
import json
import pathlib
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXECUTED = ROOT / "build" / "docs" / "notebooks"
"""Where `docs/execute.py` puts the notebooks that it has run; without it, pages show what the notebooks have stored."""

ROOMS = (
    *("ldm_jax", "ldm_jax.spaces", "ldm_jax.encoding", "ldm_jax.model", "ldm_jax.training", "ldm_jax.acting"),
    *("ldm_jax.evaluation", "environments", "environments.isolation", "data", "data.references", "data.store"),
)
"""The packages with a public API, in the order of the navigation."""


class Listed(typing.NamedTuple):
    """A public name of a room.

    Attributes:
      room: that lists it.
      name: under which it is listed.
      target: where it is defined: a module, or a module and a name in it.
      is_module: whether it is a module or a room of its own.
    """

    room: str
    name: str
    target: str
    is_module: bool

    @property
    def path(self) -> str:
        """What one imports it by."""
        return f"{self.room}.{self.name}"


def list_names(room: str) -> list[Listed]:
    """The public names of a room: those of its `__init__.pyi` or, where it has none, of its `__init__.py`."""
    folder = ROOT.joinpath(*room.split("."))
    stub = folder / "__init__.pyi"
    source = stub if stub.exists() else folder / "__init__.py"
    listed = []
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                name = alias.asname or alias.name
                target = ".".join(filter(None, (room, node.module, alias.name)))
                listed.append(Listed(room, name, target, node.module is None))
    return listed


def api_pages() -> dict[str, str]:
    """The pages of the reference by path: each object stands in the first room that lists it, others point there."""
    documented: dict[str, str] = {}
    for room in ROOMS:
        for each in list_names(room):
            if not each.is_module:
                documented.setdefault(each.target, each.path)
    pages = {f"api/{room}.md": _render_room(room, documented) for room in ROOMS}
    rooms = "\n".join(f"- [`{room}`]({room}.md): {_summary(room)}" for room in ROOMS)
    pages["api/index.md"] = (
        "# API reference\n\nWhat each package offers, from its docstrings. A name that is not here is an inner part "
        f"and may change without a word.\n\n{rooms}\n\n`python -m experiments.<script> --help` tells the flags of a "
        "script, with every field of its configuration.\n"
    )
    return pages


def _render_room(room: str, documented: dict[str, str]) -> str:
    listed = list_names(room)
    lines = [f"# {room}", "", _summary(room, whole=True), ""]
    modules = [each for each in listed if each.is_module]
    if elsewhere := [each for each in listed if not each.is_module and documented[each.target] != each.path]:
        others = ", ".join(f"[`{each.name}`][{documented[each.target]}]" for each in elsewhere)
        lines += [f"Also here, under another name's page: {others}.", ""]
    if rooms := [each.path for each in modules if each.path in ROOMS]:
        lines += ["Rooms of their own: " + ", ".join(f"[`{path}`]({path}.md)" for path in rooms) + ".", ""]
    for each in listed:
        if not each.is_module and documented[each.target] == each.path:
            lines += [f"::: {each.path}", "    options:", "      heading_level: 2", ""]
    for each in modules:
        if each.path not in ROOMS:
            lines += _render_module(each.path, documented)
    return "\n".join(lines)


def _render_module(module: str, documented: dict[str, str]) -> list[str]:
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    lines = [f"## {module}", "", ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "", ""]
    for name in public_names(source):
        path = f"{module}.{name}"
        if path not in documented:
            documented[path] = path
            lines += [f"::: {path}", "    options:", "      heading_level: 3", ""]
    return lines


def public_names(source: pathlib.Path) -> list[str]:
    """The public functions and classes of a module, as they stand there."""
    nodes = ast.parse(source.read_text("utf-8")).body
    return [
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def _summary(room: str, *, whole: bool = False) -> str:
    source = ROOT.joinpath(*room.split("."), "__init__.py").read_text("utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text if whole else text.partition("\n")[0]


def render_notebook(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page.

    Args:
      path: of the notebook, executed.

    Returns:
      The page in Markdown, and its pictures by file name.
    """
    page, pictures = [], {}
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            page.append(source.replace(".ipynb)", ".md)"))
            if not number:
                page.append(f"[The notebook]({path.name}){{ download }}: run it in a checkout of the repository.")
            continue
        page.append(f"```python\n{source}\n```")
        for place, output in enumerate(cell.get("outputs", ())):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{number}-{place}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                page.append(f"![What the cell above draws]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))).rstrip():
                page.append(f'```{{ .text .output title="prints" }}\n{text}\n```')
    return "\n\n".join(page) + "\n", pictures


def notebook_paths() -> list[pathlib.Path]:
    """The notebooks: as executed last or, before that, as they are stored."""
    stored = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    return [executed if (executed := EXECUTED / path.name).exists() else path for path in stored]


def generated_pages() -> collections.abc.Iterator[tuple[str, str | bytes]]:
    """All files that no one has written by hand, by path below `docs/`."""
    yield from api_pages().items()
    yield "changelog.md", (ROOT / "CHANGELOG.md").read_text("utf-8").replace("](docs/", "](")
    for path in notebook_paths():
        page, pictures = render_notebook(path)
        yield f"notebooks/{path.stem}.md", page
        for name, picture in pictures.items():
            yield f"notebooks/{name}", picture


def on_files(files: typing.Any, config: typing.Any) -> typing.Any:
    """Adds the generated pages to those that MkDocs has found."""
    from mkdocs.structure.files import File

    for path, content in generated_pages():
        files.append(File.generated(config, path, content=content))
    return files

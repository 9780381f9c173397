"""The sources of the packages as syntax trees, for tests that read them."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("ldm_jax", "environments", "data", "experiments")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
IMPORTERS = ("importlib.import_module", "import_module", "__import__")


class Import:
    """One import: where it stands, what it names, whether it is relative and whether it is lazy."""

    def __init__(self, path, line, module, relative, lazy):
        self.path, self.line, self.module, self.relative, self.lazy = path, line, module, relative, lazy
        self.top = module.split(".")[0]

    def __repr__(self):
        return f"{self.path}:{self.line} imports {self.module}"


def name(node):
    """`a.b.c` as written; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


@functools.cache
def tree(path):
    return ast.parse(path.read_text("utf-8"), str(path))


def relative_path(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """All imports of a file, those by `importlib` and by `__import__` too."""
    found, place = [], relative_path(path)

    def visit(node, lazy):
        if isinstance(node, ast.If) and name(node.test).endswith("TYPE_CHECKING"):
            lazy = True
        if isinstance(node, ast.Import):
            found.extend(Import(place, node.lineno, alias.name, False, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = place.removesuffix(".py").removesuffix("/__init__").split("/")
            if path.name != "__init__.py":
                package = package[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            start = ".".join(filter(None, (base, node.module)))
            # `from a import b` may import the module a.b: its names are looked at too.
            found.extend(
                Import(place, node.lineno, f"{start}.{alias.name}", bool(node.level), lazy) for alias in node.names
            )
        elif isinstance(node, ast.Call) and name(node.func) in IMPORTERS and isinstance(node.args[0], ast.Constant):
            found.append(Import(place, node.lineno, node.args[0].value, False, lazy))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree(path), False)
    return found

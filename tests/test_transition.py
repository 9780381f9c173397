"""Laws of time steps and of the schema of a stored one."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_time_steps_are_built_by_keywords():
    """Three of their parts are booleans of one shape, which nothing would notice swapped."""
    wrong = []
    for folder in ("ldm_jax", "environments", "data", "experiments", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                called = node.func if isinstance(node, ast.Call) else None
                name = getattr(called, "id", getattr(called, "attr", None))
                if name == "TimeStep" and node.args:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong

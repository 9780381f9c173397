"""Scripts that join the parts: `python -m experiments.quickstart --workdir=runs/quickstart`."""

import importlib.util
import pathlib
import sys


def _shadow() -> str:
    """A file of the user's that would be imported in the place of a package of ours; empty where there is none."""
    ours = pathlib.Path(__file__).resolve().parents[1]
    for name in ("ldm_jax", "environments", "data"):
        spec = importlib.util.find_spec(name)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        for place in filter(None, places):
            if not pathlib.Path(place).resolve().is_relative_to(ours / name):
                return place
    return ""


if _place := _shadow():
    _message = f"{_place} would be imported in the place of a package of ldm_jax: start elsewhere, or rename it"
    if sys.argv[0] == "-m":  # a script is being looked for: its user wants one line
        sys.exit(f"error: {_message}")
    raise ImportError(_message)

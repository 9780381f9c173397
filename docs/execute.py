"""Runs the notebooks from top to bottom, as a reader would: `python docs/execute.py [--store] [NAME ...]`.

They run in `build/docs/work`, where the first one to need it makes a small run that the others share, and are written
to `build/docs/notebooks`, which the pages are made from. With `--store` what they print and draw replaces what is
stored in `docs/notebooks`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

import nbclient
import nbformat

from experiments.harness import compilation

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "docs"
KEPT = ("image/png", "text/plain")
"""What is kept of an output; widgets and HTML are for a living kernel."""


def execute(source: pathlib.Path, work: pathlib.Path, timeout_s: int = 900) -> nbformat.NotebookNode:
    """Runs one notebook.

    Args:
      source: of the notebook.
      work: the folder that it runs in.
      timeout_s: what one cell may take, seconds.

    Returns:
      The notebook with what it printed and drew.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed; the message holds the cell and its traceback.
    """
    notebook = nbformat.read(source, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout_s,
        resources={"metadata": {"path": str(work)}},
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        startup_timeout=300,  # a machine with much to do is slow to start one
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "data" in output:
                output.data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
                output.metadata = {}
        if cell.cell_type == "code":  # lines of progress and of the log are no result
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main(arguments: list[str]) -> None:
    """Runs those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 1-load-and-act; default: all")
    parser.add_argument("--store", action="store_true", help="replace the stored outputs too")
    given = parser.parse_args(arguments)
    sources = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    if unknown := {*given.names} - {path.stem for path in sources}:
        parser.error(f"no such notebook: {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in sources)}")
    work = BUILT / "work"
    for folder in (work, BUILT / "notebooks"):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # so that pages are the same wherever they are made
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compilation.default_folder())
    for source in sources:
        if given.names and source.stem not in given.names:
            continue
        start = time.monotonic()
        try:
            notebook = execute(source, work)
        except nbclient.exceptions.CellExecutionError as error:
            sys.exit(f"error: {source.relative_to(ROOT)} does not run: {error}")
        nbformat.write(notebook, BUILT / "notebooks" / source.name)
        if given.store:
            nbformat.write(notebook, source)
        print(f"{source.stem}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])

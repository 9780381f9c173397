"""What a workdir has cost so far: `costs.jsonl`, a line for each start of a stage, the interrupted ones included."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import datetime
import json
import pathlib

from experiments.harness import progress
from experiments.harness.workdir import begun

_FILE = "costs.jsonl"


@contextlib.contextmanager
def counted(workdir: pathlib.Path, stage: str) -> collections.abc.Iterator[None]:
    """Writes down how long the block takes, however it ends, if the stage has found the workdir to be its own in it.

    Args:
      workdir: of the run.
      stage: its name.
    """
    clock, token = progress.clock(), begun.set(frozenset())
    try:
        yield
    finally:
        is_own = (workdir, stage) in begun.get()
        begun.reset(token)
        with contextlib.suppress(OSError):  # it says what there was to pay, nothing depends on it
            if is_own:
                ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                line = json.dumps({"stage": stage, "seconds": clock(), "ended": ended})
                with (workdir / _FILE).open("a") as file:
                    file.write(line + "\n")


def read_costs(workdir: pathlib.Path) -> dict[str, float]:
    """Seconds of each stage, over all of its starts; what was killed on the spot is missing."""
    found: dict[str, float] = collections.defaultdict(float)
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / _FILE).read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, of a full disk
                said = json.loads(line)
                found[said["stage"]] += said["seconds"]
    return dict(found)

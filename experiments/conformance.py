"""Runs the conformance kit on two ids of every library: `python -m experiments.conformance --libraries=nasim,pgx`.

The ids are the first and the last of each library in the catalog that work. Each runs in a process of its own; groups
that are not built are built. Every law is checked of every id; runs are shorter where the catalog says that an id is
slow. Each answer is logged when it comes. Ends with status 1 where a law is broken.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing.connection
import sys

import numpy as np
from absl import app, flags

import environments
import ldm_jax
from environments.catalog import entries
from environments.verification import reason_of
from experiments.harness import processes, progress, signals

_ROWS = 8
_STEPS = (12, 40)  # of each of the kit's longer runs
_LONG_S = 30.0  # what one of them should take at most, one row after the other


def choose(libraries: list[str]) -> list[str]:
    """The first and the last id of each library that work."""
    chosen: list[str] = []
    for library in libraries:
        ids = [entry.id for entry in entries.entries(library).values() if entry.verified]
        chosen += dict.fromkeys([ids[0], ids[-1]]) if ids else []
    return chosen


def check_id(id: str, isolation: str) -> str:
    """What law an id breaks; empty where it keeps them all. It need not be in the catalog, but be one of a package."""
    entry = entries.entries(id.partition("/")[0]).get(id.partition("/")[2])

    def make(batch_size: int, time_limit: int | None) -> ldm_jax.Environment:
        kind = isolation if entry and entry.isolated else "auto"
        return environments.make(id, batch_size, time_limit=time_limit, isolation=kind)

    steps = int(np.clip(entry.steps_per_s * _LONG_S / _ROWS, *_STEPS)) if entry else _STEPS[0]
    try:
        environments.check_environment(make, batch_size=_ROWS, steps=steps)
    except environments.ConformanceError as error:
        return reason_of(error)
    return ""


def _check_in_process(id: str, isolation: str, timeout_s: float) -> tuple[str, str]:
    with processes.child(_check_and_tell, id, isolation) as (_, receiver):
        try:
            return id, receiver.recv() if receiver.poll(timeout_s) else f"it takes longer than {timeout_s:g} s"
        except EOFError:
            return id, "it ends its process"


def _check_and_tell(id: str, isolation: str, sender: multiprocessing.connection.Connection) -> None:
    sender.send(check_id(id, isolation))


def launch() -> None:
    """Runs the command line."""
    libraries = flags.DEFINE_list("libraries", [], "with commas between; default: all of the catalog")
    workers = flags.DEFINE_integer("workers", 2, "ids that are checked at the same time", lower_bound=1)
    isolation = flags.DEFINE_enum(
        "isolation", "auto", ["auto", "venv", "container"], "of libraries with an interpreter"
    )
    timeout_s = flags.DEFINE_float("timeout_s", 900.0, "seconds that one id may take")

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"got {argv[1:]}, expected flags only")
        ids = choose(libraries.value or entries.catalogued())
        broken = []
        with (
            progress.bar("kit", len(ids), "id") as advance,
            concurrent.futures.ThreadPoolExecutor(workers.value) as pool,
        ):
            for future in concurrent.futures.as_completed(
                [pool.submit(_check_in_process, id, isolation.value, timeout_s.value) for id in ids]
            ):
                id, reason = future.result()
                advance(1)
                progress.log("kit", id=id, broken=reason or "nothing")
                if reason:
                    broken.append(f"{id}: {reason}")
        print(f"{len(ids) - len(broken)} of {len(ids)} ids keep the contract")
        if broken:
            sys.exit("\n".join(sorted(broken)))

    def run(argv: list[str]) -> None:
        with signals.ending():
            main(argv)

    app.run(run)


if __name__ == "__main__":
    launch()

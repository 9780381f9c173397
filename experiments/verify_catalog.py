"""Makes the catalog: `python -m experiments.verify_catalog --libraries=envpool,nasim`; `--summary` prints it.

Each id is made, reset, stepped and checked in a process that may crash or hang without harm. What was found is written
down at once: killed and started again, it tries only what is missing. At the end `<library>.jsonl` is written anew.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import typing

from absl import app, flags

from environments import registry
from environments.catalog import entries
from environments.isolation import groups, venvs
from environments.verification import STEPS, entry, name_anew, verify_id
from experiments.harness import progress, signals
from experiments.harness.engine import work_on
from experiments.harness.flags import define_engine, engine_of
from experiments.harness.outcomes import in_one_line
from experiments.harness.units import LOCAL, OUT_OF_TIME, Engine, Finished, Job, UnitsConfig
from experiments.report import catalog_page
from ldm_jax import files
from ldm_jax.environment import LibraryMissingError
from ldm_jax.errors import LdmError


def verify_library(
    library: str, output: pathlib.Path, *, workers: int, timeout_s: float, retry: bool, engine: Engine = LOCAL
) -> list[entries.Entry]:
    """Tries every id of a library that has not been tried yet, and writes its part of the catalog.

    Args:
      library: its name.
      output: folder of the catalog.
      workers: ids that are tried at the same time.
      timeout_s: seconds that one id may take.
      retry: whether to try again what did not work.
      engine: where they are tried.

    Returns:
      All that is known of the library's ids.

    Raises:
      LibraryMissingError: the library cannot be imported or built.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, journal = output / f"{library}.jsonl", output / f"{library}.journal"
    version = registry.version(library)
    if library in groups.isolated_libraries():
        # Ids are tried there, so that no image is built to list them.
        venvs.build(groups.isolated_libraries()[library].venv)
    before = [known for known in (entries.read_entries(path) if path.exists() else ()) if known.verified or not retry]
    before += _read_journal(journal)
    candidates = {f"{library}/{name}": reason for name, reason in registry.candidates(library).items()}
    found = {
        known.id: name_anew(known)
        for known in before
        if known.version == version and candidates.get(known.id) in ("", known.reason)
    }
    working = work_on(
        library,
        [_Candidate(id, reason) for id, reason in candidates.items() if id not in found],
        Job(_try, _prepare),
        UnitsConfig(workers=workers, unit_seconds=timeout_s),
        workers=workers,
        engine=engine,
        counted="id",
        done=len(found),
    )
    with journal.open("a", encoding="utf-8") as file, contextlib.closing(working):
        for each in working:
            line = each.result or entry(each.unit.id, reason=_reason(each, timeout_s))
            file.write(line.to_line() + "\n")
            file.flush()
            found[line.id] = line
    entries.write_entries(path, found.values())
    journal.unlink()
    return list(found.values())


class _Candidate(typing.NamedTuple):
    """An id to try, and why it is not even tried, if it is not."""

    id: str
    reason: str
    steps: int = 1


def _read_journal(path: pathlib.Path) -> list[entries.Entry]:
    """What was found before a run was killed; cuts off a line that it did not finish."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    os.truncate(path, len(whole) + bool(whole))
    return entries.read_entries(path)


def _reason(ended: Finished[_Candidate, entries.Entry], timeout_s: float) -> str:
    if ended.cause == OUT_OF_TIME:
        return f"it does not reset and step {STEPS} times within {timeout_s:g} s"
    return ended.reason


def _prepare(unit: _Candidate) -> entries.Entry | None:
    """Builds the interpreter that ids are tried in, where it is not there: no image, which would be built to try."""
    library = groups.isolated_libraries().get(unit.id.partition("/")[0])
    try:
        if library and not unit.reason:
            venvs.build(library.venv)
    except LibraryMissingError as error:
        return entry(unit.id, reason=in_one_line(error))
    return None


def _try(unit: _Candidate, advance: progress.Advance) -> entries.Entry:
    with open(os.devnull, "w") as nowhere:  # what libraries say must not tear the progress bar
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    found = entry(unit.id, reason=unit.reason) if unit.reason else verify_id(unit.id)
    advance(unit.steps)
    return found


def show(folder: pathlib.Path, page: str) -> None:
    """Prints what a catalog holds, or writes it to a page.

    Raises:
      CatalogError: a line is not as it should be.
    """
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in entries.read_entries(path)]
    text = catalog_page.render_catalog(lines)
    if page:
        files.write(pathlib.Path(page).expanduser(), text)
    else:
        print(text)


def launch() -> None:
    """Runs the command line."""
    libraries = flags.DEFINE_list("libraries", [], "with commas between; default: all of this package")
    output = flags.DEFINE_string("output", str(entries.CATALOG), "folder of the catalog")
    workers = flags.DEFINE_integer("workers", 2, "ids that are tried at the same time", lower_bound=1)
    timeout_s = flags.DEFINE_float("timeout_s", 180.0, "seconds that one id may take")
    retry = flags.DEFINE_bool("retry", False, "try again what did not work")
    define_engine(flags.FLAGS)
    summary = flags.DEFINE_bool("summary", False, "print what is in the catalog, and try nothing")
    page = flags.DEFINE_string("page", "", "file to write the summary to, and try nothing")

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"got {argv[1:]}, expected flags only")
        folder = pathlib.Path(output.value).expanduser()
        if summary.value or page.value:
            show(folder, page.value)
            return
        failed = []
        for library in libraries.value or [*registry.BUILT_IN, *groups.isolated_libraries()]:
            try:
                found = verify_library(
                    library,
                    folder,
                    workers=workers.value,
                    timeout_s=timeout_s.value,
                    retry=retry.value,
                    engine=engine_of(flags.FLAGS),
                )
                progress.log("catalog", library=library, verified=sum(line.verified for line in found), ids=len(found))
            except LdmError as error:
                failed.append(f"error: {library}: {error}")
        if failed:
            sys.exit("\n".join(failed))

    def run(argv: list[str]) -> None:
        try:
            with signals.ending():
                main(argv)
        except LdmError as error:
            sys.exit(f"error: {error}")

    with contextlib.suppress(BrokenPipeError):
        app.run(run)


if __name__ == "__main__":
    from experiments import verify_catalog  # by its own name: other machines run another script

    verify_catalog.launch()

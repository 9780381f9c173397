"""Virtual environments of library groups: built once from exactly pinned requirements, cached by what made them."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

from ldm_jax.environment import LibraryMissingError

from .caches import cache_folder

_LAST_LINES = 20
_PROBE_TIMEOUT_S = 30
_PROBE = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class VenvSpec:
    """What a virtual environment is made of.

    Attributes:
      name: for people; a part of the folder's name.
      python: the version of the interpreter, `3.9`.
      requirements: the file of exactly pinned requirements, all of them: nothing else is installed.
      build: packages that must be there first, where old sources do not build with new tools.
      imports: modules that must be importable at the end.
      apt: Debian packages with the shared libraries that they need.
      variables: environment variables that they need to be imported.
    """

    name: str
    python: str
    requirements: pathlib.Path
    build: tuple[str, ...]
    imports: tuple[str, ...]
    apt: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def trial(self) -> str:
        """A program that imports the modules."""
        return f"import os; os.environ.update({dict(self.variables)}); import {', '.join(self.imports)}"

    @property
    def digest(self) -> str:
        """The hash of everything that makes a difference to what is built."""
        made_of = [self.python, self.requirements.read_text("utf-8"), self.build, platform.system(), platform.machine()]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def built(spec: VenvSpec) -> str | None:
    """The interpreter of a virtual environment that has been built; None where it has not."""
    # A link whose target has been uninstalled does not exist either.
    python = _place(spec) / "bin" / "python"
    return str(python) if python.exists() else None


def build(spec: VenvSpec) -> str:
    """The interpreter of a virtual environment, which is built if it is not there.

    Raises:
      LibraryMissingError: there is no such interpreter, or a package cannot be installed or imported.
    """
    if python := built(spec):
        return python
    place = _place(spec)
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.with_suffix(".lock")):
        if python := built(spec):  # by another process, while this one waited
            return python
        base = find_python(spec.python, f"the libraries of the group {spec.name}")
        aside = place.with_suffix(".building")
        start = time.monotonic()
        count = len(spec.build) + len(pinned(spec.requirements))
        _log.warning("building the virtual environment %s of %d packages, this once: %s", spec.name, count, place)
        for folder in (aside, place):  # what a build that was killed has left; or an interpreter that is gone
            shutil.rmtree(folder, ignore_errors=True)
        _install(spec, base, aside, place.with_suffix(".log"), count)
        aside.rename(place)
        _log.warning("built the virtual environment %s in %.0f s", spec.name, time.monotonic() - start)
    python = built(spec)
    assert python is not None
    return python


def find_python(version: str, purpose: str) -> str:
    """An interpreter of a version that can make virtual environments.

    Args:
      version: `3.9`.
      purpose: who needs it, for the error.

    Raises:
      LibraryMissingError: there is none; the text says what to install.
    """
    seen = []
    for candidate in dict.fromkeys(_candidates(version)):
        try:
            result = subprocess.run(
                [candidate, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            seen.append(f"{candidate} ({error})")
            continue
        if result.stdout.strip() == version:
            return candidate
        seen.append(f"{candidate} ({(result.stderr.strip().splitlines() or ['another version'])[-1]})")
    tried = f"; found but not usable: {', '.join(seen)}" if seen else ""
    raise LibraryMissingError(
        f"Python {version} is needed for {purpose} and was not found on PATH or among the versions of pyenv and uv; "
        f"install it, for example with `pyenv install {version}`, `uv python install {version}`, or on Debian "
        f"`apt-get install python{version} python{version}-venv` where the release has it{tried}"
    )


def pinned(requirements: pathlib.Path) -> tuple[str, ...]:
    """The lines of a requirements file that name a package.

    Raises:
      ValueError: a line is not `name==version`.
    """
    lines = [line.partition("#")[0].strip() for line in requirements.read_text("utf-8").splitlines()]
    for line in filter(None, lines):
        if not re.fullmatch(r"[\w.-]+(\[[\w,.-]+\])?==[\w.!+-]+", line):
            raise ValueError(f"{requirements} has the line {line!r}, expected `name==version`")
    return tuple(filter(None, lines))


def normalize_name(distribution: str) -> str:
    """A distribution's name in the one spelling that counts: indexes and what is installed spell it as they like."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _place(spec: VenvSpec) -> pathlib.Path:
    return cache_folder() / "venvs" / f"{spec.name}-{spec.digest}"


def _candidates(version: str) -> collections.abc.Iterator[str]:
    if version == ".".join(map(str, sys.version_info[:2])):
        # Of a virtual environment, the interpreter that it was made from: it outlives the other.
        yield getattr(sys, "_base_executable", sys.executable)
    name = f"python{version}"
    for folder in os.get_exec_path():
        path = pathlib.Path(folder) / name
        if os.access(path, os.X_OK):
            yield str(path)
    homes = (
        pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions",
        pathlib.Path(os.environ.get("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python")).expanduser(),
    )
    for home in homes:
        found = home.glob(f"*/bin/{name}")
        yield from (str(path) for path in sorted(found, key=_numbers, reverse=True))


def _numbers(path: pathlib.Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.parents[1].name)]


def _install(spec: VenvSpec, base: str, folder: pathlib.Path, log: pathlib.Path, count: int) -> None:
    python = str(folder / "bin" / "python")
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-deps"]
    steps = [[base, "-I", "-m", "venv", str(folder)]]
    if spec.build:
        steps.append([*pip, *spec.build])
        pip.append("--no-build-isolation")
    # Without dependencies: what the file does not name is not installed, whatever is released tomorrow.
    steps.append([*pip, "--requirement", str(spec.requirements)])
    steps.append([python, "-I", "-c", spec.trial])
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    collected = 0
    with log.open("w", encoding="utf-8") as file:
        for step in steps:
            lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
            with subprocess.Popen(
                step,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    lines.append(line)
                    if line.startswith(("Collecting ", "Processing ")):
                        collected += 1
                        _log.info("%s: %d of %d, %s", spec.name, collected, count, pathlib.Path(line.split()[1]).name)
            if process.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                needs = f"; they need `apt-get install {' '.join(spec.apt)}`" if spec.apt else ""
                raise LibraryMissingError(
                    f"the virtual environment {spec.name} cannot be built: {' '.join(step)} exited with status "
                    f"{process.returncode}{needs}; all of its log is in {log}, the last lines:\n{''.join(lines)}"
                )


@contextlib.contextmanager
def locked(path: pathlib.Path) -> collections.abc.Iterator[None]:
    """Holds a lock that other processes that build the same thing wait for."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("another process is building %s; waiting for it", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""What a worker runs, what it may cost, and how it fails."""

from __future__ import annotations

import collections.abc
import dataclasses
import pathlib
import typing

from ldm_jax.errors import ConfigError, check_finite

from .worker import values
from .worker.experts import LIMIT_S

KINDS = ("auto", "container", "venv")
SERVER = pathlib.Path(__file__).parent / "worker" / "server.py"
"""It runs beside the other files of its folder, and needs nothing else of this package."""
# Each row is one process' work: thread pools of many workers would fight for the cores. No displays, no sound.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "SDL_VIDEODRIVER": "dummy",
    "SDL_AUDIODRIVER": "dummy",
    "MPLBACKEND": "Agg",
    "PYTHONUNBUFFERED": "1",
}

Options = collections.abc.Mapping[str, typing.Any]
"""Options of a library's own `make`, by name."""


def encode_options(id: str, options: Options) -> dict[str, typing.Any]:
    """The options of a library's `make` as JSON values, from which a worker makes the same ones.

    Args:
      id: of the environment, for the error.
      options: by name.

    Raises:
      ConfigError: names the option that cannot be carried exactly.
    """
    try:
        return values.encode_options(options)
    except values.OptionError as error:
        raise ConfigError(f"{id}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Isolation:
    """How a library is isolated and what its workers may cost.

    Attributes:
      kind: `container`, a Podman container, which isolates the machine too; `venv`, a virtual environment with its own
        interpreter, which isolates dependencies alone; or `auto`, a container where there is Podman.
      workers: processes per environment; 0 is one per core, at most one per row.
      call_timeout_s: seconds that one call to the library may take.
      start_timeout_s: seconds for a worker to import its library and make its first environment.
      label_limit_s: seconds of computing that a label of an expert may take; a later one is left out.
      max_faults: faults survived from one `reset(key)` to the next; one more raises.
      memory_limit_bytes: what one worker may hold.

    Raises:
      ConfigError: an unknown kind, or a limit that is none.
    """

    kind: str = "auto"
    workers: int = 0
    call_timeout_s: float = 60.0
    start_timeout_s: float = 180.0
    label_limit_s: float = LIMIT_S
    max_faults: int = 10
    memory_limit_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"isolation is {self.kind!r}, expected one of {', '.join(KINDS)}")
        check_finite(self)
        if self.workers < 0 or self.max_faults < 0:
            raise ConfigError(f"workers {self.workers} and max_faults {self.max_faults} cannot be negative")
        if self.call_timeout_s <= 0 or min(self.start_timeout_s, self.label_limit_s, self.memory_limit_bytes) <= 0:
            raise ConfigError(f"limits of time and memory must be positive, got {self}")


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """What a worker runs: an interpreter, and an environment of a library in it.

    Attributes:
      python: the interpreter, in the container where there is one.
      library: the first part of the id.
      name: the library's own id; empty for a worker that only says which there are.
      api: `gymnasium` or `gym`, whose registry has the id.
      imports: modules that put it there.
      distribution: the package whose version counts.
      domain: what the task is about.
      kwargs: options of the library's own `make`; the library gets them exactly, anew for each environment.
      bridge: file of a module whose `register` puts more ids there; see `environments.bridges`.
      expert_file: of the module of an expert that labels each step; see `environments.bridges.experts`.
      expert: its name there; empty for none.
      path: folders to import from, beside the interpreter's own.
      variables: environment variables of the process.
      seed_option: the option of `make` that takes the seed, where `reset` takes none.
      seed_arguments: arguments of the environment's method `seed` that want a number before every reset.
      seed_every_reset: whether `reset` without a seed draws true randomness.
      remake: whether `reset` under the same seed is only reproducible on a new environment.
      plain_integers: whether `step` wants Python's integers, though the action space samples numpy's.
      global_randomness: whether the library draws from the interpreter's global generators.
      time_limit: steps; 0 takes what the library says.
      image: of the container to run it in; empty for a process of this machine.
      digest: of what it runs in, see `EnvironmentSpec.image_digest`.

    Raises:
      ConfigError: an option of `kwargs` cannot be carried exactly to another interpreter.
    """

    python: str
    library: str
    name: str
    api: str
    imports: tuple[str, ...]
    distribution: str
    domain: str
    # Arrays have no single truth value: specs are compared by what the worker is told.
    kwargs: Options = dataclasses.field(default_factory=dict, compare=False)
    bridge: str = ""
    expert_file: str = ""
    expert: str = ""
    path: tuple[str, ...] = ()
    variables: collections.abc.Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed_option: str = ""
    seed_arguments: tuple[str, ...] = ()
    seed_every_reset: bool = False
    remake: bool = False
    plain_integers: bool = False
    global_randomness: bool = False
    time_limit: int = 0
    image: str = ""
    digest: str = ""
    _options: dict[str, typing.Any] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_options", encode_options(self.id, self.kwargs))

    @property
    def id(self) -> str:
        """The id of the environment, `library/name`."""
        return f"{self.library}/{self.name}"

    def job(self, isolation: Isolation, time_limit: int | None = None) -> dict[str, typing.Any]:
        """What the worker is told, in JSON values.

        Args:
          isolation: what it may cost.
          time_limit: steps that the caller wants an episode to have; None takes the spec's.
        """
        told = (
            *("library", "name", "api", "imports", "bridge", "path"),
            *("seed_option", "seed_every_reset", "remake", "plain_integers"),
        )
        return {name: getattr(self, name) for name in told} | {
            "options": self._options,
            "seed_arguments": self.seed_arguments,
            "global_randomness": self.global_randomness or bool(self.seed_arguments),
            "time_limit": int(time_limit or self.time_limit),
            "memory_limit": int(isolation.memory_limit_bytes),
            "expert": {"file": self.expert_file, "name": self.expert, "limit_s": isolation.label_limit_s}
            if self.expert
            else None,
        }


class WorkerFaultError(Exception):
    """A worker broke off, hung or talked nonsense.

    Attributes:
      kind: `crash`, `hang`, `garbage`, `start` or `refused`.
    """

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text

"""What a worker runs, and what it may cost."""

from __future__ import annotations

import dataclasses
import typing

KINDS = ("auto", "container", "venv")


@dataclasses.dataclass(frozen=True)
class Isolation:
    """How a library is isolated and what its workers may cost.

    Attributes:
      kind: `container`, a Podman container, which isolates the machine too; `venv`, a virtual environment with its own
        interpreter, which isolates dependencies alone; or `auto`, a container where there is Podman.
      workers: processes per environment; 0 is one per core, at most one per row.
      call_timeout_s: seconds that one call to the library may take.
      start_timeout_s: seconds for a worker to import its library and make its first environment.
      max_faults: faults survived from one `reset(key)` to the next; one more raises.
      memory_limit_bytes: what one worker may hold.
    """

    kind: str = "auto"
    workers: int = 0
    call_timeout_s: float = 60.0
    start_timeout_s: float = 180.0
    max_faults: int = 10
    memory_limit_bytes: int = 4 << 30

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"isolation is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.workers < 0 or self.max_faults < 0:
            raise ValueError(f"workers {self.workers} and max_faults {self.max_faults} cannot be negative")
        if self.call_timeout_s <= 0 or self.start_timeout_s <= 0 or self.memory_limit_bytes <= 0:
            raise ValueError(f"limits of time and memory must be positive, got {self}")


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
      kwargs: options of the library's own `make`.
      bridge: file of a module whose `register` puts more ids there; see `environments.bridges`.
      path: folders to import from, beside the interpreter's own.
      variables: environment variables of the process.
      seed_option: the option of `make` that takes the seed, where `reset` takes none.
      seed_arguments: arguments of the environment's method `seed` that want a number before every reset.
      seed_every_reset: whether `reset` without a seed draws true randomness.
      remake: whether `reset` under the same seed is only reproducible on a new environment.
      global_randomness: whether the library draws from the interpreter's global generators.
      time_limit: steps; 0 takes what the library says.
      image: of the container to run it in; empty for a process of this machine.
      digest: of what it runs in, see `EnvironmentSpec.image_digest`.
    """

    python: str
    library: str
    name: str
    api: str
    imports: tuple[str, ...]
    distribution: str
    domain: str
    kwargs: typing.Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)
    bridge: str = ""
    path: tuple[str, ...] = ()
    variables: typing.Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed_option: str = ""
    seed_arguments: tuple[str, ...] = ()
    seed_every_reset: bool = False
    remake: bool = False
    global_randomness: bool = False
    time_limit: int = 0
    image: str = ""
    digest: str = ""

    @property
    def id(self) -> str:
        """The id of the environment, `library/name`."""
        return f"{self.library}/{self.name}"

    def job(self, memory_limit_bytes: int) -> dict[str, typing.Any]:
        """What the worker is told, in JSON values."""
        told = ("library", "name", "api", "imports", "bridge", "path", "seed_option", "seed_every_reset", "remake")
        return {name: getattr(self, name) for name in told} | {
            "kwargs": dict(self.kwargs),
            "seed_arguments": self.seed_arguments,
            "global_randomness": self.global_randomness or bool(self.seed_arguments),
            "memory_limit": memory_limit_bytes,
        }

"""What a unit of work is, what it may take and what comes of it: the contract that all engines keep.

A unit and the function that works on it can be pickled, and share nothing with the others: what is worth keeping the
function writes itself, at once and whole, so that whoever is killed loses the units in flight alone.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import pathlib
import typing

from experiments.harness import progress
from experiments.harness.workdir import FREE
from ldm_jax.errors import ConfigError, LdmError, check_at_least, check_finite

U = typing.TypeVar("U")
R = typing.TypeVar("R")

OUT_OF_TIME, OUT_OF_MEMORY, DIED, LOST = "out of time", "out of memory", "process died", "machine lost"
NOT_BUILT = "group does not build"
LIMITS = frozenset((OUT_OF_TIME, OUT_OF_MEMORY, DIED, LOST, NOT_BUILT))
"""Causes that tell of a machine and its limits, not of the environment: another may have it done."""


class ClusterError(LdmError, RuntimeError):
    """A cluster that cannot be reached or used."""


class Limits(typing.NamedTuple):
    """What one unit may take; 0 for any amount.

    Attributes:
      seconds: from its beginning, once what it needs is built.
      memory_gb: held by its process and those that it starts, in gigabytes; a process with JAX alone takes about half
        of one.
      build_seconds: that it may take to build what it needs, or to wait for another that builds it.
    """

    seconds: float = 0.0
    memory_gb: float = 0.0
    build_seconds: float = 0.0


class Needs(typing.NamedTuple):
    """What is set aside for one unit while it is worked on: no machine works on more than it has room for.

    Attributes:
      cores: of a machine's.
      memory_gb: of a machine's, in gigabytes.
    """

    cores: float = 1.0
    memory_gb: float = 1.0


_free: typing.Any = {FREE: True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitsConfig:
    """How a stage works on its environments; nothing that comes of them depends on it.

    Attributes:
      workers: processes of this machine that work at once, each on one environment. 0 is for this process, in which a
        crash of one environment ends all.
      unit_seconds: that one environment may take; 0 for any number. It has failed then, and the others go on.
      unit_memory_gb: that its process may hold, and that is set aside for it; 0 for any amount, and one gigabyte.
      unit_cores: that are set aside for it: no machine works on more environments than it has cores for.
      build_seconds: that the interpreter of one group of libraries may take to be built; 0 for any number.
    """

    workers: int = dataclasses.field(default=2, metadata=_free)
    unit_seconds: float = dataclasses.field(default=0.0, metadata=_free)
    unit_memory_gb: float = dataclasses.field(default=0.0, metadata=_free)
    unit_cores: float = dataclasses.field(default=1.0, metadata=_free)
    build_seconds: float = dataclasses.field(default=3600.0, metadata=_free)

    def __post_init__(self) -> None:
        check_finite(self)
        check_at_least(self, dict.fromkeys(("workers", "unit_seconds", "unit_memory_gb", "build_seconds"), 0))
        if not self.unit_cores > 0:
            raise ConfigError(f"unit_cores is {self.unit_cores}, expected a positive number")
        for name in ("unit_seconds", "unit_memory_gb"):
            if getattr(self, name) and not self.workers:
                raise ConfigError(
                    f"{name} is {getattr(self, name)} and workers is 0: limits hold for processes, give at least 1 "
                    "worker"
                )

    @property
    def limits(self) -> Limits:
        """Of each unit."""
        return Limits(self.unit_seconds, self.unit_memory_gb, self.build_seconds)

    @property
    def needs(self) -> Needs:
        """Of each unit: of memory as much as it may hold; a gigabyte where that is not said."""
        return Needs(self.unit_cores, self.unit_memory_gb or Needs().memory_gb)

    def workers_for(self, named: int) -> int:
        """The processes that so many environments are worth: one alone, without limits, needs none of its own."""
        return 0 if named <= 1 and not (self.unit_seconds or self.unit_memory_gb) else self.workers


class Finished(typing.NamedTuple, typing.Generic[U, R]):
    """A unit that was worked on.

    Attributes:
      unit: which.
      result: what the function returned; None where the unit was ended.
      cause: why it was ended, `OUT_OF_TIME`, `OUT_OF_MEMORY`, `DIED`, `LOST` or `NOT_BUILT`;
        empty where it was not.
      reason: the same in one sentence.
    """

    unit: U
    result: R | None
    cause: str = ""
    reason: str = ""


Work = collections.abc.Callable[[U, progress.Advance], R]
"""`function(unit, advance)`; `advance(n)` says that n more are done, of whatever the progress is counted in."""


class Job(typing.NamedTuple, typing.Generic[U, R]):
    """What is done with each unit.

    Attributes:
      function: a function of a module, or a `functools.partial` of one. What it raises ends everything, and is raised
        by the engine: the disk is full, or it is a fault of ours. What is the unit's own fault it returns.
      prepare: a function like it that is called before, and whose time does not count as the unit's: it builds what is
        missing on the machine. What it returns is the unit's result, unless that is None.
    """

    function: Work[U, R]
    prepare: collections.abc.Callable[[U], R | None] | None = None


class Travel(typing.NamedTuple, typing.Generic[U]):
    """How the files of a unit get to a machine with other disks, and what it has written back.

    Attributes:
      root: folder, of this machine, below which units read and write.
      needed: `needed(unit)`, files and folders below the root that it reads; what is not there is left out.
      moved: `moved(unit, root)`, the unit as it is to be worked on below another root. A function of a module.
      arrived: `arrived(unit, root)`, called here once the unit is done: what it wrote lies below that root, on the disk
        of this machine's, and is to be taken from there whole.
      common: files and folders below the root that all units read; they are sent once.
    """

    root: pathlib.Path
    needed: collections.abc.Callable[[U], collections.abc.Iterable[str]]
    moved: collections.abc.Callable[[U, pathlib.Path], U]
    arrived: collections.abc.Callable[[U, pathlib.Path], None]
    common: tuple[str, ...] = ()


class Engine(typing.NamedTuple):
    """Where units are worked on.

    Attributes:
      kind: "local" for processes of this machine, "ray" for a cluster.
      address: of the cluster, `host:port`, or "auto" for the one that this machine is part of.
    """

    kind: typing.Literal["local", "ray"] = "local"
    address: str = ""

    @property
    def is_local(self) -> bool:
        """Whether units run on this machine."""
        return self.kind == "local"


LOCAL = Engine()

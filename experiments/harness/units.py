"""What a unit of work is, what it may take and what comes of it: the contract that all engines keep.

A unit and the function that works on it can be pickled, and share nothing with the others: what is worth keeping the
function writes itself, at once and whole, so that whoever is killed loses the units in flight alone.
"""

from __future__ import annotations

import collections.abc
import pathlib
import typing

from experiments.harness import progress
from ldm_jax.errors import ConfigError, LdmError

U = typing.TypeVar("U")
R = typing.TypeVar("R")

OUT_OF_TIME, OUT_OF_MEMORY, DIED, LOST = "out of time", "out of memory", "process died", "machine lost"
NOT_BUILT = "group does not build"


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


def check_limits(limits: Limits, workers: int) -> None:
    """Checks that limits make sense, with so many processes.

    Raises:
      ConfigError: a limit is negative, or there is no process that could be ended.
    """
    for name, value in zip(("unit_seconds", "unit_memory_gb", "build_seconds"), limits, strict=True):
        if value < 0:
            raise ConfigError(f"{name} is {value}, expected at least 0")
        if value and not workers and name != "build_seconds":
            raise ConfigError(f"{name} is {value} and workers is 0: limits hold for processes, give at least 1 worker")


class Needs(typing.NamedTuple):
    """What is set aside for one unit while it is worked on: no machine works on more than it has room for.

    Attributes:
      cores: of a machine's.
      memory_gb: of a machine's, in gigabytes.
    """

    cores: float = 1.0
    memory_gb: float = 1.0


def needs_of(cores: float, limits: Limits) -> Needs:
    """What units need of which one may hold so much memory; a gigabyte where that is not said.

    Raises:
      ConfigError: the cores are not a positive number.
    """
    if not cores > 0:
        raise ConfigError(f"unit_cores is {cores}, expected a positive number")
    return Needs(cores, limits.memory_gb or Needs().memory_gb)


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
    """

    root: pathlib.Path
    needed: collections.abc.Callable[[U], collections.abc.Iterable[str]]
    moved: collections.abc.Callable[[U, pathlib.Path], U]
    arrived: collections.abc.Callable[[U, pathlib.Path], None]


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

"""Runs independent units of work, each in a process that may crash, hang or leak without harm to the others.

`run_units` works on them on this machine, or hands them to a cluster: what it yields is the same. All stages go through
`work_on`, which adds a bar and a configuration.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import multiprocessing.connection
import os
import pathlib
import typing

from experiments.harness import cluster, progress
from experiments.harness.unit_process import TICK_S, UnitProcess
from experiments.harness.units import LOCAL, Engine, Finished, Job, Limits, Needs, R, Travel, U, UnitsConfig

_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def run_units(
    units: collections.abc.Iterable[U],
    job: Job[U, R],
    *,
    workers: int,
    engine: Engine = LOCAL,
    needs: Needs = Needs(),  # noqa: B008 (immutable)
    limits: Limits = Limits(),  # noqa: B008 (immutable)
    travel: Travel[U] | None = None,
    advance: progress.Advance = lambda n: None,
) -> collections.abc.Generator[Finished[U, R], None, None]:
    """Works on units, several at once, and yields each as it is finished.

    A process has one unit at a time, so that it is known whose fault its end is.

    Args:
      units: in the order in which they are begun.
      job: what is done with each.
      workers: processes of this machine, as far as it has room for what they need; 0 for this one, where a crash ends
        everything and limits do not hold. A cluster has as many as it has room for.
      engine: where they are worked on.
      needs: of each unit.
      limits: of each unit.
      travel: of their files, to and from the machines of a cluster; None where they have none.
      advance: told of the progress of all units.

    Yields:
      What came of each unit, in the order of their ends. Close it to end the units in flight.

    Raises:
      ClusterError: the cluster cannot be reached, or cannot be used.
    """
    if not engine.is_local:
        yield from cluster.run_on_cluster(units, job, engine.address, needs, limits, travel, advance)
    elif workers:
        at_once = max(1, min(workers, _room(needs)))
        yield from _run_here(units, job, at_once, limits, advance)
    else:
        for unit in units:
            early = job.prepare(unit) if job.prepare else None
            yield Finished(unit, job.function(unit, advance) if early is None else early)


class HasSteps(typing.Protocol):
    """A unit that says how much there is to do in it."""

    @property
    def steps(self) -> int:
        """Of what progress is counted in, about."""


S = typing.TypeVar("S", bound=HasSteps)


def work_on(
    stage: str,
    units: collections.abc.Sequence[S],
    job: Job[S, R],
    config: UnitsConfig,
    *,
    workers: int,
    engine: Engine = LOCAL,
    travel: Travel[S] | None = None,
    counted: str = "step",
    done: int = 0,
) -> collections.abc.Generator[Finished[S, R], None, None]:
    """Works on the units of a stage as its configuration says, with a bar of what is done, its rate and the time left.

    Args:
      stage: its name.
      units: in the order in which they are begun.
      job: what is done with each.
      config: what each may take.
      workers: processes of this machine; see `run_units`.
      engine: where they are worked on.
      travel: of their files.
      counted: what the progress is counted in.
      done: how much of that was done before.

    Yields:
      What came of each unit, as `run_units` does, which says what is raised.
    """
    with progress.bar(stage, done + sum(unit.steps for unit in units), counted, done) as advance:
        working = run_units(
            units,
            job,
            workers=workers,
            engine=engine,
            needs=config.needs,
            limits=config.limits,
            travel=travel,
            advance=advance,
        )
        with contextlib.closing(working):
            yield from working


def _room(needs: Needs) -> int:
    """The units that this machine has room for at once."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max", or there are no such groups
        memory_bytes = min(memory_bytes, int(_CGROUP.read_text()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(cores / needs.cores), int(memory_bytes / 1e9 / needs.memory_gb))


def _run_here(
    units: collections.abc.Iterable[U], job: Job[U, R], workers: int, limits: Limits, advance: progress.Advance
) -> collections.abc.Generator[Finished[U, R], None, None]:
    """Works on units in so many processes, which are used again, and replaced once they have ended or are worn."""
    waiting = collections.deque(units)
    with contextlib.ExitStack() as stack:
        busy: list[UnitProcess[U, R]] = []
        idle: list[UnitProcess[U, R]] = []
        while waiting or busy:
            while waiting and len(busy) < workers:
                idle = [worker for worker in idle if worker.process.is_alive()]
                worker = idle.pop() if idle else UnitProcess(stack.enter_context(contextlib.ExitStack()), job)
                worker.begin(waiting.popleft())
                busy.append(worker)
            said = multiprocessing.connection.wait([end for worker in busy for end in worker.ends], TICK_S)
            for worker in busy[:]:
                finished = worker.listen(advance) if {*worker.ends} & {*said} else None
                if finished := finished or worker.end_beyond(limits):
                    busy.remove(worker)
                    if not worker.end_if_worn():
                        idle.append(worker)
                    yield finished

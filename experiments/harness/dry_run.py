"""What a stage would do, told from the catalog and the workdir alone: nothing is made, imported, built or written."""

from __future__ import annotations

import collections.abc
import typing

from environments.catalog import entries
from experiments.harness.building import needed_groups

TO_DO = "to do"


class Planned(typing.NamedTuple):
    """What there is to do for one environment.

    Attributes:
      id: of the environment.
      state: `TO_DO`, or what came of it.
      steps: environment steps that are to be done; 0 where they are not known.
    """

    id: str
    state: str = TO_DO
    steps: int = 0

    @property
    def seconds(self) -> float:
        """At the catalog's rate, of one environment in one process; 0 where that is not known."""
        library, _, name = self.id.partition("/")
        known = entries.entries(library).get(name)
        return self.steps / known.steps_per_s if known and known.steps_per_s else 0.0


def describe_plan(stage: str, planned: collections.abc.Sequence[Planned], workers: int) -> str:
    """A line for each environment, and what they come to.

    Args:
      stage: its name.
      planned: the environments.
      workers: processes that work at once.
    """
    rows = [("environment", "state", "steps", "time")]
    for unit in planned:
        steps, time = (f"{unit.steps:,}", _duration(unit.seconds)) if unit.steps else ("", "")
        rows.append((unit.id, unit.state, steps, time if unit.seconds else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{a:{widths[0]}} {b:{widths[1]}} {c:>{widths[2]}} {d:>{widths[3]}}".rstrip() for a, b, c, d in rows]
    todo = [unit for unit in planned if unit.state == TO_DO]
    done = len(planned) - len(todo)
    total_s = sum(unit.seconds for unit in todo)
    lines += ["", f"{stage}: {len(todo)} environments to do, {done} finished, {sum(x.steps for x in todo):,} steps"]
    if total_s:
        lines.append(
            f"about {_duration(total_s / max(1, workers))} in {_count(max(1, workers), 'process', 'processes')} at the "
            "catalog's rates, which are of one environment at a time: suites in JAX are far faster"
        )
    for group, ids in needed_groups(unit.id for unit in todo).items():
        lines.append(f"to be built first: {group}, for {_count(len(ids), 'environment', 'environments')}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"

"""Public returns for the same tasks: what a reference policy is compared with, beside z.

A weak reference makes z easy, so the raw return is shown against these as well. They are in `public_targets.jsonl`, one
a line, each with its source; what is said of an id holds for its aliases, whose dynamics and rewards are the same, and
for other versions of the same task in the same library.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import typing

from environments.catalog.taxonomy import task


class PublicTarget(typing.NamedTuple):
    """What others have reached in a task, or what its best can be.

    Attributes:
      id: of the environment that it was published for.
      aliases: ids of the same task elsewhere.
      target: the mean undiscounted return of an episode, or a rate of success; None where only the random policy's is
        known.
      random: the same of the random policy, where known.
      metric: `"return"`, `"success_rate"`, or words after them.
      source: where it was published.
      confidence: `"high"`, `"medium"`, `"low"`, or `"bound"`: more cannot be reached.
      listed: whether the catalog names the id.
    """

    id: str
    aliases: tuple[str, ...]
    target: float | None
    random: float | None
    metric: str
    source: str
    confidence: str
    listed: bool = True

    @property
    def target_return(self) -> float | None:
        """The target where it is a return, which the returns of an episode can be compared with."""
        return self.target if self.metric.startswith("return") else None


def find_target(id: str) -> PublicTarget | None:
    """What is published of an environment's task.

    >>> find_target("envpool/LunarLander-v2").target_return
    242.1

    Args:
      id: `library/<the library's own id>`.

    Returns:
      The target, or None if there is none.
    """
    exact, alike = _tables()
    return exact.get(id) or alike.get(_base(id))


@functools.cache
def read_targets() -> tuple[PublicTarget, ...]:
    """All public targets, in the order of the file."""
    text = importlib.resources.files(__package__).joinpath("public_targets.jsonl").read_text("utf-8")
    names = PublicTarget._fields
    rows = [{name: value for name, value in json.loads(line).items() if name in names} for line in text.splitlines()]
    return tuple(PublicTarget(**row | {"aliases": tuple(row["aliases"])}) for row in rows)


@functools.cache
def _tables() -> tuple[dict[str, PublicTarget], dict[tuple[str, str], PublicTarget]]:
    """By id, and by library and base task, where the first in the file counts."""
    named = [(id, target) for target in reversed(read_targets()) for id in (target.id, *target.aliases)]
    return dict(named), {_base(id): target for id, target in named}


def _base(id: str) -> tuple[str, str]:
    library, _, name = id.partition("/")
    return library, task(library, name)

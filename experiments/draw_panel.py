"""Draws a panel of tasks from the catalog: `python -m experiments.draw_panel --name=panel200`.

A panel is what one policy is trained and judged on, and it is drawn before anything is trained on it. The rule knows
the catalog alone, and nothing of how hard a task is:

1. Of the ids that work, those are left out that cannot be done here: a reference would take longer than
   `REFERENCE_SECONDS` at the catalog's rate, an observation holds more than `OBSERVATION_BYTES`, or its spaces are
   larger than a model of the size `SIZE` takes.
2. A seed puts all ids into a line. The first of every kind of space in that line is drawn, so that no kind is missing;
   a kind that only slow ids have is drawn from these.
3. Libraries take turns, in the order of another such line; each gives its next id whose family nobody has given yet,
   until there are as many as wanted. So a library with five families is there with five, and one with seven hundred
   with a few more.
4. Of the turns, in their order, some are set aside at even distances. They are never trained on.

The draw depends on the catalog and on the experts that are listed when it is made: later ones draw others, and a panel
that is in use is not drawn again. `panel200` is of the commit that brought its lists in.

It writes `<name>.txt` and `<name>_held_out.txt`, lists as `--environments=@file` takes them, with the rule and what was
left out in remarks.
"""

from __future__ import annotations

import collections
import collections.abc
import pathlib
import typing

import numpy as np
from absl import flags

import environments
from data.references.candidates import total_steps
from data.references.convolutions import is_image
from environments.catalog.entries import Entry
from environments.catalog.selection import place_in_line
from experiments.harness.flags import run_app
from experiments.harness.ids import find_unfit
from ldm_jax import files
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.spaces import leaf_shape_dtype, leaves
from ldm_jax.types import EnvironmentSpec

REFERENCE_SECONDS = 1200.0
"""That a reference may take: the steps of a full budget, none where an expert is known, and `SCORING_EPISODES`."""

SCORING_EPISODES = 128
"""Episodes that scoring plays at the least: those of the reference and those of the random policy."""

OBSERVATION_BYTES = 65_536
"""That an observation may hold: 20,000 of the largest are 1.3 GB before they are compressed."""

SIZE = "micro"
"""The named size of model that has to take the spaces."""

_TOO_SLOW = f"a reference takes over {REFERENCE_SECONDS:,.0f} s"


class Panel(typing.NamedTuple):
    """What was drawn.

    Attributes:
      entries: that are trained on, in the order of their draw.
      held_out: that are not.
      left_out: how many ids of the catalog the rule left out, by its reason.
    """

    entries: tuple[Entry, ...]
    held_out: tuple[Entry, ...]
    left_out: collections.abc.Mapping[str, int]


def draw_panel(entries: collections.abc.Iterable[Entry], tasks: int, held_out: int, seed: int) -> Panel:
    """Draws a panel.

    Args:
      entries: of the catalog.
      tasks: how many are trained on, each of a family of its own.
      held_out: how many further families are set aside.
      seed: of the draw.

    Raises:
      ConfigError: there are not as many families.
    """
    there = [*entries]
    reasons = {entry.id: reason for entry in there if (reason := _too_dear(entry))}
    reasons |= dict.fromkeys(
        find_unfit([entry.id for entry in there if entry.id not in reasons], SIZES[SIZE]),
        f"spaces are larger than {SIZE} takes",
    )
    line = _in_line([entry for entry in there if entry.id not in reasons], seed)
    slow = _in_line([entry for entry in there if reasons.get(entry.id) == _TOO_SLOW], seed)
    first = _one_of_each_kind([*line, *slow])
    turns = _take_turns(line, {entry.family for entry in first}, seed)
    if tasks < len(first) or len(first) + len(turns) < tasks + held_out:
        raise ConfigError(
            f"{tasks} tasks and {held_out} held out are wanted: there are {len(first) + len(turns)} families, and "
            f"{len(first)} tasks have every kind of space"
        )
    turns = turns[: tasks + held_out - len(first)]
    aside = {*np.linspace(0, len(turns), held_out, endpoint=False, dtype=int).tolist()}
    return Panel(
        (*first, *(entry for i, entry in enumerate(turns) if i not in aside)),
        tuple(entry for i, entry in enumerate(turns) if i in aside),
        collections.Counter(reasons.values()),
    )


def kinds_of(spec: EnvironmentSpec) -> frozenset[str]:
    """The kinds of space that an environment has, of observations and of actions.

    Args:
      spec: of the environment.
    """
    layout = observation_layout(spec.observation_space)
    images = [leaf for leaf in layout.grids if is_image(leaf.space)]
    kinds = {
        "vector": layout.numeric,
        "categorical": layout.categorical,
        "image": images,
        "grid": len(layout.grids) > len(images),
        "text": layout.texts,
        "nested": len(leaves(spec.observation_space)) > 1,
    }
    actions = {type(leaf.space).__name__ for leaf in leaves(spec.action_space)}
    return frozenset(
        [*(f"observation {kind}" for kind, there in kinds.items() if there), f"action {' and '.join(sorted(actions))}"]
    )


def _too_dear(entry: Entry) -> str:
    """Why an entry cannot be done here; empty where it can."""
    spec = environments.spec(entry.id)
    steps = 0 if environments.experts(entry.id) else total_steps(spec)
    if (steps + SCORING_EPISODES * entry.time_limit) / entry.steps_per_s > REFERENCE_SECONDS:
        return _TOO_SLOW
    carried = [leaf_shape_dtype(leaf.space) for leaf in leaves(spec.observation_space)]
    if sum(np.prod(leaf.shape, dtype=int) * leaf.dtype.itemsize for leaf in carried) > OBSERVATION_BYTES:
        return f"an observation is over {OBSERVATION_BYTES:,} bytes"
    return ""


def _in_line(entries: collections.abc.Iterable[Entry], seed: int) -> list[Entry]:
    return sorted(entries, key=lambda entry: place_in_line(seed, entry.id))


def _one_of_each_kind(line: collections.abc.Iterable[Entry]) -> list[Entry]:
    """The first of every kind of space, each of a family of its own."""
    found: dict[str, Entry] = {}
    seen: set[str] = set()
    for entry in line:
        kinds = kinds_of(environments.spec(entry.id))
        if entry.family not in found and not kinds <= seen:
            found[entry.family] = entry
            seen |= kinds
    return [*found.values()]


def _take_turns(line: collections.abc.Iterable[Entry], taken: collections.abc.Set[str], seed: int) -> list[Entry]:
    """One entry of each family that is not taken, library after library."""
    lines: dict[str, collections.deque[Entry]] = collections.defaultdict(collections.deque)
    for entry in line:
        lines[entry.library].append(entry)
    found: dict[str, Entry] = {}
    while lines:
        for library in sorted(lines, key=lambda library: place_in_line(seed, library)):
            while lines[library]:
                entry = lines[library].popleft()
                if entry.family not in taken and entry.family not in found:
                    found[entry.family] = entry
                    break
        lines = {library: rest for library, rest in lines.items() if rest}
    return [*found.values()]


def render_list(panel: Panel, entries: collections.abc.Sequence[Entry], title: str) -> str:
    """A list of ids with what stands above it.

    Args:
      panel: that they belong to.
      entries: that are listed.
      title: the first line.
    """
    counts = (
        f"{len(entries)} tasks of {len({entry.family for entry in entries})} families, "
        f"{len({entry.library for entry in entries})} libraries "
        f"and {len({entry.domain for entry in entries})} domains; "
        f"{sum(entry.isolated for entry in entries)} in an interpreter of their own."
    )
    left = [f"left out: {count:,} ids, {reason}" for reason, count in sorted(panel.left_out.items())]
    head = [title, "The rule: experiments/draw_panel.py. Drawn, not picked; do not edit.", counts, *left]
    by_id = sorted(entries, key=lambda entry: entry.id.lower())
    return "".join(f"{line}\n" for line in [*(f"# {line}" for line in head), "", *(entry.id for entry in by_id)])


def _write_panel() -> None:
    values = flags.FLAGS
    panel = draw_panel(environments.find(), values.tasks, values.held_out, values.seed)
    command = (
        f"python -m experiments.draw_panel --name={values.name} --tasks={values.tasks} "
        f"--held_out={values.held_out} --seed={values.seed}"
    )
    folder = pathlib.Path(values.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path, entries, title in (
        (folder / f"{values.name}.txt", panel.entries, f"Trained on. Made by {command}"),
        (folder / f"{values.name}_held_out.txt", panel.held_out, f"Never trained on. Made by {command}"),
    ):
        files.write(path, render_list(panel, entries, title))
        print(f"{path}: {len(entries)} ids")


if __name__ == "__main__":
    flags.DEFINE_string("folder", "experiments/panels", "where the lists are written")
    flags.DEFINE_string("name", "panel200", "of the panel")
    flags.DEFINE_integer("tasks", 320, "that are trained on, each of a family of its own", lower_bound=1)
    flags.DEFINE_integer("held_out", 40, "further families that are set aside", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the draw")
    run_app(lambda _: _write_panel())

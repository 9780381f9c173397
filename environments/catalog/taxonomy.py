"""What an id is about: the task and the family that it shares with other ids, and domains by patterns of ids.

Rules are about names alone, so that they need no library. Two ids with one task are the same problem, whichever
library serves it; where two libraries give one name to different problems, they count as one, which is the careful
side to err on.
"""

from __future__ import annotations

import collections.abc
import fnmatch
import re
import types

DOMAINS = (
    "bandits",
    "board games",
    "classic control",
    "control",
    "credit assignment",
    "cybersecurity",
    "driving",
    "energy",
    "exploration",
    "flight",
    "games",
    "health",
    "inventory",
    "locomotion",
    "manipulation",
    "mathematics",
    "memory",
    "navigation",
    "NetHack",
    "networks",
    "operations research",
    "planning",
    "robotics",
    "toy text",
    "trading",
)
"""The domains of what this package serves; third parties may name others."""

GYMNASIUM = {
    "*CarRacing*": "driving",
    **dict.fromkeys(("*Reacher*", "*Pusher*"), "manipulation"),
    **dict.fromkeys(("*Ant*", "*Cheetah*", "*Hopper*", "*Humanoid*", "*Swimmer*", "*Walker*"), "locomotion"),
    **dict.fromkeys(("*Blackjack*", "*Catch*"), "games"),
    **dict.fromkeys(("*FrozenLake*", "*CliffWalking*", "*Taxi*", "*NChain*"), "toy text"),
    "*": "classic control",
}
"""Domains of Gymnasium's own ids by pattern; the first that matches counts."""

DM_CONTROL = {
    **dict.fromkeys(("*[Mm]anipulat*", "*[Ss]tack*", "*[Ff]inger*", "*[Rr]eacher*", "*[Bb]all*"), "manipulation"),
    **dict.fromkeys(
        ("*[Cc]heetah*", "*[Dd]og*", "*[Ff]ish*", "*[Hh]opper*", "*[Hh]umanoid*", "*[Qq]uadruped*"), "locomotion"
    ),
    **dict.fromkeys(("*[Ss]wimmer*", "*[Ww]alker*"), "locomotion"),
    "*": "classic control",
}
"""Domains of the DeepMind control suite's tasks by pattern."""

JUMANJI = {
    **dict.fromkeys(("*Maze*", "*Cleaner*", "*SearchAndRescue*"), "navigation"),
    **dict.fromkeys(("*2048*", "*Minesweeper*", "*PacMan*", "*Snake*", "*Tetris*", "*Foraging*"), "games"),
    **dict.fromkeys(("*RubiksCube*", "*SlidingTile*", "*Sokoban*", "*Sudoku*"), "board games"),
    "*RobotWarehouse*": "robotics",
    "*": "operations research",
}
"""Domains of Jumanji's tasks by pattern."""

# Libraries that put their own name in front of every id, as far as others serve the same tasks without it.
_PREFIX = re.compile(r"^(.*/(?=[^/]*[A-Za-z]))?(Navix-|MiniGrid-|MiniHack-|MiniWorld-|popgym-|procgen-|Vizdoom)?")
_VERSION = re.compile(r"[-_]?v\d+$")
# What is seen of the same task: pixels or symbols, with or without touch sensors, as a table or as a row.
_OBSERVATION = re.compile(
    r"^visual-|(?<=[a-z0-9])-?(Pixels|Symbolic|Vision|PureState|Audio|Notifications)(?=-|$)"
    r"|_(Boolean|Continuous)TouchSensors|[-_](ram|pixels|visual|rgb|image|grayscale)(?=[-_]|$)"
    r"|-goal-(observable|hidden)$"
)
# Libraries whose ids do not say what they are ids of; and suffixes that mean an observation in one library alone.
_NAMELESS = ("nasim",)
_OBSERVATION_OF = types.MappingProxyType({"nasim": re.compile(r"2D"), "vizdoom": re.compile(r"-S\d$")})

_SIZE = re.compile(r"\d+x\d+(x\d+)?|(?<![A-Za-z])[A-Z]\d+(?![a-z])|(?<=[a-z])[SNRFP]\d+(?=[A-Z]|[SNRF]\d|[-_]|$)")
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d{1,3}(?![A-Za-z0-9])|(?<=[A-Za-z])\d{1,3}$")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_VARIANTS = frozenset(
    (
        *("tiny", "mini", "small", "medium", "large", "big", "giant", "huge", "short", "long"),
        *("easy", "hard", "hardcore", "extreme", "expert", "very", "full", "restricted"),
        *("dense", "sparse"),
        *("random", "fixed", "deterministic", "stochastic"),
    )
)


def task(library: str, name: str) -> str:
    """The base task of an id: its name without version, library prefix, observation type, letter case and separators.

    Args:
      library: the library.
      name: the library's own id.

    Returns:
      Small letters and digits: `dooropen` for `envpool/MetaWorld/DoorOpen-v3` as for `metaworld/door-open-v3`.
    """
    return _squeeze(_base(library, name))


def family(library: str, name: str) -> str:
    """The task without sizes, numbers, difficulties, kinds of rewards, and seeds.

    Args:
      library: the library.
      name: the library's own id.

    Returns:
      Small letters and digits: `doorkey` for `minigrid/MiniGrid-DoorKey-8x8-v0`; the task where nothing is left.
    """
    base = _base(library, name)
    words = _WORD.findall(_NUMBER.sub(" ", _SIZE.sub(" ", base)))
    return "".join(word for word in map(str.lower, words) if word not in _VARIANTS) or _squeeze(base)


def first_match(table: collections.abc.Mapping[str, str], name: str) -> str:
    """The value of the first pattern, as of file names, that matches a name; empty where none does."""
    return next((value for pattern, value in table.items() if fnmatch.fnmatchcase(name, pattern)), "")


def _base(library: str, name: str) -> str:
    name = _VERSION.sub("", name)
    if (pattern := _OBSERVATION_OF.get(library)) is not None:
        name = pattern.sub("", name)
    name = _OBSERVATION.sub("", _PREFIX.sub("", name, count=1)) or name
    return f"{library}-{name}" if library in _NAMELESS else name


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

"""Pictures of what a policy did: recorded while it is evaluated, drawn from observations, small enough for a page.

An environment that sees a picture or a grid is shown as what it sees; one whose state is a number, as a cell among all;
any other one as a path through the two of its numbers that vary most. Frames that an environment renders itself are
pictures like those it sees.
"""

from __future__ import annotations

import base64
import collections
import collections.abc
import dataclasses
import functools
import io
import json
import math
import pathlib
import types
import typing

import gymnasium
import jax
import numpy as np

from experiments.report.document import JsonValue
from ldm_jax import files, rollout, spaces
from ldm_jax.environment import Environment
from ldm_jax.errors import LdmError
from ldm_jax.types import EnvironmentSpec, Key, PyTree, TimeStep

RECORDED_STEPS = 120
"""Time steps of a recording."""
FEW = 12
"""Environments that are recorded."""
_SIDE = 84  # pixels of the longer side of a picture in a page
_BYTES = 160_000  # of the pictures of one recording
_NUMBERS = 24  # numbers of an observation that are kept
_VIDEO = 320  # pixels of the longer side of a frame of a video, at least
_FEW_KINDS = 32  # a picture of fewer whole numbers shows kinds of things, not light
# The background and what stands on it, told apart by those who see colours differently (Okabe and Ito).
_KINDS = np.array(
    [
        (32, 36, 44), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
        (204, 121, 167), (235, 235, 235), (140, 140, 150), (178, 34, 52), (110, 80, 180),
    ],
    np.uint8,
)  # fmt: skip


class NothingToDrawError(LdmError, ValueError):
    """Observations of which no picture can be made, such as text."""


class Recorder:
    """An environment that behaves as the one inside and keeps what its first row saw, for as many steps as asked for.

    It is stepped from Python, where the one inside is still compiled as it would be: what is played is the same.
    """

    def __init__(self, inside: Environment, steps: int = RECORDED_STEPS):
        self._inside, self._steps = inside, steps
        self.observations: list[PyTree] = []
        self.rewards: list[float] = []
        self.first: list[bool] = []

    @property
    def spec(self) -> EnvironmentSpec:
        """Of the environment inside, but not to be traced: what is kept is kept by Python."""
        return dataclasses.replace(self._inside.spec, jittable=False)

    def reset(self, key: Key) -> tuple[PyTree, TimeStep]:
        """See `Environment.reset`."""
        return self._keep(*rollout.reset_from_host(self._inside, key))

    def step(self, state: PyTree, action: PyTree) -> tuple[PyTree, TimeStep]:
        """See `Environment.step`."""
        return self._keep(*rollout.step_from_host(self._inside, state, action))

    def close(self) -> None:
        """See `Environment.close`."""
        self._inside.close()

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._inside, name)  # its faults and reports

    def _keep(self, state: PyTree, timestep: TimeStep) -> tuple[PyTree, TimeStep]:
        if len(self.rewards) < self._steps:
            # A copy of one row: a simulator may use its buffers again.
            self.observations.append(jax.tree.map(lambda leaf: np.array(leaf[0]), timestep.observation))
            self.rewards.append(float(np.asarray(timestep.reward)[0]))
            self.first.append(bool(np.asarray(timestep.first)[0]))
        return state, timestep

    def write(self, path: pathlib.Path) -> None:
        """Writes what was kept as `draw_compact` makes it; nothing where nothing can be drawn."""
        try:
            drawn = draw_compact(self._inside.spec.observation_space, self.observations)
        except NothingToDrawError:
            return
        told = {"id": self.spec.id, "rewards": [float(f"{x:.4g}") for x in self.rewards], "first": self.first}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(told | drawn, allow_nan=False))


class Gallery:
    """Records a few of many environments while they are played.

    Args:
      folder: where the recordings go, `<id>.json` each; those that are there stay until theirs is played again.
      domains: of all environments, by id; none are recorded of none.
    """

    def __init__(
        self,
        folder: pathlib.Path = pathlib.Path(),
        domains: collections.abc.Mapping[str, str] = types.MappingProxyType({}),
    ):
        self._folder, self._chosen = folder, frozenset(choose_few(domains))
        self._recorders: dict[str, Recorder] = {}

    def watch(
        self, id: str, make: collections.abc.Callable[[], Environment]
    ) -> collections.abc.Callable[[], Environment]:
        """What makes an environment, and records it if it is among the few."""
        return functools.partial(self._record, id, make) if id in self._chosen else make

    def write(self, id: str) -> None:
        """Writes the recording of an environment that was played to its end, if there is one."""
        if recorder := self._recorders.pop(id, None):
            recorder.write(self._folder / f"{id}.json")

    def _record(self, id: str, make: collections.abc.Callable[[], Environment]) -> Environment:
        self._recorders[id] = Recorder(make())
        return self._recorders[id]


def choose_few(domains: collections.abc.Mapping[str, str], count: int = FEW) -> tuple[str, ...]:
    """A few environments that show the breadth of all: of each domain in turn, in the order of their ids.

    >>> choose_few({"a/1": "games", "a/2": "games", "b/1": "robotics"}, 2)
    ('a/1', 'b/1')

    Args:
      domains: by id.
      count: how many at most.
    """
    members = collections.defaultdict(list)
    for id in sorted(domains):
        members[domains[id]].append(id)
    ranked = sorted((rank, domain, id) for domain, ids in members.items() for rank, id in enumerate(ids))
    return tuple(id for *_, id in ranked[:count])


def draw_compact(space: gymnasium.Space, observations: collections.abc.Sequence[PyTree]) -> JsonValue:
    """What a page animates, small: a sheet of pictures, the numbers of cells, or lines of a byte a number.

    Args:
      space: of the observations.
      observations: of consecutive time steps of one environment, each as the space says.

    Returns:
      JSON values with a `kind`: "pictures", "cells" or "lines".

    Raises:
      NothingToDrawError: there is nothing in the observations that a picture could be made of.
    """
    leaf = _picture_leaf(space)
    if leaf is not None:
        return _sheet(_pictures(_values(leaf, observations)))
    if isinstance(space, gymnasium.spaces.Discrete):
        states = np.array(observations, np.int64) - int(space.start)
        return {"kind": "cells", "count": int(space.n), "states": states.tolist()}
    values, names = _numbers(space, observations)
    low, high = values.min(axis=0), values.max(axis=0)
    scaled = np.round(255 * (values - low) / np.where(high > low, high - low, 1)).astype(np.uint8)
    return {
        "kind": "lines",
        "names": names,
        "low": [float(f"{x:.3g}") for x in low],
        "high": [float(f"{x:.3g}") for x in high],
        "axes": _widest(values),
        "values": base64.b64encode(scaled.tobytes()).decode(),
    }


def draw_frames(space: gymnasium.Space, observations: collections.abc.Sequence[PyTree]) -> np.ndarray:
    """Frames of a video, drawn from observations, for an environment that renders none.

    Args:
      space: of the observations.
      observations: of T consecutive time steps of one environment, each as the space says.

    Returns:
      `uint8 [T, H, W, 3]`, H and W even.

    Raises:
      NothingToDrawError: there is nothing in the observations that a picture could be made of.
    """
    leaf = _picture_leaf(space)
    if leaf is not None:
        frames = _pictures(_values(leaf, observations))
    elif isinstance(space, gymnasium.spaces.Discrete):
        columns = math.ceil(math.sqrt(int(space.n)))
        frames = np.broadcast_to(_KINDS[0], (len(observations), -(-int(space.n) // columns), columns, 3)).copy()
        for t, state in enumerate(observations):
            place = int(state) - int(space.start)
            frames[t, place // columns, place % columns] = _KINDS[1]
    else:
        frames = _paths(_numbers(space, observations)[0])
    times = max(1, math.ceil(_VIDEO / max(frames.shape[1:3])))
    frames = frames.repeat(times, axis=1).repeat(times, axis=2)
    return np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")


def _picture_leaf(space: gymnasium.Space) -> spaces.Leaf | None:
    """The largest part of an observation that is a picture, if there is any."""
    found = [leaf for leaf in spaces.leaves(space) if _layout(getattr(leaf.space, "shape", None) or ()) is not None]
    return max(found, key=lambda leaf: math.prod(leaf.space.shape or ()), default=None)


def _layout(shape: tuple[int, ...]) -> typing.Literal["plane", "channels last", "channels first"] | None:
    if len(shape) == 2 and min(shape) >= 4:
        return "plane"
    if len(shape) == 3:
        first, last = min(shape[1:]) >= 4 and shape[0] < min(shape[1:]), min(shape[:2]) >= 4
        return "channels first" if first and shape[0] <= shape[2] else "channels last" if last else None
    return None


def _values(leaf: spaces.Leaf, observations: collections.abc.Sequence[PyTree]) -> np.ndarray:
    return np.stack([np.asarray(spaces.get(observation, leaf.path)) for observation in observations])


def _pictures(values: np.ndarray) -> np.ndarray:
    """`[T, ...]` of planes, with channels or without, as `uint8 [T, H, W, 3]`."""
    if (layout := _layout(values.shape[1:])) == "channels first":
        values = np.moveaxis(values, 1, -1)
    elif layout == "plane":
        values = values[..., None]
    channels, whole = values.shape[-1], np.all(values == np.round(values))
    if (
        whole and channels > 1 and values.min() >= 0 and values.max() <= 1
    ):  # which things are in a cell: the last counts
        kinds = (values != 0) * np.arange(1, channels + 1)
        return _KINDS[kinds.max(axis=-1).astype(int) % len(_KINDS)]
    if whole and values.min() >= 0 and values.max() < _FEW_KINDS:
        return _KINDS[values[..., 0].astype(int) % len(_KINDS)]
    if channels != 3:  # frames one after the other, of which the last is now
        values = values[..., -1:]
    if values.dtype != np.uint8:
        low, high = float(values.min()), float(values.max())
        values = 255 * (values.astype(np.float64) - low) / (high - low or 1)
    return np.broadcast_to(values, (*values.shape[:-1], 3)).astype(np.uint8)


def _sheet(frames: np.ndarray) -> JsonValue:
    """Pictures side by side in one, as a page holds it."""
    from PIL import Image

    height, width = frames.shape[1:3]
    small = max(height, width) <= 40  # cells of a grid: each has its pixel, and stays sharp
    every = math.ceil(max(height, width) / _SIDE)
    if every > 1:
        frames = frames[:, : height - height % every, : width - width % every]
        cut = (len(frames), frames.shape[1] // every, every, frames.shape[2] // every, every, 3)
        frames = frames.reshape(cut).mean(axis=(2, 4)).astype(np.uint8)
    for quality in (70, 40, 15, 5):
        columns = math.ceil(math.sqrt(len(frames)))
        rows = -(-len(frames) // columns)
        height, width = frames.shape[1:3]
        padded = np.concatenate([frames, np.zeros((rows * columns - len(frames), height, width, 3), np.uint8)])
        sheet = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
        target = io.BytesIO()
        picture = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
        picture.save(target, format="webp", lossless=small, quality=quality, method=4)
        if target.tell() <= _BYTES:
            break
        frames = frames[: max(1, len(frames) // 2)] if small else frames
    source = f"data:image/webp;base64,{base64.b64encode(target.getvalue()).decode()}"
    size = {"width": width, "height": height, "columns": columns, "count": len(frames)}
    return {"kind": "pictures", "sharp": small, "source": source, **size}


def _numbers(space: gymnasium.Space, observations: collections.abc.Sequence[PyTree]) -> tuple[np.ndarray, list[str]]:
    """Numbers of observations, `float64 [T, D]`, and their names; those that vary, and no more than can be shown."""
    columns, names = [], []
    for leaf in spaces.leaves(space):
        if isinstance(leaf.space, gymnasium.spaces.Text):
            continue
        values = _values(leaf, observations).astype(np.float64).reshape(len(observations), -1)
        columns += [*np.nan_to_num(values).T]
        name = leaf.name if leaf.path else "number"
        names += [f"{name} {i + 1}" if values.shape[1] > 1 else name for i in range(values.shape[1])]
    if not columns:
        raise NothingToDrawError("got observations without a number or a picture, expected some that can be drawn")
    stacked = np.stack(columns, axis=1)
    kept = np.sort(np.argsort(-_movement(stacked), kind="stable")[:_NUMBERS])
    return stacked[:, kept], [names[i] for i in kept]


def _movement(values: np.ndarray) -> np.ndarray:
    """How much each of D numbers moves: numbers are told apart by how often they change and how evenly."""
    span = values.max(axis=0) - values.min(axis=0)
    return np.where(span > 0, values.std(axis=0) / np.where(span > 0, span, 1), -1)


def _widest(values: np.ndarray) -> list[int]:
    """The places of the two numbers that a path is drawn through: the first two that move, as authors order them."""
    moving = [i for i, move in enumerate(_movement(values)) if move > 0]
    return [*moving, 0, 0][:2]


def _paths(values: np.ndarray) -> np.ndarray:
    """Frames of a path through two numbers, `uint8 [T, H, W, 3]`, the newest steps brightest."""
    from PIL import Image, ImageDraw

    across = values[:, _widest(values)]
    low, high = across.min(axis=0), across.max(axis=0)
    points = 20 + (_VIDEO - 40) * (across - low) / np.where(high > low, high - low, 1)
    points[:, 1] = _VIDEO - points[:, 1]
    frames = np.empty((len(points), _VIDEO, _VIDEO, 3), np.uint8)
    for t in range(len(points)):
        picture = Image.new("RGB", (_VIDEO, _VIDEO), tuple(_KINDS[0].tolist()))
        pen = ImageDraw.Draw(picture)
        for s in range(max(1, t - 40), t + 1):
            shade = (s - t + 41) / 41
            color = (_KINDS[0] + shade * (_KINDS[2].astype(float) - _KINDS[0])).astype(int).tolist()
            pen.line([*points[s - 1], *points[s]], fill=tuple(color), width=3)
        x, y = points[t]
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=tuple(_KINDS[1].tolist()))
        frames[t] = np.asarray(picture)
    return frames

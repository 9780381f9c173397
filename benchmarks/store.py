"""What the trajectory store costs: random windows, bytes, and thousands of environments.

Windows of 256 steps at random places, of a walk in 17 numbers and of stacks of four frames, are read from the store,
from Minari and from a plain `np.memmap`: the same leaves of the same steps, 32 windows a call, all of it warm. Minari
has no windows: an episode is sampled as it does, and the window cut out of it; its images are kept without loss. What
is opened at several sizes are records alone, in a process of its own, and the parts of all environments are listed
then; to append is to write one part of a new environment.

    python -m benchmarks.store

Its last line is one JSON object. `to_minari` and `to_memmap` are rates of windows, 1 being the other's; `write_mb_s`
is of raw bytes; `bytes_per_transition` counts all leaves of a step; `open_s`, `open_mb` and `append_s` are by the
number of environments.
"""

from __future__ import annotations

import argparse
import collections.abc
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import typing

import gymnasium
import numpy as np

from data import store
from data.store import records
from ldm_jax.cards import EnvironmentCard, Reference, Returns, Statistics
from ldm_jax.encoding.transition import transition_schema

from .timing import compare

WINDOW, WINDOWS = 256, 32
SIZES = (10, 100, 1000, 5000)
ACTIONS = gymnasium.spaces.Box(-1, 1, (6,))

Leaves = dict[str, np.ndarray]


class Case(typing.NamedTuple):
    """What is stored: its observations, steps and streams."""

    observation_space: gymnasium.spaces.Box
    steps: int
    streams: int


CASES = {
    "vectors": Case(gymnasium.spaces.Box(-np.inf, np.inf, (17,)), 1024, 64),
    "images": Case(gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8), 512, 8),
}
READ = ("observation/value", "action/value", "reward", "terminated", "truncated")
"""What Minari has, too."""


def card(id: str, case: Case) -> EnvironmentCard:
    """A card for data of a case."""
    returns = Returns.of(np.zeros((2, 3)))
    return EnvironmentCard(
        id=id,
        library=id.split("/")[0],
        version="1",
        domain="benchmark",
        observation_space=case.observation_space,
        action_space=ACTIONS,
        time_limit=case.steps,
        statistics=Statistics((0.0,), (1.0,), 1.0, (-1.0,) * 6, (1.0,) * 6, 1),
        random_returns=returns,
        reference_returns=returns,
        reference=Reference("ppo", "greedy", 1, 0),
    )


def make_leaves(case: Case) -> Leaves:
    """Leaves that change from step to step as real ones do: a walk, or a few sprites over a background."""
    rng, lead = np.random.default_rng(0), (case.steps, case.streams)
    schema = transition_schema(case.observation_space, ACTIONS, masked=False)
    walks = {name: rng.normal(0, 0.1, (*lead, *leaf.shape)).cumsum(0) for name, leaf in schema.items() if leaf.ndim < 3}
    leaves = {name: np.tanh(walk).astype(schema[name].dtype) for name, walk in walks.items()}
    if leaves.keys() != schema.keys():
        leaves["observation/value"] = _frames(rng, case)
    flags = {name: np.zeros(lead, bool) for name in ("terminated", "truncated", "first")}
    flags["first"][0] = flags["truncated"][-1] = True
    return {name: flags.get(name, leaves[name]) for name in schema}


def _frames(rng: np.random.Generator, case: Case) -> np.ndarray:
    frames = np.broadcast_to(rng.integers(0, 8, (84, 84), np.uint8), (case.steps + 3, case.streams, 84, 84)).copy()
    for step in range(case.steps + 3):
        for stream in range(case.streams):
            row, column = (step * (1 + stream)) % 76, (3 * step + stream) % 76
            frames[step, stream, row : row + 8, column : column + 8] = 200
    return np.stack([frames[i : i + case.steps] for i in range(4)], 2)


def whole_streams(case: Case) -> store.EpisodeIndex:
    """The index of one episode a stream."""
    zeros = np.zeros(case.streams)
    return store.EpisodeIndex(zeros, zeros + case.steps, zeros, zeros, zeros, np.arange(case.streams))


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class WindowRates(typing.NamedTuple):
    """Of one case: rates of windows over the others', and what it took to store it."""

    to_minari: float
    to_memmap: float
    write_mb_s: float
    raw: float
    stored: float


def measure_windows(name: str, folder: pathlib.Path, repetitions: int, seconds: float) -> WindowRates:
    """Writes a case everywhere and reads random windows of it from everywhere."""
    case, rng = CASES[name], np.random.default_rng(1)
    leaves = make_leaves(case)
    begin = time.perf_counter()
    dataset = store.append_part(
        store.create_dataset(folder / "store"), card("benchmark/it", case), leaves, whole_streams(case)
    )
    write_s = time.perf_counter() - begin
    (part,) = dataset.parts("benchmark/it")
    maps = {leaf: _memmap(folder / leaf.replace("/", "-"), leaves[leaf]) for leaf in READ}
    episodes = _minari(folder / "minari", case, leaves)

    def places() -> collections.abc.Iterator[tuple[int, int]]:
        starts, streams = rng.integers(case.steps - WINDOW, size=WINDOWS), rng.integers(case.streams, size=WINDOWS)
        return zip(starts.tolist(), streams.tolist(), strict=True)

    def from_store() -> object:
        return store.read_many([store.Request(part, READ, begin, begin + WINDOW, stream) for begin, stream in places()])

    def from_memmap() -> object:
        return [
            {leaf: np.array(value[stream, begin : begin + WINDOW]) for leaf, value in maps.items()}
            for begin, stream in places()
        ]

    def from_minari() -> object:
        return [_cut(episodes.sample_episodes(1)[0], begin) for begin, _ in places()]

    times = compare({"store": from_store, "memmap": from_memmap, "minari": from_minari}, repetitions, seconds)
    transitions, raw = case.steps * case.streams, sum(value.nbytes for value in leaves.values())
    return WindowRates(
        times.speed("store", "minari"),
        times.speed("store", "memmap"),
        raw / write_s / 1e6,
        raw / transitions,
        folder_bytes(folder / "store" / "benchmark") / transitions,
    )


def _memmap(path: pathlib.Path, value: np.ndarray) -> np.memmap:
    by_stream = np.swapaxes(value, 0, 1)
    made = np.memmap(path, value.dtype, "w+", shape=by_stream.shape)
    made[:] = by_stream
    made.flush()
    return np.memmap(path, value.dtype, "r", shape=by_stream.shape)


def _minari(folder: pathlib.Path, case: Case, leaves: Leaves) -> typing.Any:
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    folder.mkdir()
    made = MinariStorage.new(
        folder, observation_space=case.observation_space, action_space=ACTIONS, env_spec=None, jpeg_encoding=False
    )
    made.update_metadata({"dataset_id": "benchmark/it-v0", "minari_version": minari.__version__})
    made.update_episodes(
        EpisodeBuffer(None, None, None, *(leaves[leaf][:, stream] for leaf in READ), None)  # type: ignore[arg-type]
        for stream in range(case.streams)
    )
    return minari.MinariDataset(made)


def _cut(episode: typing.Any, begin: int) -> list[np.ndarray]:
    columns = (episode.observations, episode.actions, episode.rewards, episode.terminations, episode.truncations)
    return [column[begin : begin + WINDOW] for column in columns]


SMALL = Case(CASES["vectors"].observation_space, 64, 4)


def make_environments(folder: pathlib.Path, count: int) -> store.Dataset:
    """A dataset of so many environments: all have records, the first has data."""
    dataset = store.append_part(
        store.create_dataset(folder), card("benchmark/0", SMALL), make_leaves(SMALL), whole_streams(SMALL)
    )
    group = dataset.group("benchmark/0")
    for number in range(1, count):
        id = f"benchmark/Environment{number}-v0"
        (folder / records.record_key(id)).write_bytes(records.encode_group(id, group))
    return store.open_dataset(folder)


OPEN = """
import json, resource, sys, time
from data import store
store.open_dataset(sys.argv[1])
def resident_mb():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 1e6
before, begin = resident_mb(), time.perf_counter()
dataset = store.open_dataset(sys.argv[2])
parts = [dataset.parts(id) for id in dataset.ids]
print(json.dumps([time.perf_counter() - begin, resident_mb() - before]))
"""


def measure_open(few: pathlib.Path, folder: pathlib.Path) -> tuple[float, float]:
    """Seconds and megabytes to open a dataset and list all parts, after another was opened."""
    done = subprocess.run([sys.executable, "-c", OPEN, few, folder], capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def measure_append(datasets: dict[int, store.Dataset], repetitions: int) -> dict[int, float]:
    """Median seconds to append a part of a new environment, in turn to each dataset."""
    leaves, episodes = make_leaves(SMALL), whole_streams(SMALL)
    times: dict[int, list[float]] = {count: [] for count in datasets}
    for repetition in range(repetitions + 1):
        for count, dataset in datasets.items():
            begin = time.perf_counter()
            store.append_part(dataset, card(f"benchmark/new{repetition}", SMALL), leaves, episodes)
            times[count].append(time.perf_counter() - begin)
    return {count: statistics.median(seconds[1:]) for count, seconds in times.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each contender in each repetition")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        windows = {}
        for case in CASES:
            (folder / case).mkdir()
            windows[case] = measure_windows(case, folder / case, arguments.repetitions, arguments.seconds)
            print(case, windows[case], flush=True)
        datasets = {count: make_environments(folder / str(count), count) for count in SIZES}
        opened = {count: measure_open(folder / str(SIZES[0]), folder / str(count)) for count in SIZES}
        appended = measure_append(
            {count: datasets[count] for count in (SIZES[0], SIZES[-1])}, 4 * arguments.repetitions
        )
    result = {
        "to_minari": {case: round(rates.to_minari, 2) for case, rates in windows.items()},
        "to_memmap": {case: round(rates.to_memmap, 2) for case, rates in windows.items()},
        "write_mb_s": {case: round(rates.write_mb_s, 1) for case, rates in windows.items()},
        "bytes_per_transition": {
            case: {"raw": round(rates.raw, 1), "stored": round(rates.stored, 1)} for case, rates in windows.items()
        },
        "open_s": {str(count): round(seconds, 3) for count, (seconds, _) in opened.items()},
        "open_mb": {str(count): round(megabytes, 1) for count, (_, megabytes) in opened.items()},
        "append_s": {str(count): round(seconds, 4) for count, seconds in appended.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

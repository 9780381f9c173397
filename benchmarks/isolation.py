"""What isolation costs: the same environments in this process, in a worker process, and in a container.

In this process is `gymnasium.vector.SyncVectorEnv` with next-step reset, as the library brings it: no checks of what
comes out. A worker is `environments.isolation` on this very interpreter; a container is the same in a hardened Podman
container with an interpreter of the same version. Both check every number and limit every call. All take the same
constant actions, and nothing else is in the loop.

    python -m benchmarks.isolation

Its last line is one JSON object. `container_to_in_process` and `venv_to_in_process` are rates with one worker where a
batched step is 1 ms of work, 1 being as fast as in process; `round_trip_us` is one exchange with a container's worker
that has no row to step, and `step_us` a whole step of one row that does nothing; `scaling` is the rate with several
workers, 1 being one worker. What needs a container is null where there can be none, with the reason in `no_container`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import typing

import gymnasium
import jax
import numpy as np

from environments.cores import available_cores
from environments.isolation import IsolatedEnvironment, Isolation, WorkerSpec, containers, groups
from environments.isolation.worker.gym_api import IDLE

from .timing import Times, compare

LIBRARY = pathlib.Path(__file__).parent / "library"
IMAGE_OF = "nasim"
"""The library whose image has an interpreter of the same version as this one, and Gymnasium."""

STEPS = 20
"""Batched steps of one portion."""


class Case(typing.NamedTuple):
    """What is stepped: the library's id, the options of its `make`, and the number of rows."""

    name: str
    options: dict[str, typing.Any]
    rows: int


CASES = {
    "1 ms": Case("Workload-v0", {"work_us": 125}, 8),
    "1 ms, images": Case("Workload-v0", {"work_us": 62.5, "shape": (84, 84, 4)}, 16),
    "CartPole": Case("CartPole-v1", {}, 64),
    "nothing": Case("Workload-v0", {}, 1),
}
SPREAD = Case("Workload-v0", {"work_us": 500}, 8)
"""What is spread over several workers: 4 ms of work."""

Step = typing.Callable[[], object]


@contextlib.contextmanager
def in_process(case: Case) -> typing.Iterator[Step]:
    """Steps of Gymnasium's own vector environment."""
    sys.path.insert(0, str(LIBRARY))
    make = functools.partial(gymnasium.make, f"workload:{case.name}", disable_env_checker=True, **case.options)
    with contextlib.closing(gymnasium.vector.SyncVectorEnv([make] * case.rows)) as vector:
        sys.path.remove(str(LIBRARY))
        vector.reset(seed=0)
        action = np.zeros(case.rows, np.int32)

        def steps():
            for _ in range(STEPS):
                vector.step(action)

        yield steps


@contextlib.contextmanager
def isolated(case: Case, image: str, workers: int = 1) -> typing.Iterator[tuple[Step, IsolatedEnvironment]]:
    """Steps of workers in containers of an image, or in processes where it is empty; and their environment."""
    spec = WorkerSpec(
        python=containers.PYTHON if image else sys.executable,
        library="workload",
        name=case.name,
        api="gymnasium",
        imports=("workload",),
        distribution="gymnasium",
        domain="test",
        kwargs=case.options,
        path=(str(LIBRARY),),
        image=image,
    )
    with contextlib.closing(IsolatedEnvironment(spec, case.rows, None, Isolation(workers=workers))) as environment:
        state, _ = environment.reset(jax.random.key(0))
        action = np.zeros(case.rows, np.int32)

        def steps():
            nonlocal state
            for _ in range(STEPS):
                state, _ = environment.step(state, action)

        yield steps, environment


def side_by_side(case: Case, image: str | None, repetitions: int, seconds: float) -> Times:
    """Times of `STEPS` batched steps of one worker at most."""
    with contextlib.ExitStack() as stack:
        contenders = {"in_process": stack.enter_context(in_process(case))}
        for name, where in {"venv": "", "container": image}.items():
            if where is not None:
                contenders[name], _ = stack.enter_context(isolated(case, where))
        return compare(contenders, repetitions, seconds)


def spread(image: str, counts: list[int], repetitions: int, seconds: float) -> dict[str, float]:
    """The rate with each number of workers, 1 being that of one."""
    with contextlib.ExitStack() as stack:
        contenders = {str(count): stack.enter_context(isolated(SPREAD, image, count))[0] for count in counts}
        times = compare(contenders, repetitions, seconds)
    return {count: times.speed(count, "1") for count in contenders}


def round_trip_us(image: str, repetitions: int, seconds: float) -> float:
    """Microseconds of one exchange with a worker that has nothing to do."""
    with isolated(CASES["nothing"], image) as (_, environment):
        (worker,) = environment._workers
        assert worker is not None
        environment._batch.arrays["command"][:] = IDLE

        def exchange():
            worker.send(b"G")
            worker.receive(1.0)

        return 1e6 * compare({"exchange": exchange}, repetitions, seconds).median("exchange")


def find_image() -> tuple[str | None, str]:
    """The image that containers are made of, and why there is none where it is None."""
    try:
        image = containers.build_image(groups.isolated_libraries()[IMAGE_OF].venv)
        with isolated(CASES["nothing"], image):
            return image, ""
    except Exception as error:  # whatever it is, the rest can be measured without
        return None, str(error)


def main(arguments: typing.Sequence[str] | None = None) -> None:
    """Prints a table, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolation", description="What isolation costs.")
    parser.add_argument("--repetitions", type=int, default=9, help="rounds that medians are taken over")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contender in each round")
    parser.add_argument("--no-container", action="store_true", help="leave the containers out")
    options = parser.parse_args(arguments)
    effort = (options.repetitions, options.seconds)
    image, why_not = (None, "left out") if options.no_container else find_image()

    times = {name: side_by_side(case, image, *effort) for name, case in CASES.items()}
    print(f"rate of one worker, in process = 1 (medians of {options.repetitions} rounds, in turn)\n")
    print(f"{'a batched step':>16} {'rows':>5} {'in process':>13} {'venv':>6} {'container':>10}")
    for name, case in CASES.items():
        rate = case.rows * STEPS / times[name].median("in_process")
        container = "-" if image is None else f"{times[name].speed('container', 'in_process'):.2f}"
        venv = times[name].speed("venv", "in_process")
        print(f"{name:>16} {case.rows:>5} {rate:>9,.0f} /s {venv:>6.2f} {container:>10}")

    cores = available_cores()
    counts = sorted({1, 2, cores, 2 * cores})
    places = {"venv": "", "container": image}
    scaling = {name: None if where is None else spread(where, counts, *effort) for name, where in places.items()}
    print(f"\nrate of several workers on {cores} cores, one worker = 1 (4 ms of work a batched step)\n")
    print(f"{'workers':>16} {'venv':>6} {'container':>10}")
    for count in map(str, counts):
        row = ["-" if rates is None else f"{rates[count]:.2f}" for rates in scaling.values()]
        print(f"{count:>16} {row[0]:>6} {row[1]:>10}")

    trips = {name: None if where is None else round_trip_us(where, *effort) for name, where in places.items()}
    best = "venv" if image is None else "container"

    def speed(case: str, name: str) -> float | None:
        return times[case].speed(name, "in_process") if name in times[case].seconds else None

    result = {
        "container_to_in_process": speed("1 ms", "container"),
        "venv_to_in_process": speed("1 ms", "venv"),
        "round_trip_us": trips["container"],
        "venv_round_trip_us": trips["venv"],
        "step_us": 1e6 * times["nothing"].median(best) / STEPS,
        "ratios": {case: {name: speed(case, name) for name in places} for case in CASES},
        "scaling": scaling,
        "cores": cores,
        "no_container": why_not or None,
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()

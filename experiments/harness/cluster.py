"""Units on the machines of a Ray cluster: the one file that knows Ray.

Each unit is a task of Ray's, which works on it in a process of its own beside it, as this machine would: so a unit that
crashes, hangs or leaks costs itself alone there, too. The unit reads and writes in a scratch folder of that machine;
what it has written streams back to this one, whatever disks there are. A task that is lost with its machine is begun
anew on another one.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import importlib.metadata
import logging
import multiprocessing.connection
import pathlib
import pickle
import shutil
import signal
import socket
import time
import typing

from experiments.harness import compilation, parcels, progress
from experiments.harness.unit_process import PICKLE, TICK_S, UnitProcess, portable
from experiments.harness.units import LOST, ClusterError, Finished, Job, Limits, Needs, R, Travel, U

ATTEMPTS = 3
"""How often a unit is begun whose machine is lost, before it has failed."""
ROOM_S = 60.0
"""How long no machine may have room for a unit."""
_AHEAD = 2  # units that are handed over for each core of the cluster, so that none waits for this machine
REACHED_S = 5.0
"""How long an address may take to answer."""
_HOST_TICK_S = 1.0
NOTICE_S = 60.0
"""How long no unit may have begun, until that is said."""
# Ray speaks gRPC, over HTTP/2: whoever is greeted so answers with settings, and the fourth byte of a frame is its type.
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = b"\x04"
_ARRIVING = ".arriving"

_Said = tuple[str, typing.Any]
"""`("begun", host)`, `("advance", n)`, `("piece", bytes)` of what was written, then `("finished", Finished)` or
`("raised", error)`."""


def run_on_cluster(
    units: collections.abc.Iterable[U],
    job: Job[U, R],
    address: str,
    needs: Needs,
    limits: Limits,
    travel: Travel[U] | None,
    advance: progress.Advance,
) -> collections.abc.Generator[Finished[U, R], None, None]:
    """Works on units on a cluster; see `engine.run_units`, which is what to call.

    Raises:
      ClusterError: the cluster cannot be reached or used, or no machine of it has room for a unit.
    """
    waiting: collections.deque[_Trip[U, R]] = collections.deque(_Trip(unit) for unit in units)
    if not waiting:
        return
    # Other machines run another script: what is sent there is imported by its own name.
    assert getattr(job.function, "func", job.function).__module__ != "__main__"
    with _connected(address) as ray, _arrivals(travel) as arriving:
        work = ray.remote(num_returns="streaming", max_retries=0)(_work)
        work = work.options(num_cpus=needs.cores, memory=int(needs.memory_gb * 1e9))
        flying: list[_Trip[U, R]] = []
        noticed_s = time.monotonic()
        common = ray.put(parcels.pack(travel.root, travel.common)) if travel and travel.common else b""
        try:
            while waiting or flying:
                if waiting:
                    _await_room(ray, needs)
                while waiting and len(flying) < _AHEAD * ray.cluster_resources().get("CPU", 1) + 1:
                    flying.append(waiting.popleft().begin(work, job, limits, travel, arriving, common))
                ready, _ = ray.wait([trip.stream for trip in flying], num_returns=len(flying), timeout=TICK_S)
                if any(trip.begun for trip in flying):
                    noticed_s = time.monotonic()
                elif time.monotonic() - noticed_s > NOTICE_S:
                    noticed_s = time.monotonic()
                    progress.log("waiting", units=len(flying), reason="no machine has begun one; `ray status` says why")
                for trip in [trip for trip in flying if any(trip.stream is each for each in ready)]:
                    ended = trip.listen(ray, advance)
                    if ended is None:
                        continue
                    flying.remove(trip)
                    finished = trip.settle(ended, travel)
                    if finished is None:
                        progress.log("lost", unit=getattr(trip.unit, "id", trip.unit), reason=ended[1])
                        waiting.appendleft(trip)
                    else:
                        yield finished
        finally:
            for trip in flying:
                ray.cancel(trip.stream, force=True)


@dataclasses.dataclass(eq=False)
class _Trip(typing.Generic[U, R]):
    """A unit on its way: which attempt it is, and what has come of it."""

    unit: U
    attempt: int = 0
    steps: int = 0
    begun: bool = False
    stream: typing.Any = None
    arriving: pathlib.Path | None = None

    def begin(
        self,
        work: typing.Any,
        job: Job[U, R],
        limits: Limits,
        travel: Travel[U] | None,
        arriving: pathlib.Path | None,
        common: typing.Any,
    ) -> _Trip[U, R]:
        self.attempt, self.steps, self.begun = self.attempt + 1, 0, False
        self.arriving = parcels.place_in(arriving) if arriving else None
        moved = travel.moved if travel else None
        files = parcels.pack(travel.root, travel.needed(self.unit)) if travel else b""
        self.stream = work.remote(_version(), PICKLE.dumps((job, moved, self.unit)).tobytes(), limits, common, files)
        return self

    def listen(self, ray: typing.Any, advance: progress.Advance) -> _Said | None:
        """Hears all that was said up to now; what ended it, if something has: `("lost", why)` beside `_Said`."""
        try:
            while ray.wait([self.stream], timeout=0)[0]:
                kind, value = ray.get(next(self.stream))
                if kind == "begun":
                    self.begun = True
                elif kind == "advance":
                    self.steps += value
                    advance(value)
                elif kind == "piece":
                    assert self.arriving is not None
                    with self.arriving.open("ab") as file:
                        file.write(value)
                else:
                    return kind, value
        except StopIteration:
            return "lost", "its task has ended without a word"
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OSError):  # of the machine's disk
                return self._lost(error.cause, advance)
            raise ClusterError(f"a machine of the cluster cannot work: {error.cause}") from error
        except ray.exceptions.RayError as error:
            return self._lost(error, advance)
        return None

    def _lost(self, error: BaseException, advance: progress.Advance) -> _Said:
        advance(-self.steps)
        if self.arriving:
            self.arriving.unlink(missing_ok=True)
        words = " ".join(str(error).split())
        return "lost", f"{type(error).__name__}: {words[:200]}"

    def settle(self, ended: _Said, travel: Travel[U] | None) -> Finished[U, R] | None:
        """Takes what has arrived; None where the unit is to be begun anew."""
        kind, value = ended
        again = kind == "lost" or isinstance(value, OSError)  # the other machine's disk is full, say
        if again and self.attempt < ATTEMPTS:
            return None
        if kind == "raised":
            raise value
        if kind == "lost":
            return Finished(self.unit, None, LOST, f"the machine it was on was lost {self.attempt} times: {value}")
        if travel and self.arriving and not value.cause:
            with parcels.unpacked(self.arriving) as folder:
                travel.arrived(self.unit, folder)
        return value._replace(unit=self.unit)


def _work(version: str, payload: bytes, limits: Limits, *archives: bytes) -> collections.abc.Iterator[_Said]:
    """What a machine of the cluster does: works on a unit in a process, and says what comes of it."""
    if version != _version():
        raise ClusterError(f"{socket.gethostname()} has ldm_jax {_version()}, expected {version}: install that there")
    job, moved, unit = pickle.loads(payload)
    yield "begun", socket.gethostname()
    compilation.keep_programs(compilation.default_folder())  # of this machine, for the process and those after it
    with parcels.scratch() as root, contextlib.ExitStack() as stack:
        before = parcels.unpack(archives, root)
        worker: UnitProcess[typing.Any, typing.Any] = UnitProcess(stack, job)
        worker.begin(moved(unit, root) if moved else unit)
        steps: list[int] = []
        finished = None
        while finished is None:
            multiprocessing.connection.wait([*worker.ends], _HOST_TICK_S)
            try:
                finished = worker.listen(steps.append) or worker.end_beyond(limits)
            except Exception as error:
                yield "raised", portable(error)
                return
            if steps:
                yield "advance", sum(steps)
                steps.clear()
        worker.end()
        if not finished.cause:
            for piece in parcels.pieces(root, before):
                yield "piece", piece
        yield "finished", finished


@contextlib.contextmanager
def _connected(address: str) -> collections.abc.Iterator[typing.Any]:
    """Ray's module, connected to the cluster at an address until the block ends."""
    try:
        import ray
    except ImportError as error:
        raise ClusterError(f"Ray is not installed ({error}): pip install 'ldm_jax[cluster]'") from error
    if ray.is_initialized():
        yield ray  # whoever did it ends it
        return
    _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        words = " ".join(str(error).split())
        raise ClusterError(
            f"cannot join the Ray cluster at {address}: {words[:300]}. Start this on a machine that is part of it, "
            "with the same versions of Ray and Python; see docs/clusters.md"
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray sets its own
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises ClusterError at once where nothing answers: Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ClusterError(
            f"got the Ray address {address!r}, expected host:port, as `ray start --head` says it, or auto for the "
            "cluster that this machine is part of"
        )
    try:
        with socket.create_connection((host, int(port)), REACHED_S) as connection:
            connection.sendall(_HTTP2_GREETING)
            if connection.recv(9)[3:4] != _HTTP2_SETTINGS:
                raise OSError("another program answers there")
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster can be reached at {address}: {error}. Start one there with `ray start --head "
            f"--port={port}`, or give the address that it says"
        ) from error


def _await_room(ray: typing.Any, needs: Needs) -> None:
    """Waits a while for a machine with room for a unit: a cluster may grow, or be without one that was lost.

    Raises:
      ClusterError: there is none.
    """
    until = time.monotonic() + ROOM_S
    while True:
        machines = [_Machine.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        if any(machine.cores >= needs.cores and machine.memory_gb >= needs.memory_gb for machine in machines):
            return
        if time.monotonic() > until:
            break
        time.sleep(1)
    there = ", ".join(f"{machine.cores:g} and {machine.memory_gb:.1f} GB" for machine in machines)
    raise ClusterError(
        f"each unit needs {needs.cores:g} cores and {needs.memory_gb:g} GB, and no machine of the cluster has as much: "
        f"they have {there or 'nothing'}. Add a machine, or ask for less with unit_cores and unit_memory_gb"
    )


class _Machine(typing.NamedTuple):
    cores: float
    memory_gb: float

    @classmethod
    def of(cls, resources: collections.abc.Mapping[str, float]) -> _Machine:
        return cls(resources.get("CPU", 0.0), resources.get("memory", 0.0) / 1e9)


@contextlib.contextmanager
def _arrivals(travel: Travel[U] | None) -> collections.abc.Iterator[pathlib.Path | None]:
    """A folder for what is on its way, on the disk that it is for; what a run that was killed has left is removed."""
    if travel is None:
        yield None
        return
    folder = travel.root / _ARRIVING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _version() -> str:
    return importlib.metadata.version("ldm_jax")

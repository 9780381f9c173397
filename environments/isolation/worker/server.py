"""Serves some rows of one environment of a Gymnasium or old Gym library; the host side is `environments.isolation`.

Runs in the library's own interpreter: the standard library, numpy, the files of this folder, and Python 3.7 or later
are all it needs. It is given the descriptor of a Unix socket that the host has connected, or the path of one to connect
to, and owns nothing else: whatever happens to either side, no file, socket or process is left.

A message is one byte that says what it is, four bytes of length (little endian), and that many bytes of JSON. The
host asks and the worker answers, one for one:

  H {protocol, job}, with descriptors of the lifeline and of the log: make an environment of this job
      -> S {protocol, python, versions, observation_space, action_space, time_limit, mask}, or E {reason, text}
     or, where the job names no environment, say which the library's imports have registered
      -> S {protocol, python, versions, ids: {id: module of its entry point}}
  A {worker, first, rows, arrays, size}, with the descriptor of the file of arrays: these rows are yours
      -> K
  G: obey the command of each of your rows
      -> K, or F {faults: [[row, kind, text], ...]}, with {notes: [text, ...]} of what an expert has done wrong
  Q: close the environments and end
      -> K, or K {errors: [text, ...]} of those that raised one

Arrays are in the memory-mapped file: for each row a command and a seed, the action, and what came of it. The host
decides when a row is reset, so that the worker keeps no books about episodes. `heartbeat` counts calls to the library,
so that the host can tell a slow batch from a call that hangs.
"""

import array
import contextlib
import fcntl
import importlib
import importlib.util
import json
import mmap
import os
import platform
import random
import signal
import socket
import struct
import sys
import typing

import numpy as np

PROTOCOL = 4
HEAD = struct.Struct("<cII")
"""Of a message: its kind, the length of what follows in bytes, and the number of the question."""
MAX_LOG_BYTES = 1 << 20


def load(path, name):
    """The module in a file, under a name that no other has."""
    folders = [os.path.dirname(path)] if os.path.basename(path) == "__init__.py" else None
    spec: typing.Any = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = load(os.path.join(os.path.dirname(os.path.abspath(__file__)), "__init__.py"), "ldm_jax_worker")
"""This folder, which is on no path that this interpreter imports from."""
gym_api: typing.Any = importlib.import_module(HERE.__name__ + ".gym_api")
experts: typing.Any = importlib.import_module(HERE.__name__ + ".experts")
values: typing.Any = importlib.import_module(HERE.__name__ + ".values")


# Messages


class Connection:
    """The worker's end of the socket: an answer carries the number of its question, so that none is taken for it."""

    def __init__(self, end):
        self._socket, self._question = end, 0

    def receive(self):
        """One message and the descriptors that came with it; ends the process at the end of the connection."""
        head = b""
        descriptors: typing.List[int] = []
        while len(head) < HEAD.size:
            size = array.array("i").itemsize
            data, ancillary, _, _ = self._socket.recvmsg(HEAD.size - len(head), socket.CMSG_SPACE(4 * size))
            if not data:
                leave()
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % size])
                    descriptors.extend(received)
            head += data
        kind, length, self._question = HEAD.unpack(head)
        body = b""
        while len(body) < length:
            data = self._socket.recv(length - len(body))
            if not data:
                leave()
            body += data
        return kind, json.loads(body.decode()) if body else {}, descriptors

    def send(self, kind, content=None):
        """Sends one message, the answer to the last one received."""
        body = b"" if content is None else json.dumps(content).encode()
        self._socket.sendall(HEAD.pack(kind, len(body), self._question) + body)


def leave():
    """Ends this process and every process it has started; libraries' exit handlers may hang, so none are run."""
    with contextlib.suppress(OSError):
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
    os._exit(0)


def die_with_host(lifeline):
    """Lets the kernel kill this process and its children when the host is gone, even in the middle of a call.

    The host holds the other end of the pipe `lifeline`. This works where a thread that waits would be kept out by a
    library that holds the interpreter's lock, and does not, as the parent-death signal, hang on the host's thread.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid() if os.getpgid(0) == os.getpid() else os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            if os.read(lifeline, 1) == b"":  # it was gone before the signal was asked for
                leave()


# The library


def load_registry(job) -> typing.Any:
    """The module `gym` or `gymnasium`, its registry's entries by id once the library is imported, and bridged ids."""
    sys.path[:0] = job["path"]
    gym = importlib.import_module(job["api"])
    for name in job["imports"]:
        importlib.import_module(name)
    registry = gym.envs.registry
    entries = getattr(registry, "env_specs", registry)  # gym 0.21 wraps it
    before = set(entries)
    if job["bridge"]:
        stem = os.path.splitext(os.path.basename(job["bridge"]))[0]
        load(job["bridge"], "ldm_jax_bridge_" + stem).register()
    return gym, entries, set(entries) - before


def list_registry(job):
    """The module that each id's environment comes from; empty where it does not say, `bridge` for those of a bridge."""
    _, entries, bridged = load_registry(job)
    modules = {}
    for id in entries:
        point = entries[id].entry_point
        module = point.partition(":")[0] if isinstance(point, str) else getattr(point, "__module__", "")
        modules[id] = "bridge" if id in bridged else module
    return modules


def versions():
    """Versions of what is installed here, by distribution."""
    try:
        from importlib import metadata
    except ImportError:  # Python 3.7
        import pkg_resources

        return {item.project_name: item.version for item in pkg_resources.working_set}
    return {item.metadata["Name"]: item.version for item in metadata.distributions() if item.metadata["Name"]}


# Serving


def attach(library, environment, program, job, content, descriptor):
    """The rows of this worker in the file of arrays."""
    memory = mmap.mmap(descriptor, content["size"])
    os.close(descriptor)
    arrays = {name: np.ndarray(shape, dtype, memory, offset) for name, shape, dtype, offset in content["arrays"]}
    beside = None
    if program is not None:
        place = program, environment.action_space, arrays, content["worker"]
        beside = experts.Experts(*place, limit_s=job["expert"]["limit_s"])
    return gym_api.Rows(
        library,
        environment,
        arrays,
        range(content["first"], content["first"] + content["rows"]),
        worker=content["worker"],
        experts=beside,
        owns_process=True,
        global_randomness=job["global_randomness"],
    )


def make_library(job):
    """The library of a job, and the first environment."""
    gym, entries, _ = load_registry(job)
    if job["name"] not in entries:
        raise values.RefusedError(f"{job['library']} has no environment {job['name']!r}")
    fields = ("options", "time_limit", "seed_option", "seed_arguments", "seed_every_reset", "remake", "plain_integers")
    library = gym_api.Library(gym, entries[job["name"]], **{name: job[name] for name in fields})
    return library, library.make()


def load_expert(asked):
    """What makes the expert of a job, or None where it asks for none."""
    return load(asked["file"], "ldm_jax_experts").EXPERTS[asked["name"]] if asked else None


def greet(connection):
    """Makes the first environment and says what it is."""
    kind, content, descriptors = connection.receive()
    lifeline, log = descriptors
    die_with_host(lifeline)
    for standard in (1, 2):  # what libraries print must not get lost, nor reach the socket
        os.dup2(log, standard)
    os.close(log)
    if kind != b"H" or content.get("protocol") != PROTOCOL:
        text = f"got the protocol {content.get('protocol')}, expected {PROTOCOL}: host and worker differ in version"
        connection.send(b"E", {"reason": "protocol", "text": text})
        leave()
    job = content["job"]
    try:
        random.seed(0)  # some make what they declare by chance
        np.random.seed(0)
        about = {"protocol": PROTOCOL, "python": platform.python_version(), "versions": versions()}
        if not job["name"]:
            connection.send(b"S", {**about, "ids": list_registry(job)})
            leave()
        library, environment = make_library(job)
        program = load_expert(job["expert"])
        spec = {
            **about,
            "observation_space": values.describe(environment.observation_space),
            "action_space": values.describe(environment.action_space),
            "time_limit": library.known_limit(environment),
            "mask": library.count_choices(environment),
        }
    except values.RefusedError as error:
        connection.send(b"E", {"reason": "refused", "text": str(error)})
        leave()
    except gym_api.FAILURES as error:
        connection.send(b"E", {"reason": "failed", "text": gym_api.report(error)})
        leave()
    connection.send(b"S", spec)
    return job, library, environment, program


def resident_bytes():
    """Memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def main(where):
    """Serves until the host goes."""
    if where.isdigit():
        end = socket.socket(fileno=int(where))
    else:
        end = socket.socket(socket.AF_UNIX)
        end.connect(where)
    connection = Connection(end)
    job, library, environment, program = greet(connection)
    rows: typing.Any = None
    calls = 0
    while True:
        kind, content, descriptors = connection.receive()
        if kind == b"A":
            rows = attach(library, environment, program, job, content, descriptors[0])
            rows.is_full = lambda: resident_bytes() > job["memory_limit"]
            connection.send(b"K")
            continue
        if kind == b"Q":
            errors = [gym_api.report(error) for error in (rows.close() if rows else ())]
            connection.send(b"K", {"errors": errors} if errors else None)
            leave()
        faults = [[row, kind, gym_api.report(error)] for row, kind, error in rows.obey()]
        rows.is_full = None  # what is held from now on beyond the limit is a leak
        calls += 1
        if calls % 16 == 0:
            if os.fstat(2).st_size > MAX_LOG_BYTES:
                os.ftruncate(2, 0)
            if resident_bytes() > job["memory_limit"]:
                faults.append([-1, "memory", f"the worker holds {resident_bytes() >> 20} MB, more than its limit"])
        content = {"faults": faults} if faults else {}
        if rows.experts is not None and rows.experts.notes:
            content["notes"], rows.experts.notes = rows.experts.notes, []
        connection.send(b"F" if faults else b"K", content or None)


if __name__ == "__main__":
    main(sys.argv[1])

"""Serves some rows of one environment of a Gymnasium or old Gym library; the host side is `environments.isolation`.

Runs in the library's own interpreter: the standard library, numpy, and Python 3.7 or later are all it needs. It is
given the descriptor of a Unix socket that the host has connected, or the path of one to connect to, and owns nothing
else: whatever happens to either side, no file, socket or process is left.

A message is one byte that says what it is, four bytes of length (little endian), and that many bytes of JSON. The
host asks and the worker answers, one for one:

  H {protocol, job}, with descriptors of the lifeline and of the log: make an environment of this job
      -> S {protocol, python, versions, observation_space, action_space, time_limit, mask}, or E {reason, text}
     or, where the job names no environment, say which the library's imports have registered
      -> S {protocol, python, versions, ids: {id: module of its entry point}}
  A {worker, first, rows, arrays, size}, with the descriptor of the file of arrays: these rows are yours
      -> K
  G: obey the command of each of your rows
      -> K, or F {faults: [[row, kind, text], ...]}
  Q: close the environments and end
      -> K

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
import traceback
import typing

import numpy as np

PROTOCOL = 2
HEAD = struct.Struct("<cII")
"""Of a message: its kind, the length of what follows in bytes, and the number of the question."""
IDLE, STEP, RESET, SEED, REMAKE = range(5)
"""Commands of a row; SEED resets under the row's seed, REMAKE makes the environment anew before that."""

MISSION_BYTES = 512
"""MiniGrid does not say how long its missions are; the longest of BabyAI's have about 200 characters."""
MAX_ERROR_CHARS = 4000
MAX_LOG_BYTES = 1 << 20

PRINTABLE = "".join(map(chr, range(9, 14))) + "".join(map(chr, range(32, 127)))


class RefusedError(Exception):
    """The environment cannot be offered, whatever is tried."""


class WrongError(Exception):
    """What an environment returned is not what it declared."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


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


# Spaces, of gymnasium and of gym alike: known by the names of their kinds


KINDS = ("Dict", "Tuple", "Box", "Discrete", "MultiDiscrete", "MultiBinary", "Text", "MissionSpace")


def kind_of(space):
    """The nearest supported kind that a space is or descends from; empty for one of no such kind."""
    return next((kind.__name__ for kind in type(space).__mro__ if kind.__name__ in KINDS), "")


def describe(space):
    """A space as JSON values, in the form of `ldm_jax.spaces.to_json`."""
    kind = kind_of(space)
    if kind == "Dict":
        if not all(isinstance(key, str) for key in space.spaces):
            raise RefusedError(f"its Dict space has keys that are not strings: {sorted(map(repr, space.spaces))}")
        return {"kind": "Dict", "spaces": {key: describe(space.spaces[key]) for key in sorted(space.spaces)}}
    if kind == "Tuple":
        return {"kind": "Tuple", "spaces": [describe(child) for child in space.spaces]}
    if kind == "Box":
        low, high = describe_bounds(space.low), describe_bounds(space.high)
        return {"kind": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if kind == "Discrete":
        return {"kind": "Discrete", "n": int(space.n), "start": int(getattr(space, "start", 0))}
    if kind == "MultiDiscrete":
        nvec = np.asarray(space.nvec)
        start = np.asarray(getattr(space, "start", np.zeros_like(nvec)))
        return {"kind": "MultiDiscrete", "nvec": nvec.tolist(), "start": start.tolist()}
    if kind == "MultiBinary":
        return {"kind": "MultiBinary", "shape": np.atleast_1d(space.shape if space.shape else space.n).tolist()}
    if kind == "Text":
        charset = "".join(sorted(space.character_set))
        return {"kind": "Text", "min_length": space.min_length, "max_length": space.max_length, "charset": charset}
    if kind == "MissionSpace":
        return {"kind": "Text", "min_length": 0, "max_length": MISSION_BYTES, "charset": "".join(sorted(PRINTABLE))}
    raise RefusedError(f"a space of kind {type(space).__name__} is not supported: {str(space)[:200]}")


def describe_bounds(values):
    """Bounds as a nested list, or as one number where they are all the same; infinity as a word."""

    def number(value):
        return str(value) if isinstance(value, float) and np.isinf(value) else value

    flat = np.ravel(values).tolist()
    if flat and all(value == flat[0] for value in flat):
        return number(flat[0])
    return [number(value) for value in flat]


def find_leaves(space, path=()):
    """(path, space) of each leaf in canonical order: Dict by sorted key, Tuple by position."""
    kind = kind_of(space)
    if kind == "Dict":
        children = [(key, space.spaces[key]) for key in sorted(space.spaces)]
    elif kind == "Tuple":
        children = list(enumerate(space.spaces))
    else:
        return [(path, space)]
    return [leaf for key, child in children for leaf in find_leaves(child, (*path, key))]


def build(space, leaves):
    """The values of an iterator, one per leaf, in the structure of the space."""
    kind = kind_of(space)
    if kind == "Dict":
        return {key: build(space.spaces[key], leaves) for key in sorted(space.spaces)}
    if kind == "Tuple":
        return tuple(build(child, leaves) for child in space.spaces)
    return next(leaves)


def name_of(path):
    """How a part of an observation is called in errors."""
    words = "/".join(map(str, path))
    return f"the observation, part {words!r}," if path else "the observation"


def write(slot, path, kind, space, observation):
    """Writes one leaf of an observation into its place `[...]` of the arrays, if it has the shape it should have."""
    value = observation
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise WrongError("shape", f"{name_of(path)} is missing") from None
    if kind in ("Text", "MissionSpace"):
        text = np.frombuffer(str(value).encode(), np.uint8)
        if len(text) > len(slot):
            raise WrongError("shape", f"{name_of(path)} has {len(text)} bytes, expected at most {len(slot)}")
        slot[...] = 0
        slot[: len(text)] = text
        return
    value = np.asarray(value)
    if value.dtype == slot.dtype and value.shape == slot.shape:  # as most are
        slot[...] = value
        return
    if value.dtype == object or value.dtype.kind not in "biuf":
        raise WrongError("shape", f"{name_of(path)} is of type {value.dtype}, expected numbers")
    if value.shape != slot.shape:
        if value.size != slot.size or value.size != 1:  # scalars come as [1]
            expected = list(slot.shape)
            raise WrongError("shape", f"{name_of(path)} has shape {list(value.shape)}, expected {expected}")
        value = value.reshape(slot.shape)
    if slot.dtype.kind in "iu" and value.dtype != slot.dtype:
        limits = np.iinfo(slot.dtype)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise WrongError("nan", f"{name_of(path)} is not finite")
        if kind == "Box":
            value = np.clip(value, limits.min, limits.max)
        elif value.size and not (limits.min <= value.min() and value.max() <= limits.max):
            raise WrongError("category", f"{name_of(path)} has the value {value.ravel()[0]}, outside {space}")
    slot[...] = value


def read(slot, kind, space):
    """One leaf of an action as the library wants it."""
    if kind == "Discrete":
        return slot.item()
    dtype = space.dtype if space.dtype is not None else slot.dtype
    return np.array(slot, dtype).reshape(space.shape)


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
        load(job["bridge"]).register()
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


class Library:
    """What is the same for gymnasium, gym 0.26 and gym 0.21: make, reset, step."""

    def __init__(self, job):
        self.job = job
        self.gym, entries, _ = load_registry(job)
        if job["name"] not in entries:
            raise RefusedError(f"{job['library']} has no environment {job['name']!r}")
        self.spec = entries[job["name"]]
        # We keep the time limit; none of the library's wrappers may end an episode before it.
        self.time_limit = self.spec.max_episode_steps
        self.spec.max_episode_steps = None
        self.spec.disable_env_checker = True  # the host checks, at every step

    def make(self):
        """One environment."""
        options = dict(self.job["kwargs"])
        if self.job["seed_option"]:
            options[self.job["seed_option"]] = random.randrange(1 << 31)
        return self.gym.make(self.job["name"], **options)

    def reset(self, environment, seed=None):
        """The first observation and what is known beside it."""
        if self.job["seed_arguments"]:
            # These want seeds before every reset, and would draw true randomness without.
            environment.unwrapped.seed(**{name: random.randrange(1 << 31) for name in self.job["seed_arguments"]})
        if seed is not None and not self.job["seed_option"]:
            try:
                result = environment.reset(seed=seed)
            except TypeError:  # before gym 0.26
                environment.seed(seed)
                result = environment.reset()
        else:
            result = environment.reset()
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
            return result
        return result, {}

    def step(self, environment, action):
        """Observation, reward, terminated, truncated, and what is known beside them."""
        result = environment.step(action)
        if not isinstance(result, tuple) or len(result) not in (4, 5):
            raise WrongError("shape", f"step returned {type(result).__name__}, expected a tuple of 4 or 5")
        if len(result) == 5:
            return result
        observation, reward, done, info = result
        truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
        return observation, reward, bool(done) and not truncated, truncated, info

    def known_limit(self, environment):
        """The number of steps after which the library cuts an episode off, where it says so; else None."""
        inner = environment.unwrapped
        for value in (self.time_limit, *(getattr(inner, name, None) for name in ("max_steps", "_max_episode_steps"))):
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0:
                return int(value)
        return None


def load(path):
    """The module in a file, whatever else has its name."""
    name = "ldm_jax_bridge_" + os.path.splitext(os.path.basename(path))[0]
    spec: typing.Any = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions():
    """Versions of what is installed here, by distribution."""
    try:
        from importlib import metadata
    except ImportError:  # Python 3.7
        import pkg_resources

        return {item.project_name: item.version for item in pkg_resources.working_set}
    return {item.metadata["Name"]: item.version for item in metadata.distributions() if item.metadata["Name"]}


@contextlib.contextmanager
def own_randomness(states, row):
    """Runs a row under its own state of the interpreter's two global generators, which libraries do use."""
    if row in states:
        python, numpy = states[row]
        random.setstate(python)
        np.random.set_state(numpy)
    yield
    states[row] = random.getstate(), np.random.get_state()


# Serving


class Rows:
    """The environments of this worker and their places in the file of arrays."""

    def __init__(self, library, first_environment, content, descriptor):
        self.library = library
        self.environments = {}
        self.generators = {}
        self.spare = first_environment
        self.observation_space, self.action_space = first_environment.observation_space, first_environment.action_space
        memory = mmap.mmap(descriptor, content["size"])
        os.close(descriptor)
        self.arrays = {
            name: np.ndarray(shape, dtype, memory, offset) for name, shape, dtype, offset in content["arrays"]
        }
        self.range = range(content["first"], content["first"] + content["rows"])
        self.heartbeat = self.arrays["heartbeat"][content["worker"] : content["worker"] + 1]
        self.calls = int(self.heartbeat[0])
        # Looked up at every step of every row.
        self.rewards, self.terminateds, self.truncateds = (
            self.arrays[name] for name in ("reward", "terminated", "truncated")
        )
        self.masks = self.arrays.get("mask")
        self.observation_places = self.find_places("observation", self.observation_space)
        self.action_places = self.find_places("action", self.action_space)
        self.action_is_nested = kind_of(self.action_space) in ("Dict", "Tuple")
        # Rows that share a generator would depend on how rows are split among workers.
        self.states: typing.Any = {} if library.job["global_randomness"] else None

    def find_places(self, prefix, space):
        """For each row, the place of each leaf in the arrays, the leaf's path, kind and space."""
        leaves = find_leaves(space)
        arrays = [self.arrays[f"{prefix}/{i}"] for i in range(len(leaves))]
        return {
            row: [
                (slots[row : row + 1].reshape(slots.shape[1:]), path, kind_of(leaf), leaf)
                for slots, (path, leaf) in zip(arrays, leaves)
            ]
            for row in self.range
        }

    def obey(self):
        """Does what each row is told to; the faults of those that failed."""
        commands, faults = self.arrays["command"][self.range.start : self.range.stop].tolist(), []
        for row, command in zip(self.range, commands):
            if command == IDLE:
                continue
            self.count()
            try:
                obey = self.step if command == STEP else self.reset
                if self.states is None:
                    obey(row, command)
                else:
                    with own_randomness(self.states, row):
                        obey(row, command)
            except Exception as error:
                kind = error.kind if isinstance(error, WrongError) else "exception"
                text = str(error) if isinstance(error, WrongError) else tail(traceback.format_exc())
                faults.append([row, kind, text])
                self.drop(row)
        self.count()
        return faults

    def count(self):
        """Counts a call to the library, for the host to see."""
        self.calls += 1
        self.heartbeat[0] = self.calls

    def step(self, row, command):
        """Steps one row."""
        values = [read(slot, kind, space) for slot, _, kind, space in self.action_places[row]]
        action = build(self.action_space, iter(values)) if self.action_is_nested else values[0]
        observation, reward, terminated, truncated, info = self.library.step(self.environments[row], action)
        if not isinstance(reward, (float, int)):
            reward = np.asarray(reward, np.float64)
            if reward.size != 1:
                raise WrongError("shape", f"the reward has shape {list(reward.shape)}, expected one number")
            reward = reward.item()
        self.put(row, observation, reward, bool(terminated), bool(truncated), info)

    def reset(self, row, command):
        """Resets one row, or makes it."""
        seed, job = None, self.library.job
        made_of_seed = job["remake"] or bool(job["seed_option"])
        if command in (SEED, REMAKE):
            seed = int(self.arrays["seed"][row])
            random.seed(seed)
            np.random.seed(seed)
            self.generators[row] = random.Random(seed)
            if command == REMAKE or made_of_seed:
                self.drop(row)
        elif job["seed_every_reset"]:
            seed = self.generators[row].randrange(1 << 31)
        if row not in self.environments:
            # The environment that told the spaces serves, unless it depends on its seed.
            spare, self.spare = self.spare, None
            self.environments[row] = self.library.make() if spare is None or made_of_seed else spare
        observation, info = self.library.reset(self.environments[row], seed)
        self.put(row, observation, 0.0, False, False, info)

    def put(self, row, observation, reward, terminated, truncated, info):
        """Writes what came of one row into the arrays."""
        for slot, path, kind, space in self.observation_places[row]:
            write(slot, path, kind, space, observation)
        self.rewards[row], self.terminateds[row], self.truncateds[row] = reward, terminated, truncated
        if self.masks is not None:
            mask = np.asarray(info["action_mask"], bool).ravel()
            self.masks[row] = mask if mask.any() else True

    def drop(self, row):
        """Closes the environment of a row, as well as it can be."""
        environment = self.environments.pop(row, None)
        if environment is not None:
            with contextlib.suppress(Exception):
                environment.close()


def tail(text):
    """The end of a long text, which is where a traceback says what is wrong."""
    return text if len(text) <= MAX_ERROR_CHARS else "... " + text[-MAX_ERROR_CHARS:]


def mask_of(library, environment):
    """The number of choices of a Discrete action space whose library says which of them are allowed; else 0."""
    if kind_of(environment.action_space) != "Discrete":
        return 0
    try:
        _, info = library.reset(environment, 0)
    except Exception:  # resets that fail are the host's to count
        return 0
    size = int(environment.action_space.n)
    return size if np.shape(info.get("action_mask")) == (size,) else 0


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
    try:
        random.seed(0)  # some make what they declare by chance
        np.random.seed(0)
        about = {"protocol": PROTOCOL, "python": platform.python_version(), "versions": versions()}
        if not content["job"]["name"]:
            connection.send(b"S", {**about, "ids": list_registry(content["job"])})
            leave()
        library = Library(content["job"])
        environment = library.make()
        spec = {
            **about,
            "observation_space": describe(environment.observation_space),
            "action_space": describe(environment.action_space),
            "time_limit": library.known_limit(environment),
            "mask": mask_of(library, environment),
        }
    except RefusedError as error:
        connection.send(b"E", {"reason": "refused", "text": str(error)})
        leave()
    except Exception:
        connection.send(b"E", {"reason": "failed", "text": tail(traceback.format_exc())})
        leave()
    connection.send(b"S", spec)
    return library, environment


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
    library, environment = greet(connection)
    rows: typing.Any = None
    calls = 0
    while True:
        kind, content, descriptors = connection.receive()
        if kind == b"A":
            rows = Rows(library, environment, content, descriptors[0])
            connection.send(b"K")
            continue
        if kind == b"Q":
            for row in rows.range if rows else ():
                rows.drop(row)
            connection.send(b"K")
            leave()
        faults = rows.obey()
        calls += 1
        if calls % 16 == 0:
            if os.fstat(2).st_size > MAX_LOG_BYTES:
                os.ftruncate(2, 0)
            if resident_bytes() > library.job["memory_limit"]:
                text = f"the worker holds {resident_bytes() >> 20} MB, more than its limit"
                faults = [*faults, [-1, "memory", text]]
        connection.send(b"F", {"faults": faults}) if faults else connection.send(b"K")


if __name__ == "__main__":
    main(sys.argv[1])

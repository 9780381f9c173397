"""Environments that behave until they are told not to: action 3 makes trouble of the kind that the id names."""

import gc
import importlib
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time

import numpy as np

gym = importlib.import_module(os.environ.get("MISBEHAVING_API", "gymnasium"))
spaces = gym.spaces

OLD = not hasattr(spaces, "Text")
"""Gym 0.21: see `Old`."""
TROUBLE = 3
START = 0 if OLD else 5


class Seeded(gym.Env):
    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.default_rng(seed)


class Steady(Seeded):
    """Walks up from a random place; what it sees is the place, the number of steps and their parity."""

    def __init__(self):
        parity = spaces.Discrete(2) if OLD else spaces.Discrete(2, start=START)
        self.observation_space = spaces.Dict(place=spaces.Box(-np.inf, np.inf, (2,), np.float64), parity=parity)
        self.action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.normal(), 0
        return self.see(), {}

    def step(self, action):
        assert type(action) is type(self.action_space.sample())
        if action == TROUBLE:
            result = self.trouble()
            if result is not None:
                return result
        self.place += action + self.noise()
        self.steps += 1
        return self.see(), float(action), self.steps == 30, False, {}

    def see(self):
        return {"place": np.array([self.place, self.steps]), "parity": START + self.steps % 2}

    def noise(self):
        return self.np_random.normal()

    def trouble(self):
        """Returns what `step` is to return, or None to go on."""


class Shared(Steady):
    """Draws from the interpreter's global generator."""

    def noise(self):
        return np.random.normal()


class Crash(Steady):
    def trouble(self):
        print("about to crash", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGSEGV)


class Exit(Steady):
    def trouble(self):
        os._exit(7)


class Orphan(Steady):
    """Leaves a child of its own behind when it crashes."""

    def trouble(self):
        child = subprocess.Popen(["sleep", "1000"])
        print(f"child {child.pid}", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGKILL)


class Hang(Steady):
    """Hangs and holds the interpreter's lock."""

    def trouble(self):
        re.match(r"(a*)*b", "a" * 100)


class Sleep(Steady):
    def trouble(self):
        time.sleep(1000)


class Slow(Steady):
    """Each call takes a while, a whole batch longer than the limit of one call."""

    def step(self, action):
        time.sleep(0.3)
        return super().step(action)


class Raise(Steady):
    def trouble(self):
        raise RuntimeError("no such move")


class NanObservation(Steady):
    def trouble(self):
        return self.see() | {"place": np.array([0, np.nan])}, 0.0, False, False, {}


class NanReward(Steady):
    def trouble(self):
        return self.see(), float("nan"), False, False, {}


class HugeReward(Steady):
    def trouble(self):
        return self.see(), 1e300, False, False, {}


class WrongShape(Steady):
    def trouble(self):
        return self.see() | {"place": np.zeros(3)}, 0.0, False, False, {}


class WrongType(Steady):
    def trouble(self):
        return self.see() | {"place": ["a", None]}, 0.0, False, False, {}


class MissingPart(Steady):
    def trouble(self):
        return {"parity": START}, 0.0, False, False, {}


class NoTuple(Steady):
    def trouble(self):
        return self.see()


class NoSuchCategory(Steady):
    def trouble(self):
        return self.see() | {"parity": 7}, 0.0, False, False, {}


def _sockets():
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                yield int(name)
        except OSError:
            pass


class Garbage(Steady):
    """Writes to a socket that is not its own."""

    def trouble(self):
        for descriptor in _sockets():
            os.write(descriptor, b"what you see is not a message")


class Forged(Steady):
    """Writes to the socket what looks like the answer that is waited for."""

    def trouble(self):
        (question,) = [thing._question for thing in gc.get_objects() if type(thing).__name__ == "Connection"]
        for descriptor in _sockets():
            os.write(descriptor, struct.pack("<cII", b"F", 5, question) + b"[1,2]")


class Twice(Steady):
    """Answers twice, first to a question that nobody asked."""

    def trouble(self):
        for descriptor in _sockets():
            os.write(descriptor, b"K" + bytes(8))


class HangUp(Steady):
    """Closes the host's connection."""

    def trouble(self):
        for descriptor in _sockets():
            socket.socket(fileno=descriptor).shutdown(socket.SHUT_RDWR)


class Heavy(Steady):
    """Takes 60 MB at its first reset, and no more."""

    held = None

    def reset(self, *, seed=None, options=None):
        if self.held is None:
            self.held = np.ones(60 << 17)
        return super().reset(seed=seed, options=options)


class Leak(Steady):
    """Takes 20 MB and never gives it back, again at every step."""

    kept = None

    def trouble(self):
        self.kept = []

    def step(self, action):
        result = super().step(action)
        if self.kept is not None:
            memory = mmap.mmap(-1, 20_000_000)
            memory[:: mmap.PAGESIZE] = b"\1" * len(range(0, len(memory), mmap.PAGESIZE))
            self.kept.append(memory)
        return result


class Chatter(Steady):
    """Prints a lot; that is no fault."""

    def trouble(self):
        print("x" * 300_000)


class RarelyStarts(Steady):
    """Two of three resets fail."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.np_random.random() < 2 / 3:
            raise RuntimeError("not this time")
        return super().reset()


class NeverStarts(Steady):
    def reset(self, *, seed=None, options=None):
        raise RuntimeError("never")


class CannotBeMade(Steady):
    def __init__(self):
        raise RuntimeError("no display")


class HangsWhenMade(Steady):
    def __init__(self):
        time.sleep(1000)


class SequenceSpace(Steady):
    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Sequence(spaces.Discrete(3))


class IntegerKeys(Steady):
    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict({1: spaces.Discrete(2)})


class TextAction(Steady):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Text(4)


class Replaces(Steady):
    """Does something else than it is told, and says so."""

    def step(self, action):
        executed = (int(action) + 1) % 3
        return (*super().step(type(action)(executed))[:-1], {"action_executed": executed})


class Choosy(Steady):
    """Says which actions are allowed."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"action_mask": np.array([1, 0, 1, 0], np.int8)}

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"action_mask": np.zeros(4, np.int8)}


class Everything(Seeded):
    """Every kind of space; the observation is the last action and more."""

    def __init__(self):
        self.action_space = spaces.Dict(
            move=spaces.Box(np.float64(-1), np.float64(1), (2,), np.float64),
            level=spaces.Box(-2, 3, (2,), np.int64),
            word=spaces.Tuple([spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 5]), spaces.MultiBinary(3)]),
        )
        self.observation_space = spaces.Dict(
            action=self.action_space,
            image=spaces.Box(0, 255, (4, 5, 3), np.uint8),
            counter=spaces.Discrete(10**6),
            words=spaces.Text(12, charset="aä "),
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.action_space.seed(int(self.np_random.integers(2**31)))
        self.count = int(self.np_random.integers(1000))
        return self.see(self.action_space.sample()), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"{action} is not in {self.action_space}")
        self.count += 1
        return self.see(action), np.float64(self.count), self.count % 40 == 0, False, {}

    def see(self, action):
        image = np.full((4, 5, 3), self.count % 256, np.uint8)
        return {"action": action, "image": image, "counter": self.count, "words": "ä" * (self.count % 13)}


# Oddities that are no faults, and faults of single rows: they can be tried in the interpreter of the host too.


class InfoOfMixedTypes(Steady):
    """What nobody reads cannot be put into one array."""

    def step(self, action):
        *rest, _ = super().step(action)
        return (*rest, {"lap_time": 12 if action else None, 3: [object()]})


class InfoIsNone(Steady):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], None

    def step(self, action):
        return (*super().step(action)[:-1], None)


class MaskIsAList(Choosy):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"action_mask": [True, False, True, True]}

    def step(self, action):
        return (*Steady.step(self, action)[:-1], {"action_mask": [0, 1, 1, 0]})


class MaskIsMissingAtTheEnd(MaskIsAList):
    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        ends = self.steps == 4
        return observation, reward, ends, False, {} if ends else info


class MaskOfAnotherSize(MaskIsAList):
    def trouble(self):
        return self.see(), 0.0, False, False, {"action_mask": [1, 1]}

    def step(self, action):
        return Steady.step(self, action)


class MaskIsOneOfEachSlot(Seeded):
    """Masks as Gymnasium's MultiDiscrete wants them, or as one array."""

    def __init__(self):
        self.observation_space = spaces.Box(0, 1, (2,), np.float32)
        self.action_space = spaces.MultiDiscrete([2, 3])

    def mask(self):
        return (np.array([1, 0], np.int8), np.array([0, 1, self.steps % 2], np.int8))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {"action_mask": self.mask()}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        # At the end nothing is allowed in the second slot.
        mask = (np.ones(2, np.int8), np.zeros(3, np.int8)) if self.steps == 5 else self.mask()
        return action.astype(np.float32) / 3, 0.0, self.steps == 5, False, {"action_mask": mask}


class MaskIsFlat(MaskIsOneOfEachSlot):
    def mask(self):
        return np.concatenate(super().mask())


class KeysInTheirOwnOrder(Seeded):
    """Takes actions in the order of its space, which is not that of the alphabet."""

    def __init__(self):
        parts = {"turn": spaces.Discrete(3), "accelerate": spaces.Box(np.float32(-1), np.float32(1), (1,))}
        self.action_space = spaces.Dict([*parts.items()])
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert list(action) == list(self.action_space.sample()) == list(self.action_space.spaces)
        turn, accelerate = action.values()
        return np.array([turn, accelerate[0]], np.float32), 0.0, False, False, {}


class ReadsItsSpec(Steady):
    def reset(self, *, seed=None, options=None):
        assert self.spec.id == "ReadsItsSpec-v0"
        return super().reset(seed=seed)


class ReadsItsLimit(Steady):
    """Its wrapper, see below, shows the limit that its registration has."""


class ChangesFolder(Steady):
    """Works in a folder of its own, where its files are."""

    def __init__(self):
        os.chdir(os.path.dirname(os.path.abspath(__file__)))
        super().__init__()

    def step(self, action):
        assert os.path.exists("__init__.py")
        return super().step(action)


class CloseRaises(Steady):
    viewer = None

    def close(self):
        self.viewer.close()


class TakesOptions(Steady):
    """Shows whether it was given what `gymnasium.make` gives, and spoils it for whoever gets the same objects."""

    def __init__(self, size=(), prices=None, weights=None, level=0):
        super().__init__()
        known = isinstance(size, tuple) and type(level) is np.int16 and set(prices) == {0, 1}
        self.offset = 100.0 * known + prices[1] + float(weights.sum())
        weights += 1
        prices.clear()

    def noise(self):
        return self.offset


class BeyondItsBounds(Steady):
    """Shows numbers that their type here does not hold, in a space of bytes that it leaves."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(
            picture=spaces.Box(0, 255, (2,), np.uint8), count=spaces.Box(0, 100, (1,), np.int64)
        )

    def see(self):
        return {"picture": np.array([self.steps * 100, 3]), "count": np.array([self.steps * 10**10])}


class WideIntegers(Steady):
    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(
            cents=spaces.Box(0, 10**12, (1,), np.int64), ticks=spaces.Box(0, 2**32 - 1, (), np.uint32)
        )

    def see(self):
        return {"cents": np.array([(5 + self.steps) * 10**9]), "ticks": np.uint32(2**32 - 2**10 * (1 + self.steps))}


class FarDiscrete(Steady):
    """Its actions start where 32 bits end."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Discrete(5) if OLD else spaces.Discrete(5, start=2**33)

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(0)


class ExitsInStep(Steady):
    """As programs of pygame do when their window is closed."""

    def trouble(self):
        sys.exit()


class ExitsInReset(Steady):
    def reset(self, *, seed=None, options=None):
        sys.exit(3)


class TypeErrorInReset(Steady):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1) + None, {}


class ResetReturnsNone(Steady):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)


class ResetReturnsTheObservation(Steady):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class ResetTakesNoSeed(Steady):
    def reset(self):
        return super().reset()


class Huge(Steady):
    """A million bytes a row."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (1 << 20,), np.uint8)


class Old(gym.Env):
    """Any of them in the manners of Gym 0.21: a method `seed`, observations alone from `reset`, one flag of the end."""

    def __init__(self, make):
        self.inner, self.next_seed = make(), 0
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space

    def seed(self, seed=None):
        self.next_seed = seed

    def reset(self):
        seed, self.next_seed = self.next_seed, None
        return self.inner.reset(seed=seed)[0]

    def step(self, action):
        result = self.inner.step(action)
        if not isinstance(result, tuple):
            return result
        observation, reward, terminated, truncated, info = result
        return observation, reward, terminated, {**info, "TimeLimit.truncated": truncated}


def descendants(kind):
    return [each for child in kind.__subclasses__() for each in (child, *descendants(child))]


for environment in descendants(Seeded):
    if OLD:
        gym.register(f"{environment.__name__}-v0", entry_point=Old, kwargs={"make": environment})
    elif environment is not ReadsItsLimit or gym.__name__ == "gym":
        gym.register(f"{environment.__name__}-v0", environment)
if gym.__name__ == "gymnasium":

    class ShowsTheLimit(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
        def __init__(self, env):
            gym.utils.RecordConstructorArgs.__init__(self)
            super().__init__(env)

        def observation(self, observation):
            return {**observation, "place": np.full(2, self.env.spec.max_episode_steps)}

    gym.register(
        "ReadsItsLimit-v0", ReadsItsLimit, max_episode_steps=20, additional_wrappers=(ShowsTheLimit.wrapper_spec(),)
    )

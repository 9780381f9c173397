"""Environments of Gymnasium and of old Gym, made, reset and stepped in one way wherever they live.

The worker program (`server.py`) and the adapter in this interpreter (`environments.adapters.gymnasium`) both call
libraries through this module, so that an environment behaves alike in either. The standard library, numpy, and Python
3.7 or later are all it needs; this folder alone is there in interpreters that have nothing else of this package.

Rows are served in arrays: for each row a command and a seed, the action, and what came of it. Whoever owns the arrays
decides when a row is reset, so that no books about episodes are kept here.
"""

import contextlib
import inspect
import math
import random
import traceback
import typing

import numpy as np

from .values import Masks, WrongError, build, decode_options, find_leaves, kind_of, make_reader, write

IDLE, STEP, RESET, SEED, REMAKE = range(5)
"""Commands of a row; SEED resets under the row's seed, REMAKE makes the environment anew before that."""

MAX_ERROR_CHARS = 4000
ARRAYS = ("Box", "MultiDiscrete", "MultiBinary")
"""Kinds of spaces whose values are arrays."""
LARGEST = float(np.finfo(np.float32).max)

FAILURES = (Exception, SystemExit)
"""What a call to a library may raise that is its own fault: some end their program when a window is closed."""


def report(error):
    """The end of an error's traceback, which is where it says what is wrong; of a `WrongError` its text."""
    if isinstance(error, WrongError):
        return error.text
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return text if len(text) <= MAX_ERROR_CHARS else "... " + text[-MAX_ERROR_CHARS:]


# Libraries


class Library:
    """One environment of a library, called in the one way of gymnasium, gym 0.26 and gym 0.21.

    Args:
      gym: the module `gymnasium` or `gym`.
      entry: what its registry has of the environment.
      options: of its `make`, as `encode_options` gives them.
      time_limit: steps that an episode is to have, for the library to know; 0 leaves its own.
      seed_option: the option of `make` that takes the seed, where `reset` takes none.
      seed_arguments: arguments of the environment's method `seed` that want a number before every reset.
      seed_every_reset: whether `reset` without a seed draws true randomness.
      remake: whether `reset` under the same seed is only reproducible on a new environment.
      plain_integers: whether `step` wants Python's integers, though the space samples numpy's.
    """

    def __init__(
        self,
        gym,
        entry,
        options,
        time_limit=0,
        *,
        seed_option="",
        seed_arguments=(),
        seed_every_reset=False,
        remake=False,
        plain_integers=False,
    ):
        self.gym, self.entry, self.options = gym, entry, options
        self.seed_option, self.seed_arguments, self.seed_every_reset = seed_option, seed_arguments, seed_every_reset
        self.plain_integers = plain_integers
        self.made_of_seed = remake or bool(seed_option)
        self.time_limit = time_limit or entry.max_episode_steps
        self.takes_seed: typing.Optional[bool] = None
        known = inspect.signature(gym.make).parameters
        # What is returned is checked at every step, for all libraries alike.
        self.fixed = {"disable_env_checker": True} if "disable_env_checker" in known else {}
        if time_limit and "max_episode_steps" in known:
            self.fixed["max_episode_steps"] = time_limit
        elif time_limit:  # gym 0.21, in a process of its own
            entry.max_episode_steps = time_limit
        # Before gym 0.26 `reset` returned the observation alone.
        self.has_info = gym.__name__ != "gym" or tuple(map(int, gym.__version__.split(".")[:2])) >= (0, 26)

    def make(self):
        """One environment."""
        options = decode_options(self.options)
        if self.seed_option:
            options[self.seed_option] = random.randrange(1 << 31)
        environment = self.gym.make(self.entry.id, **{**self.fixed, **options})
        if self.takes_seed is None:
            self.takes_seed = takes_seed(environment)
        return environment

    def reset(self, environment, seed=None):
        """The first observation and what is known beside it."""
        if self.seed_arguments:
            # These want seeds before every reset, and would draw true randomness without.
            environment.unwrapped.seed(**{name: random.randrange(1 << 31) for name in self.seed_arguments})
        if seed is None or self.seed_option:
            result = environment.reset()
        elif self.takes_seed:
            result = environment.reset(seed=seed)
        elif hasattr(environment, "seed"):  # before gym 0.26
            environment.seed(seed)
            result = environment.reset()
        else:
            raise WrongError("exception", "its reset takes no seed, and it has no method `seed`")
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
            return result
        if not self.has_info:
            return result, {}
        if isinstance(result, tuple) and len(result) == 2 and result[1] is None:
            return result[0], {}
        raise WrongError(
            "shape",
            f"reset returned {summary(result)}, expected a pair of the observation and a dict: `return obs, {{}}`",
        )

    def read_step(self, result):
        """Observation, reward, terminated, truncated, and what is known beside them, of what `step` returned."""
        if not isinstance(result, tuple) or len(result) not in (4, 5):
            raise WrongError("shape", f"step returned {summary(result)}, expected a tuple of 4 or 5")
        if len(result) == 5:
            return result
        observation, reward, done, info = result
        truncated = bool(done) and isinstance(info, dict) and bool(info.get("TimeLimit.truncated", False))
        return observation, reward, bool(done) and not truncated, truncated, info

    def known_limit(self, environment):
        """The number of steps after which the library cuts an episode off, where it says so; else None."""
        inner = environment.unwrapped
        for value in (self.time_limit, *(getattr(inner, name, None) for name in ("max_steps", "_max_episode_steps"))):
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0:
                return int(value)
        return None

    def count_choices(self, environment):
        """Choices of the action space whose library says which of them are allowed; 0 where it does not say."""
        masks = Masks(environment.action_space)
        if not masks.size:
            return 0
        try:
            _, info = self.reset(environment, 0)
            if info.get("action_mask") is None:
                return 0
            masks.row(info["action_mask"])
        except FAILURES:  # a reset that fails is seen again when it counts; another thing of that name is no mask
            return 0
        return masks.size


def read_reward(reward):
    """A reward as a float."""
    if isinstance(reward, (float, int)):
        return float(reward)
    reward = np.asarray(reward, np.float64)
    if reward.size != 1:
        raise WrongError("shape", f"the reward has shape {list(reward.shape)}, expected one number")
    return reward.item()


def summary(value):
    """What a call returned, in a few words."""
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def takes_seed(environment):
    """Whether `reset` takes a seed, as far as signatures say; wrappers of the library's own interface pass it on."""
    layer = environment
    while True:
        try:
            parameters = inspect.signature(layer.reset).parameters
        except (TypeError, ValueError):  # it is not written in Python
            return True
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if "seed" not in parameters and not passes_on:
            return False
        own = getattr(type(layer).reset, "__module__", "").partition(".")[0] not in ("gym", "gymnasium")
        inner = getattr(layer, "env", None)
        if ("seed" in parameters and own) or inner is None or not hasattr(inner, "reset"):
            return True
        layer = inner


# Rows


@contextlib.contextmanager
def own_randomness(states, row):
    """Runs a row under its own state of the interpreter's two global generators, which libraries do use."""
    if row in states:
        python, numpy = states[row]
        random.setstate(python)
        np.random.set_state(numpy)
    yield
    states[row] = random.getstate(), np.random.get_state()


class Rows:
    """Environments of some rows of a batch, and their places in the arrays.

    Args:
      library: what they are made of.
      environment: the one that told the spaces; it serves the first row.
      arrays: by name, each `[B, ...]`, but for `heartbeat [workers]`, which counts calls to the library.
      rows: a range.
      worker: which of them this is.
      experts: of the rows (`experts.Experts`), or None.
      owns_process: whether the interpreter's global generators may be seeded.
      global_randomness: whether each row is to have a state of those generators of its own.
    """

    def __init__(
        self, library, environment, arrays, rows, worker=0, *, experts=None, owns_process=False, global_randomness=False
    ):
        self.library, self.arrays, self.rows, self.owns_process = library, arrays, rows, owns_process
        self.environments, self.generators, self.spare, self.experts = {}, {}, environment, experts
        self.is_full = None  # whether memory has no room for another environment; asked while the first are made
        self.action_space = environment.action_space
        self.heartbeat = arrays["heartbeat"][worker : worker + 1]
        self.calls = int(self.heartbeat[0])
        # Looked up at every step of every row.
        self.rewards, self.terminateds, self.truncateds, self.cuts = (
            arrays[name] for name in ("reward", "terminated", "truncated", "cut")
        )
        self.mask_slots, self.masks = arrays.get("mask"), Masks(self.action_space)
        seen, chosen = find_leaves(environment.observation_space), find_leaves(self.action_space)
        self.observation_places = self.find_places([(path, kind_of(leaf), leaf) for path, leaf in seen])
        self.is_array = [path for path, _ in seen] == [()] and kind_of(seen[0][1]) in ARRAYS
        if self.is_array:
            self.dtype, self.shape = arrays["observation/0"].dtype, arrays["observation/0"].shape[1:]
        self.readers = [
            (arrays[f"action/{i}"][rows.start : rows.stop], make_reader(leaf, library.plain_integers))
            for i, (_, leaf) in enumerate(chosen)
        ]
        self.action_is_nested = kind_of(self.action_space) in ("Dict", "Tuple")
        # Rows that share a generator would depend on how rows are split among workers.
        self.states: typing.Any = {} if owns_process and global_randomness else None

    def find_places(self, leaves):
        """For each row, the place of each leaf of its observation in the arrays and what goes with the leaf."""
        arrays = [self.arrays[f"observation/{i}"] for i in range(len(leaves))]
        return {
            row: [(slots[row : row + 1].reshape(slots.shape[1:]), *leaf) for slots, leaf in zip(arrays, leaves)]
            for row in self.rows
        }

    def obey(self):
        """Does what each row is told to.

        Returns:
          Row, kind and error of each that failed; its environment is gone.
        """
        commands, faults = self.arrays["command"][self.rows.start : self.rows.stop].tolist(), []
        step, reset, calls, heartbeat = self.step, self.reset, self.calls, self.heartbeat
        actions = self.read_actions() if STEP in commands else commands
        if self.experts is not None:
            self.experts.begin()
        for row, command, action in zip(self.rows, commands, actions):
            if command == IDLE:
                continue
            if self.owns_process:
                calls += 1
                heartbeat[0] = calls
            try:
                if self.states is not None:
                    with own_randomness(self.states, row):
                        outcome = step(row, action) if command == STEP else reset(row, command)
                elif command == STEP:
                    outcome = step(row, action)
                else:
                    outcome = reset(row, command)
                if self.experts is not None:  # outside of the row's own randomness, which it so leaves alone
                    calls += 1
                    heartbeat[0] = calls
                    executed = action if command == STEP else None
                    place = row, self.environments[row], executed, outcome
                    self.experts.follow(*place, is_new=command in (SEED, REMAKE))
            except FAILURES as error:
                faults.append((row, error.kind if isinstance(error, WrongError) else "exception", error))
                self.drop(row)
        self.calls = heartbeat[0] = calls + 1
        return faults

    def read_actions(self):
        """The action of each row."""
        values = [read(slots) for slots, read in self.readers]
        if not self.action_is_nested:
            return values[0]
        return [build(self.action_space, iter(row)) for _, *row in zip(self.rows, *values)]

    def step(self, row, action):
        """Steps one row; what came of it, as `experts.Experts.follow` takes it."""
        result = self.environments[row].step(action)
        if type(result) is not tuple or len(result) != 5:
            result = self.library.read_step(result)
        observation, reward, terminated, truncated, info = result
        if type(reward) is not float:
            reward = read_reward(reward)
        if not -LARGEST <= reward <= LARGEST:
            reward = math.copysign(math.inf, reward) if reward == reward else reward
        terminated, truncated = bool(terminated), bool(truncated)
        self.put(row, observation, reward, terminated, truncated, info)
        return observation, reward, terminated or truncated, info

    def reset(self, row, command):
        """Resets one row, or makes it; what came of it, as `experts.Experts.follow` takes it."""
        seed, library = None, self.library
        if command in (SEED, REMAKE):
            seed = int(self.arrays["seed"][row])
            if self.owns_process:
                random.seed(seed)
                np.random.seed(seed)
            if library.seed_every_reset:
                self.generators[row] = random.Random(seed)
            if command == REMAKE or library.made_of_seed:
                self.drop(row)
        elif library.seed_every_reset:
            seed = self.generators[row].randrange(1 << 31)
        if row not in self.environments:
            # The environment that told the spaces serves, unless it depends on its seed.
            spare, self.spare = self.spare, None
            if self.is_full is not None and self.is_full():
                raise WrongError("rows", str(len(self.environments)))
            self.environments[row] = library.make() if spare is None or library.made_of_seed else spare
        observation, info = library.reset(self.environments[row], seed)
        self.put(row, observation, 0.0, False, False, info)
        return observation, 0.0, False, info

    def put(self, row, observation, reward, terminated, truncated, info):
        """Writes what came of one row into the arrays."""
        places = self.observation_places[row]
        is_array = self.is_array and type(observation) is np.ndarray
        if is_array and observation.dtype == self.dtype and observation.shape == self.shape:  # as most are
            places[0][0][...] = observation
            places = ()
        for slot, path, kind, space in places:
            if write(slot, path, kind, space, observation):
                self.cuts[row] = True
        self.rewards[row], self.terminateds[row], self.truncateds[row] = reward, terminated, truncated
        if self.mask_slots is not None:
            self.mask_slots[row] = self.masks.row(info.get("action_mask") if isinstance(info, dict) else None)

    def drop(self, row):
        """Closes the environment of a row; what it raises, or None."""
        environment = self.environments.pop(row, None)
        return None if environment is None else close(environment)

    def close(self):
        """Closes all environments; the errors of those that raised one."""
        errors = [self.drop(row) for row in list(self.environments)]
        spare, self.spare = self.spare, None
        if spare is not None:
            errors.append(close(spare))
        return [error for error in errors if error is not None]


def close(environment):
    """Closes an environment; what it raises, or None."""
    try:
        environment.close()
    except FAILURES as error:
        return error
    return None

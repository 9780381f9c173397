"""Experts beside the environments that they are for: what one would do at every time step, whoever acts.

Runs where `gym_api.py` runs, and is trusted no more than a library: an expert that raises, is slow or answers nonsense
has no answer, and is counted and told of once. See `environments.bridges.experts` for what an expert is.
"""

import ctypes
import random
import time

import numpy as np

from .values import find_leaves

COUNTS = ("asked", "labels", "none", "slow", "raised", "nonsense", "drew")
"""What is counted of an expert, by worker: questions, labels, answers of None, answers that came too late, errors,
labels that its space cannot have, and calls that drew from the environment's generator."""
ASKED, LABELS, NONE, SLOW, RAISED, NONSENSE, DREW = range(len(COUNTS))
UNTOLD = 2
"""In the place of whether a task is solved (0 or 1), where the library's `info` does not tell its `success`."""
NANOSECONDS = len(COUNTS)
"""Behind the counts: the time of the processor that questions have taken."""

LIMIT_S = 1.0
"""Seconds of computing that a label may take, unless something else is said."""

FAILURES = (Exception, SystemExit)
_MAX_KEPT = 1 << 16  # labels by state
_MAX_NOTE_CHARS = 600
_SURELY_COMPUTED_NS = 200_000
"""An answer that came sooner was not waiting for the processor; asking what it used would cost more than most take."""


class Experts:
    """The experts of some rows, one for each, and their labels in the arrays.

    Args:
      program: makes an expert of a seed.
      action_space: the library's own.
      arrays: of the rows; `label/i`, `label_valid` and `expert` among them.
      worker: whose line of `expert` counts.
      limit_s: seconds of computing that a label may take. The processor's, so that a busy machine changes no label.

    Attributes:
      notes: what has gone wrong for the first time and was not told yet.
    """

    def __init__(self, program, action_space, arrays, worker=0, *, limit_s=LIMIT_S):
        self._program, self._limit_ns = program, int(1e9 * limit_s)
        self._paths = [path for path, _ in find_leaves(action_space)]
        self._labels = [arrays[f"label/{i}"] for i in range(len(self._paths))]
        self._seeds = arrays["seed"]
        # Views of memory: an element of theirs costs a tenth of one of an array.
        self._valid, self._counts = memoryview(arrays["label_valid"]), memoryview(arrays["expert"][worker])
        self._success = memoryview(arrays["success"])
        self._plain, self._wholes = (
            self._paths == [()],
            self._labels[0].dtype.kind in "iu" and self._labels[0].ndim == 1,
        )
        self._low, self._high = 0, 0
        if self._wholes:
            limits = np.iinfo(self._labels[0].dtype)
            self._low, self._high = int(limits.min), int(limits.max)
        self._of, self._states, self._kept, self._told, self._generators = {}, {}, {}, set(), {}
        self._broken, self._trusts_keys = set(), True
        self._mark = 0, 0
        self._draws = bool(getattr(program, "draws", False))
        self.notes = []

    def begin(self):
        """Is called before some rows are followed, one after the other."""
        self._mark = time.perf_counter_ns(), time.thread_time_ns()

    def follow(self, row, environment, action, outcome, *, is_new):
        """Lets the expert of a row see what has happened, and writes what it would do now.

        Args:
          row: of the batch.
          environment: of the row.
          action: that was executed; None where the episode has begun.
          outcome: observation, reward, whether the episode is over, and what is known beside them.
          is_new: whether the row was seeded, so that its expert is to be a new one.
        """
        self._valid[row] = False
        observation, reward, ended, info = outcome
        info = info if isinstance(info, dict) else {}
        if "success" in info:
            self._success[row] = bool(info["success"])
        else:  # few say it at the start of an episode too
            self._success[row] = 0 if action is None and self._success[row] != UNTOLD else UNTOLD
        if action is None:
            self._watch(row, environment)
        generators = self._generators[row]
        before = [generator.read() for generator in generators]
        if self._draws:
            if is_new:
                self._states.pop(row, None)
            self._swap(row)
        try:
            if action is None:
                self._broken.add(row)
                if is_new or row not in self._of:
                    self._of[row] = self._program(int(self._seeds[row]))
                self._of[row].reset(environment, observation, info)
                self._broken.discard(row)
            elif row not in self._broken:
                executed = info.get("action_executed", action)
                self._of[row].observe(executed, observation, reward, ended, info)
            if not ended:
                self._ask(row, environment, observation, info)
        except FAILURES as error:
            self._broken.add(row)  # what it remembers is no longer what has happened
            self._counts[ASKED] += 1
            self._tell(RAISED, row, describe(error))
        finally:
            if self._draws:
                self._swap(row)
        if [generator.read() for generator in generators] != before:
            for generator, state in zip(generators, before):
                generator.write(state)
            if not self._draws:
                self._tell(DREW, row, "it drew from the environment's own generator, which was put back")

    def _ask(self, row, environment, observation, info):
        counts = self._counts
        counts[ASKED] += 1
        if row in self._broken:
            counts[NONE] += 1
            return
        started = time.perf_counter_ns()
        try:
            action = self._label(row, environment, observation, info)
        except FAILURES as error:
            self._tell(RAISED, row, describe(error))
            return
        taken = time.perf_counter_ns() - started
        if taken > _SURELY_COMPUTED_NS:
            taken = self._computed(started)
        counts[NANOSECONDS] += taken
        if taken > self._limit_ns:
            self._tell(SLOW, row, f"it took {1e-9 * taken:.3g} s, more than {1e-9 * self._limit_ns:g} s")
        elif action is None:
            counts[NONE] += 1
        else:
            problem = self._write(row, action)
            if problem:
                self._tell(NONSENSE, row, problem)
            else:
                self._valid[row] = True
                counts[LABELS] += 1

    def _computed(self, started):
        """How long this thread has computed since a moment, at least: before it, no longer than there was time."""
        (moment, computed), now = self._mark, (time.perf_counter_ns(), time.thread_time_ns())
        self._mark = now
        return max(0, min(now[0] - started, now[1] - computed - (started - moment)))

    def _watch(self, row, environment):
        """Finds the generators of a row that begins an episode; mostly they are those of the last one."""
        found, known = find_generators(environment), self._generators.setdefault(row, [])
        if len(found) != len(known) or any(one is not other.generator for one, other in zip(found, known)):
            self._generators[row] = [GeneratorState(generator) for generator in found]

    def _label(self, row, environment, observation, info):
        expert = self._of[row]
        if not self._trusts_keys or not hasattr(expert, "key"):
            return expert.label(environment, observation, info)
        key = expert.key(environment, observation, info)
        if key is None:
            return expert.label(environment, observation, info)
        kept, times = self._kept.get(key, (None, 0))
        if times & (times - 1):
            self._kept[key] = kept, times + 1
            return kept
        action = expert.label(environment, observation, info)
        # What is kept is worked out again the second, third, fifth, ninth time that it is asked for: does it follow?
        if times and not same_actions(kept, action):
            self._trusts_keys = False
            text = f"it says that its labels follow from {str(key)[:200]}, but answers {kept} and {action} there"
            self._tell(NONSENSE, row, text)
            return None
        if len(self._kept) >= _MAX_KEPT:
            self._kept.clear()
        self._kept[key] = action, times + 1
        return action

    def _write(self, row, action):
        """Writes a label into its place; what is wrong with it, or nothing. The host checks that its space has it."""
        if self._plain:  # as most are
            labels = self._labels[0]
            if self._wholes and type(action) is int and self._low <= action <= self._high:
                labels[row] = action
                return ""
            if type(action) is np.ndarray and action.dtype == labels.dtype and action.shape == labels.shape[1:]:
                labels[row] = action
                return ""
        for path, labels in zip(self._paths, self._labels):
            value = action
            for key in path:
                try:
                    value = value[key]
                except (KeyError, IndexError, TypeError):
                    return f"its label {str(action)[:200]} lacks the part {'/'.join(map(str, path))}"
            try:
                value = np.asarray(value)
            except ValueError:
                return f"its label {str(action)[:200]} is no array"
            shape = labels.shape[1:]
            if value.dtype.kind not in "biuf" or (value.shape != shape and not value.size == labels[row].size == 1):
                return f"its label is {str(action)[:200]}, expected numbers of shape {list(shape)}"
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                return f"its label {str(action)[:200]} is not finite"
            with np.errstate(all="ignore"):
                cast = value.astype(labels.dtype).reshape(shape)
            if labels.dtype.kind in "biu" and (cast != value.reshape(shape)).any():
                return f"its label is {str(action)[:200]}, expected whole numbers of {labels.dtype}"
            labels[row] = cast
        return ""

    def _tell(self, count, row, text):
        self._counts[count] += 1
        if count not in self._told:
            self._told.add(count)
            self.notes.append(f"row {row}: {COUNTS[count]}: {text[-_MAX_NOTE_CHARS:]}")

    def _swap(self, row):
        """Puts the expert's states of the two global generators in the place of those of the row, or back."""
        now = random.getstate(), np.random.get_state()
        kept = self._states.pop(row, None)
        if kept is None:
            seed = (int(self._seeds[row]) ^ 0x5EED) & 0xFFFFFFFF
            random.seed(seed)
            np.random.seed(seed)
        else:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
        self._states[row] = now


class GeneratorState:
    """The state of a generator of kind PCG64, to be compared and put back: looked at in its memory, as bytes.

    `state` of numpy makes a dictionary of large numbers in 4 us, as long as many an expert takes; this takes a tenth.
    Where numpy would keep a state otherwise than it has since there are such generators, this is asked for instead.
    """

    def __init__(self, generator):
        self.generator, self._source, self._parts = generator, generator.bit_generator, []
        if 1 <= int(np.__version__.partition(".")[0]) <= 2:
            # Its structure: a pointer to state and increment, 16 bytes each; whether half a number is left, and that.
            address = self._source.ctypes.state_address
            numbers = ctypes.c_uint64.from_address(address).value
            parts = [(ctypes.c_char * 32).from_address(numbers), (ctypes.c_char * 8).from_address(address + 8)]
            if [part.raw for part in parts] == pcg64_bytes(self._source.state):
                self._parts = parts

    def read(self):
        """The state, which compares equal to the same one."""
        return [part.raw for part in self._parts] if self._parts else self._source.state

    def write(self, state):
        """Puts a state back that was read."""
        if not self._parts:
            self._source.state = state
        for part, content in zip(self._parts, state):
            part.raw = content


def pcg64_bytes(state):
    """The state of a generator as it lies in memory."""
    numbers = state["state"]["state"], state["state"]["inc"]
    rest = state["has_uint32"], state["uinteger"]
    return [b"".join(n.to_bytes(16, "little") for n in numbers), b"".join(n.to_bytes(4, "little") for n in rest)]


def find_generators(environment):
    """The environment's own generators of numpy, as far as they have been made."""
    inner = environment.unwrapped
    fields = getattr(inner, "__dict__", {})
    found = [fields.get("_np_random"), fields.get("np_random")]
    # Gymnasium's are of this kind; states of others have arrays, which are not compared in a microsecond.
    kinds = np.random.Generator, np.random.PCG64
    return [one for one in found if isinstance(one, kinds[0]) and isinstance(one.bit_generator, kinds[1])]


def same_actions(one, other):
    """Whether two labels are the same; nests are compared as they are."""
    if one is None or other is None:
        return one is other
    if isinstance(one, (dict, list, tuple)):
        return str(one) == str(other)
    return np.array_equal(one, other)


def describe(error):
    """The kind and the text of an error, and where it was raised."""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place, trace = (
            f" ({code.co_filename.rpartition('/')[2]}, line {trace.tb_lineno}, in {code.co_name})",
            trace.tb_next,
        )
    return f"{type(error).__name__}: {error}{place}"

"""Playing episodes in many environments at once with one policy: the one engine of every evaluation.

Environments of one bucket share a batch of rows, whose places go to the next environment as they become free. While the
policy acts in one batch, the environments of another are stepped, and the next ones are made.
"""

from __future__ import annotations

import collections
import collections.abc
import concurrent.futures
import contextlib
import gc
import queue
import sys
import typing

import jax
import numpy as np

from ldm_jax.acting.agent import check_agent, check_timestep
from ldm_jax.acting.decoding import Decoding
from ldm_jax.acting.rows import Seats, seeds
from ldm_jax.cards import check_matches
from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.buckets import Bucket
from ldm_jax.encoding.codec import Codec
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Params
from ldm_jax.rollout import EpisodeReturns, check_ended, check_returns, reset_from_host, step_from_host
from ldm_jax.spaces import zeros
from ldm_jax.types import Array, Key, TimeStep

BATCHES = 2
"""Batches at once, each played in a thread: one acts while the environments of the other are stepped."""
_AHEAD = 2
"""Environments of each that are made before there is place for them."""

_TURN_S = 2e-4


class Trial(typing.NamedTuple):
    """Episodes to play in one environment.

    Attributes:
      codec: of the environment; trials whose codecs have the same bucket share a program.
      make: makes the environment, with `rows` rows; called in another thread, when its turn comes.
      rows: B.
      episodes: E, of each row, on one context.
      key: typed key of the episodes and of the acting: the same key gives the same episodes, whoever else plays.
      decoding: how actions are taken.
      keep_open: the environment is whose `make` is, not closed when its episodes have been played.
    """

    codec: Codec
    make: collections.abc.Callable[[], Environment]
    rows: int
    episodes: int
    key: Key
    decoding: Decoding = "card"
    keep_open: bool = False


class Played(typing.NamedTuple):
    """What came of a trial.

    Attributes:
      trial: the one that was given.
      episodes: `[B, E]`, or None where it failed.
      error: why it failed, or None.
      faults: how often each kind of fault of the environment's workers was survived.
      steps: how often each row acted, at most.
    """

    trial: Trial
    episodes: EpisodeReturns | None
    error: LdmError | None
    faults: dict[str, int]
    steps: int


Count = collections.abc.Callable[[int], None]
"""Called with the number of episodes that ended since the last call."""


def play_trials(
    cfg: ModelConfig,
    params: Params,
    trials: collections.abc.Iterable[Trial],
    rows: int = 0,
    count: Count = lambda episodes: None,
) -> collections.abc.Iterator[Played]:
    """Plays episodes in many environments.

    A program is compiled for each bucket of the trials, not for each trial. An environment that fails, by whatever
    fault of its own, costs its own episodes and nobody else's. What was played is given as soon as it is finished, in
    no order that could be relied upon.

    Args:
      cfg: shapes of the model.
      params: of the model.
      trials: what to play.
      rows: of a batch, at most; there are never fewer than a trial needs. Default: twice those of the largest trial.
      count: is told of episodes that ended.

    Yields:
      What came of each trial, once.
    """
    queues: dict[Bucket, collections.deque[Trial]] = collections.defaultdict(collections.deque)
    # Those that may take longest first: at the end, few rows have the batch to themselves.
    for trial in sorted(trials, key=lambda trial: -trial.codec.card.time_limit * trial.episodes):
        try:
            _check(cfg, trial)
        except LdmError as error:
            yield Played(trial, None, error, {}, 0)
        else:
            queues[trial.codec.bucket].append(trial)
    sizes = {bucket: _size(waiting, rows) for bucket, waiting in queues.items()}
    params = jax.device_put(params)
    with contextlib.ExitStack() as closing:
        closing.enter_context(_short_turns())
        makers, players = (
            closing.enter_context(concurrent.futures.ThreadPoolExecutor(_AHEAD * BATCHES)) for _ in range(2)
        )
        told: queue.SimpleQueue[int | Played | _Table] = queue.SimpleQueue()
        tables: dict[_Table, concurrent.futures.Future[None]] = {}
        closing.callback(_stop, tables)
        while queues or tables:
            while len(tables) < BATCHES:
                bucket = _next_bucket(queues, sizes, {table.bucket for table in tables})
                if bucket is None:
                    break
                seats = Seats(cfg, params, queues[bucket][0].codec, sizes[bucket])
                table = _Table(seats, queues[bucket], makers, told.put)
                tables[table] = players.submit(table.run)
            match told.get():
                case Played() as played:
                    yield played
                case int() as ended:
                    count(ended)
                case table:
                    tables.pop(table).result()
            queues = {bucket: waiting for bucket, waiting in queues.items() if waiting}


@contextlib.contextmanager
def _short_turns() -> collections.abc.Iterator[None]:
    """Lets threads take turns often: one that traces an environment holds up the players by a turn at each step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _stop(tables: collections.abc.Collection[_Table]) -> None:
    for table in tables:
        table.stopped = True


def _next_bucket(
    queues: dict[Bucket, collections.deque[Trial]], sizes: dict[Bucket, int], taken: set[Bucket]
) -> Bucket | None:
    """The bucket with most to do that nobody plays in, or one that has enough for two; None where there is none."""
    rows = {bucket: sum(trial.rows for trial in waiting) for bucket, waiting in queues.items()}
    open_to = [bucket for bucket in queues if bucket not in taken or rows[bucket] >= 2 * sizes[bucket]]
    return max(open_to, key=lambda bucket: rows[bucket], default=None)


def _check(cfg: ModelConfig, trial: Trial) -> None:
    check_agent(cfg, trial.codec, trial.decoding)
    for name in ("rows", "episodes"):
        if getattr(trial, name) < 1:
            raise ConfigError(f"{name} of {trial.codec.card.id} is {getattr(trial, name)}, expected at least 1")


def _size(waiting: collections.abc.Collection[Trial], rows: int) -> int:
    """The number of rows of a batch: all that a few trials have, what was asked for where there are many."""
    largest = max(trial.rows for trial in waiting)
    return min(max(rows or 2 * largest, largest), sum(trial.rows for trial in waiting))


class _Guest:
    """An environment whose rows have places in a batch."""

    def __init__(self, trial: Trial, environment: Environment):
        self.trial, self.environment, self.steps = trial, environment, 0
        spec, codec = environment.spec, trial.codec
        if spec.batch_size != trial.rows:
            raise ConfigError(f"{spec.id} was made with {spec.batch_size} rows, expected {trial.rows}")
        check_matches(codec.card, spec, f"the card of {codec.card.id}")
        reset_key, act_key = jax.random.split(trial.key)
        self.seeds = seeds(act_key, trial.rows)
        self._state, timestep = reset_from_host(environment, reset_key)
        self._timestep: TimeStep = jax.tree.map(np.asarray, timestep)
        check_timestep(codec, self._timestep, trial.rows)
        self._previous = zeros(codec.card.action_space, (trial.rows,))
        self.places = np.zeros(0, np.intp)
        self.playing = np.ones(trial.rows, bool)
        self._features = codec.features(self._timestep, self._previous, np.zeros(trial.rows, bool))
        shape = (trial.rows, trial.episodes)
        self.episodes = EpisodeReturns(np.zeros(shape, np.float32), np.zeros(shape, np.int32))
        self._finished = np.zeros(trial.rows, np.intp)
        self._total, self._length = np.zeros(trial.rows, np.float32), np.zeros(trial.rows, np.int32)

    def write(self, seats: Seats) -> None:
        """Says what the rows that still play see."""
        if self.playing.all():
            seats.write(self.places, self._features)
        else:
            seats.write(self.places[self.playing], jax.tree.map(lambda leaf: leaf[self.playing], self._features))

    def step(self, slots: Slots) -> int:
        """Does what the policy chose.

        Returns:
          The number of episodes that ended.
        """
        codec, playing = self.trial.codec, self.playing[:, None]
        # A row that has played its own goes on with any choice that is allowed: nobody looks at it.
        chosen = Slots(
            np.where(playing, slots.categorical[self.places], _first_allowed(self._features.action_mask)),
            np.where(playing, slots.continuous[self.places], np.float32(0)),
        )
        self._previous = codec.action(chosen)
        self._state, timestep = step_from_host(self.environment, self._state, self._previous)
        self._timestep = jax.tree.map(np.asarray, timestep)
        self._features = codec.features(self._timestep, self._previous, np.ones(self.trial.rows, bool))
        self.steps += 1
        return self._book()

    def _book(self) -> int:
        """Books a time step: at the end of an episode its return goes to the row's next free place, if any is left."""
        step, episodes = self._timestep, self.trial.episodes
        self._total = np.where(step.first, np.float32(0), self._total + step.reward)
        self._length = np.where(step.first, 0, self._length + 1)
        ended = np.flatnonzero(step.last & self.playing)
        self.episodes.returns[ended, self._finished[ended]] = self._total[ended]
        self.episodes.lengths[ended, self._finished[ended]] = self._length[ended]
        self._finished[ended] += 1
        self.playing = self._finished < episodes
        check_ended(self.environment.spec, int(self._finished.sum()), self.trial.rows * episodes, self.steps, episodes)
        return len(ended)

    def result(self) -> Played:
        """What was played."""
        try:
            check_returns(self.environment.spec, self.episodes)
        except EnvironmentFaultError as error:
            return self.failed(error)
        return Played(self.trial, self.episodes, None, self._faults(), self.steps)

    def failed(self, error: LdmError) -> Played:
        """That nothing was."""
        return Played(self.trial, None, error, self._faults(), self.steps)

    def _faults(self) -> dict[str, int]:
        return dict(getattr(self.environment, "faults", {}))

    def close(self) -> None:
        if not self.trial.keep_open:
            self.environment.close()


def _first_allowed(mask: Array) -> np.ndarray:
    """The first choice allowed in each slot, `int32 [B, K]`, of a mask `[B, K, V]`."""
    return np.asarray(mask).argmax(-1).astype(np.int32) if mask.size else np.zeros(mask.shape[:-1], np.int32)


def _open(trial: Trial) -> _Guest | Played:
    """Makes the environment of a trial and begins its episodes."""
    try:
        environment = trial.make()
        try:
            return _Guest(trial, environment)
        except BaseException:
            if not trial.keep_open:
                environment.close()
            raise
    except Exception as error:
        return Played(trial, None, _fault(trial, error), {}, 0)


def _fault(trial: Trial, error: Exception) -> LdmError:
    """What a library raised, whatever its kind, as a fault of its environment."""
    if isinstance(error, LdmError):
        return error
    fault = EnvironmentFaultError(f"{trial.codec.card.id} raised {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault


class _Table:
    """A batch, the environments that have places in it, and those that wait for one; plays in a thread of its own."""

    def __init__(
        self,
        seats: Seats,
        waiting: collections.deque[Trial],
        makers: concurrent.futures.Executor,
        tell: collections.abc.Callable[[int | Played | _Table], None],
    ):
        self.bucket, self.stopped = seats.bucket, False
        self._seats, self._waiting, self._makers, self._tell = seats, waiting, makers, tell
        self._guests: list[_Guest] = []
        self._opening: collections.deque[concurrent.futures.Future[_Guest | Played]] = collections.deque()
        self._open_more()

    def run(self) -> None:
        """Plays until nobody is left, and tells of every episode, of every trial, and at last of the end."""
        try:
            self._seats.warm_up()
            while (self._guests or self._opening) and not self.stopped:
                self._admit()
                if self._guests:
                    self._step()
        finally:
            self._close()
            self._tell(self)

    def _step(self) -> None:
        for guest in self._guests:
            guest.write(self._seats)
        self._seats.send()
        slots, ended = self._seats.receive(), 0
        for guest in [*self._guests]:
            playing = guest.playing
            try:
                ended += guest.step(slots)
            except Exception as error:
                self._seats.leave(guest.places[playing])
                self._see_off(guest, guest.failed(_fault(guest.trial, error)))
                continue
            self._seats.leave(guest.places[playing & ~guest.playing])
            if not guest.playing.any():
                self._see_off(guest, guest.result())
        if ended:
            self._tell(ended)

    def _see_off(self, guest: _Guest, played: Played) -> None:
        self._guests.remove(guest)
        with contextlib.suppress(Exception):  # what was played counts, however its environment ends
            guest.close()
        if guest.environment.spec.jittable and not guest.trial.keep_open:
            del guest
            gc.collect()  # what was compiled for it lies in cycles, some 10 MB
        self._tell(played)

    def _open_more(self) -> None:
        """Has the next environments made; a few ahead, as each holds memory."""
        while self._waiting and len(self._opening) < _AHEAD:
            self._opening.append(self._makers.submit(_open, self._waiting.popleft()))

    def _admit(self) -> None:
        """Gives places to the environments that are made, in their order; waits for one only where nobody plays."""
        while self._opening and (self._opening[0].done() or not self._guests):
            guest = self._opening[0].result()
            if isinstance(guest, Played):
                self._tell(guest)
            elif guest.trial.rows <= self._seats.free:
                guest.places = self._seats.seat(guest.trial.codec, guest.seeds, guest.trial.decoding)
                self._guests.append(guest)
            else:
                return
            self._opening.popleft()
            self._open_more()

    def _close(self) -> None:
        """Closes all environments."""
        concurrent.futures.wait(self._opening)
        opened = [future.result() for future in self._opening if not future.exception()]
        for guest in [*self._guests, *opened]:
            if isinstance(guest, _Guest):
                guest.close()

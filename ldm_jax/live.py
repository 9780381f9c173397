"""A policy at work in one plain Gymnasium environment, step by step: `play`."""

from __future__ import annotations

import collections.abc
import dataclasses
import logging
import math
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax import acting, measuring, spaces
from ldm_jax.acting.rows import seeds
from ldm_jax.cards import CardError, EnvironmentCard
from ldm_jax.encoding.codec import Codec
from ldm_jax.environment import EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.policy import Policy
from ldm_jax.types import MAX_TIME_LIMIT, EnvironmentSpec, PyTree, TimeStep

_log = logging.getLogger(__name__)


class PlayStep(typing.NamedTuple):
    """One step of an episode.

    Attributes:
      observation: what the policy saw, as the environment gave it.
      action: what it did, as the environment takes it.
      reward: what that earned.
      terminated: the episode ended there.
      truncated: the episode was cut off there.
      next_observation: what came of it.
      episode: number of the episode, from 1.
      step: number of the step in its episode, from 1.
      return_so_far: undiscounted, of the episode.
      info: what else the environment said.
    """

    observation: typing.Any
    action: typing.Any
    reward: float
    terminated: bool
    truncated: bool
    next_observation: typing.Any
    episode: int
    step: int
    return_so_far: float
    info: dict[str, typing.Any]

    @property
    def last(self) -> bool:
        """Whether the episode ended there."""
        return self.terminated or self.truncated


def play(
    policy: Policy,
    environment: gymnasium.Env,
    *,
    episodes: int = 5,
    seed: int = 0,
    decoding: acting.Decoding | None = None,
    card: str | EnvironmentCard | None = None,
) -> collections.abc.Iterator[PlayStep]:
    """Lets a policy act in one plain Gymnasium environment, and gives each step as it is made.

    >>> import gymnasium, jax, ldm_jax
    >>> cfg = ldm_jax.SIZES["nano"]
    >>> policy = ldm_jax.Policy(cfg, ldm_jax.make_model(cfg).init(jax.random.key(0)), cards={})
    >>> for step in ldm_jax.play(policy, gymnasium.make("FrozenLake-v1"), episodes=2):
    ...     if step.last:
    ...         print(f"episode {step.episode} ended")
    episode 1 ended
    episode 2 ended

    The policy remembers one episode in the next, as it was trained to. It knows the environment by its id: by the card
    of any library that has it, `gymnasium` first. Of an unknown one a card is made of its spaces, and its observations
    are standardized by running statistics of what was seen of it so far; the log says that it is so.

    Args:
      policy: who acts.
      environment: from `gymnasium.make`, or any object of its kind, wrapped or not; it is reset, and stays open.
      episodes: how many; `next` on what is returned makes single steps.
      seed: of the first reset and of the acting: an environment that keeps to its seed gives the same steps again.
      decoding: how actions are taken; default: the policy's, which samples in an unknown environment.
      card: whose spaces and statistics to act by: the id of one of the policy's, or any. Default: as above.

    Returns:
      An iterator over the steps; nothing is done before the first is asked for, but what was passed is checked.

    Raises:
      ConfigError: no single Gymnasium environment, fewer than one episode, an unknown decoding, or spaces that do not
        fit the model: what is how wide, and what the model takes.
      SpaceError: a space that is not supported, or a value that does not belong to its space.
      PolicyError: the policy has no card of such an id.
      CardError: the card that was passed is of other spaces.
      EnvironmentFaultError: a reward that is not a number.
    """
    if not isinstance(environment, gymnasium.Env):
        raise ConfigError(
            f"got {environment!r}, expected one environment as gymnasium.make gives; for environments of "
            "`environments.make` there is ldm_jax.evaluate"
        )
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}, expected at least 1")
    if isinstance(card, str):
        card = policy.card(card)
    if card is not None and (reason := _misfit(card, environment)):
        raise CardError(f"the card of {card.id} is not of this environment: {reason}")
    known = card or _known(policy, environment)
    player = _Player(policy, known or _stranger(environment), decoding or policy.decoding, seed, running=known is None)
    return _play(player, environment, episodes, seed)


def _play(player: _Player, environment: gymnasium.Env, episodes: int, seed: int) -> collections.abc.Iterator[PlayStep]:
    for episode in range(1, episodes + 1):
        observation, info = environment.reset(seed=seed) if episode == 1 else environment.reset()
        said = {"reward": 0.0, "terminated": False, "truncated": False, "first": True}
        action, number, total, last = player.act(observation, info, **said), 0, 0.0, False
        while not last:
            did = spaces.to_gymnasium(environment.action_space, action)
            after, earned, terminated, truncated, info = environment.step(did)
            reward, terminated, truncated = float(earned), bool(terminated), bool(truncated)
            last, number, total = terminated or truncated, number + 1, total + reward
            # The policy sees the end of an episode too; what it would do there is ignored.
            action = player.act(after, info, reward=reward, terminated=terminated, truncated=truncated, first=False)
            yield PlayStep(observation, did, reward, terminated, truncated, after, episode, number, total, info)
            observation = after


class _Player:
    """One row of a policy, with its context and its statistics."""

    def __init__(self, policy: Policy, card: EnvironmentCard, decoding: acting.Decoding, seed: int, *, running: bool):
        self._codec = policy.codec(card)
        acting.check_agent(policy.cfg, self._codec, decoding)
        self._seats = acting.Seats(policy.cfg, jax.device_put(policy.params), self._codec, 1)
        self._places = self._seats.seat(self._codec, seeds(jax.random.key(seed), 1), decoding)
        self._previous: PyTree = spaces.zeros(card.action_space, (1,))
        self._has_previous = np.zeros(1, bool)
        self._running = measuring.start_statistics(card.observation_space) if running else None
        self._masked = card.statistics.masked

    def act(self, observation: typing.Any, info: dict[str, typing.Any], **said: typing.Any) -> PyTree:
        """What the policy does next, `[1, ...]`."""
        card = self._codec.card
        if self._running is not None and not self._has_previous.any():
            self._masked = info.get("action_mask") is not None
        if not math.isfinite(said["reward"]):
            raise EnvironmentFaultError(f"{card.id} gave the reward {said['reward']}, expected a number")
        timestep = TimeStep(
            observation=spaces.from_gymnasium(card.observation_space, observation, f"the observation of {card.id}"),
            reward=np.array([said["reward"]], np.float32),
            terminated=np.array([said["terminated"]]),
            truncated=np.array([said["truncated"]]),
            first=np.array([said["first"]]),
            action_mask=self._mask(info.get("action_mask")),
        )
        if self._running is not None:
            self._running = measuring.add_timestep(self._running, self._codec.observation_layout, timestep)
            statistics = measuring.statistics_of(self._running, card.action_space, masked=self._masked)
            self._codec = Codec(dataclasses.replace(card, statistics=statistics), self._codec.bucket)
        acting.check_timestep(self._codec, timestep, 1)
        self._seats.write(self._places, self._codec.features(timestep, self._previous, self._has_previous))
        self._seats.send()
        self._previous, self._has_previous = self._codec.action(self._seats.receive()), np.ones(1, bool)
        return self._previous

    def _mask(self, mask: typing.Any) -> np.ndarray | None:
        card, size = self._codec.card, self._codec.action_layout.flat_choices
        if not self._masked:
            return None
        if mask is None:  # it allows all, as where every choice is
            return np.ones((1, size), bool)
        flat = np.concatenate([np.ravel(part) for part in mask]) if isinstance(mask, list | tuple) else np.ravel(mask)
        if flat.size != size:
            raise acting.ActingError(f"the action mask of {card.id} has {flat.size} entries, expected {size}")
        return flat.astype(bool)[None]


def _known(policy: Policy, environment: gymnasium.Env) -> EnvironmentCard | None:
    """The policy's card of an environment, by its id; the log says which it is, or why there is none."""
    name = _name(environment)
    named = [id for id in policy.ids if id.partition("/")[2] == name]
    why = f"none of the {len(policy.ids)} environments that the policy was trained in has this id"
    for id in sorted(named, key=lambda id: (not id.startswith("gymnasium/"), id)):
        if not (reason := _misfit(policy.cards[id], environment)):
            _log.info("%s: acting by the card of %s", name, id)
            return policy.cards[id]
        why = f"{id} of the policy is another one, {reason}"
    _log.warning(
        "%s: unknown to the policy (%s); acting by a card made of its spaces and running statistics of its context",
        name,
        why,
    )
    return None


def _name(environment: gymnasium.Env) -> str:
    return environment.spec.id if environment.spec else type(environment.unwrapped).__name__


def _misfit(card: EnvironmentCard, environment: gymnasium.Env) -> str:
    """How the spaces of an environment differ from those of a card in what is carried; empty where they do not."""
    for what in ("observation", "action"):
        then, now = (getattr(each, f"{what}_space") for each in (card, environment))
        try:
            mine, theirs = ({leaf.name: leaf.space for leaf in spaces.leaves(space)} for space in (then, now))
        except spaces.SpaceError:
            # A kind of the library's own, as the missions of MiniGrid are: its values will say whether they fit.
            if what == "observation":
                continue
            raise
        alike = mine.keys() == theirs.keys() and all(_alike(mine[name], theirs[name], what) for name in mine)
        if not alike:
            return f"its {what} space is {now}, expected {then}"
    return ""


def _alike(mine: gymnasium.Space, theirs: gymnasium.Space, what: str) -> bool:
    """Whether values of the one leaf can stand for those of the other."""
    if isinstance(mine, gymnasium.spaces.Text) or isinstance(theirs, gymnasium.spaces.Text):
        return type(mine) is type(theirs)
    if mine.shape != theirs.shape:
        return False
    if spaces.choices(mine) and spaces.choices(theirs):
        same_first = np.array_equal(spaces.first_value(mine), spaces.first_value(theirs))
        return spaces.choices(mine) == spaces.choices(theirs) and same_first
    if what == "action" and isinstance(mine, gymnasium.spaces.Box) and isinstance(theirs, gymnasium.spaces.Box):
        # The same number is to mean the same there; a bound that float32 has rounded is the same.
        return all(np.allclose(*pair) for pair in zip(spaces.bounds(mine), spaces.bounds(theirs), strict=True))
    return True


def _stranger(environment: gymnasium.Env) -> EnvironmentCard:
    """The card of an environment that the policy does not know, before anything was seen of it."""
    name = _name(environment)
    for what in ("observation", "action"):
        try:
            spaces.check_supported(getattr(environment, f"{what}_space"), f"the {what} space of {name}")
        except spaces.SpaceError as error:
            raise spaces.SpaceError(f"the {what} space of {name} cannot be taken (wrap it): {error}") from error
    spec = EnvironmentSpec(
        id=f"gymnasium/{name}",
        library="gymnasium",
        version=gymnasium.__version__,
        observation_space=environment.observation_space,
        action_space=environment.action_space,
        batch_size=1,
        time_limit=(environment.spec and environment.spec.max_episode_steps) or MAX_TIME_LIMIT,
        domain="unknown",
        jittable=False,
    )
    return measuring.unmeasured_card(spec)

"""How good a policy is in one environment: `evaluate`, by the same engine as the stage that evaluates in thousands."""

from __future__ import annotations

import collections.abc
import functools
import importlib.metadata
import logging
import math
import typing

import numpy as np

from ldm_jax import acting, measuring
from ldm_jax.cards import EnvironmentCard, check_matches
from ldm_jax.environment import Environment
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation import scores
from ldm_jax.evaluation.bootstrap import Estimate, z_score
from ldm_jax.policy import Policy
from ldm_jax.types import EnvironmentSpec, Key

MAKER_GROUP = "ldm_jax.makers"
"""The entry points that make environments by id: `make(id, batch_size)`; the core itself knows no environment."""

_log = logging.getLogger(__name__)


class Evaluation(typing.NamedTuple):
    """What a policy got in one environment.

    Attributes:
      id: of the environment.
      returns: `float32 [B, E]`, undiscounted, of E episodes in each of B rows, on one context a row.
      lengths: `int32 [B, E]`, in steps.
      z: the place between the random policy (0) and the reference (1) with its 95 % interval, which is infinite for a
        single row; None where there is none.
      reason: what z is measured between, or why there is none.
    """

    id: str
    returns: np.ndarray
    lengths: np.ndarray
    z: Estimate | None
    reason: str

    def __repr__(self) -> str:
        rows, episodes = self.returns.shape
        means = f"mean return {self.returns.mean():.5g}, mean length {self.lengths.mean():.5g}"
        z = f"no z: {self.reason}"
        if self.z:
            z = f"z {self.z.value:.2f}"
            z += f" [{self.z.low:.2f}, {self.z.high:.2f}]" if math.isfinite(self.z.low) else ""
        return f"Evaluation({self.id!r}, {means} of {rows} x {episodes} episodes, {z})"


def evaluate(
    policy: Policy,
    environment: str | Environment,
    key: Key,
    *,
    rows: int = 16,
    episodes: int = 4,
    decoding: acting.Decoding | None = None,
    card: EnvironmentCard | None = None,
) -> Evaluation:
    """Plays a fixed number of episodes in every row of an environment and scores them.

    >>> import jax, ldm_jax
    >>> cfg = ldm_jax.SIZES["nano"]
    >>> policy = ldm_jax.Policy(cfg, ldm_jax.make_model(cfg).init(jax.random.key(0)), cards={})
    >>> ldm_jax.evaluate(policy, "gymnax/Catch-bsuite", jax.random.key(0), rows=2).lengths.tolist()
    [[9, 9, 9, 9], [9, 9, 9, 9]]

    An environment that the policy was not trained in is measured first, by random steps, and that is said in the log.

    Args:
      policy: who plays.
      environment: an id such as `gymnax/CartPole-v1`, which is made and closed; or an environment with its rows,
        jittable or not, which stays open.
      key: typed key of the episodes and the acting: the same key gives the same episodes.
      rows: of an environment that is given by its id.
      episodes: of each row, on one context.
      decoding: how actions are taken; default: the policy's.
      card: of the environment. Default: the policy's own.

    Returns:
      Returns, lengths, and z where the card has a reference that is better than random.

    Raises:
      CardError: the environment is not as it was when the policy was trained.
      ConfigError: no environment of this kind, spaces that do not fit the model, an unknown decoding, fewer than one
        row or episode, or an id where nothing is installed that makes environments.
      EnvironmentFaultError: the environment broke its contract.
    """
    if isinstance(environment, str):
        if rows < 1:
            raise ConfigError(f"rows is {rows}, expected at least 1")
        made = _maker()(environment, rows)
        try:
            return _play_all(policy, made, key, episodes, decoding or policy.decoding, card)
        finally:
            made.close()
    return _play_all(policy, environment, key, episodes, decoding or policy.decoding, card)


def _play_all(
    policy: Policy,
    environment: Environment,
    key: Key,
    episodes: int,
    decoding: acting.Decoding,
    card: EnvironmentCard | None,
) -> Evaluation:
    if not isinstance(getattr(environment, "spec", None), EnvironmentSpec):
        raise ConfigError(
            f"got {environment!r}, expected an id or an environment of `environments.make`; for one of gymnasium.make "
            "there is ldm_jax.play"
        )
    card = card or _card(policy, environment, key, decoding)
    check_matches(card, environment.spec, f"the card of {card.id}")
    trial = acting.Trial(
        codec=policy.codec(card),
        make=lambda: environment,
        rows=environment.spec.batch_size,
        episodes=episodes,
        key=key,
        decoding=decoding,
        keep_open=True,
    )
    (played,) = acting.play_trials(policy.cfg, policy.params, [trial])
    if played.error is not None:
        raise played.error
    assert played.episodes is not None  # there is no error
    return _scored(card, *played.episodes)


def _card(policy: Policy, environment: Environment, key: Key, decoding: acting.Decoding) -> EnvironmentCard:
    """The policy's card of an environment, or one that is made by looking at it."""
    spec = environment.spec
    if spec.id in policy.cards:
        return policy.card(environment)
    acting.check_agent(policy.cfg, policy.codec(measuring.unmeasured_card(spec)), decoding)
    statistics = measuring.measure_by_chance(environment, key)
    _log.warning(
        "%s: the policy was not trained in it; its card is made of its spaces and of %d random steps",
        spec.id,
        statistics.steps,
    )
    return measuring.unmeasured_card(spec, statistics)


def _scored(card: EnvironmentCard, returns: np.ndarray, lengths: np.ndarray) -> Evaluation:
    if card.reference.algorithm == measuring.UNMEASURED:
        return Evaluation(card.id, returns, lengths, None, "the environment has no reference")
    random, reference = card.random_returns.array, card.reference_returns.array
    (score,) = scores.score_each([scores.Measurement(card.id, card.domain, random, reference, returns)], seed=0)
    z, reason = score.z, score.reason
    if len(returns) == 1 and min(random.size, reference.size) > 1:
        admission = scores.admit(random, reference)
        reason = admission.reason
        if admission.admitted:
            z = Estimate(z_score(random.mean(), reference.mean(), returns.mean()), -math.inf, math.inf)
    return Evaluation(card.id, returns, lengths, z, reason)


@functools.cache
def _maker() -> collections.abc.Callable[[str, int], Environment]:
    for point in importlib.metadata.entry_points(group=MAKER_GROUP):
        return point.load()
    raise ConfigError(
        f"nothing that is installed makes environments by id (entry points {MAKER_GROUP}): pass an environment, or "
        "install ldm_jax as a package (pip install .)"
    )

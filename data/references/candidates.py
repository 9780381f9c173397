"""Which ways to find a reference are worth trying in an environment: by its spaces and what a probe has seen.

No environment is known by name here. What helps some tasks much (a longer or shorter view, noise that lasts, another
algorithm) is a candidate wherever it may help, and halving finds out.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import typing

from gymnasium import spaces

from ldm_jax.spaces import leaves
from ldm_jax.types import EnvironmentSpec

from . import tabular
from .convolutions import is_grid, is_image
from .hindsight import has_goals
from .ppo_loss import PPOConfig
from .probing import UNKNOWN, Probe
from .recipes import ALGORITHMS, Recipe

HALVING = 4
"""How much longer the better half is trained than all were, from rung to rung."""

LEAST_RUNG = 45_000
"""Environment steps that tell one candidate from another: a budget that cannot pay for them has fewer candidates."""

TOTAL_STEPS, JITTABLE_STEPS, TABLE_STEPS = 1_000_000, 1_500_000, 250_000
"""Environment steps for all candidates together; the second where they cost little, the third for a table."""

SELDOM = 1e-3
"""Share of random steps that are paid, below which learning is a matter of luck."""

OFTEN = 0.5
"""Share of random steps that met an observation seen before, beyond which states can be told apart and counted."""


RELABELLED = 0.8
"""Share of what is learned from that gets another goal, where observations hold goals (Andrychowicz et al. 2017)."""


class Candidate(typing.NamedTuple):
    """One of the ways that are tried.

    Attributes:
      name: what is special about it.
      recipe: how it is trained; its budget is set when it is known how many there are.
      seed: added to that of the environment: another seed is another candidate.
    """

    name: str
    recipe: Recipe
    seed: int = 0


class Rung(typing.NamedTuple):
    """A place where candidates are compared.

    Attributes:
      runs: how many candidates get there.
      share: of the winner's training that they have had then.
    """

    runs: int
    share: float


def total_steps(spec: EnvironmentSpec, probe: Probe = UNKNOWN) -> int:
    """Environment steps that a full budget has for all candidates together.

    Args:
      spec: of the environment.
      probe: what was seen of it.
    """
    if tabular.is_tabular(spec) and not probe.memory:
        return TABLE_STEPS
    return JITTABLE_STEPS if spec.jittable else TOTAL_STEPS


def find_candidates(spec: EnvironmentSpec, probe: Probe) -> tuple[Candidate, ...]:
    """The candidates of an environment, the likeliest first, in which order a small budget tries them.

    Args:
      spec: of the environment; its id, versions and batch size do not matter.
      probe: what was seen of it, `UNKNOWN` where nothing was.

    Returns:
      At least one candidate.
    """
    if tabular.is_tabular(spec) and not probe.memory:
        return (Candidate("table", Recipe("tabular", tabular.TabularConfig())),)
    others, plain = _by_algorithm(spec, probe), _ppo(spec, probe)
    if probe.steps and probe.rewarded < SELDOM:  # what is found there is found by luck, and another seed has other luck
        plain = (*plain, plain[0]._replace(name=f"{plain[0].name}, another seed", seed=1))
    return (*others, *plain) if probe.memory else (plain[0], *others, *plain[1:])


def _ppo(spec: EnvironmentSpec, probe: Probe) -> tuple[Candidate, ...]:
    continuous = any(isinstance(leaf.space, spaces.Box) for leaf in leaves(spec.action_space))
    base = PPOConfig(budget_steps=JITTABLE_STEPS, entropy_coef=0.0 if continuous else 0.01)
    if _has_grids(spec):
        cells = dataclasses.replace(base, activation="relu", convolved=True)
        return _named(
            {
                "cells": cells,
                "numbers": dataclasses.replace(cells, learning_rate=2e-3, convolved=False),  # rows may be no places
                "cells, far view": dataclasses.replace(cells, discount=0.997, gae_lambda=0.97),
                # Many passes fit a rollout too closely in some games (Asterix 12 to 22), and are needed in others.
                "cells, fewer passes": dataclasses.replace(cells, learning_rate=2e-3, epochs=2),
            }
        )
    if any(is_image(leaf.space) for leaf in leaves(spec.observation_space)):
        image = dataclasses.replace(base, activation="relu")
        return _named(
            {
                "image": dataclasses.replace(image, learning_rate=2e-3),
                "image, slower": dataclasses.replace(image, learning_rate=5e-4),
                "image, far view": dataclasses.replace(image, discount=0.997, gae_lambda=0.97),
            }
        )
    far = dataclasses.replace(base, discount=0.999, gae_lambda=0.98, learning_rate=5e-4, minibatches=16)
    far = dataclasses.replace(far, num_envs=32, rollout_length=256)  # fewer are cut off from what follows
    if not continuous:
        return _named({"plain": base, "far view": far})
    near = dataclasses.replace(base, discount=0.96, learning_rate=7e-4)
    # White noise may never reach what noise that lasts does at once; were its size trained, it would be lost.
    lasting = dataclasses.replace(base, noise_correlation=0.95, learn_std=False)
    found = {"plain": base, "near view": near, "lasting noise": lasting, "far view": far}
    if probe.positive and probe.steps:  # something is earned by chance: no need to look further away for it
        del found["lasting noise"]
    return _named(found)


def _by_algorithm(spec: EnvironmentSpec, probe: Probe) -> tuple[Candidate, ...]:
    """Other algorithms than the one that does for most, where they may be better."""
    kinds = {type(leaf.space) for leaf in leaves(spec.action_space)}
    repeating = probe.repeated > OFTEN
    wanted: dict[str, bool] = {
        "recurrent_ppo": probe.memory,
        "hashed": repeating and tabular.takes(spec),
        "pqn": isinstance(spec.action_space, spaces.Discrete),
        "sac": kinds == {spaces.Box} and not spec.jittable,  # it learns from fewer steps, and takes longer over each
    }
    names = [name for name, fits in wanted.items() if fits and name in ALGORITHMS]
    if repeating and not probe.memory:
        names.append("recurrent_ppo")  # states may look alike in a way that random acting does not tell
    found = tuple(Candidate(name, Recipe(name, _config(name, spec))) for name in names)
    # How near a goal is near enough can be learned where rewards say nothing else.
    if kinds != {spaces.Box} or not has_goals(spec.observation_space) or not 1 <= probe.rewards <= 2:
        return found
    relabelling = dataclasses.replace(_config("sac", spec), relabelled=RELABELLED, discount=0.98)
    return (Candidate("sac, goals in hindsight", Recipe("sac", relabelling)), *found)


def _config(name: str, spec: EnvironmentSpec) -> typing.Any:
    config = ALGORITHMS[name].config()
    if name not in ("recurrent_ppo", "pqn"):
        return config
    return dataclasses.replace(config, budget_steps=JITTABLE_STEPS, convolved=_has_grids(spec))


def _named(configs: collections.abc.Mapping[str, PPOConfig]) -> tuple[Candidate, ...]:
    return tuple(Candidate(name, Recipe("ppo", config)) for name, config in configs.items())


def _has_grids(spec: EnvironmentSpec) -> bool:
    """Whether a part of what is seen are cells in rows and columns."""
    return any(is_grid(leaf.space) for leaf in leaves(spec.observation_space))


def rungs(count: int) -> tuple[Rung, ...]:
    """Where so many candidates are halved, down to one that is trained to the end.

    >>> [(rung.runs, round(rung.share, 2)) for rung in rungs(3)]
    [(3, 0.06), (2, 0.25), (1, 1.0)]
    """
    counts = [count]
    while counts[-1] > 1:
        counts.append(math.ceil(counts[-1] / 2))
    return tuple(Rung(n, float(HALVING) ** -(len(counts) - 1 - i)) for i, n in enumerate(counts))


def rank(scores: collections.abc.Sequence[tuple[float, float]]) -> list[int]:
    """The places of candidates, the best first; of those that their errors do not tell apart the likelier is better.

    Args:
      scores: mean returns and their standard errors, of the likeliest candidate first.

    >>> rank([(1.0, 0.3), (1.2, 0.3), (5.0, 0.3)])
    [2, 0, 1]
    """
    left, ranked = list(range(len(scores))), list[int]()
    while left:
        mean, error = max(scores[place] for place in left)
        chosen = next(place for place in left if scores[place][0] >= mean - math.hypot(error, scores[place][1]))
        left.remove(chosen)
        ranked.append(chosen)
    return ranked


def winner_steps(total: int, count: int) -> int:
    """Environment steps of the one that is trained to the end, if all together take `total`."""
    done, cost = 0.0, 0.0
    for rung in rungs(count):
        cost, done = cost + rung.runs * (rung.share - done), rung.share
    return max(1, int(total / cost))


def affordable(count: int, total: int) -> int:
    """How many of `count` candidates a budget can tell from each other, at least one."""
    while count > 1 and winner_steps(total, count) * rungs(count)[0].share < LEAST_RUNG:
        count -= 1
    return count

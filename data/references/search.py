"""From candidates to one trained policy: train all a little, keep the better half, train those longer, and so on.

What is compared are fresh episodes, each candidate's better form; neither they nor their keys are used again, so what
is reported later was not chosen by.
Source: Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016 (successive halving).
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import math
import sys
import time
import typing

import jax
import numpy as np

from ldm_jax import cards, rollout
from ldm_jax.environment import Environment, EnvironmentFaultError, TooManyRowsError
from ldm_jax.errors import LdmError
from ldm_jax.types import Agent, EnvironmentSpec, PyTree

from .candidate_run import CandidateRun
from .candidates import Candidate, Rung, affordable, find_candidates, rank, rungs, total_steps, winner_steps
from .hyperparameters import Hyperparameters
from .learning import DivergenceError
from .opening import MakeEnvironment, opened, with_room
from .policy import SlotDecoding, with_decoding
from .probing import PROBING_STEPS, UNKNOWN, Probe, probe
from .recipes import ALGORITHMS, Recipe
from .tabular import UnsuitableError

PROBE_SHARE = 20
"""A budget is probed for only where it is at least so many times what the probe takes."""

TRIAL_ROWS, HOST_TRIAL_ROWS = 64, 16
"""Episodes that compare candidates, of each form; the second where a simulator has to be stepped for them."""

TRIAL_SHARE = 0.2
"""Of all steps, that one comparison of one candidate may take; where episodes can be longer, those that training itself
ended compare: they are not reported either."""

NEAR = 0.9
"""Share of the way to a target from which on it is looked whether it is reached."""

LOOK_AGAIN = 1.2
"""How much longer training goes on before it is looked again, from where it was not reached."""

_PROBING, _TRYING = 0x9208, 0x7214  # set their randomness apart from that of training


class Found(typing.NamedTuple):
    """What a search came to.

    Attributes:
      spec: of the environment.
      candidate: the one that was kept.
      config: its configuration, settled.
      params: for the policy of its agent, NumPy arrays.
      tried: names of all candidates.
      steps: environment steps of all together, the probe and what compared them included.
      seconds: that it took.
      curve: environment steps and mean return of the kept one's own training.
      stopped: why before the budget was spent: `"solved"`, `"flat"` or nothing.
    """

    spec: EnvironmentSpec
    candidate: Candidate
    config: typing.Any
    params: PyTree
    tried: tuple[str, ...]
    steps: int
    seconds: float
    curve: tuple[tuple[int, float], ...]
    stopped: str


class _Place:
    """Where an environment's candidates are trained and compared; all that it opens is closed with it."""

    def __init__(
        self, make: MakeEnvironment, id: str, stack: contextlib.ExitStack, most_rows: int = sys.maxsize
    ) -> None:
        self._make, self._id, self._stack, self._most_rows = make, id, stack, most_rows
        self._shared: dict[int, Environment] = {}
        self._agents: dict[tuple[str, typing.Any], Agent] = {}
        with opened(make, id, 1) as environment:
            self.spec = environment.spec
        self.steps = 0  # those of the probe and of trials
        self.trial_rows = min(most_rows, TRIAL_ROWS if self.spec.jittable else HOST_TRIAL_ROWS)

    def _own(self, rows: int) -> tuple[Environment, collections.abc.Callable[[], None]]:
        stack = self._stack.enter_context(contextlib.ExitStack())
        return stack.enter_context(opened(self._make, self._id, min(rows, self._most_rows))), stack.close

    def training(self, rows: int) -> tuple[Environment, collections.abc.Callable[[], None]]:
        """An environment for one candidate alone, and what closes it; pure ones are shared."""
        if not self.spec.jittable:
            return self._own(rows)
        return self.shared(rows), lambda: None

    def shared(self, rows: int) -> Environment:
        """An environment that is begun anew by whoever uses it."""
        if rows not in self._shared:
            self._shared[rows] = self._own(rows)[0]
        return self._shared[rows]

    def agent(self, algorithm: str, config: Hyperparameters) -> Agent:
        """Who acts by what was learned: one for all configurations of a structure, so that it compiles once."""
        which = (algorithm, config.structure)
        if which not in self._agents:
            self._agents[which] = ALGORITHMS[algorithm].agent(self.spec, config)
        return self._agents[which]

    def probe(self, seed: int) -> Probe:
        found = probe(self.shared(self.trial_rows), jax.random.fold_in(jax.random.key(seed), _PROBING))
        self.steps += found.steps
        return found

    def try_out(self, run: CandidateRun, key: jax.Array) -> tuple[float, float]:
        """Mean return and its standard error on fresh episodes, of the better form."""
        assert run.learned is not None, "a candidate is tried when it has learned something"
        found = []
        forms: tuple[SlotDecoding, ...] = ("sample", "greedy")
        for form in forms:
            params = with_decoding(jax.tree.map(np.asarray, run.learned.params), form)
            episodes = rollout.run_episodes(self.shared(self.trial_rows), run.agent, params, key, 1)
            self.steps += int(episodes.lengths.sum())
            returns = episodes.returns.astype(np.float64)
            found.append((float(returns.mean()), float(returns.std(ddof=1)) / returns.size**0.5))
        return max(found)


class _Plan(typing.NamedTuple):
    """What a search goes by.

    Attributes:
      place: where.
      seed: of everything random.
      total: environment steps of training of all candidates.
      steps: of the one that is trained to the end.
      target: a return at which the task is solved, or None.
      early: whether training may end before its budget.
      progress: is told the steps and their total.
      more: how many times its own budget a candidate may have that learns from fewer steps.
    """

    place: _Place
    seed: int
    total: int
    steps: int
    target: float | None
    early: bool
    progress: rollout.Progress | None
    more: float = 1.0

    @property
    def tries(self) -> bool:
        """Whether fresh episodes may be had for a comparison; each form plays its own."""
        return 2 * self.place.trial_rows * self.place.spec.time_limit <= TRIAL_SHARE * self.total


def search(
    make: MakeEnvironment,
    id: str,
    budget: float = 1.0,
    seed: int = 0,
    target: float | None = None,
    progress: rollout.Progress | None = None,
) -> Found:
    """Probes an environment, and halves its candidates until one is left, which is trained to the end.

    It ends early when the task is solved, or training is flat.

    Args:
      make: makes the environment, `environments.make` or the like.
      id: of the environment.
      budget: of all candidates together, as a share of `candidates.total_steps`.
      seed: of everything random.
      target: a return at which the task is solved, or None where none is known.
      progress: is told the environment steps trained and their total.

    Raises:
      DivergenceError: every candidate diverged.
      EnvironmentFaultError: whoever acted, the environment broke its contract.
    """
    return _in_place(make, id, lambda place: _search(place, budget, seed, target, progress))


def _in_place(make: MakeEnvironment, id: str, work: collections.abc.Callable[[_Place], Found]) -> Found:
    """Does something where it may open environments, and anew where memory has no room for as many rows."""

    def begun(rows: int) -> Found:
        with contextlib.ExitStack() as stack:
            return work(_Place(make, id, stack, rows))

    return with_room(begun, sys.maxsize)


def _search(place: _Place, budget: float, seed: int, target: float | None, progress: rollout.Progress | None) -> Found:
    probed = round(budget * total_steps(place.spec)) >= PROBE_SHARE * PROBING_STEPS
    seen = place.probe(seed) if probed else UNKNOWN
    total = max(1, round(budget * total_steps(place.spec, seen)))
    candidates = find_candidates(place.spec, seen)
    kept = candidates[: affordable(len(candidates), total)]
    plan = _Plan(place, seed, total, winner_steps(total, len(kept)), target, True, progress, max(1.0, budget))
    return _halve(plan, kept)


def train_one(
    make: MakeEnvironment, id: str, recipe: Recipe, seed: int = 0, progress: rollout.Progress | None = None
) -> Found:
    """Trains by one recipe to the end of its budget.

    Args:
      make: makes the environment, `environments.make` or the like.
      id: of the environment.
      recipe: how.
      seed: of everything random.
      progress: is told the environment steps trained and their total.

    Raises:
      DivergenceError: training diverged.
    """
    steps = recipe.config.budget_steps

    def work(place: _Place) -> Found:
        plan = _Plan(place, seed, steps, steps, None, False, progress)
        return _halve(plan, (Candidate("given", recipe),))

    return _in_place(make, id, work)


def _halve(plan: _Plan, candidates: collections.abc.Sequence[Candidate]) -> Found:
    began, faults = time.monotonic(), list[Exception]()
    runs: list[CandidateRun] = []
    tried: list[str] = []
    stopped = ""
    for number, rung in enumerate(rungs(len(candidates))):
        # One after the other: if the likeliest solves the task at once, the others are not even begun.
        climbing = (_begin(plan, each, faults, tried) for each in candidates) if number == 0 else iter(runs)
        climbed: list[CandidateRun] = []
        for run in climbing:
            if run is None or (end := _climb(plan, run, rung, sum(one.steps for one in climbed), faults)) == "failed":
                continue
            if end:
                _close(plan, [one for one in climbed + runs if one is not run])
                climbed, stopped = [run], end
                break
            climbed.append(run)
        runs = climbed
        if not runs:
            raise faults[0]
        if not stopped and rung.runs > 1:
            runs, stopped = _better_half(plan, runs, number)
        if stopped:
            break
    if plan.progress is not None:
        plan.progress(plan.total, plan.total)
    (run,) = runs
    run.close()
    assert run.learned is not None, "training reports at least once"
    return Found(
        spec=plan.place.spec,
        candidate=run.candidate,
        config=run.config,
        params=jax.tree.map(np.asarray, run.learned.params),
        tried=tuple(tried),
        steps=plan.place.steps + run.steps,
        seconds=time.monotonic() - began,
        curve=tuple(run.curve),
        stopped=stopped,
    )


def _climb(plan: _Plan, run: CandidateRun, rung: Rung, before: int, faults: list[Exception]) -> str:
    """Trains a candidate up to a rung; why it ended before: a candidate that fails leaves it to the others."""
    while run.steps < run.config.budget_steps * rung.share and not run.ended:
        try:
            run.advance()
        except (DivergenceError, UnsuitableError, EnvironmentFaultError) as fault:
            faults.append(fault)
            _close(plan, [run])
            return "failed"
        if plan.progress is not None:
            plan.progress(min(plan.total, before + run.steps), plan.total)
        if plan.early and not run.ended:
            if _is_near(plan, run) and _is_solved(plan, plan.place.try_out(run, _key(plan, run.steps))):
                return "solved"
            if rung.runs == 1 and run.is_flat(run.config.budget_steps):
                return "flat"
    return ""


def _better_half(plan: _Plan, runs: list[CandidateRun], number: int) -> tuple[list[CandidateRun], str]:
    """Those that are trained on, by fresh episodes, and whether the best has solved the task."""
    if len(runs) == 1:
        return runs, ""  # the others failed
    key = _key(plan, number)
    scores = {id(run): plan.place.try_out(run, key) if plan.tries else (run.recent, 0.0) for run in runs}
    best = max(runs, key=lambda run: scores[id(run)][0])
    solved = plan.tries and _is_solved(plan, scores[id(best)])
    better = rank([scores[id(run)] for run in runs])[: math.ceil(len(runs) / 2)]
    kept = [best] if solved else [runs[place] for place in sorted(better)]  # the likelier stay first
    _close(plan, [run for run in runs if all(run is not one for one in kept)])
    return kept, "solved" if solved else ""


def _close(plan: _Plan, runs: collections.abc.Sequence[CandidateRun]) -> None:
    """Frees what candidates hold that are trained no more; their steps were spent all the same."""
    for run in {id(run): run for run in runs}.values():
        run.close()
        plan.place.steps += run.steps


def _begin(plan: _Plan, candidate: Candidate, faults: list[Exception], tried: list[str]) -> CandidateRun | None:
    tried.append(candidate.name)
    algorithm, seed, spec = ALGORITHMS[candidate.recipe.algorithm], plan.seed + candidate.seed, plan.place.spec
    # What learns from fewer steps says so by its own budget, and is given no more unless all are.
    own = candidate.recipe.config
    config = dataclasses.replace(own, budget_steps=min(round(own.budget_steps * plan.more), plan.steps))
    environment, close = plan.place.training(config.num_envs)
    cards.check_matches(spec, environment.spec, f"what {spec.id} said of itself when made a moment ago")
    if (rows := environment.spec.batch_size) < config.num_envs:  # there is no room for more; as many steps an update
        longer = config.rollout_length * config.num_envs // rows
        config = dataclasses.replace(config, num_envs=rows, rollout_length=longer)
    try:
        config = algorithm.settle(environment, config, seed)
    except TooManyRowsError:
        raise
    except (LdmError, EnvironmentFaultError) as fault:
        faults.append(fault)
        return None
    agent = plan.place.agent(candidate.recipe.algorithm, config)
    return CandidateRun(candidate, config, agent, algorithm.learn(environment, config, seed), close)


def _is_near(plan: _Plan, run: CandidateRun) -> bool:
    """Whether the last report makes it likely that the target is reached; to look costs episodes, so not each time."""
    if (
        plan.target is None
        or not plan.tries
        or not run.curve
        or run.curve[-1][0] != run.steps
        or run.steps < run.look_after
    ):
        return False
    first, last = run.curve[0][1], run.curve[-1][1]
    if last < first + NEAR * (plan.target - first):
        return False
    run.look_after = LOOK_AGAIN * run.steps
    return True


def _is_solved(plan: _Plan, score: tuple[float, float]) -> bool:
    """Whether a mean return is sure to be at the target; a policy that cannot fail has no error."""
    mean, error = score
    return plan.early and plan.target is not None and mean - error >= plan.target - 1e-6 * abs(plan.target)


def _key(plan: _Plan, number: int) -> jax.Array:
    """The key of the episodes of one comparison, the same for all candidates."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), _TRYING), number)

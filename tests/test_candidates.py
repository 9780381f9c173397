"""How a reference is found without a hand: what a probe sees, which candidates follow, and which of them is kept."""

import dataclasses
import itertools
import math

import gymnasium as gym
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from gymnasium import spaces

import environments
from data import references
from data.references import candidate_run, candidates, probing, search
from data.references.algorithm import Algorithm, Learned
from data.references.hyperparameters import Hyperparameters
from data.references.scoring import Rounds, play_rounds, told_apart
from ldm_jax import rollout
from ldm_jax.evaluation import scores
from ldm_jax.types import EnvironmentSpec


def spec_of(observation, action, id="here/Something-v0", jittable=False):
    return EnvironmentSpec(id, "here", "0", observation, action, 1, 10, "test", jittable)


BOX, DISCRETE, GRID = spaces.Box(-1, 1, (2,)), spaces.Discrete(4), spaces.Box(0, 1, (5, 5, 2))


# The probe


class Recall(gym.Env):
    """Shows a letter, then a clock alone, and pays for naming the letter in the end: or, by luck, another."""

    action_space, observation_space = spaces.Discrete(2), spaces.Discrete(6)

    def __init__(self, luck=False):
        self.luck = luck

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock, self.letter = 0, int(self.np_random.integers(2))
        return self.letter, {}

    def step(self, action):
        self.clock += 1
        wanted = int(self.np_random.integers(2)) if self.luck else self.letter
        return 2 + self.clock, float(self.clock == 3 and action == wanted), self.clock == 3, False, {}


gym.register("Recall-v0", Recall, max_episode_steps=10)
gym.register("Luck-v0", Recall, max_episode_steps=10, kwargs={"luck": True})


def probed(id, rows=16, seed=0):
    environment = environments.make(id, batch_size=rows)
    try:
        return probing.probe(environment, jax.random.key(seed))
    finally:
        environment.close()


def test_a_probe_tells_what_must_be_remembered_from_what_is_merely_random():
    recall, luck = probed("gymnasium/Recall-v0"), probed("gymnasium/Luck-v0")
    assert recall.memory and not luck.memory
    for seen in (recall, luck):
        assert (seen.states, seen.episode_length, seen.largest_reward) == (5, 3.0, 1.0)
        assert seen.repeated > 0.99 and seen.positive and 0.1 < seen.rewarded < 0.25
        assert seen.idle == () and seen.steps_per_second > 0


def test_the_same_key_probes_the_same():
    assert probed("gymnasium/Recall-v0") == probed("gymnasium/Recall-v0") != probed("gymnasium/Recall-v0", seed=1)


def test_a_slippery_world_needs_no_memory_and_a_wall_makes_actions_idle_only_where_it_is():
    seen = probed("envpool/FrozenLake-v1")
    assert not seen.memory and seen.repeated > 0.9 and seen.idle == ()


# Candidates


@st.composite
def drawn_probes(draw):
    return probing.Probe(
        steps=draw(st.sampled_from((0, 4096))),
        positive=draw(st.booleans()),
        rewarded=draw(st.sampled_from((0.0, 0.5))),
        repeated=draw(st.sampled_from((0.0, 0.9))),
        memory=draw(st.booleans()),
    )


SPACES = st.sampled_from((BOX, DISCRETE, GRID, spaces.Tuple((BOX, DISCRETE)), spaces.MultiDiscrete([2, 3])))


@hypothesis.given(SPACES, SPACES, st.booleans(), drawn_probes())
def test_candidates_are_a_pure_function_of_spaces_and_probe_whatever_the_environment_is_called(
    observation, action, jittable, probe
):
    one = candidates.find_candidates(spec_of(observation, action, jittable=jittable), probe)
    faster = dataclasses.replace(probe, steps_per_second=1e6)
    names = [each.name for each in one]
    assert one and len({*names}) == len(names)
    for id in ("here/CartPole-v1", "here/LunarLander-v3"):
        assert candidates.find_candidates(spec_of(observation, action, id, jittable), faster) == one


def test_what_helps_some_tasks_is_tried_wherever_it_may_help():
    def configs(observation, action, **seen):
        found = candidates.find_candidates(spec_of(observation, action), probing.Probe(**seen))
        return [each.recipe.config for each in found if each.recipe.algorithm == "ppo"]

    assert all(config.entropy_coef > 0 for config in configs(BOX, DISCRETE))
    assert all(config.entropy_coef == 0 for config in configs(BOX, BOX))
    assert max(config.discount for config in configs(BOX, DISCRETE)) > 0.99
    assert min(config.discount for config in configs(BOX, BOX)) < 0.99
    assert any(config.noise_correlation > 0 for config in configs(BOX, BOX, steps=4096, positive=False))
    assert not any(config.noise_correlation > 0 for config in configs(BOX, BOX, steps=4096, positive=True))
    assert {config.activation for config in configs(GRID, DISCRETE)} == {"relu"}
    sparse = candidates.find_candidates(spec_of(BOX, DISCRETE), probing.Probe(steps=4096, rewarded=0.0))
    assert {each.seed for each in sparse} == {0, 1}
    (table,) = candidates.find_candidates(spec_of(DISCRETE, DISCRETE), probing.UNKNOWN)
    assert table.recipe.algorithm == "tabular"
    steps = [
        candidates.total_steps(spec_of(DISCRETE, DISCRETE), probing.Probe(memory=memory)) for memory in (False, True)
    ]
    assert steps == [candidates.TABLE_STEPS, candidates.TOTAL_STEPS]  # what has to be remembered fits no table
    for action in (DISCRETE, spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), spaces.Tuple((BOX, DISCRETE))):
        repeating = candidates.find_candidates(spec_of(BOX, action), probing.Probe(steps=4096, repeated=0.9))
        found = {each.recipe.algorithm for each in repeating}
        assert ("hashed" in found) == (not isinstance(action, spaces.Tuple)) and "recurrent_ppo" in found
    goals = spaces.Dict({"achieved_goal": BOX, "desired_goal": BOX})
    for observation, action, rewards in ((goals, BOX, 2), (goals, BOX, 9), (goals, DISCRETE, 2), (BOX, BOX, 2)):
        seen = probing.Probe(steps=4096, rewards=rewards)
        found = candidates.find_candidates(spec_of(observation, action), seen)
        relabelling = any(getattr(each.recipe.config, "relabelled", 0) > 0 for each in found)
        assert relabelling == (observation is goals and action is BOX and rewards == 2)
    large = candidates.find_candidates(spec_of(spaces.Discrete(10**6), DISCRETE), probing.UNKNOWN)
    assert "tabular" not in {each.recipe.algorithm for each in large}


@hypothesis.given(st.integers(1, 9), st.integers(100, 10**7))
def test_halving_costs_what_it_may_and_ends_with_one(count, total):
    ladder = candidates.rungs(count)
    assert (ladder[0].runs, ladder[-1].runs, ladder[-1].share) == (count, 1, 1.0)
    assert all(b.runs == math.ceil(a.runs / 2) and b.share > a.share for a, b in itertools.pairwise(ladder))
    steps, done, cost = candidates.winner_steps(total, count), 0.0, 0.0
    for rung in ladder:
        cost, done = cost + rung.runs * (rung.share - done) * steps, rung.share
    assert cost <= total * (1 + 1e-9) and cost >= total - 2 * count
    kept = candidates.affordable(count, total)
    assert 1 <= kept <= count
    assert kept == 1 or candidates.winner_steps(total, kept) * candidates.rungs(kept)[0].share >= candidates.LEAST_RUNG


# Halving, with algorithms that are told how good they become


@dataclasses.dataclass(frozen=True)
class Told(Hyperparameters):
    """How likely the better action becomes in the end, and what training says of its episodes meanwhile."""

    final: float = 1.0
    fails: bool = False
    mean: float = math.nan
    budget_steps: int = 100_000
    num_envs: int = 4


def learn(environment, config, seed):
    for tenth in range(1, 11):
        if config.fails and tenth == 2:
            raise references.DivergenceError(f"{environment.spec.id} diverged")
        chance = 0.5 + (config.final - 0.5) * tenth / 10
        logits = np.log(np.array([1 - chance, chance]) + 1e-9).astype(np.float32)
        yield Learned(config.budget_steps * tenth // 10, {"logits": logits}, config.mean)


@pytest.fixture
def told(monkeypatch):
    """Makes candidates of an algorithm that is told what comes of it, and halves them in a game that pays for 1."""
    from ldm_jax.encoding.actions import action_layout

    def policy(params, timestep):
        rows = timestep.reward.shape[0]
        logits = jax.numpy.broadcast_to(params["logits"], (rows, 2))
        return references.policy.SlotPolicy(logits, jax.numpy.zeros((rows, 0)), jax.numpy.zeros((rows, 0)))

    algorithm = Algorithm(
        Told,
        lambda environment, config, seed: config,
        learn,
        lambda spec, config: references.policy.slot_agent(action_layout(spec.action_space), policy),
        lambda spec, config: {"logits": np.zeros(2, np.float32)},
    )
    known = {"told": algorithm}
    monkeypatch.setattr(search, "ALGORITHMS", known)
    monkeypatch.setattr(references.recipes, "ALGORITHMS", known)
    monkeypatch.setattr(candidate_run, "FLAT_AFTER", 2.0)

    def halve(*configs, target=None, total=10_000, progress=None):
        each = [candidates.Candidate(str(i), references.Recipe("told", config)) for i, config in enumerate(configs)]
        with search.contextlib.ExitStack() as stack:
            place = search._Place(environments.make, "gymnasium/Pays-v0", stack)
            steps = candidates.winner_steps(total, len(each))
            more = max(1.0, total / candidates.total_steps(place.spec))
            return search._halve(search._Plan(place, 0, total, steps, target, True, progress, more), each)

    return halve


class Pays(gym.Env):
    action_space, observation_space = spaces.Discrete(2), spaces.Box(0, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action), False, False, {}


gym.register("Pays-v0", Pays, max_episode_steps=20)


def test_halving_keeps_the_best_and_trains_it_to_the_end(told):
    found = told(Told(0.3), Told(0.4), Told(1.0), Told(0.0))
    assert found.candidate.name == "2" and found.stopped == ""
    assert found.config.budget_steps == candidates.winner_steps(10_000, 4)
    assert found.tried == ("0", "1", "2", "3") and found.steps > 10_000 * 0.9  # with what compared them


def test_a_larger_budget_is_for_those_too_that_learn_from_few_steps(told):
    told_steps = [told(Told(1.0), total=total).config.budget_steps for total in (50_000, 1_000_000, 3_000_000)]
    assert told_steps == [50_000, 100_000, 300_000]


def test_the_same_seed_finds_the_same_and_so_does_what_is_begun_again_after_it_was_killed(told):
    def kill(done, total):
        if done > 2 * total / 3:
            raise KeyboardInterrupt

    one = told(Told(0.3), Told(1.0))
    with pytest.raises(KeyboardInterrupt):
        told(Told(0.3), Told(1.0), progress=kill)
    other = told(Told(0.3), Told(1.0))
    assert one.candidate == other.candidate and (one.steps, one.curve, one.tried) == (
        other.steps,
        other.curve,
        other.tried,
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))


def test_where_episodes_are_too_long_to_be_tried_those_of_training_compare(told, monkeypatch):
    monkeypatch.setattr(search, "TRIAL_SHARE", 0.0)
    found = told(Told(1.0, mean=3.0), Told(0.3, mean=5.0), target=4.0)
    assert found.candidate.name == "1" and found.stopped == ""
    assert found.steps <= 10_500  # nothing was played beside training


def test_a_candidate_that_diverges_leaves_it_to_the_others(told):
    assert told(Told(1.0, fails=True), Told(0.7)).candidate.name == "1"
    with pytest.raises(references.DivergenceError, match="Pays-v0"):
        told(Told(fails=True), Told(fails=True))


def test_a_solved_candidate_stops_early(told):
    solved, spent = told(Told(1.0, mean=19.5), target=15.0), told(Told(1.0, mean=19.5))
    assert solved.stopped == "solved" and spent.stopped == ""
    assert solved.steps < 0.8 * spent.steps
    assert told(Told(0.4, mean=19.5), target=15.0).stopped == ""  # training's own episodes do not decide it


# Scoring by need


def playing(random, reference, spread, rows=8):
    """Plays a made-up game, and tells the keys and numbers of the rounds."""
    calls = []

    def play(which, number):
        rng = np.random.default_rng([which, number])
        calls.append((which, number))
        returns = rng.normal((reference, random)[which], spread, (rows, 1)).astype(np.float32)
        return rollout.EpisodeReturns(returns, np.full((rows, 1), 10, np.int32))

    return play, calls


def told_to_a_tenth(one, other):
    return scores.z_error(other, one) <= scores.ADMIT_Z_ERROR


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(st.floats(0.3, 20), st.booleans())
def test_episodes_are_played_until_z_is_told_whichever_way_it_leans(gap, better):
    play, calls = playing(0.0, gap if better else -gap, 1.0)
    found, other = play_rounds(play, Rounds(8, 1, 64, 4096, 10**9), told_to_a_tenth)
    assert found.episodes == other.episodes == 8 * len(calls) // 2 >= 64
    assert told_to_a_tenth(found.array, other.array)
    assert found.episodes == 64 or not told_to_a_tenth(found.array[:, :-1], other.array[:, :-1])
    mirrored = play_rounds(
        lambda which, number: play(which, number)._replace(returns=-play(which, number).returns),
        Rounds(8, 1, 64, 4096, 10**9),
        told_to_a_tenth,
    )
    assert mirrored[0].episodes == found.episodes


def test_scoring_ends_where_it_has_cost_enough_or_is_hopeless():
    for rounds, expected in ((Rounds(8, 1, 64, 256, 10**9), 256), (Rounds(8, 1, 64, 4096, 3000), 152)):
        play, _ = playing(0.0, 0.0, 1.0)
        assert play_rounds(play, rounds, told_to_a_tenth)[0].episodes == expected


@hypothesis.given(st.floats(-3, 3), st.integers(0, 100))
def test_forms_are_told_apart_alike_in_either_order(gap, seed):
    rng = np.random.default_rng(seed)
    one, other = rng.normal(0, 1, (8, 4)), rng.normal(gap, 1, (8, 4))
    assert told_apart(one, other) == told_apart(other, one)


def test_a_reference_is_found_scored_and_admitted_without_a_hand(monkeypatch):
    """Halving never reports the episodes that it chose by: no key of an evaluation is used twice."""
    keys = []
    real = rollout.run_episodes

    def evaluate(environment, agent, params, key, *rest):
        keys.append((tuple(jax.random.key_data(key).tolist()), int(params["decoding"])))
        return real(environment, agent, params, key, *rest)

    monkeypatch.setattr(rollout, "run_episodes", evaluate)
    monkeypatch.setattr(candidates, "LEAST_RUNG", 1000)
    monkeypatch.setattr(search, "TRIAL_SHARE", math.inf)
    trained = references.train_reference(environments.make, "gymnax/Catch-bsuite", budget=0.02, target=1.0)
    chosen = [key for key, _ in keys]
    scored = references.score_reference(environments.make, trained)
    reported = [key for key, _ in keys[len(chosen) :]]
    assert chosen and not {*chosen} & {*reported} and len({*reported}) == len(reported)
    made = scored.policy.reference
    assert made.candidate in made.candidates
    assert made.steps >= made.budget_steps and made.seconds > 0 and made.curve[-1][0] <= made.budget_steps + 8192
    assert {form[0] for form in made.forms} == {"greedy", "sample"} and made.public_target == 1.0
    assert scored.share_of_target is not None and scored.weak == (scored.share_of_target < 0.5)


@hypothesis.given(st.lists(st.tuples(st.floats(-1e6, 1e6) | st.just(-math.inf), st.floats(0, 1e3)), max_size=6))
def test_better_candidates_are_kept_and_among_equals_the_likelier(scores):
    ranked = candidates.rank(scores)
    assert sorted(ranked) == list(range(len(scores)))
    for place, chosen in enumerate(ranked):
        mean, error = max(scores[other] for other in ranked[place:])
        assert scores[chosen][0] >= mean - math.hypot(error, scores[chosen][1])
    assert candidates.rank([(mean, 0.0) for mean, _ in scores]) == sorted(
        range(len(scores)), key=lambda place: -scores[place][0]
    )

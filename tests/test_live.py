"""Laws of a policy at work: it is evaluated as the stages do, and plays in any plain Gymnasium environment."""

import contextlib
import functools
import logging

import examples
import gymnasium
import hypothesis
import jax
import numpy as np
import pytest
import spaces_strategies
from gymnasium import spaces as gs
from hypothesis import strategies as st

import environments
import ldm_jax
from ldm_jax import acting, cards, measuring, spaces
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.types import TimeStep

NANO = SIZES["nano"]
PARAMS = examples.random_params(make_model(NANO))
LAKE, CATCH = "gymnasium/FrozenLake-v1", "gymnax/Catch-bsuite"


@functools.cache
def policy():
    """A policy that has learnt nothing and has cards of two environments, one of them jittable."""
    known = {}
    for id in (LAKE, CATCH):
        with contextlib.closing(environments.make(id, 1)) as environment:
            spec = environment.spec
        made = examples.make_card(spec.observation_space, spec.action_space)
        names = ("statistics", "random_returns", "reference_returns", "reference")
        known[id] = cards.EnvironmentCard.of(spec, **{name: getattr(made, name) for name in names})
    return ldm_jax.Policy(NANO, PARAMS, known)


# Evaluating


@pytest.mark.parametrize("id", [LAKE, CATCH])
def test_an_environment_is_evaluated_as_by_the_stage_that_evaluates_made_or_named(id):
    with contextlib.closing(environments.make(id, 3)) as environment:
        found = ldm_jax.evaluate(policy(), environment, jax.random.key(3), episodes=2)
    trial = acting.Trial(
        policy().codec(policy().cards[id]), functools.partial(environments.make, id, 3), 3, 2, jax.random.key(3)
    )
    (played,) = acting.play_trials(NANO, PARAMS, [trial])
    named = ldm_jax.evaluate(policy(), id, jax.random.key(3), rows=3, episodes=2)
    for each in (found, named):
        np.testing.assert_array_equal(each.returns, played.episodes.returns)
        np.testing.assert_array_equal(each.lengths, played.episodes.lengths)
    card = policy().cards[id]
    random, reference = card.random_returns.mean, card.reference_returns.mean
    assert named.z == found.z and found.z.low <= found.z.value <= found.z.high
    np.testing.assert_allclose(found.z.value, (found.returns.mean() - random) / (reference - random), atol=1e-6)
    assert f"'{id}'" in repr(found) and "3 x 2 episodes" in repr(found) and "nan" not in repr(found)


def test_a_single_row_has_a_z_and_no_interval():
    found = ldm_jax.evaluate(policy(), CATCH, jax.random.key(0), rows=1, episodes=1)
    assert found.z.low == -np.inf and found.z.high == np.inf and np.isfinite(found.z.value)
    assert "[" not in repr(found).partition("z ")[2]


def test_an_environment_that_is_not_known_is_measured_first_and_has_no_z(caplog):
    unknown = ldm_jax.Policy(NANO, PARAMS, {})
    found = ldm_jax.evaluate(unknown, CATCH, jax.random.key(0), rows=3, episodes=1)
    assert found.z is None and "no reference" in repr(found) and found.lengths.tolist() == [[9], [9], [9]]
    (line,) = caplog.messages
    assert "was not trained in it" in line and f"{3 * measuring.RANDOM_STEPS} random steps" in line


def test_what_cannot_be_evaluated_is_said():
    with pytest.raises(ldm_jax.LdmError, match="did you mean gymnax/Catch-bsuite"):
        ldm_jax.evaluate(policy(), "gymnax/Catch", jax.random.key(0))
    for few in ({"rows": 0}, {"episodes": 0}):
        with pytest.raises(ldm_jax.LdmError, match="expected at least 1"):
            ldm_jax.evaluate(policy(), CATCH, jax.random.key(0), **few)
    with pytest.raises(ldm_jax.LdmError, match="expected an id or an environment"):
        ldm_jax.evaluate(policy(), gymnasium.make("FrozenLake-v1"), jax.random.key(0))


# What was seen so far


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(data=st.data(), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_running_statistics_are_those_of_all_that_was_seen(data, rows, seed):
    space, action = gs.Dict(at=gs.Box(-np.inf, np.inf, (3,)), kind=gs.Discrete(3)), gs.Discrete(2)
    layout, rng = observation_layout(space), np.random.default_rng(seed)
    running, seen, rewards = measuring.start_statistics(space), [], []
    still = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    for _ in range(data.draw(st.integers(1, 6))):
        at = np.where(still, 7, rng.normal(1e3, 5, (rows, 3))).astype(np.float32)
        reward = rng.choice([0, 2.5, -1], rows).astype(np.float32)
        no = np.zeros(rows, bool)
        step = TimeStep(
            observation={"at": at, "kind": np.zeros(rows, np.int32)},
            reward=reward,
            terminated=no,
            truncated=no,
            first=no,
        )
        running = measuring.add_timestep(running, layout, step)
        seen.append(at)
        rewards.append(reward)
    found = measuring.statistics_of(running, action, masked=False)
    numbers, paid = np.concatenate(seen).astype(np.float64), np.concatenate(rewards)
    mean, std = numbers.mean(0), numbers.std(0)
    np.testing.assert_allclose(found.observation_mean, mean)
    floored = measuring.floored_deviation(std, mean, numbers.min(0), numbers.max(0))
    np.testing.assert_allclose(found.observation_std, floored, rtol=1e-6)
    paid = paid[paid != 0]
    np.testing.assert_allclose(found.reward_scale, np.sqrt((paid**2).mean()) if paid.size else 1.0)
    assert found.steps == len(numbers)


# Values of single environments


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(spaces_strategies.any_spaces)
def test_a_value_of_any_space_is_carried_and_given_back(space):
    value = spaces_strategies.library_sample(space)
    carried = spaces.from_gymnasium(space, value, "it")
    assert spaces.check(space, carried, 1, "it") == 0
    if not any(isinstance(leaf.space, gs.Text) for leaf in spaces.leaves(space)):
        again = spaces.to_gymnasium(space, carried)
        jax.tree.map(np.testing.assert_array_equal, spaces.from_gymnasium(space, again, "it"), carried)
        for leaf in spaces.leaves(space):
            mine, theirs = spaces.get(again, leaf.path), spaces.get(value, leaf.path)
            assert np.asarray(mine).dtype == np.asarray(theirs).dtype and np.shape(mine) == np.shape(theirs)


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (gs.Dict(at=gs.Box(0, 1, (2,))), {"et": np.zeros(2)}, "has no part 'at'"),
        (gs.Box(0, 1, (2,)), np.zeros(3), r"has shape \[3\], expected \[2\]"),
        (gs.Box(0, 1, (2,)), [0, np.nan], "is NaN"),
        (gs.Box(0, 1, (1,)), "left", "expected numbers"),
        (gs.Discrete(3, start=1), 0, "outside Discrete"),
        (gs.Text(3), "word", "has 4 bytes, expected at most 3"),
    ],
)
def test_a_value_of_another_space_is_refused(space, value, message):
    with pytest.raises(spaces.SpaceError, match=f"the sight of it.*{message}"):
        spaces.from_gymnasium(space, value, "the sight of it")


# Playing


class Echo(gymnasium.Env):
    """Says anything of its space, and ends after some steps; `acted` is what it was told."""

    def __init__(self, observation_space, action_space, length=3, mask=None):
        self.observation_space, self.action_space = observation_space, action_space
        self.length, self.mask, self.acted, self.seeds = length, mask, [], []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.left = self.length
        return self._look()

    def _look(self):
        return self.observation_space.sample(), {} if self.mask is None else {"action_mask": self.mask}

    def step(self, action):
        self.acted.append(action)
        self.left -= 1
        observation, info = self._look()
        return observation, 0.5, self.left == 0, False, info


def test_play_acts_as_the_agent_of_the_card_does_over_the_ends_of_episodes():
    steps = list(ldm_jax.play(policy(), gymnasium.make("FrozenLake-v1"), episodes=4))
    assert [step.episode for step in steps if step.last] == [1, 2, 3, 4] and len(steps) > NANO.window
    agent = policy().agent(LAKE)
    memory, act = agent.init(1), jax.jit(agent.step)

    def see(observation, reward=0.0, terminated=False, truncated=False, first=False):
        nonlocal memory
        seen = TimeStep(
            observation=np.array([observation], np.int32),
            reward=np.array([reward], np.float32),
            terminated=np.array([terminated]),
            truncated=np.array([truncated]),
            first=np.array([first]),
        )
        memory, action, _ = act(PARAMS, memory, seen, jax.random.key(0))
        return int(action[0])

    total, number = 0.0, 0
    for step in steps:
        if number == 0:
            action = see(step.observation, first=True)
        assert action == step.action
        total, number = total + step.reward, number + 1
        assert (step.return_so_far, step.step) == (total, number)
        action = see(step.next_observation, step.reward, step.terminated, step.truncated)
        if step.last:
            total, number = 0.0, 0


MIXED = examples.SPACES["mixed"]


def test_an_environment_of_any_spaces_is_played_and_said_to_be_unknown(caplog):
    environment = Echo(MIXED[0], gs.Tuple([gs.Discrete(4, start=2), gs.Box(-1, 1, (1,), np.float64)]))
    steps = list(ldm_jax.play(policy(), environment, episodes=2, seed=5))
    (line,) = caplog.messages
    assert line.startswith("Echo: unknown to the policy") and "running statistics" in line
    assert len(steps) == 6 and environment.seeds == [5, None]
    for step in steps:
        assert step.action in environment.action_space
    again = Echo(environment.observation_space, environment.action_space)
    next(ldm_jax.play(policy(), again, seed=5))


def test_a_mask_of_choices_is_kept_to_wherever_it_is():
    mask = np.array([0, 0, 1], np.int8)
    environment = Echo(gs.Box(-1, np.inf, (4,)), gs.Discrete(3), mask=mask)
    assert {int(step.action) for step in ldm_jax.play(policy(), environment, episodes=3)} == {2}


def test_the_card_that_is_meant_can_be_named(caplog):
    lake = policy().cards[LAKE]
    environment = Echo(lake.observation_space, lake.action_space)
    with caplog.at_level(logging.WARNING):
        assert len(list(ldm_jax.play(policy(), environment, card=LAKE, episodes=1))) == 3
    assert not caplog.messages
    with pytest.raises(cards.CardError, match=r"its action space is Discrete\(3\), expected Discrete\(4\)"):
        ldm_jax.play(policy(), Echo(lake.observation_space, gs.Discrete(3)), card=LAKE)


def test_an_environment_of_the_same_id_and_other_spaces_is_another_one(caplog):
    environment = gymnasium.make("FrozenLake-v1", map_name="8x8")
    next(ldm_jax.play(policy(), environment, episodes=1))
    assert f"{LAKE} of the policy is another one, its observation space is Discrete(64)" in caplog.text


@pytest.mark.parametrize(
    ("seen", "acted", "message"),
    [
        (
            gs.Box(0, 1, (4096,)),
            gs.Discrete(2),
            r"needs numeric=8192 \(the model has \d+\).*observation value float32\[4096\]",
        ),
        (gs.Discrete(2), gs.Discrete(5000), r"needs choices=5120 .*action value Discrete\(5000\)"),
        (gs.Sequence(gs.Discrete(2)), gs.Discrete(2), "the observation space of Echo.*kind Sequence"),
        (gs.Discrete(2), gs.Text(3), "action space has a Text part"),
    ],
)
def test_spaces_that_do_not_fit_the_model_are_refused_with_their_widths(seen, acted, message):
    with pytest.raises(ldm_jax.LdmError, match=message):
        ldm_jax.play(policy(), Echo(seen, acted))


def test_what_cannot_be_played_in_is_refused_before_anything_is_done():
    for wrong in (policy(), "FrozenLake-v1", gymnasium.make_vec("FrozenLake-v1", 2)):
        with pytest.raises(ldm_jax.LdmError, match=r"expected one environment as gymnasium\.make gives"):
            ldm_jax.play(policy(), wrong)
    lake = gymnasium.make("FrozenLake-v1")
    with pytest.raises(ldm_jax.LdmError, match="episodes is 0, expected at least 1"):
        ldm_jax.play(policy(), lake, episodes=0)
    with pytest.raises(ldm_jax.LdmError, match="decoding is 'best'"):
        ldm_jax.play(policy(), lake, decoding="best")
    with pytest.raises(ldm_jax.LdmError, match="no card of 'gymnasium/FrozenLak'"):
        ldm_jax.play(policy(), lake, card="gymnasium/FrozenLak")

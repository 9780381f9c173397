"""Laws of the algorithms that find references: each solves its smallest problem, and its agent is what it learned."""

import dataclasses
import types

import chex
import gymnasium as gym
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces

import environments
from data import collect, references
from data.references import hindsight, learning, mdp, memory, moments, policy, ppo, pqn, recipes, sac, states, tabular
from ldm_jax import rollout
from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16, action_layout
from ldm_jax.encoding.transition import from_leaves
from ldm_jax.errors import ConfigError
from ldm_jax.spaces import SpaceError
from ldm_jax.types import EnvironmentSpec, TimeStep

CHAIN = "gymnax/MemoryChain-bsuite"
REMEMBERING = ppo.PPOConfig(
    budget_steps=16_384, num_envs=16, rollout_length=64, hidden=(16,), minibatches=4, memory=16, sequence_length=16
)


def made_once(id, rows):
    """One environment for all that train in it, so that they compile once."""
    made = environments.make(id, batch_size=rows)
    return lambda id, batch_size: made if batch_size == rows else environments.make(id, batch_size=batch_size)


def saved_and_found(folder, scored):
    references.save_reference(folder / "reference", scored)
    assert references.load_reference(folder / "reference") == scored


# Memory


@pytest.fixture(scope="module")
def chain():
    """A reference with memory, and what made its environment."""
    make = made_once(CHAIN, REMEMBERING.num_envs)
    return references.train_reference(make, CHAIN, references.Recipe("ppo", REMEMBERING)), make


def test_what_was_shown_at_the_beginning_is_remembered_to_the_end(chain):
    trained, make = chain
    scored = references.score_reference(make, trained, num_envs=16)
    assert scored.reference_returns.mean > 0.9  # without memory: 0, as random


def test_a_reference_with_memory_is_saved_and_found_the_same(tmp_path, chain):
    trained, make = chain
    scored = references.score_reference(make, trained, num_envs=16, episodes_per_env=1)
    saved_and_found(tmp_path, scored)
    again = references.train_reference(make, CHAIN, references.Recipe("ppo", REMEMBERING))
    assert again == trained
    loaded = references.load_reference(tmp_path / "reference")
    assert references.score_reference(make, loaded.policy, num_envs=16, episodes_per_env=1) == scored


def test_a_label_follows_the_history_whoever_acted(chain):
    trained, make = chain
    spec = make(CHAIN, 16).spec
    collected = collect.collect(make(CHAIN, 16), trained.with_decoding("greedy"), 0, collect.CollectConfig(16, 40, 20))
    seen = from_leaves(spec.observation_space, spec.action_space, collected.leaves)
    params, carry, step = trained.with_decoding("greedy").params, trained.agent.init(16), jax.jit(trained.agent.step)
    for t in range(40):
        now = jax.tree.map(lambda x, t=t: x[t], seen)
        carry, label, _ = step(params, carry, now.timestep, jax.random.key(0))
        np.testing.assert_array_equal(np.asarray(label)[now.label_mask], now.reference_action[now.label_mask])
        carry = policy.executed(carry, now.action)
    assert 0.2 < collected.random < 0.8


def remembering_model(seed):
    spec = EnvironmentSpec(
        "here/Mixed-v0",
        "here",
        "0",
        gym_spaces.Box(-1, 1, (3,)),
        gym_spaces.Tuple((gym_spaces.Discrete(3, start=1), gym_spaces.Box(-1, 1, (2,)))),
        4,
        10,
        "test",
        True,
    )
    model = memory.recurrent(spec, action_layout(spec.action_space), (8,), "tanh", 8)
    return spec, model, model.init(np.random.default_rng(seed))


def time_step(observation, first):
    no = np.zeros(4, bool)
    return TimeStep(observation=observation, reward=no.astype(np.float32), terminated=no, truncated=no, first=first)


def test_learning_unrolls_what_acting_did_step_by_step():
    spec, model, params = remembering_model(0)
    rng, known, length = np.random.default_rng(1), moments.init_moments(model.size), 12
    known = known._replace(seen=np.float32(1), std=np.ones(model.size, np.float32))
    state, acted, seen, firsts = model.begin(4), [], [], []
    for t in range(length):
        first = np.full(4, True) if t == 0 else rng.random(4) < 0.2
        timestep = time_step(rng.normal(size=(4, 3)).astype(np.float32), first)
        seen.append(model.see(state, timestep))
        firsts.append(first)
        outputs, state = model.act(params, known, state, seen[-1], timestep)
        acted.append(outputs)
        action = jax.tree.map(lambda x: np.stack([x] * 4), spec.action_space.sample())
        state = policy.executed(state, jax.tree.map(jnp.asarray, action))
    together = jax.tree.map(lambda *steps: jnp.stack(steps, 1), *seen)
    unrolled = model.unroll(params, known, model.begin(4), together, None, np.stack(firsts, 1))
    for step_by_step, at_once in zip(zip(*acted, strict=True), unrolled, strict=True):
        np.testing.assert_allclose(np.stack(step_by_step, 1), at_once, atol=1e-5)


def test_nothing_is_remembered_beyond_the_beginning_of_an_episode():
    _, model, params = remembering_model(0)
    begun = model.begin(4)
    other = begun._replace(hidden=begun.hidden + 1.0, action=jax.tree.map(jnp.ones_like, begun.action))
    timestep = time_step(np.ones((4, 3), np.float32), np.ones(4, bool))
    known = moments.init_moments(model.size)
    outputs = [model.act(params, known, m, model.see(m, timestep), timestep)[0] for m in (begun, other)]
    chex.assert_trees_all_equal(*outputs)


@pytest.mark.parametrize("changes", [{"sequence_length": 24}, {"memory": -1}, {"memory": 1.5}, {"minibatches": 128}])
def test_sequences_that_do_not_divide_a_rollout_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        dataclasses.replace(REMEMBERING, **changes)


# Tables


class Hidden(gym.Env):
    """A way of six steps, each told by two numbers and a few letters; at each all actions but one lead back to its
    beginning, the last is forbidden, and only the end pays."""

    observation_space = gym_spaces.Dict({"at": gym_spaces.Box(-9, 9, (2,), np.float32), "word": gym_spaces.Text(4)})
    action_space = gym_spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return self.see(), {}

    def see(self):
        return {"at": np.array([self.place % 2, -self.place], np.float32), "word": "abc"[: self.place % 4]}

    def step(self, action):
        self.place = self.place + 1 if tuple(action) == (self.place % 2, self.place % 3) else 0
        return self.see(), float(self.place == 6), self.place == 6, False, {}


gym.register("Hidden-v0", Hidden, max_episode_steps=12)


def test_planning_finds_what_is_hidden_at_the_end_of_a_way(tmp_path):
    config = tabular.TabularConfig(budget_steps=8192, num_envs=16, rollout_length=32, states_limit=64)
    how = references.Recipe("tabular", config)
    trained, again = (references.train_reference(environments.make, "gymnasium/Hidden-v0", how) for _ in range(2))
    chex.assert_trees_all_equal(trained.params, again.params)  # as learning in a simulator is, where that takes a seed
    scored = references.score_reference(environments.make, trained, num_envs=16)
    assert scored.reference_returns.mean == 1.0  # random: 6 ** -6 at each try
    saved_and_found(tmp_path, scored)


def test_what_does_not_repeat_is_refused_by_name():
    how = references.Recipe("tabular", tabular.TabularConfig(budget_steps=1024, num_envs=16, rollout_length=16))
    with pytest.raises(tabular.UnsuitableError, match="CartPole-v1 showed"):
        learned = recipes.ALGORITHMS["tabular"].learn
        list(learned(environments.make("gymnax/CartPole-v1", batch_size=16), how.config, 0))


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_states_are_numbered_as_they_are_met_and_found_again(seed):
    rng, known, met = np.random.default_rng(seed), states.nothing_known(), {}
    for _ in range(3):
        values = rng.integers(0, 30, (7, 2))
        prints = np.asarray(FINGERPRINT({"a": values.astype(np.float32), "b": values.astype(np.uint8)}))
        found, known = states.number_states(known, prints)
        for value, state in zip(map(tuple, values), found, strict=True):
            assert met.setdefault(value, state) == state
        assert sorted(met.values()) == list(range(len(met)))
        rows, there = states.find_states(states.key_table(known, 64), prints)
        assert np.asarray(there).all()
        np.testing.assert_array_equal(known.states[np.asarray(rows)], found)
    other = np.asarray(FINGERPRINT({"a": np.full((7, 2), 31, np.float32), "b": np.zeros((7, 2), np.uint8)}))
    assert not np.asarray(states.find_states(states.key_table(known, 64), other)[1]).any()


FINGERPRINT = jax.jit(states.hash_observations)


def test_states_whose_keys_begin_alike_are_told_apart():
    prints = np.array([[5, 1], [5, 2], [5, 3], [7, 1]], np.uint32)
    _, known = states.number_states(states.nothing_known(), prints)
    rows, there = states.find_states(states.key_table(known, 8), prints)
    np.testing.assert_array_equal(known.states[np.asarray(rows)], np.arange(4))
    assert np.asarray(there).all()
    assert not np.asarray(states.find_states(states.key_table(known, 8), np.array([[5, 4]], np.uint32))[1]).any()


def test_what_is_forbidden_is_not_planned_for():
    # Action 1 of state 0 was never tried and never allowed; curiosity would seek it.
    transitions, allowed = np.array([[0, 0, 1, 0], [1, 0, 0, 1]]), np.array([[True, False], [True, True]])
    model = mdp.EmpiricalMDP(2, 2, transitions, np.full(2, 5), np.zeros(2), allowed)
    np.testing.assert_allclose(np.exp(mdp.curious_plan(model)), [[1, 0], [0, 1]], atol=1e-9)


# Values of actions


QUICK_Q = pqn.PQNConfig(
    budget_steps=40_000, num_envs=32, rollout_length=16, hidden=(32,), minibatches=8, learning_rate=2e-3
)


def test_values_of_actions_are_learned_where_everything_is_traced(tmp_path):
    make = made_once("gymnax/Catch-bsuite", QUICK_Q.num_envs)
    trained = [
        references.train_reference(make, "gymnax/Catch-bsuite", references.Recipe("pqn", QUICK_Q)) for _ in range(2)
    ]
    assert trained[0] == trained[1]
    scored = references.score_reference(make, trained[0], num_envs=QUICK_Q.num_envs)
    assert scored.reference_returns.mean > 0.7  # random: -0.7
    saved_and_found(tmp_path, scored)


def test_the_policy_of_values_takes_the_best_and_never_what_is_forbidden():
    layout = action_layout(gym_spaces.MultiDiscrete([2, 3]))
    forbidden = NOT_ALLOWED_FLOAT16
    worth = jnp.array([[0.1, 0.3, -5.0, -9.0, forbidden], [0.0, forbidden, forbidden, forbidden, forbidden]])
    logits = pqn._mostly_best(layout, worth, 0.1)
    expected = [[[0.05, 0.95, 0], [0.95, 0.05, 0]], [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]]
    np.testing.assert_allclose(np.exp(policy.choice_logits(layout, logits)), expected, atol=1e-6)
    np.testing.assert_allclose(pqn._best_worth(layout, worth), [(0.3 - 5.0) / 2, 0.0], rtol=1e-6)


# All that was seen


QUICK_SAC = sac.SACConfig(
    budget_steps=6144, num_envs=8, rollout_length=16, hidden=(32,), batch_size=64, replay_ratio=1.0, discount=0.9
)


def test_continuous_actions_are_learned_from_all_that_was_seen(tmp_path):
    trained = [
        references.train_reference(environments.make, "gymnasium/Point-v0", references.Recipe("sac", QUICK_SAC))
        for _ in range(2)
    ]
    assert trained[0] == trained[1]
    scored = references.score_reference(environments.make, trained[0], num_envs=16)
    assert scored.reference_returns.mean > -3.0  # random: -18
    saved_and_found(tmp_path, scored)
    assert scored.admission.admitted


class Point(gym.Env):
    """Pays for acting as the observation says, and goes on or ends as it likes."""

    observation_space, action_space = gym_spaces.Box(-1, 1, (2,)), gym_spaces.Box(-3, 1, (2,))

    def see(self):
        self.wanted = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.wanted

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.see(), {}

    def step(self, action):
        reward = -float(np.abs(action + 1 - self.wanted).sum())
        return self.see(), reward, bool(self.np_random.random() < 0.05), False, {}


gym.register("Point-v0", Point, max_episode_steps=10)


# Goals in hindsight


class Reach(gym.Env):
    """A point that moves as told; whether it is near its goal is all that is paid for."""

    action_space = gym_spaces.Box(-1, 1, (2,))
    observation_space = gym_spaces.Dict(
        {name: gym_spaces.Box(-1, 1, (2,)) for name in ("observation", "achieved_goal", "desired_goal")}
    )

    def see(self):
        return {"observation": self.at, "achieved_goal": self.at, "desired_goal": self.goal}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.goal = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return self.see(), {}

    def step(self, action):
        self.at = np.clip(self.at + 0.4 * action, -1, 1).astype(np.float32)
        return self.see(), -float(np.linalg.norm(self.at - self.goal) > 0.2), False, False, {}


gym.register("Reach-v0", Reach, max_episode_steps=12)


def test_goals_that_are_seldom_met_by_chance_are_learned_in_hindsight():
    how = references.Recipe("sac", dataclasses.replace(QUICK_SAC, relabelled=0.8))
    trained = references.train_reference(environments.make, "gymnasium/Reach-v0", how)
    scored = references.score_reference(environments.make, trained.with_decoding("greedy"), num_envs=16)
    assert scored.reference_returns.mean > -6  # random: about -11.6, the goal takes 3 % of the plane


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_a_goal_of_hindsight_was_reached_later_in_the_same_episode_and_is_paid_as_it_would_have_been(seed, rollouts):
    rng, steps, rows, held = np.random.default_rng(seed), 6, 3, 2
    places = steps * rows * held
    buffer = {name: np.zeros((places, 2), np.float32) for name in ("achieved_goal", "desired_goal")}
    known, met, episodes = hindsight.begin_goals(places, rows), np.full(places, -1), np.zeros(rows, int)
    distances = []
    for i in range(rollouts):
        begin = i * steps * rows % places
        following = {name: rng.normal(size=(steps, rows, 2)).astype(np.float32) for name in buffer}
        last = rng.random((steps + 1, rows)) < 0.2
        distance = np.linalg.norm(following["achieved_goal"] - following["desired_goal"], axis=-1)
        reward = (distance < 1.5).astype(np.float32) - 1
        known = REMEMBER(known, following, reward, np.zeros_like(last[1:]), last, begin)
        for t in range(steps):
            episodes = episodes + last[t]
            met[begin + t * rows : begin + (t + 1) * rows] = np.where(last[t], -1, episodes)
        distances.append(np.where(last[:-1] | (reward < 0), 0, distance).max())
        for name, value in following.items():
            buffer[name][begin : begin + steps * rows] = value.reshape(-1, 2)
    np.testing.assert_allclose(known.payment.reach, max(distances), rtol=1e-5)
    hypothesis.assume(known.payment.low < known.payment.high)
    given = hindsight.Relabelled(buffer, buffer, np.full(places, 7, np.float32), np.zeros(places, bool))
    got = jax.tree.map(np.asarray, RELABEL(known, given, buffer, np.arange(places), jax.random.key(seed % 2**31)))
    for place in np.flatnonzero(met >= 0):
        goal, reward = got.following["desired_goal"][place], got.reward[place]
        (whence,) = np.flatnonzero((buffer["achieved_goal"] == np.asarray(goal)).all(1))
        assert met[whence] == met[place] and whence % rows == place % rows
        assert place == whence or (whence - place) % places < 12 * rows
        near = np.linalg.norm(buffer["achieved_goal"][place] - buffer["achieved_goal"][whence])
        assert reward == (0 if near <= known.payment.reach * (1 + 1e-6) else -1)


REMEMBER = jax.jit(hindsight.remember_goals)
RELABEL = jax.jit(lambda known, *given: hindsight.relabel(known, *given, 1.0, 12))


# What all have in common

CATEGORIES = (gym_spaces.Discrete(3, start=2), gym_spaces.MultiDiscrete([2, 3]), gym_spaces.MultiBinary(3))
KINDS = {
    "categories": gym_spaces.Tuple(CATEGORIES),
    "everything": gym_spaces.Tuple((*CATEGORIES, gym_spaces.Box(-2, 3, (2,), np.float32))),
}


class Anything(gym.Env):
    """Takes actions of many kinds at once, pays for the sum of all their numbers and lasts three steps."""

    observation_space = gym_spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, kind):
        self.action_space = KINDS[kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), float(sum(np.sum(part) for part in action)), False, False, {}


for kind in KINDS:
    gym.register(f"Anything-{kind}-v0", Anything, max_episode_steps=3, kwargs={"kind": kind})

MANY_KINDS = {
    # random: 3 * 6, or 3 * 7 with numbers; the best: 3 * 10 and 3 * 16
    "categories": ("pqn", pqn.PQNConfig(budget_steps=16384, num_envs=8, rollout_length=32, hidden=(8,)), 27.0),
    "everything": ("ppo", ppo.PPOConfig(budget_steps=4096, num_envs=8, rollout_length=32, hidden=(8,)), 30.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_actions_of_many_kinds_are_learned_at_once(kind):
    name, config, least = MANY_KINDS[kind]
    how = references.Recipe(name, dataclasses.replace(config, learning_rate=5e-3 if name == "pqn" else 2e-2))
    trained = references.train_reference(environments.make, f"gymnasium/Anything-{kind}-v0", how)
    environment = environments.make(f"gymnasium/Anything-{kind}-v0", batch_size=8)
    episodes = rollout.run_episodes(
        environment, trained.agent, trained.with_decoding("greedy").params, jax.random.key(0), 1
    )
    assert episodes.returns.mean() > least


@pytest.mark.parametrize(("name", "kind"), [("pqn", "everything"), ("sac", "categories"), ("tabular", "everything")])
def test_an_algorithm_refuses_the_kinds_it_cannot_take(name, kind):
    environment = environments.make(f"gymnasium/Anything-{kind}-v0", batch_size=8)
    algorithm = recipes.ALGORITHMS[name]
    with pytest.raises(SpaceError, match=f"Anything-{kind}-v0"):
        list(algorithm.learn(environment, algorithm.config(num_envs=8), 0))


@pytest.mark.parametrize("config", [pqn.PQNConfig(), sac.SACConfig()])
@pytest.mark.parametrize(
    "changes", [{"budget_steps": 0}, {"discount": 1.5}, {"learning_rate": float("nan")}, {"hidden": ()}]
)
def test_impossible_hyperparameters_are_refused(config, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize("width", [0, 3])
def test_the_numbers_of_a_rollout_are_taken_in_though_there_be_none(width):
    learner = types.SimpleNamespace(moments=moments.init_moments(width))
    seen = learning.add_numbers(learner, jnp.full((5, 2, width), 4.0))
    assert seen.mean.shape == (width,) and np.allclose(seen.mean, 4.0)

"""Laws of references that hold whatever the environment: units, ranges, what is kept in memory, what can be saved."""

import copy
import dataclasses
import gc
import json
import math
import pickle
import weakref

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
from data import references
from data.references import action_range, convolutions, learning, moments, networks, pipeline, ppo, tabular
from ldm_jax import cards, rollout
from ldm_jax.encoding import observations
from ldm_jax.encoding.actions import action_layout
from ldm_jax.environment import EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.types import EnvironmentSpec, TimeStep

TINY = ppo.PPOConfig(budget_steps=256, num_envs=4, rollout_length=16, hidden=(8,), minibatches=2, epochs=2)
SMALL = ppo.PPOConfig(budget_steps=8192, num_envs=16, rollout_length=64)


class Guess(gym.Env):
    """Says in some unit what is wanted, and pays for it in another."""

    action_space = gym_spaces.Discrete(2)
    observation_space = gym_spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, observation_unit=1.0, reward_unit=1.0):
        self.units = observation_unit, reward_unit

    def see(self):
        self.wanted = int(self.np_random.integers(2))
        return np.array([(5 + 10 * self.wanted) * self.units[0]], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.see(), {}

    def step(self, action):
        reward = self.units[1] * float(action == self.wanted)
        return self.see(), reward, False, False, {}


class Far(gym.Env):
    """Pays most for an action of 50, and declares no bounds."""

    action_space = gym_spaces.Box(-np.inf, np.inf, (1,), np.float32)
    observation_space = gym_spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, pay=lambda action: -abs(action - 50.0)):
        self.pay = pay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(self.pay(float(action[0]))), False, False, {}


class Slippery(gym.Env):
    """Three cells in a row; the last one pays and ends."""

    action_space, observation_space = gym_spaces.Discrete(2), gym_spaces.Discrete(3)

    def __init__(self, reward_unit=1.0):
        self.unit = reward_unit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 0
        return self.cell, {}

    def step(self, action):
        self.cell = self.cell + 1 if action == 1 else 0
        return self.cell, self.unit * float(self.cell == 2), self.cell == 2, False, {}


gym.register("Guess-v0", Guess, max_episode_steps=20, kwargs={"observation_unit": 1e-9, "reward_unit": 1e20})
gym.register("Guess-v1", Guess, max_episode_steps=20, kwargs={"observation_unit": 1e20, "reward_unit": 1e-9})
gym.register("Slippery-v0", Slippery, max_episode_steps=10, kwargs={"reward_unit": 1e-9})
gym.register("Slippery-v1", Slippery, max_episode_steps=10, kwargs={"reward_unit": 1e20})
gym.register("Far-v0", Far, max_episode_steps=10)
gym.register("Nowhere-v0", Far, max_episode_steps=10, kwargs={"pay": lambda action: math.inf})
gym.register("Diverging-v0", Guess, max_episode_steps=20, kwargs={"reward_unit": math.inf})


# Units


def rollout_of(seed, spec, config):
    """A rollout and the step after it, drawn."""
    rng = np.random.default_rng(seed)
    shape = (config.rollout_length + 1, config.num_envs)
    terminated, truncated = rng.random((2, *shape)) < 0.1
    last = terminated | truncated
    first = np.concatenate([np.ones((1, shape[1]), bool), last[:-1]])
    steps = TimeStep(
        observation=rng.normal(3.0, 2.0, (*shape, *spec.observation_space.shape)).astype(np.float32),
        reward=np.where(first, 0.0, rng.normal(0.5, 1.0, shape)).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        first=first,
    )
    slots = ppo.Slots(rng.integers(0, 3, (*shape, 1)).astype(np.int32)[:-1], np.zeros((*shape, 0), np.float32)[:-1])
    value, log_prob = rng.normal(size=(2, *shape)).astype(np.float32)
    record = ppo.ActorRecord(slots, log_prob[:-1] - 1, value[:-1])
    before, after = (jax.tree.map(lambda x, i=i: x[i], steps) for i in (slice(None, -1), -1))
    return rollout.Trajectory(before, None, record), after


SPEC = EnvironmentSpec(
    "here/Numbers-v0",
    "here",
    "0",
    gym_spaces.Box(-np.inf, np.inf, (3,), np.float32),
    gym_spaces.Discrete(3),
    TINY.num_envs,
    10,
    "test",
    False,
)


@pytest.fixture(scope="module")
def update():
    def once(learner, trajectory, following, key):
        return ppo._update(ppo._parts(SPEC, TINY), learner, learning.Experience(trajectory, following, (None, ())), key)

    return jax.jit(once)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(-30, 67), st.integers(-30, 67))
def test_the_units_of_rewards_and_observations_change_no_bit_of_what_is_learned(update, seed, reward_power, power):
    # Powers of two, which scale floating numbers exactly.
    learned = []
    for reward_unit, unit in ((1.0, 1.0), (2.0**reward_power, 2.0**power)):
        learner = ppo._begin(ppo._parts(SPEC, TINY), 0)
        for i in range(3):
            trajectory, following = jax.tree.map(jnp.asarray, rollout_of((seed, i), SPEC, TINY))
            trajectory, following = (
                part._replace(timestep=scaled(part.timestep, unit, reward_unit))
                if isinstance(part, rollout.Trajectory)
                else scaled(part, unit, reward_unit)
                for part in (trajectory, following)
            )
            learner = update(learner, trajectory, following, jax.random.key(i))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learner))
        learned.append(learner)
    chex.assert_trees_all_equal(learned[0].params, learned[1].params)
    np.testing.assert_array_equal(learned[0].moments.std * np.float32(2.0**power), learned[1].moments.std)


def scaled(timestep, unit, reward_unit):
    unit, reward_unit = np.float32(unit), np.float32(reward_unit)
    return timestep._replace(observation=timestep.observation * unit, reward=timestep.reward * reward_unit)


@pytest.mark.parametrize("id", ["gymnasium/Guess-v0", "gymnasium/Guess-v1"])
def test_ppo_learns_whatever_the_units_are(id):
    trained = references.train_reference(environments.make, id, references.Recipe("ppo", SMALL))
    scored = references.score_reference(environments.make, trained, num_envs=16)
    unit = 1e20 if id.endswith("v0") else 1e-9
    assert scored.reference_returns.mean / unit > 19.5  # of 20; random: 10
    assert scored.admission.admitted


@pytest.mark.parametrize(("id", "unit"), [("gymnasium/Slippery-v0", 1e-9), ("gymnasium/Slippery-v1", 1e20)])
def test_planning_does_not_depend_on_the_unit_of_rewards(id, unit):
    how = references.Recipe("tabular", tabular.TabularConfig(budget_steps=2048, num_envs=8, rollout_length=64))
    trained = references.train_reference(environments.make, id, how)
    probability = np.exp(trained.params["policy"]["logits"][:2])
    np.testing.assert_allclose(probability, [[0, 1], [0, 1]], atol=1e-6)


@pytest.mark.parametrize("power", (-60, -30, 0, 30, 66))
def test_what_was_never_tried_is_never_planned_for(power):
    # In state 0 action 0 pays and ends; action 1 was never tried, whatever is paid.
    mdp = tabular.EmpiricalMDP(2, 2, np.array([[0, 0, 1, 1]]), np.array([5]), np.array([5.0 * 2.0**power]))
    np.testing.assert_allclose(np.exp(tabular._best(mdp, tabular.TabularConfig()))[0], [1, 0], atol=1e-9)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(-60, 60))
def test_running_moments_are_those_of_all_that_was_valid(seed, parts, power):
    rng = np.random.default_rng(seed)
    values = (rng.normal(rng.normal(), 1.0, (parts, 20, 3)) * 2.0**power).astype(np.float32)
    valid = rng.random((parts, 20)) < 0.7
    running = moments.init_moments(3)
    for part, kept in zip(values, valid, strict=True):
        running = moments.add_moments(running, np.where(kept[:, None], part, np.nan), kept)
    seen = values[valid].astype(np.float64)
    if len(seen):
        np.testing.assert_allclose(running.mean, seen.mean(0), rtol=1e-4, atol=1e-5 * 2.0**power)
        np.testing.assert_allclose(running.std, seen.std(0), rtol=1e-3, atol=1e-5 * 2.0**power)
    assert running.seen == len(seen)


def test_what_never_changes_is_not_blown_up():
    constant = np.full((100, 2), 0.1, np.float32) * np.array([1, 0], np.float32)
    running = moments.add_moments(moments.init_moments(2), constant, np.ones(100, bool))
    assert (np.abs(moments.standardize(running, constant)) < 0.1).all()


# Images


@pytest.mark.parametrize("shape", [(64, 64, 128), (64, 48, 48), (3, 40, 36), (40, 36, 3), (33, 35)])
def test_teacher_and_student_agree_on_the_axis_of_the_channels(shape):
    space = gym_spaces.Box(0, 255, shape, np.uint8)
    value = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    image = convolutions._scaled(jnp.asarray(value), space)
    assert image.shape == (2, *observations.channels_last_shape(shape))
    np.testing.assert_allclose(image * 255, observations.channels_last(value, shape), atol=1e-3)
    layers = convolutions.init_convolutions(np.random.default_rng(0), space)
    assert convolutions.apply_convolutions(layers, value, space).shape == (2, convolutions.IMAGE_FEATURES)


@pytest.mark.parametrize(
    "space",
    [
        gym_spaces.Box(0, 255, (7, 7, 3), np.uint8),
        gym_spaces.Box(0, 1, (10, 10, 4), np.float32),
        gym_spaces.Box(0, 1, (4, 10, 10), np.uint8),
        gym_spaces.Box(-1, 11, (4, 4), np.int32),
        gym_spaces.Box(-np.inf, np.inf, (6, 5), np.float32),
    ],
    ids=str,
)
def test_a_change_of_any_cell_of_a_grid_is_seen(space):
    rng = np.random.default_rng(0)
    layers = convolutions.init_convolutions(rng, space)
    assert convolutions.is_grid(space) and not convolutions.is_image(space)
    plain = np.full(space.shape, max(space.low.flat[0], 0), space.dtype)
    cells = math.prod(space.shape)
    changed = plain + np.eye(cells, dtype=space.dtype).reshape(cells, *space.shape)
    seen = np.asarray(convolutions.apply_convolutions(layers, np.stack([plain, *changed]), space))
    assert seen.shape == (1 + cells, convolutions.GRID_FEATURES) and np.isfinite(seen).all()
    assert len(np.unique(seen.round(5), axis=0)) == 1 + cells


def test_kinds_of_cells_are_told_apart_as_names_and_not_as_more_and_less():
    """What is seen of a kind of cell says nothing of the next one: no layer sees their number alone."""
    space = gym_spaces.Box(0, 255, (3, 3), np.uint8)
    layers = convolutions.init_convolutions(np.random.default_rng(0), space)
    boards = np.stack([np.full((3, 3), kind, np.uint8) for kind in range(convolutions.CELL_KINDS)])
    seen = np.asarray(convolutions.apply_convolutions(layers, boards, space))
    middle = (seen[:-2] + seen[2:]) / 2
    assert (np.abs(middle - seen[1:-1]).max(-1) > 0.05).all()


@pytest.mark.parametrize("unit", [2.0**-30, 1.0, 2.0**60])
def test_an_image_without_bounds_is_seen_in_any_unit(unit):
    space = gym_spaces.Box(-np.inf, np.inf, (32, 32), np.float32)
    value = np.random.default_rng(0).normal(5, 1, (4, 32, 32)).astype(np.float32)
    network = networks.network(space, action_layout(gym_spaces.Discrete(2)), (8,), "tanh")
    params = network.init(np.random.default_rng(0))
    seen = []
    for image in (value, value * np.float32(unit)):
        known = moments.add_moments(moments.init_moments(network.size), network.numbers(image), np.ones(4, bool))
        seen.append(network.apply(params, known, image, None))
    chex.assert_trees_all_equal(*seen)
    assert len({float(v) for v in seen[0][2]}) == 4


# Actions without bounds


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-np.inf, np.inf, (-100, 100)),
        (3, np.inf, (3, 103)),
        (-np.inf, 3, (-97, 3)),
        (-2, 5, (-2, 5)),
    ],
)
def test_limits_keep_the_bounds_that_there_are(low, high, expected):
    space = gym_spaces.Dict({"a": gym_spaces.Box(low, high, (2,), np.float32), "b": gym_spaces.Discrete(3)})
    found = action_range.limits(space, 100.0)
    np.testing.assert_array_equal(found, np.repeat(np.array(expected, float)[:, None], 2, 1))
    assert action_range.unbounded(space).all() == (not np.isfinite([low, high]).all())


def test_actions_without_bounds_are_looked_for_where_they_pay():
    how = references.Recipe("ppo", dataclasses.replace(SMALL, budget_steps=32768, entropy_coef=0.0))
    trained = references.train_reference(environments.make, "gymnasium/Far-v0", how)
    assert 50 <= trained.config.action_scale <= 1000
    scored = references.score_reference(environments.make, trained, num_envs=16)
    assert scored.policy.reference.assumed_slots == (0,)
    assert scored.reference_returns.mean > -50  # random: -500; the best within +-1: -490
    assert scored.admission.admitted


def test_a_range_that_was_given_is_not_looked_for():
    how = references.Recipe("ppo", dataclasses.replace(TINY, action_scale=3.0))
    trained = references.train_reference(environments.make, "gymnasium/Far-v0", how)
    assert trained.config.action_scale == 3.0


def test_where_no_range_gives_finite_rewards_it_is_said():
    with pytest.raises((references.ActionRangeError, EnvironmentFaultError), match="Nowhere-v0"):
        references.train_reference(environments.make, "gymnasium/Nowhere-v0", references.Recipe("ppo", TINY))


# Memory


@pytest.mark.parametrize("id", ["gymnax/Catch-bsuite", "gymnasium/Guess-v0"])
def test_an_environment_that_was_trained_in_is_let_go(id):
    made = []

    def make(id, batch_size):
        environment = environments.make(id, batch_size)
        made.append(weakref.ref(environment))
        return environment

    trained = references.train_reference(make, id, references.Recipe("ppo", TINY))
    references.score_reference(make, trained, num_envs=4, episodes_per_env=1)
    gc.collect()
    assert len(made) == 3 and not [ref for ref in made if ref() is not None]


# Settings of the process


@pytest.mark.parametrize("id", ["gymnasium/Guess-v1", "gymnasium/Slippery-v0"])
def test_a_process_set_to_64_bits_gives_the_same(id):
    algorithm, config = ("ppo", TINY) if "Guess" in id else ("tabular", tabular.TabularConfig(budget_steps=512))
    found = []
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            trained = references.train_reference(environments.make, id, references.Recipe(algorithm, config))
            found.append(references.score_reference(environments.make, trained, num_envs=4, episodes_per_env=1))
    assert found[0] == found[1]


# What travels


@pytest.fixture(scope="module")
def scored():
    trained = references.train_reference(environments.make, "gymnasium/Guess-v1", references.Recipe("ppo", TINY))
    return references.score_reference(environments.make, trained, num_envs=4, episodes_per_env=2)


def act(reference):
    with pipeline.opened(environments.make, reference.spec.id, 4) as environment:
        loop = rollout.start(environment, reference.agent, jax.random.key(0))
        return rollout.rollout(environment, reference.agent, reference.params, loop, jax.random.key(1), 5)[1]


@pytest.mark.parametrize("travel", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_a_reference_can_be_pickled_copied_and_compared_before_and_after_use(travel, scored):
    there = travel(scored)
    assert there == scored and hash(there) == hash(scored)
    assert there.policy == scored.policy and there.policy.config == scored.policy.config
    seen = act(there.policy)
    chex.assert_trees_all_equal(seen, act(scored.policy))
    assert travel(there) == scored
    other = there.policy.with_decoding("greedy" if scored.policy.reference.decoding == "sample" else "sample")
    assert other != scored.policy
    assert "Guess-v1" in repr(there.policy) and len(repr(there.policy)) < 120


@pytest.mark.parametrize("config", [TINY, tabular.TabularConfig(), references.Recipe("ppo", TINY)])
def test_configurations_can_be_pickled_copied_and_compared(config):
    for there in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert there == config and hash(there) == hash(config)


def test_a_table_can_be_pickled():
    how = references.Recipe("tabular", tabular.TabularConfig(budget_steps=512, num_envs=8, rollout_length=16))
    trained = references.train_reference(environments.make, "gymnasium/Slippery-v0", how)
    assert pickle.loads(pickle.dumps(trained)) == trained


def test_sizes_given_as_numbers_of_numpy_are_saved(tmp_path):
    def make(id, batch_size):
        return environments.make(id, np.int64(batch_size))

    config = dataclasses.replace(TINY, num_envs=np.int64(4), learning_rate=np.float32(1e-3))
    trained = references.train_reference(make, "gymnasium/Guess-v1", references.Recipe("ppo", config), seed=np.int64(3))
    scored = references.score_reference(make, trained, num_envs=4, episodes_per_env=1)
    references.save_reference(tmp_path / "reference", scored)
    assert references.load_reference(tmp_path / "reference") == scored


# What is saved, against what is there


def edit(directory, change):
    path = directory / "reference.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def test_parameters_that_do_not_fit_are_named(tmp_path, scored):
    references.save_reference(tmp_path / "one", scored)
    edit(tmp_path / "one", lambda description: description["config"].update(hidden=[9]))
    with pytest.raises(references.ReferencePolicyError, match=r"actor.*float32\[1, 8\], expected float32\[1, 9\]"):
        references.load_reference(tmp_path / "one")


def test_a_reference_of_an_earlier_version_is_refused(tmp_path, scored):
    references.save_reference(tmp_path / "one", scored)
    edit(tmp_path / "one", lambda description: description.update(version=1))
    with pytest.raises(references.ReferencePolicyError, match="version 1, expected 2; train this reference again"):
        references.load_reference(tmp_path / "one")


def test_a_reference_meets_only_the_environment_it_was_trained_in(scored):
    with pytest.raises(cards.CardError, match=r"Guess-v1.*time_limit"):
        references.score_reference(
            lambda id, batch_size: environments.make(id, batch_size, time_limit=7), scored.policy, num_envs=4
        )


def test_replacing_a_reference_leaves_one_of_them_whatever_interrupts(tmp_path, scored, monkeypatch):
    references.save_reference(tmp_path / "one", scored)
    decoding = "greedy" if scored.policy.reference.decoding == "sample" else "sample"
    other = dataclasses.replace(scored, policy=scored.policy.with_decoding(decoding))
    real, calls = references.saving.files.write, []

    def write(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("No space left on device")
        real(path, content)

    monkeypatch.setattr(references.saving.files, "write", write)
    with pytest.raises(OSError):
        references.save_reference(tmp_path / "one", other)
    monkeypatch.undo()
    assert references.load_reference(tmp_path / "one") == scored


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [ppo.PPOConfig(), tabular.TabularConfig()])
def test_no_number_of_a_configuration_is_nan_or_infinite(config, value):
    for field in dataclasses.fields(config):
        if isinstance(getattr(config, field.name), float):
            with pytest.raises(ConfigError, match=field.name):
                dataclasses.replace(config, **{field.name: value})


def test_training_that_diverges_is_a_clear_failure():
    with pytest.raises((references.DivergenceError, EnvironmentFaultError), match="Diverging-v0"):
        references.train_reference(environments.make, "gymnasium/Diverging-v0", references.Recipe("ppo", TINY))


def test_what_is_kept_is_finite_and_not_the_loss_alone():
    learner = ppo._begin(ppo._parts(SPEC, TINY), 0)
    learning.check_learner(SPEC, learner, 1)
    spoilt = jax.tree.map(np.copy, learner.params)
    spoilt["log_std"] = np.array([np.nan], np.float32)
    with pytest.raises(references.DivergenceError, match="Numbers-v0"):
        learning.check_learner(SPEC, learner._replace(params=spoilt), 1)


def test_the_last_policy_is_kept_unless_it_is_clearly_worse_than_one_before():
    begun = ppo._begin(ppo._parts(SPEC, TINY), 0)

    def kept(*returns):
        best = learning.Best(begun)
        for i, mean in enumerate(returns):
            finished = moments.Moments(np.float32(0 if math.isnan(mean) else 100), np.float32([mean]), np.float32([5]))
            best = learning.keep_better(best, begun._replace(loss=np.float32(i), finished=finished), biased=i == 0)
        return int(best.learner.loss)

    assert kept(1, 5, 9) == 2
    assert kept(1, 9, 8.5) == 2  # within what chance does
    assert kept(1, 9, 2, 2) == 1
    assert kept(9, 1, 2) == 2  # what ended first was short, and not typical
    assert kept(1, 9, math.nan) == 2  # no episode ended


def test_an_environment_that_fails_to_close_costs_nothing():
    class Stubborn:
        def __init__(self, inner):
            self.inner, self.spec = inner, inner.spec

        def reset(self, key):
            return self.inner.reset(key)

        def step(self, state, action):
            return self.inner.step(state, action)

        def close(self):
            self.inner.close()
            raise AttributeError("no viewer")

    def make(id, batch_size):
        return Stubborn(environments.make(id, batch_size))

    with pytest.warns(UserWarning, match="failed to close: AttributeError: no viewer"):
        trained = references.train_reference(make, "gymnasium/Guess-v1", references.Recipe("ppo", TINY))
    assert trained.spec.id == "gymnasium/Guess-v1"

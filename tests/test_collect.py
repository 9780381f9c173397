"""Laws of collected data: it replays, it is labelled everywhere, and its index and statistics say what is in it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import pathlib
import pickle
import subprocess
import sys

import gymnasium
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_datasets
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from runs import CASES, go_right, reference_of

import environments
import ldm_jax
from data import collect as collecting
from data.collect import CollectConfig, affordable_streams, collect, index_episodes, noise_levels
from data.references import ReferencePolicyError
from data.references.ppo import PPOConfig
from data.statistics import measure
from ldm_jax.cards import CardError
from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16, Distribution
from ldm_jax.encoding.codec import Codec
from ldm_jax.environment import EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.spaces import leaf_shape_dtype

STREAMS, STEPS = 24, 200
CONFIG = CollectConfig(streams=STREAMS, steps=STEPS, block=64)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    environment = environments.make(request.param, STREAMS)
    reference = reference_of(CASES[request.param], environment)
    yield environment, reference, collect(environment, reference, 7, CONFIG)
    environment.close()


def test_same_seed_same_data(case):
    environment, reference, collected = case
    again = collect(environment, reference, 7, CONFIG)
    for name, value in collected.leaves.items():
        np.testing.assert_array_equal(value, again.leaves[name], err_msg=name, strict=True)
    assert again.statistics == collected.statistics
    other = collect(environment, reference, 8, CONFIG)
    assert any((value != other.leaves[name]).any() for name, value in collected.leaves.items())


def test_executed_actions_replay(case):
    environment, _, collected = case
    leaves = collected.leaves
    environment_key, _ = jax.random.split(jax.random.key(7))
    state, timestep = environment.reset(environment_key)
    step = jax.jit(environment.step) if environment.spec.jittable else environment.step
    # Another program may round the last bit of a float otherwise, and chaos takes over after some steps.
    for t in range(60 if environment.spec.jittable else STEPS):
        np.testing.assert_allclose(leaves["observation/value"][t], timestep.observation, rtol=1e-3, atol=1e-4)
        for name in ("terminated", "truncated", "first"):
            np.testing.assert_array_equal(leaves[name][t], getattr(timestep, name))
        state, timestep = step(state, leaves["action/value"][t])


def test_every_state_has_the_label_of_thereference_of(case):
    environment, _, collected = case
    leaves, space = collected.leaves, environment.spec.action_space
    observation = leaves["observation/value"].reshape(STEPS * STREAMS, *environment.spec.observation_space.shape)
    label, distribution = CASES[environment.spec.id](jnp.asarray(observation))
    label = np.asarray(label).reshape(leaves["reference_action/value"].shape)
    if isinstance(space, gymnasium.spaces.Box):
        mean = np.asarray(distribution.mean).reshape(label.shape)
        np.testing.assert_allclose(leaves["reference/mean"], mean, rtol=1e-5, atol=1e-6)
        label = np.clip(label, space.low, space.high)
        assert np.abs(mean).max() > space.high.max(), "the case should try the clipping"
    else:
        logits = leaves["reference/logits"]
        assert logits.dtype == np.float16 and np.isfinite(logits).all() and logits.min() >= NOT_ALLOWED_FLOAT16
        assert (logits.argmax(-1) == label).all()
    np.testing.assert_allclose(leaves["reference_action/value"], label, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(leaves["label_mask"], ~(leaves["terminated"] | leaves["truncated"]))
    dtype = leaf_shape_dtype(space).dtype
    assert leaves["action/value"].dtype == leaves["reference_action/value"].dtype == dtype


def test_noise_runs_from_the_reference_to_random(case):
    environment, _, collected = case
    executed, label = (collected.leaves[f"{name}/value"] for name in ("action", "reference_action"))
    same = (executed == label).reshape(STEPS, STREAMS, -1).all(-1)
    assert collected.random >= 0.5
    assert same[:, 0].all(), "the first stream executes the reference alone"
    assert same[:, -1].mean() < 0.75, "the last one ignores it"
    assert collected.agreement == pytest.approx(same[collected.leaves["label_mask"]].mean())
    random = executed[:, -1]
    if isinstance(environment.spec.action_space, gymnasium.spaces.Box):
        holds = [(np.diff(executed[:, b, 0])[:100] == 0).mean() for b in range(STREAMS - 3, STREAMS)]
        assert min(holds) < 0.1 and max(holds) > 0.6, "random actions of several time scales"
    else:
        assert len(np.unique(random)) == environment.spec.action_space.n


@pytest.mark.parametrize("streams", [2, 3, 16, 192])
def test_at_least_half_is_random(streams):
    levels = noise_levels(streams)
    assert levels[0] == 0 and levels[-1] == 1 and levels.mean() >= 0.5 and (np.diff(levels) >= 0).all()


def test_episodes_tile_the_streams(case):
    _, _, collected = case
    leaves, episodes = collected.leaves, collected.episodes
    seen = np.zeros((STEPS, STREAMS), int)
    for start, length, return_, seed, noise, stream in zip(*episodes, strict=True):
        rows = slice(start, start + length)
        seen[rows, stream] += 1
        assert leaves["first"][start, stream] and leaves["first"][rows, stream].sum() == 1
        assert return_ == pytest.approx(leaves["reward"][rows, stream].sum(dtype=np.float64), rel=1e-9, abs=1e-9)
        ended = (leaves["terminated"] | leaves["truncated"])[start + length - 1, stream]
        assert ended or start + length == STEPS, "only the end of the data cuts an episode off"
        assert seed == 7 and noise == noise_levels(STREAMS)[stream]
    assert (seen == 1).all()


def test_failed_episodes_stay_in_the_data_and_are_counted(case):
    _, _, collected = case
    random = float(np.unique(collected.episodes.return_)[:2].mean())  # between two: their sums round differently here
    failed = 0
    for stream in range(STREAMS):
        firsts = [*np.flatnonzero(collected.leaves["first"][:, stream])]
        for begin, after in itertools.pairwise(firsts):  # the last one is cut off
            failed += collected.leaves["reward"][begin:after, stream].sum(dtype=np.float64) <= random
    assert collected.episodes.failed(STEPS, random).sum() == failed
    assert collected.episodes.failed(STEPS, np.inf).sum() == collected.leaves["first"][1:].sum()
    assert not collected.episodes.failed(STEPS, -np.inf).any()


def test_statistics_are_those_of_the_data(case):
    environment, _, collected = case
    leaves, statistics = collected.leaves, collected.statistics
    rewards = leaves["reward"][leaves["reward"] != 0].astype(np.float64)
    assert statistics.steps == STEPS * STREAMS and statistics.outside == 0
    assert statistics.reward_scale == pytest.approx(np.sqrt(np.mean(rewards**2)) if rewards.size else 1.0)
    if isinstance(environment.spec.observation_space, gymnasium.spaces.Box):
        numbers = leaves["observation/value"].reshape(STEPS * STREAMS, -1).astype(np.float64)
        np.testing.assert_allclose(statistics.observation_mean, numbers.mean(0), atol=1e-9)
        np.testing.assert_allclose(statistics.observation_std, numbers.std(0), rtol=1e-9)
    if isinstance(environment.spec.action_space, gymnasium.spaces.Box):
        action = leaves["action/value"].reshape(STEPS * STREAMS, -1)
        np.testing.assert_allclose(statistics.action_low, action.min(0), rtol=1e-6)
        np.testing.assert_allclose(statistics.action_high, action.max(0), rtol=1e-6)


@dataclasses.dataclass(frozen=True, eq=False)
class _Broken:
    """A real environment that lies from its 41st step on."""

    inner: ldm_jax.Environment
    lie: str

    @property
    def spec(self):
        return self.inner.spec

    def reset(self, key):
        self.__dict__["steps"] = 0
        state, timestep = self.inner.reset(key)
        return state, self._masked(timestep) if self.lie == "no mask" else timestep

    def step(self, state, action):
        state, timestep = self.inner.step(state, action)
        self.__dict__["steps"] += 1
        lies = self.__dict__["steps"] > 40
        if self.lie.endswith("mask"):
            return state, self._masked(timestep) if lies == (self.lie == "mask") else timestep
        if lies:
            values = {"reward": timestep.reward * np.nan, "observation": np.full_like(timestep.observation, 99)}
            timestep = timestep._replace(**{self.lie: values[self.lie]})
        return state, timestep

    def _masked(self, timestep):
        return timestep._replace(action_mask=np.ones((len(timestep.reward), self.spec.action_space.n), bool))

    def close(self):
        self.inner.close()


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("reward", "reward nan at step 41"),
        ("observation", "99"),
        ("mask", "gave an action mask after its first time step"),
        ("no mask", "lost its action mask after its first time step"),
    ],
)
def test_lies_are_refused(lie, words):
    environment = _Broken(environments.make("envpool/FrozenLake-v1", STREAMS), lie)
    with pytest.raises(EnvironmentFaultError, match=words) as caught:
        collect(environment, reference_of(go_right, environment), 0, CONFIG)
    assert "envpool/FrozenLake-v1" in str(caught.value)
    environment.close()


def _label(value):
    def policy(observation):
        action, distribution = _damp(observation)
        return jnp.full_like(action, value), distribution

    return policy


def _scale(observation):
    action, distribution = _damp(observation)
    return action, distribution._replace(scale=jnp.full_like(action, jnp.inf))


_damp = CASES["gymnax/Pendulum-v1"]


@pytest.mark.parametrize(("policy", "words"), [(_label(jnp.nan), "NaN"), (_scale, "its scale is not finite")])
def test_labels_that_are_no_numbers_are_refused(policy, words):
    environment = environments.make("gymnax/Pendulum-v1", 4)
    with pytest.raises(ReferencePolicyError, match=f"the label of gymnax/Pendulum-v1 in steps 0 to 63.*{words}"):
        collect(environment, reference_of(policy, environment), 0, CONFIG)


def test_labels_that_do_not_exist_are_refused():
    environment = environments.make("gymnax/CartPole-v1", 4)

    def policy(observation):
        action, distribution = CASES["gymnax/CartPole-v1"](observation)
        return action + 7, distribution

    with pytest.raises(ReferencePolicyError, match=r"the label of gymnax/CartPole-v1.*outside Discrete\(2\)"):
        collect(environment, reference_of(policy, environment), 0, CONFIG)


@pytest.mark.parametrize(
    "change", [{"version": "0"}, {"time_limit": 3}, {"action_space": gymnasium.spaces.Discrete(4, start=1)}]
)
def test_a_reference_of_another_version_of_the_environment_collects_nothing(change):
    environment = environments.make("envpool/FrozenLake-v1", 4)
    reference = reference_of(go_right, environment)
    other = dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, **change))
    with pytest.raises(CardError, match=f"the reference of envpool/FrozenLake-v1 is not .*{next(iter(change))}"):
        collect(environment, other, 0, CONFIG)
    environment.close()


def test_a_single_stream_which_would_have_no_noise_is_refused():
    environment = environments.make("gymnax/CartPole-v1", 1)
    with pytest.raises(ConfigError, match="gymnax/CartPole-v1 has 1 stream, expected at least 2"):
        collect(environment, reference_of(CASES["gymnax/CartPole-v1"], environment), 0, CONFIG)


def test_arrays_too_large_for_memory_are_refused_before_the_first_step():
    environment = environments.make("gymnax/CartPole-v1", 4)
    reference, seen = reference_of(CASES["gymnax/CartPole-v1"], environment), []
    for config in (
        CollectConfig(steps=10**6, max_bytes=2**20),
        CollectConfig(steps=10**14, max_bytes=2**60),  # allowed, and more than any machine has
    ):
        with pytest.raises(ConfigError, match=r"4 streams of 10+ steps of gymnax/CartPole-v1 take \d+ MiB, more than"):
            collect(environment, reference, 0, config, seen.append)
    assert not seen
    with pytest.raises(ConfigError, match="2 streams of 1000000 steps"):
        affordable_streams(environment.spec, CollectConfig(steps=10**6, max_bytes=2**20))


class _Far(gymnasium.Env):
    """Its good actions lie far out, and its space does not say how far."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,))
    action_space = gymnasium.spaces.Dict(
        {
            "bounded": gymnasium.spaces.Box(-1, 1),
            "far": gymnasium.spaces.Box(-np.inf, np.inf, (2,)),
            "low": gymnasium.spaces.Box(5, np.inf),
            "which": gymnasium.spaces.Discrete(3),
        }
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action["far"][0]), False, False, {}


def test_random_actions_go_as_far_as_the_training_of_the_reference_found():
    gymnasium.register("FarOut-v0", _Far, max_episode_steps=20)
    environment = environments.make("gymnasium/FarOut-v0", 16)

    def policy(observation):
        rows, zeros = len(observation), jnp.zeros((len(observation), 1))
        action = {"bounded": zeros, "far": jnp.zeros((rows, 2)), "low": zeros + 6, "which": jnp.zeros(rows, jnp.int32)}
        return action, Distribution(jnp.zeros((rows, 3)), jnp.zeros((rows, 4)), jnp.zeros((rows, 4)))

    reference, found = reference_of(policy, environment), {}
    for scale in (0.0, 500.0):
        told = dataclasses.replace(reference, config=PPOConfig(action_scale=scale))
        found[scale] = collect(environment, told, 0, CollectConfig(16, 200, 50))
    environment.close()
    near, far = (found[scale].statistics for scale in (0.0, 500.0))
    assert np.abs(near.action_high[1:]).max() < 20
    np.testing.assert_allclose(far.action_low, [-1, -500, -500, 5], atol=25)
    np.testing.assert_allclose(far.action_high, [1, 500, 500, 505], atol=25)
    assert {*np.unique(found[500.0].leaves["action/which"])} == {0, 1, 2}


def _measured(observation, reward):
    spec = environments.make("gymnax/CartPole-v1", 2).spec
    spec = dataclasses.replace(spec, observation_space=gymnasium.spaces.Box(-np.inf, np.inf, observation.shape[2:]))
    card = tiny_datasets.card(observation_space=spec.observation_space)
    leaves = tiny_datasets.leaves(card, *reward.shape) | {"observation/value": observation, "reward": reward}
    return card, leaves, measure(spec, leaves)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.floats(-9, 20), st.floats(-9, 20), hnp.arrays(np.int8, (20, 3, 4)), hnp.arrays(np.int8, (20, 3)), st.booleans()
)
def test_statistics_and_features_do_not_depend_on_the_unit(power, reward_power, observation, reward, shifted):
    observation = observation.astype(np.float32) + 1000 * shifted
    observation[..., 3] = 7.0 * shifted  # a number that never changes
    found = []
    for unit, reward_unit in ((1.0, 1.0), (10.0**power, 10.0**reward_power)):
        card, leaves, statistics = _measured(
            (observation * unit).astype(np.float32), (reward * reward_unit).astype(np.float32)
        )
        features, _ = Codec(dataclasses.replace(card, statistics=statistics)).window(
            {name: value[:, 0] for name, value in leaves.items()}
        )
        known = 1.0 if shifted else np.array([*np.where(np.ptp(observation, (0, 1)) > 0, unit, 1.0)])
        known = np.where(observation[0, 0] != 0, unit, known)
        found.append(
            (
                np.array(statistics.observation_mean) / unit,
                np.array(statistics.observation_std) / known,
                statistics.reward_scale / (reward_unit if reward.any() else 1.0),
                features.numeric[..., 0],
                features.reward,
            )
        )
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_the_widest_range_that_float32_holds_has_finite_statistics():
    observation = np.full((20, 3, 4), 3e38, np.float32) * np.array([1, -1])[np.arange(20) % 2][:, None, None]
    _, _, statistics = _measured(observation.astype(np.float32), np.full((20, 3), -3e38, np.float32))
    np.testing.assert_allclose(statistics.observation_std, 3e38, rtol=1e-6)
    np.testing.assert_allclose(statistics.reward_scale, 3e38, rtol=1e-6)


def test_a_small_return_is_not_lost_beside_a_large_one():
    first = np.zeros((6, 1), bool)
    first[[0, 3]] = True
    reward = np.array([0, 1e20, 0, 0, 1e-3, 1e-3], np.float32)[:, None]
    episodes = index_episodes({"first": first, "reward": reward}, 0, np.zeros(1, np.float32))
    np.testing.assert_allclose(episodes.return_, [1e20, 2e-3], rtol=1e-6)


def test_observations_that_float32_does_not_hold_are_refused():
    space = gymnasium.spaces.Dict(
        {
            "wide": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "grid": gymnasium.spaces.Box(0, np.inf, (5, 5)),
        }
    )
    spec = dataclasses.replace(environments.make("gymnax/CartPole-v1", 2).spec, observation_space=space)
    for name, value in (("wide", 1e300), ("wide", np.inf), ("grid", np.inf)):
        observation = {"wide": np.zeros((3, 2, 2), np.float32), "grid": np.zeros((3, 2, 5, 5), np.float32)}
        with np.errstate(over="ignore"):
            observation[name].flat[0] = np.float32(value)
        no = np.zeros((3, 2), bool)
        timestep = ldm_jax.TimeStep(
            observation=observation, reward=np.zeros((3, 2), np.float32), terminated=no, truncated=no, first=no
        )
        with pytest.raises(EnvironmentFaultError, match=f"part '{name}', is infinite in float32"):
            collecting._check_timesteps(spec, timestep, 0)


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_what_was_collected_travels(case, travel):
    _, _, collected = case
    again = travel(collected)
    assert again == collected and (again != collected) is False and travel(CONFIG) == CONFIG
    reward = collected.leaves["reward"].copy()
    reward[0, 0] += 1
    assert collected != collected._replace(leaves=collected.leaves | {"reward": reward})


def test_large_observations_get_fewer_streams():
    spec = environments.make("gymnax/CartPole-v1", 2).spec
    images = dataclasses.replace(spec, observation_space=gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8))
    config = CollectConfig()
    assert affordable_streams(spec, config) == config.streams
    assert 2 <= affordable_streams(images, config) < 64
    assert affordable_streams(images, config) * config.steps * 4 * 84 * 84 < config.max_bytes


@pytest.mark.parametrize("field", ["streams", "steps", "block", "max_bytes"])
def test_config_refuses_nothing_to_do(field):
    with pytest.raises(ValueError, match=field):
        CollectConfig(**{field: 0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.5, "64", -1])
@pytest.mark.parametrize("field", ["streams", "steps", "block", "max_bytes"])
def test_config_takes_whole_numbers_alone(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value!r}, expected"):
        CollectConfig(**{field: value})
    assert type(getattr(CollectConfig(**{field: np.int32(64)}), field)) is int


WIDE = """
import sys; sys.path.insert(0, sys.argv[1])
import environments, numpy as np, runs
from data.collect import CollectConfig, collect
from ldm_jax.encoding.transition import check_leaves
for id in runs.CASES:
    environment = environments.make(id, 4)
    leaves = collect(environment, runs.reference_of(runs.CASES[id], environment), 0, CollectConfig(4, 40, 40)).leaves
    shapes = {name: (value.shape[2:], value.dtype) for name, value in leaves.items()}
    check_leaves(environment.spec.observation_space, environment.spec.action_space, shapes, id)
    print(id)
    environment.close()
"""


def test_the_schema_holds_where_jax_computes_in_64_bits():
    done = subprocess.run(
        [sys.executable, "-c", WIDE, str(pathlib.Path(__file__).parent)],
        env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(CASES)

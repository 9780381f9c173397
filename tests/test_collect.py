"""Laws of collected data: it replays, it is labelled everywhere, and its index and statistics say what is in it."""

from __future__ import annotations

import dataclasses

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import CASES, go_right, reference_of

import environments
import ldm_jax
from data.collect import CollectConfig, affordable_streams, collect, noise_levels
from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16
from ldm_jax.environment import EnvironmentFaultError
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
        return self.inner.reset(key)

    def step(self, state, action):
        state, timestep = self.inner.step(state, action)
        self.__dict__["steps"] += 1
        if self.__dict__["steps"] > 40:
            lies = {"reward": timestep.reward * np.nan, "observation": np.full_like(timestep.observation, 99)}
            timestep = timestep._replace(**{self.lie: lies[self.lie]})
        return state, timestep

    def close(self):
        self.inner.close()


@pytest.mark.parametrize(("lie", "words"), [("reward", "reward nan at step 41"), ("observation", "99")])
def test_lies_are_refused(lie, words):
    environment = _Broken(environments.make("envpool/FrozenLake-v1", STREAMS), lie)
    with pytest.raises(EnvironmentFaultError, match=words) as caught:
        collect(environment, reference_of(go_right, environment), 0, CONFIG)
    assert "envpool/FrozenLake-v1" in str(caught.value)
    environment.close()


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

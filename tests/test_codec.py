"""Laws of the codec over numbers: units do not matter, nothing overflows, and what is masked is not looked at."""

import copy
import dataclasses
import math
import pickle

import examples
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces as gs
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax import spaces
from ldm_jax.encoding.codec import Codec
from ldm_jax.encoding.signature import SIGNATURE
from ldm_jax.types import TimeStep

UNBOUNDED = gs.Box(-np.inf, np.inf, (3,))
UNITS = st.floats(-9, 20).map(lambda power: 10.0**power)


def codec_of(space, unit=1.0, reward_unit=1.0, action_space=None):
    card = examples.make_card(space, action_space or gs.Discrete(2))
    numbers = len(card.statistics.observation_mean)
    statistics = dataclasses.replace(
        card.statistics,
        observation_mean=(0.5 * unit,) * numbers,
        observation_std=(2.0 * unit,) * numbers,
        reward_scale=0.5 * reward_unit,
    )
    return Codec(dataclasses.replace(card, statistics=statistics))


def timestep_of(observation, reward):
    no = np.zeros(len(reward), bool)
    return TimeStep(observation=observation, reward=reward, terminated=no, truncated=no, first=no)


def features_of(codec, observation, reward, xp=np):
    action = spaces.zeros(codec.card.action_space, (len(reward),))
    step, action = jax.tree.map(xp.asarray, (timestep_of(observation, reward), action))
    return codec.features(step, action, xp.ones(len(reward), bool))


@settings(max_examples=60, deadline=None)
@given(UNITS, UNITS, st.integers(0, 1000))
def test_features_do_not_depend_on_the_unit_that_the_statistics_are_in(unit, reward_unit, seed):
    rng = np.random.default_rng(seed)
    value, reward = rng.normal(0.5, 2.0, (20, 3)), rng.normal(0, 1, 20)
    plain = features_of(codec_of(UNBOUNDED), value.astype(np.float32), reward.astype(np.float32))
    scaled_value, scaled_reward = (value * unit).astype(np.float32), (reward * reward_unit).astype(np.float32)
    for xp in (np, jnp):
        scaled = features_of(codec_of(UNBOUNDED, unit, reward_unit), scaled_value, scaled_reward, xp)
        np.testing.assert_allclose(scaled.numeric[..., 0], plain.numeric[..., 0], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(scaled.reward, plain.reward, rtol=1e-5, atol=2e-6)
        assert np.isfinite(scaled.numeric).all()


@pytest.mark.parametrize("unit", [1e-9, 1e4, 1e6, 1e8, 1e12, 1e20])
def test_rich_is_told_from_poor_in_any_unit(unit):
    """5 or 15 units of cash, both beyond what anybody would clip at."""
    cash = np.array([[5.0] * 3, [15.0] * 3]) * unit
    standard = features_of(codec_of(UNBOUNDED, unit), cash.astype(np.float32), np.zeros(2, np.float32)).numeric[
        :, :3, 0
    ]
    np.testing.assert_allclose(standard[1] - standard[0], 5.0, rtol=1e-5)


def test_the_largest_numbers_and_statistics_stay_finite():
    most, least = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    value = np.array([[most, -most, least], [0, np.inf, -np.inf]], np.float32)
    reward = np.array([most, -most], np.float32)
    for unit in (1e-300, 1e-40, 1.0, 1e38, 1e300):
        for xp in (np, jnp):
            features = features_of(codec_of(UNBOUNDED, unit, unit), value, reward, xp)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(features))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.float64])
def test_numbers_of_any_type_reach_the_model_to_the_precision_of_float32(dtype):
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(np.float32)
    space = gs.Box(limits.min, limits.max, (3,), dtype)
    value = np.array([[limits.min, 0, limits.max], [1, 7, 100]], dtype)
    carried = value.astype(spaces.leaf_shape_dtype(space).dtype)
    symlog = features_of(codec_of(space), carried, np.zeros(2, np.float32)).numeric[:, :3, 1]
    exact = value.astype(np.float64)
    np.testing.assert_allclose(symlog, np.sign(exact) * np.log1p(np.abs(exact)), rtol=1e-6)


def test_no_nan_of_a_previous_action_that_was_not_reaches_the_features():
    acted = gs.Box(-1, 1, (2,))
    codec = codec_of(UNBOUNDED, action_space=acted)
    step = timestep_of(np.zeros((3, 3), np.float32), np.zeros(3, np.float32))
    step = step._replace(first=np.array([True, False, False]))
    present = np.array([True, False, True])
    action = np.array([[np.nan] * 2, [np.nan] * 2, [0.5, -0.5]], np.float32)
    for xp in (np, jnp):
        features = codec.features(*jax.tree.map(xp.asarray, (step, action, present)))
        np.testing.assert_array_equal(features.has_previous, [0, 0, 1])
        np.testing.assert_allclose(features.previous.continuous[:, :2], [[0, 0], [0, 0], [0.5, -0.5]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 38), min_size=2, max_size=2), st.floats(-9, 38))
def test_the_signature_is_bounded_whatever_the_bounds(powers, reach):
    low, high = (np.full(2, sign * 10.0**power) for sign, power in zip((-1, 1), powers, strict=True))
    acted = gs.Box(-np.inf, np.inf, (2,))
    card = examples.make_card(gs.Box(low, high, dtype=np.float64), acted)
    ends = {"action_low": (-(10.0**reach),) * 2, "action_high": (10.0**reach,) * 2}
    card = dataclasses.replace(card, statistics=dataclasses.replace(card.statistics, **ends))
    for space in (acted, gs.Box(low, high, dtype=np.float64)):
        vector = Codec(dataclasses.replace(card, action_space=space)).signature.vector
        assert vector.shape == (SIGNATURE,) and np.isfinite(vector).all() and np.abs(vector).max() <= 23


def test_finite_bounds_are_told_from_others_and_from_none():
    vectors = [codec_of(gs.Box(-end, end, (3,))).signature.vector for end in (1.0, 1e6, 2e6, 1e12, np.inf)]
    assert len({vector.tobytes() for vector in vectors}) == len(vectors)


@pytest.mark.parametrize("name", examples.SPACES)
def test_a_codec_travels_before_and_after_it_was_used(name):
    codec = examples.make_codec(name)
    arrays = examples.random_stream(codec, 6, 0)
    for _ in range(2):
        for other in (pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec)):
            assert other.card == codec.card and other.bucket == codec.bucket
            jax.tree.map(np.testing.assert_array_equal, other.window(arrays), codec.window(arrays))


@pytest.mark.parametrize("name", examples.SPACES)
@pytest.mark.parametrize("lead", [(3,), (2, 1)])
def test_a_window_is_encoded_alike_alone_and_beside_others(name, lead):
    codec = examples.make_codec(name)
    for distribution in (True, False):
        streams = [examples.random_stream(codec, 7, seed) for seed in range(math.prod(lead))]
        for stream in [] if distribution else streams:
            for leaf in [leaf for leaf in stream if leaf.startswith("reference/")]:
                del stream[leaf]
        alone = examples.stack([codec.window(stream) for stream in streams])
        stacked = examples.stack(streams)
        together = codec.window({leaf: value.reshape(*lead, *value.shape[1:]) for leaf, value in stacked.items()})
        flat = jax.tree.map(lambda value: value.reshape(math.prod(lead), *value.shape[len(lead) :]), together)
        jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), flat, alone)

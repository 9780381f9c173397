"""Laws of spaces and action slots."""

import json

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces as gs
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces_strategies import action_spaces, any_spaces

from ldm_jax import spaces
from ldm_jax.encoding import actions


@settings(max_examples=100, deadline=None)
@given(any_spaces)
def test_json_round_trip(space):
    assert spaces.from_json(json.loads(json.dumps(spaces.to_json(space)))) == space


@settings(max_examples=50, deadline=None)
@given(any_spaces)
def test_zeros_follow_the_leaf_shapes_and_leaves_cover_the_space(space):
    zeros = spaces.zeros(space, (3, 2))
    found = [spaces.get(zeros, leaf.path) for leaf in spaces.leaves(space)]
    assert len(found) == len(jax.tree.leaves(zeros))
    for value, leaf in zip(found, spaces.leaves(space), strict=True):
        struct = spaces.leaf_shape_dtype(leaf.space)
        assert value.shape == (3, 2, *struct.shape) and value.dtype == struct.dtype


def numpy_batch(space, count, seed):
    """A batch of the library's own samples, in the form that time steps carry."""
    space.seed(seed)
    samples = [space.sample() for _ in range(count)]
    values = []
    for leaf in spaces.leaves(space):
        column = [np.asarray(spaces.get(sample, leaf.path)) for sample in samples]
        values.append(np.stack(column).astype(spaces.leaf_shape_dtype(leaf.space).dtype))
    return spaces.unflatten(space, values)


@settings(max_examples=100, deadline=None)
@given(action_spaces, st.integers(0, 1000))
def test_actions_survive_the_slots(space, seed):
    action = numpy_batch(space, 5, seed)
    flat = [np.concatenate([a.ravel() for a in jax.tree.leaves(action)], dtype=np.float64)]
    reach = np.abs(flat[0]).max() + 1.0
    layout = actions.action_layout(space)
    slots = actions.to_slots(layout, action)
    assert slots.categorical.shape == (5, layout.categorical) and slots.continuous.shape == (5, layout.continuous)
    assert (slots.categorical >= 0).all() and (slots.categorical < np.array(layout.sizes, int)).all()
    back = actions.from_slots(layout, slots)
    for old, new in zip(jax.tree.leaves(action), jax.tree.leaves(back), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_allclose(new.astype(np.float64), old.astype(np.float64), atol=1e-5 * reach, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(action_spaces, st.integers(0, 1000))
def test_any_slots_decode_into_the_space(space, seed):
    layout = actions.action_layout(space)
    rng = np.random.default_rng(seed)
    choices = rng.integers(0, np.array(layout.sizes, int), (4, layout.categorical)).astype(np.int32)
    numbers = rng.uniform(-1.5, 1.5, (4, layout.continuous)).astype(np.float32)
    action = actions.from_slots(layout, actions.Slots(choices, numbers))
    assert spaces.check(space, action, 4, "the action") == 0


def test_bounds_survive_the_slots_at_the_edges():
    space = gs.Box(np.array([-2.0, 0.1], np.float32), np.array([2.0, 0.7], np.float32))
    layout = actions.action_layout(space)
    for edge, expected in ((space.low, -1.0), (space.high, 1.0)):
        slots = actions.to_slots(layout, edge[None])
        np.testing.assert_allclose(slots.continuous, expected, atol=1e-6)
        np.testing.assert_allclose(actions.from_slots(layout, slots)[0], edge, atol=1e-6)


def test_samples_are_uniform_and_honour_the_mask():
    space = gs.Dict(a=gs.MultiDiscrete([3, 2]), b=gs.Box(-2, 4, (2,)), c=gs.Discrete(4, start=7))
    batch = jax.jit(lambda key: spaces.sample(key, space, 6000))(jax.random.key(0))
    assert spaces.check(space, batch, 6000, "the sample") == 0
    np.testing.assert_allclose(np.bincount(batch["a"][:, 0]) / 6000, 1 / 3, atol=0.03)
    np.testing.assert_allclose(batch["b"].mean(0), 1.0, atol=0.1)
    np.testing.assert_allclose(batch["b"].std(0), 6 / 12**0.5, atol=0.1)
    mask = jnp.tile(jnp.array([0, 1, 1, 1, 0, 0, 0, 1, 0], bool), (6000, 1))
    masked = spaces.sample(jax.random.key(0), space, 6000, mask)
    assert set(np.unique(masked["a"][:, 0])) == {1, 2} and set(np.unique(masked["c"])) == {9}
    assert set(np.unique(masked["a"][:, 1])) == {0}


def test_flat_choices_are_cut_into_slots():
    layout = actions.action_layout(gs.MultiDiscrete([2, 3]))
    flat = np.arange(10, dtype=np.float32).reshape(2, 5)
    cut = actions.split_choices(layout, flat, 3, 4, -1.0)
    np.testing.assert_array_equal(cut[0], [[0, 1, -1, -1], [2, 3, 4, -1], [-1, -1, -1, -1]])


def test_unbounded_actions_take_the_range_of_the_data():
    layout = actions.action_layout(gs.Box(-np.inf, 3.4e38, (2,)), np.array([-3.0, -1.0]), np.array([5.0, 1.0]))
    np.testing.assert_array_equal(layout.low, [-3, -1])
    np.testing.assert_array_equal(layout.high, [5, 1])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": np.zeros(3, np.int32)}, "no part 'b'"),
        ({"a": np.zeros(3, np.int32), "b": np.zeros((3, 1), np.float32)}, r"float32\[3, 2\]"),
        ({"a": np.zeros(3, np.int32), "b": np.zeros((3, 2))}, "float64"),
        ({"a": np.array([0, 4, 0], np.int32), "b": np.zeros((3, 2), np.float32)}, "outside Discrete"),
        ({"a": np.zeros(3, np.int32), "b": np.full((3, 2), np.nan, np.float32)}, r"NaN in rows \[0, 1, 2\]"),
    ],
)
def test_check_says_what_is_wrong(value, message):
    space = gs.Dict(a=gs.Discrete(4), b=gs.Box(-1, 1, (2,)))
    with pytest.raises(spaces.SpaceError, match=message):
        spaces.check(space, value, 3, "the observation of here/There-v0")


def test_check_counts_numbers_out_of_bounds():
    value = np.array([[0, 0], [2, 0], [-3, 9]], np.float32)
    assert spaces.check(gs.Box(-1, 1, (2,)), value, 3, "it") == 2


def test_unknown_spaces_are_refused():
    with pytest.raises(spaces.SpaceError, match="Sequence"):
        spaces.leaves(gs.Sequence(gs.Discrete(2)))
    with pytest.raises(spaces.SpaceError, match="Text"):
        actions.action_layout(gs.Text(4))
    with pytest.raises(spaces.SpaceError, match="no component"):
        actions.action_layout(gs.Box(0, 1, (0,)))


def test_text_is_as_wide_as_its_longest_utf8():
    assert spaces.text_bytes(gymnasium.spaces.Text(5, charset="aé漢")) == 15

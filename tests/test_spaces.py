"""Laws of spaces and action slots."""

import json
import os
import subprocess
import sys
import warnings

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces as gs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spaces_strategies import WHOLE, action_spaces, any_boxes, any_spaces, library_sample, multi_binaries, nested

from ldm_jax import spaces
from ldm_jax.encoding import actions


@settings(max_examples=100, deadline=None)
@given(any_spaces)
def test_json_round_trip(space):
    back = spaces.from_json(json.loads(json.dumps(spaces.to_json(space), allow_nan=False)))
    assert back == space
    for old, new in zip(spaces.leaves(space), spaces.leaves(back), strict=True):
        assert new.path == old.path and new.space.dtype == old.space.dtype
        if isinstance(old.space, gs.Box):  # == compares bounds to a tolerance
            np.testing.assert_array_equal(new.space.low, old.space.low)
            np.testing.assert_array_equal(new.space.high, old.space.high)


@settings(max_examples=100, deadline=None)
@given(any_boxes())
def test_any_bounds_survive_json(space):
    back = spaces.from_json(json.loads(json.dumps(spaces.to_json(space), allow_nan=False)))
    assert np.array_equal(back.low, space.low) and np.array_equal(back.high, space.high)


@pytest.mark.parametrize(
    "space",
    [
        gs.Discrete(np.int64(3), start=np.int32(-1)),
        gs.Discrete(3, dtype=np.int32),
        gs.MultiDiscrete(np.array([[2, 3]], np.int16), np.int16, start=np.array([[1, 0]], np.int8)),
        gs.MultiBinary(np.array([2, 3])),
        gs.Text(np.int64(7), min_length=np.int64(0)),
        gs.Box(0, 1, (np.int64(2), np.int64(1))),
        gs.Box(np.array([0, 2**64 - 1], np.uint64), np.array([2**63 + 1, 2**64 - 1], np.uint64), dtype=np.uint64),
    ],
)
def test_sizes_of_numpy_survive_json(space):
    back = spaces.from_json(json.loads(json.dumps(spaces.to_json(space))))
    assert back == space and back.dtype == space.dtype and back.shape == space.shape
    if isinstance(space, gs.Box):
        assert np.array_equal(back.low, space.low) and np.array_equal(back.high, space.high)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {},
        {"kind": "Sequence"},
        {"kind": "Discrete", "n": 0, "start": 0},
        {"kind": "Discrete", "n": "two", "start": 0},
        {"kind": "Box", "low": 1, "high": 0, "shape": [2], "dtype": "float32"},
        {"kind": "Box", "low": [1, 2, 3], "high": 4, "shape": [2], "dtype": "float32"},
        {"kind": "Box", "low": 0, "high": 1e99, "shape": [2], "dtype": "uint8"},
        {"kind": "Tuple", "spaces": [{"kind": "MultiBinary"}]},
    ],
)
def test_what_describes_no_space_is_refused(damaged):
    with pytest.raises(spaces.SpaceError, match=r"describes no space|does not know"):
        spaces.from_json(damaged)


@settings(max_examples=200, deadline=None)
@given(nested(multi_binaries, st.text(max_size=4)))
def test_names_of_leaves_are_unique_and_fit_for_files(space):
    names = [leaf.name for leaf in spaces.leaves(space)]
    assert len(set(names)) == len(names)
    for name in names:
        words = name.split("/")
        assert not any(other != name and other.startswith(name + "/") for other in names)
        assert all(word and word.isascii() and word.isprintable() and word.strip(".") for word in words)
        assert not any(set(word) & set('\\:*?"<>| ') for word in words) and max(map(len, words)) < 255


def test_long_keys_and_keys_that_only_look_alike_have_names_of_their_own(tmp_path):
    keys = ["", ".", "..", "a/b", "a%2Fb", "%", "%25", "é", "\u0301e", "\ud800", "é" * 300, "é" * 301, "x" * 300, "0"]
    space = gs.Dict({key: gs.Dict({"a": gs.Discrete(2), "": gs.Discrete(3)}) for key in keys})
    names = [leaf.name for leaf in spaces.leaves(space)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert len(set(names)) == 2 * len(keys)
    assert sorted(path.read_text() for path in tmp_path.rglob("*") if path.is_file()) == sorted(names)


@pytest.mark.parametrize("space", [gs.Dict({0: gs.Discrete(2)}), gs.Dict({"a": gs.Dict({("b", 1): gs.Discrete(2)})})])
def test_keys_that_are_no_text_are_refused(space):
    for look in (spaces.leaves, spaces.to_json, lambda space: spaces.check_supported(space, "it")):
        with pytest.raises(spaces.SpaceError, match=r"expected text keys; rename it in the adapter"):
            look(space)


def contained(space, values):
    """Whether a batch of a Box lies within the library's own bounds, compared in their own type."""
    wide = np.asarray(values).astype(space.dtype)
    return bool((wide >= space.low).all() and (wide <= space.high).all())


def holds_float32(space):
    """Whether there is a float32 between the bounds of each number, other than those that XLA takes for 0."""
    low, high = spaces.bounds(space)
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.stack([low / 2 + high / 2, np.zeros_like(low), np.maximum(low, -3e38), np.minimum(high, 3e38)])
        near = near.astype(np.float32)
    near[np.abs(near) < np.finfo(np.float32).tiny] = 0.0
    return bool(((near >= low) & (near <= high)).any(0).all() and (low < 1e30).all() and (high > -1e30).all())


@settings(max_examples=100, deadline=None)
@given(any_boxes(), st.integers(0, 1000))
def test_nothing_that_is_clipped_sampled_or_decoded_lies_outside_the_box_of_the_library(space, seed):
    assume(holds_float32(space))
    rng = np.random.default_rng(seed)
    scale = np.array([1e-30, 1.0, 1e10, 1e30, 3e38]).reshape(5, *(1,) * len(space.shape))
    wild = (rng.uniform(-1, 1, (5, *space.shape)) * scale).astype(np.float32)
    edges = np.stack([np.full(space.shape, np.inf), np.full(space.shape, -np.inf), space.low, space.high])
    with np.errstate(over="ignore"):
        wild = np.concatenate([wild, edges.astype(np.float32)])
    clipped = [spaces.clip(space, wild), spaces.clip(space, jnp.asarray(wild))]
    for values in (*clipped, spaces.sample(jax.random.key(seed), space, 64)):
        assert values.dtype == spaces.leaf_shape_dtype(space).dtype
        assert contained(space, values)
    if space.shape:
        layout = actions.action_layout(space, low=-1.0, high=1.0)
        numbers = rng.uniform(-1.2, 1.2, (9, layout.continuous)).astype(np.float32)
        for xp in (np, jnp):
            slots = actions.Slots(xp.zeros((9, 0), np.int32), xp.asarray(numbers))
            assert contained(space, actions.from_slots(layout, slots))


@settings(max_examples=100, deadline=None)
@given(any_boxes())
def test_bounds_of_observations_are_rounded_as_observations_are(space):
    """What lies on a bound is not outside it."""
    carried = spaces.carried_box(space, inward=False)
    with np.errstate(over="ignore"):
        values = np.stack([space.low, space.high]).astype(carried.dtype)
    assert spaces.check(space, values, 2, "it") == 0
    assert spaces.check(carried, values, 2, "it") == 0


@pytest.mark.parametrize("dtype", WHOLE)
def test_whole_numbers_are_carried_exactly_or_to_the_precision_of_float32(dtype):
    low, high = (0, 1) if dtype == np.bool_ else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    narrow = gs.Box(max(low, -(2**31)), min(high, 2**31 - 1), (2,), dtype)
    carried = spaces.leaf_shape_dtype(narrow).dtype
    assert carried.itemsize <= 4 and carried.kind in "iu"
    assert (narrow.low.astype(carried) == narrow.low).all() and (narrow.high.astype(carried) == narrow.high).all()
    whole = gs.Box(low, high, (2,), dtype)
    assert spaces.leaf_shape_dtype(whole).dtype == (np.float32 if np.dtype(dtype).itemsize == 8 else carried)
    box = spaces.carried_box(whole, inward=False)
    assert box.dtype == spaces.leaf_shape_dtype(whole).dtype
    if np.dtype(dtype).itemsize == 8:  # Gymnasium's way to write infinity
        assert np.isposinf(box.high).all() and np.isneginf(box.low).all() == np.issubdtype(dtype, np.signedinteger)


def test_finite_is_finite():
    space = gs.Box(
        np.array([-1e6, -2e6, -1e12, -1e29, -1e30, -np.inf]),
        np.array([9, 1e12, 1e29, 3e38, 1e99, np.inf]),
        dtype=np.float64,
    )
    low, high = spaces.bounds(space)
    np.testing.assert_allclose(low, [-1e6, -2e6, -1e12, -1e29, -np.inf, -np.inf])
    np.testing.assert_allclose(high, [9, 1e12, 1e29, np.inf, np.inf, np.inf])


@pytest.mark.parametrize(
    "space",
    [
        gs.Discrete(5, start=2**33),
        gs.Discrete(5, start=-(2**31) - 1),
        gs.Discrete(2**33),
        gs.Discrete(2**63 - 1, start=5),
        gs.MultiDiscrete([2, 2], start=[0, 2**31 - 1]),
        gs.MultiDiscrete(np.array([2**64 - 1], np.uint64), np.uint64),
    ],
)
def test_categories_beyond_int32_are_refused(space):
    with pytest.raises(spaces.SpaceError, match=r"the action space of here/There-v0, part 'b': .*expected categories"):
        spaces.check_supported(gs.Dict(b=space), "the action space of here/There-v0")


def test_categories_up_to_the_ends_of_int32_are_carried_exactly():
    for start in (-(2**31), 2**31 - 5):
        space = gs.Discrete(5, start=start)
        spaces.check_supported(space, "it")
        values = np.asarray(spaces.sample(jax.random.key(0), space, 500))
        assert set(values.tolist()) == set(range(start, start + 5))
    layout = actions.action_layout(space, low=-1.0, high=1.0)
    slots = actions.to_slots(layout, values)
    assert set(slots.categorical.ravel().tolist()) == set(range(5))
    for xp in (np, jnp):
        back = actions.from_slots(layout, jax.tree.map(xp.asarray, slots))
        assert np.array_equal(back, values)


def test_a_box_without_numbers_in_it_is_refused():
    broken = gs.Box(0, 1, (2,))
    broken.high = np.array([1, np.nan], np.float32)
    with pytest.raises(spaces.SpaceError, match="expected low <= high"):
        spaces.check_supported(broken, "the observation space of here/There-v0")
    with pytest.raises(spaces.SpaceError, match="NaN"):
        spaces.to_json(broken)


FULL = [(np.iinfo(dtype).min, np.iinfo(dtype).max, dtype) for dtype in WHOLE if np.dtype(dtype).kind in "iu"]


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        *FULL[:-2],
        (1, 255, np.uint8),
        (-100, 100, np.int8),
        (-(2**31), 2**31 - 2, np.int32),
        (2**31 - 3, 2**31 - 1, np.int32),
        (2**31, 2**32 - 1, np.uint32),
        (0, 10**12, np.int64),
        (-(10**18), 10**18, np.int64),
        (7, 2**63, np.uint64),
    ],
)
def test_samples_of_whole_numbers_are_uniform_over_the_whole_range(low, high, dtype):
    count = 20000
    space = gs.Box(low, high, (2,), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = jax.jit(lambda key: spaces.sample(key, space, count))(jax.random.key(3))
    assert values.dtype == spaces.leaf_shape_dtype(space).dtype
    exact = np.asarray(values).astype(np.float64 if values.dtype == np.float32 else np.int64)
    assert exact.min() >= low and exact.max() <= high
    size = int(high) - int(low) + 1
    bins = min(size, 256)
    place = np.floor((exact - float(low)) * bins / size).astype(int).clip(0, bins - 1)
    for column in place.T:
        observed = np.bincount(column, minlength=bins)
        expected = count * np.diff(np.ceil(np.arange(bins + 1) * (size / bins))) / size
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert abs(chi_square - (bins - 1)) < 5 * np.sqrt(2 * bins)
    assert abs(np.corrcoef(exact.T)[0, 1]) < 5 / np.sqrt(count)


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
    samples = [library_sample(space) for _ in range(count)]
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
    layout = actions.action_layout(space, low=-1.0, high=1.0)
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
    layout = actions.action_layout(space, low=-1.0, high=1.0)
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


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 1e-44), (5, 5 + 1e-12), (-1e29, 1e29), (-3e38, 3e38), (0, 1e-30)]
)
def test_slots_of_any_width_are_finite_there_and_back(low, high):
    space = gs.Box(-np.inf, np.inf, (2,)) if high > 1e30 else gs.Box(low, high, (2,), np.float64)
    layout = actions.action_layout(space, low=low, high=high)
    edges = np.array([[low] * 2, [high] * 2], np.float32)
    for xp in (np, jnp):
        slots = actions.to_slots(layout, xp.asarray(edges))
        back = np.asarray(actions.from_slots(layout, slots))
        assert np.isfinite(slots.continuous).all() and np.isfinite(back).all()
        np.testing.assert_allclose(back.clip(-1e30, 1e30), edges.clip(-1e30, 1e30), rtol=1e-6, atol=1e-12)


SAME_DRAWS = """
import jax, numpy as np
from gymnasium import spaces as gs
from ldm_jax import spaces
ends = np.array([[-1, 0, -np.inf], [1, np.inf, np.inf]], np.float32)
space = gs.Dict(a=gs.Box(*ends), b=gs.Discrete(5), c=gs.Box(-9, 99, (3,), np.int32), d=gs.MultiDiscrete([3, 4]))
for mask in (None, np.arange(12)[None].repeat(4, 0) % 2 == 0):
    batch = spaces.sample(jax.random.key(0), space, 4, mask)
    print({name: (str(leaf.dtype), np.asarray(leaf).tolist()) for name, leaf in batch.items()})
"""


def test_samples_are_the_same_under_64_bits():
    found = []
    for wide in ("0", "1"):
        variables = os.environ | {"JAX_ENABLE_X64": wide, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", SAME_DRAWS]
        found.append(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout)
    assert found[0] == found[1] and found[0].count("\n") == 2


def test_flat_choices_are_cut_into_slots():
    layout = actions.action_layout(gs.MultiDiscrete([2, 3]))
    flat = np.arange(10, dtype=np.float32).reshape(2, 5)
    cut = actions.split_choices(layout, flat, 3, 4, fill=-1.0)
    np.testing.assert_array_equal(cut[0], [[0, 1, -1, -1], [2, 3, 4, -1], [-1, -1, -1, -1]])


def test_unbounded_actions_take_the_range_of_the_data():
    layout = actions.action_layout(gs.Box(-np.inf, 3.4e38, (2,)), np.array([-3.0, -1.0]), np.array([5.0, 1.0]))
    assert layout.assumed == (0, 1)
    np.testing.assert_array_equal(layout.low, [-3, -1])
    np.testing.assert_array_equal(layout.high, [5, 1])


def test_a_range_that_the_space_does_not_give_is_stated_and_named():
    space = gs.Dict(
        a=gs.Box(-1, 1, (2,)), b=gs.Box(np.array([0, -np.inf, -2e9]), np.array([np.inf, 4, 2e9]), dtype=np.float64)
    )
    with pytest.raises(spaces.SpaceError, match=r"no bounds in its continuous slots \[2, 3\]: say the range"):
        actions.action_layout(space)
    layout = actions.action_layout(space, low=-3.0, high=7.0)
    assert layout.assumed == (2, 3)
    np.testing.assert_array_equal(layout.low, [-1, -1, 0, -3, -2e9])
    np.testing.assert_array_equal(layout.high, [1, 1, 7, 4, 2e9])
    assert actions.action_layout(gs.Box(-2e9, 2e9)).assumed == ()


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

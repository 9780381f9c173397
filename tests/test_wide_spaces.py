"""Laws of codecs over all that the buckets hold: 290 dimensions, 4,672 choices, images, texts, nests and masks."""

import collections
import dataclasses
import fnmatch
import itertools

import chex
import examples
import jax
import numpy as np
import pytest
import tiny_datasets
from flax import nnx
from gymnasium import spaces as gs
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces_strategies import action_spaces, any_spaces

from data import store
from data.batches import make_codecs
from environments.catalog import entries
from ldm_jax import spaces
from ldm_jax.encoding import actions, observations
from ldm_jax.encoding.buckets import bucket_for, join_buckets, join_two
from ldm_jax.encoding.codec import Codec
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.model import encoders
from ldm_jax.model.config import SIZES
from ldm_jax.model.encoders import CategoryEncoder
from ldm_jax.model.heads import bin_centers, bin_probabilities
from ldm_jax.model.network import make_model
from ldm_jax.training import cost, padding
from ldm_jax.training.bucket_work import bucket_work

LARGE = dataclasses.replace(
    SIZES["32m"],
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    feed_forward=16,
    window=4,
    bins=64,
    numeric=2048,
    image_side=96,
)
WORK = bucket_work(dataclasses.replace(LARGE, image_side=320, numeric=8192))
WIDE = {
    "muscles": (gs.Box(-np.inf, np.inf, (1276,)), gs.Box(-1, 1, (290,), np.float32)),
    "chess": (gs.Box(0, 1, (8, 8, 119)), gs.Discrete(4672)),
    "frames": (gs.Box(0, 255, (4, 84, 84), np.uint8), gs.Discrete(18)),
    "colour": (gs.Box(0, 255, (64, 64, 3), np.uint8), gs.Discrete(15)),
    "nest": (
        gs.Dict(
            board=gs.Box(0, 9, (9, 9), np.int32),
            inner=gs.Tuple([gs.MultiBinary([3, 4]), gs.Dict(goal=gs.Box(-5, 5, (2, 2)), word=gs.Text(40))]),
            count=gs.MultiDiscrete([1000, 3]),
        ),
        gs.Dict(
            move=gs.Box(np.array([-3, 0], np.float32), np.array([3, np.inf], np.float32)),
            tool=gs.Tuple([gs.Discrete(700, start=-5), gs.MultiDiscrete([[2, 3], [4, 5]])]),
            keys=gs.MultiBinary(9),
            steps=gs.Box(-4, 4, (3,), np.int32),
        ),
    ),
}


def wide_codec(name):
    """The codec of one of `WIDE`."""
    return Codec(examples.make_card(*WIDE[name], name=f"test/{name}"))


def check_labels(codec, seed):
    """Every label that is encoded as a target comes back as the action, within half a bin."""
    stream = examples.random_stream(codec, 6, seed)
    arrays = {name: value for name, value in stream.items() if not name.startswith("reference/")}
    _, targets = codec.window(arrays)
    space, layout = codec.card.action_space, codec.action_layout
    bins = np.asarray(bin_probabilities(LARGE, targets.mean, targets.scale))
    np.testing.assert_allclose(bins.sum(-1), 1, atol=1e-5)
    index = targets.probabilities.argmax(-1) if layout.categorical else np.zeros((6, codec.bucket.choice_slots), int)
    slots = actions.Slots(index.astype(np.int32), np.clip(bins @ bin_centers(LARGE), -1, 1).astype(np.float32))
    action = codec.action(slots)
    assert spaces.check(space, action, 6, "the action") == 0
    label = spaces.unflatten(space, [arrays[f"reference_action/{leaf.name}"] for leaf in spaces.leaves(space)])
    found, wanted = (actions.to_slots(layout, tree) for tree in (action, label))
    np.testing.assert_array_equal(found.categorical, wanted.categorical)
    whole = np.concatenate(
        [
            np.full(int(np.prod(leaf.space.shape)), 0.5 * (not np.issubdtype(leaf.space.dtype, np.floating)))
            for leaf in spaces.leaves(space)
            if isinstance(leaf.space, gs.Box)
        ]
        or [np.zeros(0)]
    )
    # Whole numbers are rounded to the nearest, so they may move by one half more.
    half = LARGE.bin_width / 2 + whole / ((layout.high - layout.low) / 2)
    assert (np.abs(found.continuous - np.clip(wanted.continuous, -1, 1)) <= half * 1.01 + 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(any_spaces, action_spaces, st.integers(0, 1000))
def test_windows_and_labels_of_any_space_fit_their_bucket(seen, acted, seed):
    codec = Codec(examples.make_card(seen, acted))
    check_labels(codec, seed)
    features, _ = codec.window(examples.random_stream(codec, 6, seed))
    told = cost.example_shapes(codec.bucket, 1, 6).inputs.features
    jax.tree.map(lambda leaf, shape: np.testing.assert_equal((1, *leaf.shape), shape.shape), features, told)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(features))


@pytest.mark.parametrize("name", WIDE)
def test_labels_of_the_widest_spaces_survive(name):
    check_labels(wide_codec(name), 0)


def test_one_model_reads_and_acts_in_the_widest_spaces():
    model, batch, allowed = make_model(LARGE), {}, {}
    params = examples.random_params(model)
    for name in WIDE:
        codec = wide_codec(name)
        LARGE.check_fits(codec.bucket, name)
        streams = [examples.random_stream(codec, 3, seed) for seed in range(2)]
        if codec.action_layout.flat_choices:
            rng = np.random.default_rng(0)
            for arrays in streams:
                arrays["action_mask"] = rng.random((3, codec.action_layout.flat_choices)) < 0.3
                arrays["action_mask"][:, 0] = True
        windows = [codec.window(arrays)[0] for arrays in streams]
        batch[name] = examples.Inputs(examples.stack(windows), examples.stack([codec.signature] * 2))
        allowed[name] = batch[name].features.action_mask
    predictions = jax.device_get(jax.jit(model.apply)(params, batch)[0])
    for name, (choices, bins) in predictions.items():
        codec, layout = wide_codec(name), wide_codec(name).action_layout
        assert bins.shape[2] >= layout.continuous and choices.shape[2] >= layout.categorical
        assert np.isfinite(choices).all() and np.isfinite(bins).all()
        # Two rows that see something else are answered something else.
        answers = np.concatenate([choices.reshape(2, -1), bins[:, :, : layout.continuous].reshape(2, -1)], -1)
        assert np.abs(answers[0] - answers[1]).max() > 1e-4
        for slot in range(layout.categorical):
            mask = allowed[name][:, :, slot]
            rows = mask.any(-1)
            probabilities = np.asarray(jax.nn.softmax(choices[:, :, slot], -1))
            assert (probabilities[rows][~mask[rows]] == 0).all()
            np.testing.assert_allclose(probabilities[rows].sum(-1), 1, atol=1e-4)


def test_categories_with_the_same_low_digit_are_told_apart():
    encoder = CategoryEncoder(1, LARGE.values, LARGE, nnx.Rngs(params=jax.random.key(0)))
    index = np.array([5, 5 + LARGE.values, 5 + 7 * LARGE.values])[None, :, None]
    x = np.asarray(encoder(index, np.ones((1, 1), np.float32)))[0]
    assert min(np.abs(x[i] - x[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


def draw_space(rng, nested=True):
    """A space as libraries have them: mostly vectors, some categories, grids, images, texts and nests."""
    kind = rng.choice(["vector", "category", "grid", "image", "text", "nest"], p=[0.5, 0.15, 0.12, 0.1, 0.05, 0.08])
    if kind == "vector":
        return gs.Box(-1, 1, (int(2 ** rng.uniform(0, 11)),))
    if kind == "category":
        return gs.Discrete(int(2 ** rng.uniform(1, 9)))
    if kind == "grid":
        side = int(rng.integers(5, 17))
        return gs.Box(0, 9, (side, side, int(rng.integers(1, 5))), np.int32)
    if kind == "image":
        return gs.Box(0, 255, [(84, 84, 4), (64, 64, 3), (4, 84, 84)][rng.integers(3)], np.uint8)
    if kind == "text" or not nested:
        return gs.Text(int(rng.integers(8, 100)))
    return gs.Dict({name: draw_space(rng, False) for name in "ab"})


def draw_actions(rng):
    """An action space as libraries have them."""
    kind = rng.choice(["box", "discrete", "multi", "mixed"], p=[0.6, 0.3, 0.06, 0.04])
    if kind == "box":
        return gs.Box(-1, 1, (int(2 ** rng.uniform(0, 8.18)),))
    if kind == "discrete":
        return gs.Discrete(int(2 ** rng.uniform(1, 12.2)))
    if kind == "multi":
        return gs.MultiDiscrete(rng.integers(2, 12, int(rng.integers(1, 20))))
    return gs.Dict(a=gs.Discrete(int(rng.integers(2, 30))), b=gs.Box(-1, 1, (int(rng.integers(1, 9)),)))


def test_programs_are_compiled_for_buckets_and_not_for_environments():
    rng = np.random.default_rng(0)
    cards = [examples.make_card(draw_space(rng), draw_actions(rng), f"test/Number{i}-v0") for i in range(200)]
    own = [bucket_for(card.observation_space, card.action_space) for card in cards]
    kinds = {(bucket.grids, bucket.texts) for bucket in own}
    joined = join_buckets(collections.Counter(own), len(kinds) + 10, WORK)
    traced = chex.assert_max_traces(lambda example: example.targets.weight.sum(), n=len(kinds) + 10)
    program = jax.jit(traced)
    for seed, (card, bucket) in enumerate(zip(cards, own, strict=True)):
        program(examples.random_example(Codec(card, joined[bucket]), 1, 2, seed))
    assert len(set(joined.values())) == len(kinds) + 10 < len(set(own)) / 2


TOO_WIDE = {
    "dm_control/dm_control/*_vision-v0": 9,  # 21,210 numbers
    "envpool/*FlatPack-v0": 2,  # 8,100 categories
    "gym-aloha/gym_aloha/AlohaInsertion-v0": 1,  # an image of 640 pixels
    "mo-gymnasium/minecart-rgb-v0": 1,  # of 480
    "open_spiel/[cds]*": 3,  # colored_trails, dou_dizhu and shogi: 13,689 choices and more
    "pyRDDLGym/Manufacturer_ippc2018-*": 6,  # 420 slots and more
    "pyRDDLGym/RecSim_ippc2023-*": 4,  # 875 slots and more, or 125,001 choices
    "vizdoom/VizdoomBasicNotifications*-v1": 2,  # texts of 32,768 bytes
}
"""Verified environments that no named size takes."""


def test_named_sizes_take_the_catalog_but_a_handful():
    sizes = [size for name, size in SIZES.items() if name != "nano"]
    fits, refused = {}, []
    for entry in entries.entries_of(entries.catalogued()):
        if not entry.verified:
            continue
        if (key := repr((entry.observation_space, entry.action_space))) not in fits:
            seen, acted = spaces.from_json(entry.observation_space), spaces.from_json(entry.action_space)
            try:
                bucket, categories = bucket_for(seen, acted), max(observation_layout(seen).sizes, default=0)
                for cfg in sizes:
                    cfg.check_fits(bucket, entry.id, categories)
            except LdmError:
                fits[key] = False
            else:
                fits[key] = True
        if not fits[key]:
            refused.append(entry.id)
    assert {name: len(fnmatch.filter(refused, name)) for name in TOO_WIDE} == TOO_WIDE
    assert len(refused) == sum(TOO_WIDE.values()) == 28


def test_narrowed_tables_are_those_that_are_read_and_change_nothing():
    cfg = dataclasses.replace(LARGE, width=8, image_side=96)
    image, grid = gs.Box(0, 255, (20, 20, 3), np.uint8), gs.Box(0, 9, (7, 7, 3), np.int32)
    seen = gs.Dict(a=image, b=grid, c=gs.Discrete(11), d=gs.Box(-1, 1, (6,)))
    codec = Codec(examples.make_card(seen, gs.Dict(a=gs.MultiDiscrete([3, 4]), b=gs.Box(-1, 1, (3,)))))
    narrow = cfg.narrowed([codec.bucket], categories=11)
    fields = ("numeric", "categorical", "values", "channels", "image_side", "text", "parts")
    assert [getattr(narrow, field) for field in fields] == [8, 1, 11, 4, 32, 1, 2]
    assert (narrow.choice_slots, narrow.choices, narrow.continuous_slots) == (4, 8, 8)
    assert narrow.narrowed([codec.bucket], categories=11) == narrow
    with pytest.raises(ConfigError, match=r"continuous_slots=8 \(the model has 2\)"):
        dataclasses.replace(cfg, continuous_slots=2).narrowed([codec.bucket])

    whole, few = make_model(cfg), make_model(narrow)
    rng = np.random.default_rng(0)
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in (whole, few)]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes[0])
    kept = jax.tree.map(lambda leaf, shape: leaf[tuple(map(slice, shape.shape))], params, shapes[1])
    inputs = {"rows": examples.random_example(codec, 1, 2, 0).inputs}
    told, same = (
        jax.jit(lambda params, inputs, model=model: model.apply(params, inputs)[0])(params, inputs)
        for model, params in ((whole, params), (few, kept))
    )
    chex.assert_trees_all_close(told, same, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30))
def test_joined_buckets_hold_what_they_were_joined_from(seed, most):
    rng = np.random.default_rng(seed)
    own = collections.Counter(bucket_for(draw_space(rng), draw_actions(rng)) for _ in range(30))
    joined = join_buckets(own, most, WORK)
    assert joined.keys() == own.keys()
    for old, new in joined.items():
        assert (old.grids, old.texts) == (new.grids, new.texts)
        assert all(getattr(new, name) >= getattr(old, name) for name in ("numeric", "choices", "continuous_slots"))
    kinds = {(bucket.grids, bucket.texts) for bucket in own}
    assert len(set(joined.values())) <= max(most, len(kinds))
    if len(own) <= most:
        assert all(old == new for old, new in joined.items())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([0.0, 0.02]))
def test_padded_grids_and_texts_leave_fewer_buckets_that_hold_all(seed, most, each):
    rng = np.random.default_rng(seed)
    own = collections.Counter(bucket_for(draw_space(rng), draw_actions(rng)) for _ in range(20))
    joined = join_buckets(own, most, WORK, each=each, pad_parts=True)
    for old, new in joined.items():
        assert join_two(old, new, pad_parts=True) == new and WORK(new) >= WORK(old) * (1 - 1e-9)
        for one, other in zip(old.grids, new.grids, strict=False):
            assert one.dtype == other.dtype and (one.side > 16) == (other.side > 16)
    left = set(joined.values())
    assert len(left) <= len(set(join_buckets(own, most, WORK).values()))
    if len(left) > most:  # no two of them are of a kind
        assert not any(join_two(*pair, pad_parts=True) for pair in itertools.combinations(left, 2))


def test_what_a_bucket_costs_is_the_sum_of_its_parts():
    cfg = dataclasses.replace(LARGE, image_side=96)
    work = bucket_work(cfg)
    for name in ("mixed", "nest", "frames"):
        bucket = (examples.make_codec(name) if name in examples.SPACES else wide_codec(name)).bucket
        counted = cost.bucket_flops(cfg, bucket, 8, 64) + cost.flops_per_token(cfg, 2 * cfg.window).forward
        assert work(bucket) == pytest.approx(counted, rel=0.05)
    stacked = bucket_for(gs.Box(0, 255, (60, 80, 12), np.uint8), gs.Discrete(3))
    for bucket, message in ((stacked, "channels=16"), (wide_codec("muscles").bucket, "numeric=2048")):
        with pytest.raises(ConfigError, match=rf"the bucket {bucket.name} needs {message} \(the model has"):
            bucket_work(SIZES["nano"])(bucket)


def test_parts_that_are_not_there_change_nothing():
    small, large = (examples.make_card(space, gs.Discrete(3)) for space in (gs.Box(-1, 1, (4,)), WIDE["nest"][0]))
    own, wide = Codec(small).bucket, Codec(large).bucket
    joined = join_two(own, wide, pad_parts=True)
    assert joined.grids and joined.texts and not own.grids
    model, rng = make_model(LARGE), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    apply = jax.jit(lambda params, inputs: model.apply(params, inputs)[0]["rows"].choice_logits[..., 0, :3])
    told, same = (
        apply(params, {"rows": examples.random_example(Codec(small, bucket), 1, 3, 0).inputs})
        for bucket in (own, joined)
    )
    np.testing.assert_allclose(told, same, rtol=1e-4, atol=1e-4)


def test_training_joins_buckets_that_are_too_many():
    dataset = store.create_dataset(tiny_datasets.memory())
    ids = [f"test/Number{i}-v0" for i in range(5)]
    for id, choices in zip(ids, (2, 30, 100, 500, 8000), strict=True):
        made = tiny_datasets.card(id, action_space=gs.Discrete(choices))
        leaves = tiny_datasets.leaves(made, 8, 1, **{"action/value": 0, "reference_action/value": 0})
        dataset = store.append_part(dataset, made, leaves, tiny_datasets.episodes(8, 1))
    own = make_codecs(dataset, ids, LARGE)
    assert len({codec.bucket for codec in own}) == 5 and [codec.card.id for codec in own] == ids
    few = make_codecs(dataset, ids, LARGE, max_buckets=2)
    assert len({codec.bucket for codec in few}) == 2
    assert all(new.bucket.choices >= old.bucket.choices for new, old in zip(few, own, strict=True))


def test_useful_fractions_count_what_is_real():
    names, steps = ["vector", "continuous", "mixed"], 12
    batch = examples.random_batch(names, 2, 6, seed=0)
    useful = padding.measure_useful(batch)
    inputs, padded, slots, all_slots = 0, 0, 0, 0
    for codec in map(examples.make_codec, names):
        seen, acted, bucket = codec.observation_layout, codec.action_layout, codec.bucket
        inputs += steps * (seen.numbers + len(seen.sizes) + 7 * 7 * len(seen.grids))
        inputs += sum((text > 0).sum() for text in batch[bucket.name].inputs.features.texts)
        padded += steps * (
            bucket.numeric + bucket.categorical + sum(bucket.texts) + sum(g.side**2 for g in bucket.grids)
        )
        slots += acted.categorical + acted.continuous
        all_slots += bucket.choice_slots + bucket.continuous_slots
    labelled = sum(example.targets.weight.sum() for example in batch.values())
    assert useful.steps == pytest.approx(labelled / (len(names) * steps))
    assert useful.inputs == pytest.approx(inputs / padded)
    assert useful.slots == pytest.approx(slots / all_slots)
    assert useful.choices == pytest.approx((3 + 4) / (8 + 8))
    tight = Codec(examples.make_card(gs.Box(-1, 1, (8,)), gs.Discrete(8)))
    assert padding.measure_useful({"rows": examples.random_example(tight, 2, 4, seed=0)})[1:] == (1, 1, 1)


def test_what_is_too_wide_names_the_way_out():
    codec = Codec(examples.make_card(gs.Box(-1, 1, (3000,)), gs.Discrete(9000 // 2)))
    with pytest.raises(ConfigError, match=r"numeric=8192 \(the model has 2048\): make the model with"):
        LARGE.check_fits(codec.bucket, "test/Some-v0")
    with pytest.raises(spaces.SpaceError, match="choices = 9000"):
        bucket_for(gs.Discrete(2), gs.Discrete(9000))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8, 8, 119), 2),
        ((84, 84, 4), 2),
        ((4, 84, 84), 0),
        ((119, 9, 9), 0),
        ((3, 20, 30), 0),
        ((10, 7, 4), 2),
        ((5, 7, 5), 2),
        ((6, 6, 6), 2),
        ((64, 64, 128), 2),
        ((64, 48, 48), 0),
        ((128, 64, 64), 0),
        ((48, 48, 64), 2),
        ((210, 160, 3), 2),
        ((3, 210, 160), 0),
        ((30, 9, 20), 2),
        ((20, 9, 30), 0),
    ],
)
def test_channels_are_beside_the_square_or_else_the_shorter_of_the_outer_axes(shape, axis):
    assert observations.channel_axis(shape) == axis


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_are_the_same_a_few_at_a_time_and_all_at_once(dtype, monkeypatch):
    graph, params = nnx.split(encoders.GridEncoder(dataclasses.replace(LARGE, channels=8), nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 6, 32, 32, 8)).astype(dtype)
    mask = np.zeros((2, 32, 32), np.float32)
    mask[:, :30, :20] = 1

    @jax.value_and_grad
    def loss(params, image):
        return jax.numpy.sin(nnx.merge(graph, params)(image, mask)).sum()

    whole = loss(params, np.where(mask[:, None, ..., None] > 0, image, 0).astype(dtype))
    monkeypatch.setattr(encoders, "_IMAGES", 4)  # two steps of both rows
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5), loss(params, image), whole
    )

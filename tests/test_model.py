"""Laws of the model: causality, cached decoding, padding, history, compilation."""

import dataclasses
import functools
import json

import chex
import examples
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

from ldm_jax import acting, spaces
from ldm_jax.encoding.buckets import bucket_for
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError
from ldm_jax.model import encoders
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import Inputs, count_parameters, make_model
from ldm_jax.training.loss import imitation_loss

NANO = dataclasses.replace(SIZES["nano"], values=64)
WINDOW = NANO.window


@pytest.fixture(scope="module")
def model():
    return make_model(NANO)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)  # as a whole: one by one, its many small operations take longer to compile


def flatten(predictions):
    """Softmaxed predictions as one array `[rows, T, ...]`."""
    return np.concatenate([np.asarray(jax.nn.softmax(p, -1)).reshape(*p.shape[:2], -1) for p in predictions], -1)


@pytest.mark.parametrize("name", ["continuous", "mixed"])
def test_cached_decoding_equals_one_forward_pass_with_staggered_resets(model, params, apply, name):
    codec, steps, resets = examples.make_codec(name), 4 * WINDOW, (0, 5, 2 * WINDOW + 3)
    example = examples.random_example(codec, len(resets), steps, seed=1)
    cache = model.init_cache(len(resets))
    decoded = []
    for t in range(steps):
        fresh = jnp.array([t == reset for reset in resets])
        cache = cache._replace(length=jnp.where(fresh, 0, cache.length))
        now = example.inputs._replace(
            features=jax.tree.map(lambda leaf, t=t: leaf[:, t : t + 1], example.inputs.features)
        )
        predictions, cache = apply(params, {"rows": now}, cache)
        decoded.append(flatten(predictions["rows"]))
    decoded = np.concatenate(decoded, 1)
    for row, reset in enumerate(resets):
        features = jax.tree.map(lambda leaf, row=row, reset=reset: leaf[row : row + 1, reset:], example.inputs.features)
        signature = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], example.inputs.signature)
        whole, _ = apply(params, {"rows": Inputs(features, signature)})
        np.testing.assert_allclose(decoded[row, reset:], flatten(whole["rows"])[0], atol=2e-5)


def test_attention_is_causal_and_local_by_gradient(params, apply):
    example = examples.random_example(examples.make_codec("vector"), 1, 4 * WINDOW, seed=2)
    t = 3 * WINDOW

    def prediction(numeric):
        inputs = example.inputs._replace(features=example.inputs.features._replace(numeric=numeric))
        return jax.nn.log_softmax(apply(params, {"rows": inputs})[0]["rows"].choice_logits[0, t, 0, :3])[0]

    influence = np.abs(jax.grad(prediction)(example.inputs.features.numeric)).sum((0, 2, 3))
    reach = NANO.layers * (WINDOW - 1)
    assert (influence[t + 1 :] == 0).all()
    assert (influence[: max(0, t - reach)] == 0).all()
    assert (influence[t - WINDOW + 1 : t + 1] > 0).all()


def test_a_nan_in_padding_changes_nothing(params, apply):
    codec = examples.make_codec("mixed")
    example = examples.random_example(codec, 2, 6, seed=3)
    features = example.inputs.features
    before, _ = apply(params, {"rows": example.inputs})
    numbers = codec.observation_layout.numbers
    slots = codec.action_layout.continuous
    side = features.grids[0].copy()
    side[:, :, 7:] = np.nan
    numeric = features.numeric.copy()
    numeric[:, :, numbers:] = np.nan
    continuous = features.previous.continuous.copy()
    continuous[..., slots:] = np.nan
    poisoned = features._replace(
        numeric=numeric, grids=(side,), previous=features.previous._replace(continuous=continuous)
    )
    assert np.isnan(numeric).any() and np.isnan(side).any() and np.isnan(continuous).any()
    after, _ = apply(params, {"rows": example.inputs._replace(features=poisoned)})
    np.testing.assert_array_equal(before["rows"].choice_logits, after["rows"].choice_logits)
    np.testing.assert_array_equal(before["rows"].bin_logits[:, :, :slots], after["rows"].bin_logits[:, :, :slots])


FLOAT_IMAGE = (examples.gs.Box(0, 1, (20, 30, 3)), examples.gs.Box(-1, 1, (2,)))


def poison(example, rng, value):
    """Puts a value, or integers outside any table, wherever a mask or a missing previous action says not to look."""
    features, signature = example.inputs.features, example.inputs.signature
    present = rng.random(features.has_previous.shape) < 0.5
    no_slot = [
        ~present[..., None] | ~(mask[:, None] > 0) for mask in (signature.choice_slots, signature.continuous_slots)
    ]
    holes = features._replace(
        numeric=~(signature.numeric_mask[:, None, :, None] > 0),
        categorical=~(signature.categorical_mask[:, None] > 0),
        grids=tuple(~(mask[:, None, ..., None] > 0) for mask in signature.grid_masks),
        texts=tuple(np.zeros((), bool) for _ in features.texts),
        reward=np.zeros((), bool),
        flags=np.zeros((), bool),
        previous=features.previous._replace(categorical=no_slot[0], continuous=no_slot[1]),
        has_previous=np.zeros((), bool),
        action_mask=~signature.choice_mask[:, None],
    )

    def fill(leaf, hole, value):
        kinds = {"f": value, "b": True, "u": 255, "i": rng.choice([-1, -(2**31), 2**31 - 1])}
        return np.where(hole, np.asarray(kinds[leaf.dtype.kind], leaf.dtype), leaf)

    features = features._replace(has_previous=present.astype(np.float32))
    plain, filled = (jax.tree.map(lambda a, b, v=v: fill(a, b, v), features, holes) for v in (0.0, value))
    return tuple(example._replace(inputs=example.inputs._replace(features=one)) for one in (plain, filled))


@pytest.mark.parametrize("name", [*examples.SPACES, "float image"])
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(seed=st.integers(0, 99), value=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_what_stands_in_a_masked_place_is_never_read(params, apply, name, seed, value):
    if name in examples.SPACES:
        codec = examples.make_codec(name)
    else:
        codec = Codec(examples.make_card(*FLOAT_IMAGE))
        assert codec.bucket.grids[0].dtype == "float32"
    example = examples.random_example(codec, 2, 5, seed=seed)
    plain, filled = (
        apply(params, {"rows": one.inputs})[0]["rows"] for one in poison(example, np.random.default_rng(seed), value)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, filled)


def test_what_stands_in_a_masked_place_has_no_part_in_the_gradient(model, params):
    example = examples.random_example(examples.make_codec("mixed"), 2, 5, seed=0)
    gradient = jax.jit(jax.grad(lambda params, batch: imitation_loss(model, NANO, params, batch)[0]))
    plain, filled = (gradient(params, {"rows": one}) for one in poison(example, np.random.default_rng(0), np.nan))
    jax.tree.map(np.testing.assert_array_equal, plain, filled)


def test_what_a_row_left_in_the_cache_is_never_read_again(model, params, apply):
    example = examples.random_example(examples.make_codec("mixed"), 2, WINDOW + 2, seed=15)
    fresh = model.init_cache(2)
    filled = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), (fresh.keys, fresh.values))
    left = fresh._replace(keys=filled[0], values=filled[1])
    caches = [fresh, left]
    for t in range(WINDOW + 2):
        now = example.inputs._replace(
            features=jax.tree.map(lambda leaf, t=t: leaf[:, t : t + 1], example.inputs.features)
        )
        found, caches = zip(*(apply(params, {"rows": now}, cache) for cache in caches), strict=True)
        jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("change", ["reward", "terminated", "truncated", "action"])
def test_how_an_episode_ended_changes_the_next_prediction(params, apply, change):
    codec = examples.make_codec("vector")
    arrays = examples.random_stream(codec, 8, seed=4)
    for name in ("terminated", "truncated"):
        arrays[name] = np.zeros(8, bool)
    arrays["first"] = np.arange(8) == 5
    arrays["terminated"][4] = True
    other = {name: leaf.copy() for name, leaf in arrays.items()}
    if change == "reward":
        other["reward"][4] += 1.0
    elif change == "action":
        other["action/value"][3] = (other["action/value"][3] + 1) % 3
    else:
        other["terminated"][4], other["truncated"][4] = False, True
        if change == "terminated":
            other["terminated"][4] = True
    outputs = []
    for stream in (arrays, other):
        features, _ = codec.window(stream)
        inputs = Inputs(examples.stack([features]), examples.stack([codec.signature]))
        outputs.append(flatten(apply(params, {"rows": inputs})[0]["rows"]))
    assert np.abs(outputs[0] - outputs[1])[0, 5].max() > 1e-6
    np.testing.assert_array_equal(outputs[0][0, :3], outputs[1][0, :3])


def test_the_ignored_action_does_not_matter(params, apply):
    codec = examples.make_codec("vector")
    arrays = examples.random_stream(codec, 8, seed=5)
    arrays["terminated"], arrays["truncated"] = np.arange(8) == 4, np.zeros(8, bool)
    arrays["first"] = np.arange(8) == 5
    other = arrays | {"action/value": arrays["action/value"].copy()}
    other["action/value"][4] = (other["action/value"][4] + 1) % 3
    outputs = []
    for stream in (arrays, other):
        features, _ = codec.window(stream)
        inputs = Inputs(examples.stack([features]), examples.stack([codec.signature]))
        outputs.append(flatten(apply(params, {"rows": inputs})[0]["rows"]))
    np.testing.assert_array_equal(*outputs)


def test_rows_and_buckets_do_not_touch_each_other(params, apply):
    batch = {name: example.inputs for name, example in examples.random_batch(examples.SPACES, 2, 5, seed=6).items()}
    together, _ = apply(params, batch)
    for name, inputs in batch.items():
        alone, _ = apply(params, {name: jax.tree.map(lambda leaf: leaf[1:], inputs)})
        np.testing.assert_allclose(flatten(together[name])[1:], flatten(alone[name]), atol=1e-5)


def test_the_signature_is_seen(params, apply):
    codec = examples.make_codec("vector")
    example = examples.random_example(codec, 1, 3, seed=7)
    other = example.inputs.signature._replace(vector=example.inputs.signature.vector * 0.5)
    one, two = (
        apply(params, {"rows": i})[0]["rows"].choice_logits
        for i in (example.inputs, example.inputs._replace(signature=other))
    )
    assert np.abs(one - two).max() > 1e-4


def test_masked_choices_have_no_probability(params, apply):
    codec = examples.make_codec("vector")
    example = examples.random_example(codec, 2, 4, seed=8)
    mask = example.inputs.features.action_mask.copy()
    mask[..., 1] = False
    inputs = example.inputs._replace(features=example.inputs.features._replace(action_mask=mask))
    probabilities = jax.nn.softmax(apply(params, {"rows": inputs})[0]["rows"].choice_logits, -1)
    assert (np.asarray(probabilities[..., 1]) == 0).all()
    assert (np.asarray(probabilities[..., 3:]) == 0).all()


def test_a_second_call_compiles_nothing(model, params):
    fresh = jax.jit(chex.assert_max_traces(lambda *arguments: model.apply(*arguments), n=1))
    for seed in (9, 10):
        fresh(params, {name: e.inputs for name, e in examples.random_batch(["vector", "grid"], 2, 4, seed).items()})


@pytest.mark.parametrize(
    "variant", [{"qk_norm": False}, {"kv_heads": 1}, {"remat": "full"}, {"remat": "dots"}, {"dtype": "bfloat16"}]
)
def test_variants_of_the_decoder_run_and_stay_finite(variant):
    cfg = dataclasses.replace(NANO, **variant)
    model = make_model(cfg)
    params = jax.jit(model.init)(jax.random.key(1))
    batch = {name: e.inputs for name, e in examples.random_batch(["vector", "mixed"], 2, 4, seed=11).items()}

    def total(params):
        return sum(jnp.square(jnp.maximum(p, -30)).sum() for p in jax.tree.leaves(model.apply(params, batch)[0]))

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(total))(params)))


@pytest.mark.parametrize(
    ("size", "backbone"), [("32m", 31.5e6), ("70m", 70.8e6), ("308m", 302e6), ("736m", 736e6), ("micro", 0.65e6)]
)
def test_named_sizes_have_their_parameter_counts(size, backbone):
    shapes = jax.eval_shape(make_model(SIZES[size]).init, jax.random.key(0))
    assert count_parameters(shapes["decoder"]) == pytest.approx(backbone, rel=0.03)


def test_parameters_and_caches_have_the_same_types_under_64_bits(model):
    shapes = jax.eval_shape(lambda key: (model.init(key), model.init_cache(2)), jax.random.key(0))
    with jax.enable_x64(True):
        wide = jax.eval_shape(lambda key: (model.init(key), model.init_cache(2)), jax.random.key(0))
    assert shapes == wide
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[0])} == {np.dtype(np.float32)}


def test_init_is_a_pure_function_of_the_key(model, params):
    init = jax.jit(model.init)
    same, other = init(jax.random.key(0)), init(jax.random.key(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), params, same))
    assert not jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), params, other))
    assert all(
        type(node) is dict
        for node in jax.tree.leaves(params, is_leaf=lambda x: not isinstance(x, dict))
        if isinstance(node, dict)
    )


@pytest.mark.parametrize("name", examples.SPACES)
def test_the_window_and_the_single_steps_encode_alike(name):
    codec = examples.make_codec(name)
    arrays = examples.random_stream(codec, 12, seed=12)
    features, targets = codec.window(arrays)
    space = codec.card.action_space
    stacked = {key: leaf[None] for key, leaf in arrays.items()}
    step = jax.jit(codec.features)
    for t in range(12):
        previous = spaces.unflatten(
            space, [arrays[f"action/{leaf.name}"][max(t - 1, 0)][None] for leaf in spaces.leaves(space)]
        )
        one = step(examples.timestep_at(codec, stacked, t), previous, np.array([t > 0]))
        for whole, single in zip(jax.tree.leaves(features), jax.tree.leaves(one), strict=True):
            assert whole.dtype == single.dtype
            np.testing.assert_allclose(whole[t], single[0], atol=1e-5)
    assert targets.weight.sum() == arrays["label_mask"].sum()
    if codec.action_layout.categorical:
        np.testing.assert_allclose(targets.probabilities.sum((-2, -1)), codec.action_layout.categorical, rtol=1e-5)


def test_the_signature_is_bounded():
    for name in examples.SPACES:
        assert np.abs(examples.make_codec(name).signature.vector).max() < 10


def test_a_space_too_large_names_the_way_out():
    card = examples.make_card(examples.gs.Box(-1, 1, (300,)), examples.gs.Discrete(40))
    with pytest.raises(ConfigError, match=r"numeric=512 \(the model has 128\), choices=128"):
        ModelConfig().check_fits(Codec(card).bucket, card.id)
    with pytest.raises(spaces.SpaceError, match="numeric = 9000"):
        bucket_for(examples.gs.Box(-1, 1, (9000,)), examples.gs.Discrete(2))


def test_more_parts_than_the_model_has_are_refused_and_counted():
    # Grids take the table of parts from the front, texts from the back: one more would share a part.
    def bucket(grids, texts):
        kinds = {f"grid{i}": examples.gs.Box(0, 1, (8, 8, 1)) for i in range(grids)}
        space = examples.gs.Dict(kinds | {f"text{i}": examples.gs.Text(5) for i in range(texts)})
        return bucket_for(space, examples.gs.Discrete(2))

    cfg = dataclasses.replace(NANO, parts=5)
    for grids in range(6):
        cfg.check_fits(bucket(grids, 5 - grids), "test/Some-v0")
        with pytest.raises(ConfigError, match=r"test/Some-v0 needs parts=6 \(the model has 5\)"):
            cfg.check_fits(bucket(grids, 6 - grids), "test/Some-v0")
    assert SIZES["micro"].parts == 16


@pytest.mark.parametrize(("categories", "values"), [(64**2, 64), (64**2 + 1, 65), (10**6, 1000)])
def test_categories_that_two_digits_do_not_tell_apart_are_refused(categories, values):
    codec = Codec(examples.make_card(examples.gs.Discrete(categories), examples.gs.Discrete(2)))
    dataclasses.replace(NANO, values=values).check_fits(codec.bucket, "it", categories)
    small = dataclasses.replace(NANO, values=values - 1)
    with pytest.raises(ConfigError, match=rf"values={values} \(the model has {values - 1}\)"):
        acting.make_agent(small, codec, "greedy")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [name for name, value in vars(NANO).items() if type(value) in (int, float)])
def test_no_number_of_a_configuration_is_nan_or_infinite(name, bad):
    with pytest.raises(ConfigError, match=f"{name} is"):
        ModelConfig(**{name: bad})


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_sizes_of_numpy_are_plain_numbers(kind):
    cfg = ModelConfig(layers=kind(3), sigma_bins=np.float32(1.5), qk_norm=np.bool_(False), tokens_per_step=kind(2))
    assert cfg == ModelConfig(layers=3, sigma_bins=1.5, qk_norm=False, tokens_per_step=2)
    assert json.loads(json.dumps(dataclasses.asdict(cfg))) == dataclasses.asdict(cfg)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_differ_in_number_are_not_broadcast(model, params, rows):
    inputs = examples.random_example(examples.make_codec("vector"), 2, 1, seed=16).inputs
    with pytest.raises(ValueError, match=f"1 steps of 2 rows with a cache of {rows} rows"):
        jax.eval_shape(model.apply, params, {"rows": inputs}, model.init_cache(rows))
    with pytest.raises(AssertionError, match="shape"):
        fewer = inputs._replace(signature=jax.tree.map(lambda leaf: leaf[:1], inputs.signature))
        jax.eval_shape(model.apply, params, {"rows": fewer})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bins", 8, "8 bins with sigma_bins=2 leave none"),
        ("bins", 12, "expected more than 12 bins"),
        ("sigma_bins", 50.0, "expected more than 300 bins"),
        ("choices", 513**2, "expected at least 513 values"),
        ("width", 128.0, "width is 128.0, expected a whole number"),
        ("layers", True, "layers is True, expected a whole number"),
        ("qk_norm", 1, "qk_norm is 1, expected True or False"),
        ("rope_base", "10", "rope_base is '10', expected a number"),
        ("parts", 0, "parts is 0, expected a positive number"),
        ("layers", 0, "layers is 0"),
        ("heads", 3, "3 heads"),
        ("kv_heads", 3, "divisor"),
        ("dtype", "int8", "bfloat16"),
        ("remat", "x", "dots"),
        ("tokens_per_step", 3, "1 or 2"),
    ],
)
def test_bad_configurations_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        functools.partial(ModelConfig, **{field: value})()


def test_compiled_shapes_do_not_grow_with_the_number_of_environments():
    rng = np.random.default_rng(0)

    def space(most):
        kind = rng.integers(4)
        if kind == 0:
            return examples.gs.Box(-1, 1, (int(rng.integers(1, most)),))
        if kind == 1:
            return examples.gs.Discrete(int(rng.integers(2, most)))
        if kind == 2:
            return examples.gs.MultiDiscrete(rng.integers(2, 9, int(rng.integers(1, 5))))
        side = int(rng.integers(5, 16))
        return examples.gs.Box(0, 1, (side, side, int(rng.integers(1, 5))))

    def action_space(most):
        while True:
            drawn = space(most)
            if len(getattr(drawn, "shape", ())) < 3:
                return drawn

    buckets = [bucket_for(space(500), action_space(300)) for _ in range(1000)]
    few, many = len(set(buckets[:200])), len(set(buckets))
    assert many <= 200
    assert many < 2 * few, "five times the environments bring few new shapes"


def test_with_two_tokens_per_step_no_action_is_seen_before_it_is_predicted(params):
    cfg = dataclasses.replace(NANO, tokens_per_step=2)
    model = make_model(cfg)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, jax.eval_shape(model.init, jax.random.key(0)), params)
    assert jax.tree.all(same), "the two encodings have the same parameters"
    steps, t = 4 * WINDOW, 3 * WINDOW
    example = examples.random_example(examples.make_codec("continuous"), 1, steps, seed=13)

    def prediction(numeric, previous, reward):
        features = example.inputs.features
        previous = features.previous._replace(continuous=previous)
        features = features._replace(numeric=numeric, previous=previous, reward=reward)
        (output,) = model.apply(params, {"rows": example.inputs._replace(features=features)})[0].values()
        return jax.nn.log_softmax(output.bin_logits[0, t, 0])[3]

    features = example.inputs.features
    features = features._replace(has_previous=np.ones_like(features.has_previous))
    example = example._replace(inputs=example.inputs._replace(features=features))
    gradient = jax.jit(jax.grad(prediction, argnums=(0, 1, 2)))
    for influence in gradient(features.numeric, features.previous.continuous, features.reward):
        influence = np.abs(influence).reshape(steps, -1).sum(-1)
        # The action at t is `previous` at t + 1.
        assert (influence[t + 1 :] == 0).all()
        assert (influence[t - WINDOW + 1 : t + 1] > 0).all()
        assert (influence[: t - NANO.layers * WINDOW] == 0).all()


def test_two_tokens_per_step_train_and_do_not_act(params):
    cfg = dataclasses.replace(NANO, tokens_per_step=2)
    model, codec = make_model(cfg), examples.make_codec("vector")
    batch = {"rows": examples.random_example(codec, 2, 5, seed=14)}
    total, metrics = jax.jit(functools.partial(imitation_loss, model, cfg))(params, batch)
    assert np.isfinite(total) and metrics["rows"].weight.sum() == batch["rows"].targets.weight.sum()
    with pytest.raises(ConfigError, match="tokens_per_step=1 to act"):
        acting.make_agent(cfg, codec, "greedy")
    with pytest.raises(ConfigError, match="without a cache"):
        model.apply(params, {"rows": batch["rows"].inputs}, model.init_cache(2))


def test_waves_are_sine_and_cosine():
    turns = np.concatenate([np.linspace(-4, 4, 4001), [0.5, -0.5, 1e4 / 3, 1e6 + 0.25, 1e30]]).astype(np.float32)
    wave = encoders._wave(turns)
    turns = turns.astype(np.float64)
    angle = 2 * np.pi * (turns - np.round(turns))
    np.testing.assert_allclose(wave, (np.sin(angle), np.cos(angle)), atol=1e-6)


@pytest.mark.parametrize(("side", "size"), [(8, 1), (12, 1), (48, 3)])
def test_patches_that_a_stride_joins_lie_together(side, size):
    places = np.stack(np.meshgrid(*[np.arange(side)] * 2, indexing="ij"), -1)
    patches = np.asarray(encoders._in_blocks(places[None, None], size)[0, 0])
    assert len(np.unique(patches.reshape(-1, 2), axis=0)) == side * side
    for joined, wide in ((1, size), (4, 2 * size), (16, 4 * size)):
        blocks = patches.reshape(-1, joined * size * size, 2)
        corners = blocks.min(1)
        assert (blocks.max(1) - corners == wide - 1).all() and (corners % wide == 0).all()


def test_categories_are_encoded_alike_whichever_way_is_cheaper():
    encoder = encoders.CategoryEncoder(6, 32, NANO, nnx.Rngs(0))
    mask = np.tile(np.array([1, 1, 1, 1, 1, 0], np.float32), (3, 1))
    small = np.random.default_rng(0).integers(0, 16, (3, 8, 6)).astype(np.int32)
    large = small.copy()
    large[0, 0, 0] = 16  # one value more than fits makes all of them go the other way
    one, other = (np.asarray(encoder(index, mask)) for index in (small, large))
    np.testing.assert_allclose(one[1:], other[1:], rtol=1e-4, atol=1e-5)
    assert not np.allclose(one[0, 0], other[0, 0], atol=1e-3)

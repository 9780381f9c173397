"""Laws of the heads: their logits, their losses and the whole gradient against direct formulas in float64."""

import dataclasses
import functools

import examples
import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx
from gymnasium import spaces as gs

from ldm_jax.encoding.buckets import Bucket
from ldm_jax.encoding.codec import Codec
from ldm_jax.model.config import SIZES
from ldm_jax.model.heads import Head, bin_edges
from ldm_jax.model.network import Inputs, make_model
from ldm_jax.training import cost
from ldm_jax.training.loss import Example, draw_slots, imitation_loss
from ldm_jax.training.optimizer import TrainingConfig
from ldm_jax.training.step import loss_and_gradients, state_shapes

NANO = dataclasses.replace(SIZES["nano"], values=64)
MODEL = make_model(NANO)
APPLY = jax.jit(MODEL.apply)
LOSS = jax.jit(functools.partial(imitation_loss, MODEL, NANO))


@pytest.fixture(scope="module")
def params():
    return examples.random_params(MODEL)


@pytest.mark.parametrize(("tokens", "values"), [(1, 48), (40, 48), (40, 200)])
def test_slots_are_decoded_by_one_hidden_layer_on_token_plus_slot(tokens, values):
    # Few tokens and many values, or many tokens and few values: two ways through the same matrices.
    head = Head(dataclasses.replace(NANO, width=64, bins=values), nnx.Rngs(params=jax.random.key(0)))
    x = np.random.default_rng(0).normal(0, 1, (2, tokens, 64)).astype(np.float32)
    slots, kernel, first, second = (
        np.asarray(value[...], np.float64)
        for value in (head.continuous_slot, head.bins, head.hidden.kernel, head.out.kernel)
    )
    y = x[:, :, None].astype(np.float64) + slots[:5]
    bent = y @ first
    bent = 0.5 * bent * (1 + np.tanh(np.sqrt(2 / np.pi) * (bent + 0.044715 * bent**3)))
    expected = (y + bent @ second) @ kernel
    np.testing.assert_allclose(head._slots(x, head.continuous_slot[:5], head.bins[...]), expected, atol=1e-5)


def raw_stream(codec, steps, seed):
    """A stream with everything that may be stored of a reference: logits, means with scales, and an action mask."""
    arrays, rng, layout = examples.random_stream(codec, steps, seed), np.random.default_rng(seed), codec.action_layout
    if layout.flat_choices:
        allowed = rng.random((steps, layout.flat_choices)) < 0.6
        allowed[:, np.cumsum([0, *layout.sizes[:-1]])] = True
        arrays["action_mask"] = allowed
    if layout.continuous:
        arrays["reference/mean"] = rng.uniform(layout.low, layout.high, (steps, layout.continuous)).astype(np.float32)
        scale = rng.uniform(0, 0.3, (steps, layout.continuous)) * (layout.high - layout.low)
        arrays["reference/scale"] = (scale * (rng.random(scale.shape) < 0.5)).astype(np.float32)
    return arrays


def direct_loss(codec, arrays, choices, bins):
    """Sums over labelled steps of loss and entropy, from what is stored and the logits of one row."""
    layout, loss, entropy = codec.action_layout, 0.0, 0.0
    edges = bin_edges(NANO).astype(np.float64)
    for t in np.flatnonzero(arrays["label_mask"]):
        terms, offset = [], 0
        for slot, size in enumerate(layout.sizes):
            allowed = arrays["action_mask"][t, offset : offset + size]
            p = scipy.special.softmax(arrays["reference/logits"][t, offset : offset + size][allowed].astype(np.float64))
            terms.append((p, scipy.special.log_softmax(choices[t, slot, :size][allowed].astype(np.float64))))
            offset += size
        for slot in range(layout.continuous):
            half = (layout.high[slot] - layout.low[slot]) / 2
            mean = (arrays["reference/mean"][t, slot] - layout.low[slot]) / half - 1
            deviation = np.hypot(arrays["reference/scale"][t, slot] / half, NANO.sigma_bins * NANO.bin_width)
            cumulative = scipy.stats.norm(mean, deviation).cdf(edges)
            cumulative[0], cumulative[-1] = 0, 1  # what lies beyond the bins is in the outermost
            terms.append((np.diff(cumulative), scipy.special.log_softmax(bins[t, slot].astype(np.float64))))
        loss -= sum((p * log_q).sum() for p, log_q in terms) / len(terms)
        entropy += sum(scipy.special.entr(p).sum() for p, _ in terms) / len(terms)
    return loss, entropy


def test_the_loss_of_every_head_is_its_direct_formula(params):
    codecs = {name: examples.make_codec(name) for name in ("vector", "category", "continuous", "mixed", "grid")}
    streams = {name: [raw_stream(codec, 7, 10 + row) for row in range(2)] for name, codec in codecs.items()}
    batch = {}
    for name, codec in codecs.items():
        features, targets = examples.stack([codec.window(arrays) for arrays in streams[name]])
        batch[name] = Example(Inputs(features, examples.stack([codec.signature] * 2)), targets, np.zeros(2, np.int32))
    predictions = jax.device_get(APPLY(params, {name: example.inputs for name, example in batch.items()})[0])
    total, metrics = jax.device_get(LOSS(params, batch))
    whole, steps = 0.0, 0
    for name, codec in codecs.items():
        direct = [
            direct_loss(codec, arrays, predictions[name].choice_logits[row], predictions[name].bin_logits[row])
            for row, arrays in enumerate(streams[name])
        ]
        losses, entropies = np.array(direct).T
        np.testing.assert_allclose(metrics[name].loss, losses, rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(metrics[name].entropy, entropies, rtol=2e-4, atol=1e-4, err_msg=name)
        assert (metrics[name].loss > metrics[name].entropy).all()
        whole += losses.sum()
        steps += sum(arrays["label_mask"].sum() for arrays in streams[name])
    np.testing.assert_allclose(total, whole / steps, rtol=1e-5)


MANY = (gs.Box(-1, 1, (2,)), gs.Tuple([gs.MultiDiscrete([3] * 5), gs.Box(-1, 1, (5,))]))
"""Five slots of each kind, in a bucket of more."""


@functools.cache
def many_slots(rows):
    """Rows that all say the same."""
    example = examples.random_example(Codec(examples.make_card(*MANY)), 1, 16, seed=3)
    return jax.tree.map(lambda leaf: np.repeat(leaf, rows, 0), example)


@pytest.mark.parametrize("most", [2, 3])
def test_drawn_slots_go_round_evenly_and_are_never_padding(most):
    rows, slots = 200, 5
    drawn = draw_slots(jax.random.key(1), {"rows": many_slots(rows)}, most)["rows"].inputs.drawn
    for places in map(np.asarray, drawn):
        assert places.shape == (rows, 2, most)
        assert places.min() == 0
        assert places.max() == slots - 1
        # One after the other, on through the runs of steps, and from the last to the first.
        assert ((np.diff(places.reshape(rows, -1), axis=1) % slots) == 1).all()
        counts = np.bincount(places[:, 0, 0], minlength=slots)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert (drawn.choices != drawn.numbers).any()


def test_the_loss_of_drawn_slots_is_that_of_all_in_the_mean_over_the_draws(params):
    gradient = jax.jit(jax.value_and_grad(functools.partial(imitation_loss, MODEL, NANO), has_aux=True))
    (whole, _), whole_gradient = gradient(params, {"rows": many_slots(5)})
    drawn = draw_slots(jax.random.key(0), {"rows": many_slots(64)}, 2)["rows"].inputs.drawn
    # Rows that begin at each of the five places in turn; the two kinds do not touch each other.
    begins = [np.unique(np.asarray(places[:, 0, 0]), return_index=True)[1] for places in drawn]
    every = type(drawn)(*(places[rows] for places, rows in zip(drawn, begins, strict=True)))
    example = many_slots(5)
    (mean, rows), mean_gradient = gradient(
        params, {"rows": example._replace(inputs=example.inputs._replace(drawn=every))}
    )
    assert np.ptp(rows["rows"].loss) > 1e-2 * mean  # each draw alone is another
    np.testing.assert_allclose(mean, whole, rtol=1e-5)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(mean_gradient), jax.tree.leaves(whole_gradient), strict=True
    ):
        error = np.linalg.norm(one - other)
        assert error <= 2e-4 * np.linalg.norm(other) + 1e-7, jax.tree_util.keystr(path)


def test_where_all_slots_can_be_drawn_the_loss_is_that_of_all(params):
    whole, drawn = many_slots(2), draw_slots(jax.random.key(0), {"rows": many_slots(2)}, 6)["rows"]
    assert drawn.inputs.drawn.numbers.shape[-1] == 6  # of eight
    (one, metrics), (other, expected) = (LOSS(params, {"rows": each}) for each in (drawn, whole))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), metrics["rows"], expected["rows"])
    no_more = draw_slots(jax.random.key(0), {"rows": whole}, 320)["rows"]
    assert jax.tree.structure(no_more) == jax.tree.structure(whole)  # the same program, to the last bit


def test_a_training_step_costs_hardly_more_with_hundreds_of_slots():
    cfg, training = SIZES["micro"], TrainingConfig()
    model = make_model(cfg)
    state = state_shapes(model, training)

    def work(slots):
        bucket = Bucket(numeric=8, categorical=0, grids=(), texts=(), choice_slots=0, choices=0, continuous_slots=slots)
        step = functools.partial(loss_and_gradients, model, cfg, training)
        return cost.count_matrix_flops(step, state, {"rows": cost.example_shapes(bucket, 8, 64)})

    # The previous action has a row of a table for each slot.
    assert work(8) < work(320) < 1.1 * work(8)

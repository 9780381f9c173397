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

from ldm_jax.model.config import SIZES
from ldm_jax.model.heads import Head, bin_edges
from ldm_jax.model.network import Inputs, make_model
from ldm_jax.training.loss import Example, imitation_loss

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

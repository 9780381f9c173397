"""Laws of what a policy remembers: exact however long it lives, read where it lies and written in place."""

import dataclasses
import functools

import examples
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from ldm_jax import acting
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.model.decoder import rotate, rotation
from ldm_jax.model.heads import Predictions
from ldm_jax.model.network import make_model

NANO = dataclasses.replace(SIZES["nano"], values=64)
BASE, WIDTH = 10_000.0, 16


@jax.jit
def product(query, key, position, distance):
    """Of a query and a key that is `distance` steps older, both rotated."""
    one, other = (
        rotate(x[None, None, None], rotation(at[None, None], WIDTH, BASE))
        for x, at in ((query, position + distance), (key, position))
    )
    return (one * other).sum()


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(position=st.integers(0, 2**32 - 1), distance=st.integers(0, 4096), seed=st.integers(0, 9))
def test_two_steps_are_rotated_against_each_other_by_their_distance_alone(position, distance, seed):
    query, key = np.random.default_rng(seed).normal(0, 1, (2, WIDTH)).astype(np.float32)
    # As one complex number for each pair, in float64.
    one, other = (x[: WIDTH // 2] + 1j * x[WIDTH // 2 :].astype(np.float64) for x in (query, key))
    angle = distance * BASE ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    wanted = (one * np.exp(1j * angle) * other.conj()).real.sum()
    np.testing.assert_allclose(product(query, key, np.uint32(position), np.uint32(distance)), wanted, atol=2e-5)


def test_after_millions_of_steps_a_policy_acts_as_in_one_forward_pass_over_the_last():
    # A window that does not divide 2^32, so that slots and positions go round at different steps.
    cfg = dataclasses.replace(NANO, window=7)
    starts, steps, reach = (10_000_000, 2**31 - 20, 2**32 - 20), 4 * cfg.window, cfg.layers * (cfg.window - 1)
    assert reach < 2 * cfg.window
    model, rng = make_model(cfg), np.random.default_rng(0)
    params, apply = examples.random_params(model), jax.jit(model.apply)
    example = examples.random_example(examples.make_codec("vector"), len(starts), steps, seed=1)
    # What such rows remember of the steps before is as good as random.
    cache = jax.tree.map(lambda leaf: rng.normal(0, 1, leaf.shape).astype(leaf.dtype), model.init_cache(len(starts)))
    cache = cache._replace(
        length=np.full(len(starts), cfg.window, np.int32),
        slot=np.array([start % cfg.window for start in starts], np.int32),
        position=np.array(starts, np.uint32),
    )
    decoded = []
    for t in range(steps):
        features = jax.tree.map(lambda leaf, t=t: leaf[:, t : t + 1], example.inputs.features)
        predictions, cache = apply(params, {"rows": example.inputs._replace(features=features)}, cache)
        decoded.append(jax.nn.softmax(predictions["rows"].choice_logits))
    assert cache.position.tolist() == [(start + steps) % 2**32 for start in starts]
    whole, _ = apply(params, {"rows": example.inputs})
    wanted = jax.nn.softmax(whole["rows"].choice_logits)
    np.testing.assert_allclose(np.concatenate(decoded, 1)[:, reach:], wanted[:, reach:], atol=2e-5)
    assert np.abs(np.concatenate(decoded, 1) - wanted)[:, 0].max() > 1e-4, "the steps before have no part in it"


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.size]


def test_what_is_remembered_is_donated_and_written_in_place():
    cfg = dataclasses.replace(NANO, window=512)
    codec, rows = examples.make_codec("vector"), 4
    agent, params = acting.make_agent(cfg, codec, "sample"), examples.random_params(make_model(cfg))
    stream = {name: leaf[None].repeat(rows, 0) for name, leaf in examples.random_stream(codec, 1, seed=0).items()}
    timestep = examples.timestep_at(codec, stream, 0)

    @functools.partial(jax.jit, donate_argnums=0)
    def play(state, params):
        def step(state, t):
            state, action, _ = agent.step(params, state, timestep, jax.random.fold_in(jax.random.key(0), t))
            return state, action

        return jax.lax.scan(step, state, jnp.arange(3))

    state = agent.init(rows)
    before, size = pointers(state), sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert len(set(before)) == len(before), "what shares memory cannot be donated"
    program = play.lower(state, params).compile()
    assert program.memory_analysis().temp_size_in_bytes < size / 4, "something as large as the cache is copied"
    after, _ = program(state, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert pointers(after.cache[:2]) == before[: 2 * cfg.layers]
    assert after.cache.length.tolist() == [3] * rows


# Taking actions


DECODE = jax.jit(acting.decode, static_argnames=("cfg", "decoding"))
ROWS = 4000


def draw(predictions, key, temperature=1.0):
    return DECODE(NANO, predictions, "sample", key, temperature)


def some_predictions():
    """As many rows of the same distributions, one slot each."""
    probabilities = np.array([0.1, 0.7, 0.2], np.float32)
    bins = np.random.default_rng(0).normal(0, 1, NANO.bins).astype(np.float32)
    return Predictions(*(np.tile(logits, (ROWS, 1, 1)) for logits in (np.log(probabilities), bins)))


def test_what_a_row_draws_depends_on_its_key_and_on_no_other_row():
    rng, key = np.random.default_rng(1), jax.random.key(0)
    predictions = jax.tree.map(lambda leaf: leaf + rng.normal(0, 1, leaf.shape).astype(np.float32), some_predictions())
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(ROWS))
    drawn, order = draw(predictions, keys), rng.permutation(ROWS)
    moved = draw(jax.tree.map(lambda leaf: leaf[order], predictions), keys[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), drawn, moved)
    # One key for all is folded with the number of each row.
    jax.tree.map(np.testing.assert_array_equal, drawn, draw(predictions, key))


@pytest.mark.parametrize("temperature", [1e-6, 0.5, 1.0, 2.0])
def test_a_temperature_flattens_or_sharpens_what_is_drawn(temperature):
    predictions = some_predictions()
    drawn = draw(predictions, jax.random.key(1), temperature)
    logits = predictions.choice_logits[0, 0].astype(np.float64)
    wanted = np.exp((logits - logits.max()) / temperature)
    np.testing.assert_allclose(
        np.bincount(drawn.categorical[:, 0], minlength=3) / ROWS, wanted / wanted.sum(), atol=0.03
    )
    assert (len(np.unique(drawn.continuous)) == 1) == (temperature == 1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_is_a_positive_number(temperature):
    with pytest.raises(ConfigError, match=r"temperature is .*, expected a positive number"):
        acting.make_agent(NANO, examples.make_codec("vector"), "sample", temperature)

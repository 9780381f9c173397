"""Laws of the objective, the training step, checkpoints and saved policies."""

import collections
import copy
import dataclasses
import functools
import itertools
import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import warnings

import chex
import examples
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from compiling import compilations
from optax import contrib

import ldm_jax
from ldm_jax import acting, policy, training
from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.codec import Targets
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.model.heads import Predictions, bin_centers, bin_edges, bin_probabilities
from ldm_jax.model.network import make_model
from ldm_jax.training import checkpoints, cost, diagnosis, muon
from ldm_jax.training.loss import drop_previous_actions, imitation_loss
from ldm_jax.training.optimizer import is_matrix, make_optimizer, make_schedule
from ldm_jax.types import TimeStep

pytestmark = pytest.mark.usefixtures("in_haste")

NANO = dataclasses.replace(SIZES["nano"], values=64)
MODEL = make_model(NANO)
# Compiled as a whole: one by one, their many small operations take longer.
INIT, APPLY = jax.jit(MODEL.init), jax.jit(MODEL.apply)
LOSS = jax.jit(functools.partial(imitation_loss, MODEL, NANO))
GRADIENT = jax.jit(jax.value_and_grad(functools.partial(imitation_loss, MODEL, NANO), has_aux=True))
NAMES = ["vector", "continuous"]
CONFIG = training.TrainingConfig(steps=12, warmup=2)
PARAMETERS = INIT(jax.random.key(0))


def batches(start=0):
    """An endless stream of batches, each a function of its number."""
    while True:
        yield examples.random_batch(NAMES, 2, 6, seed=start)
        start += 1


@pytest.fixture(scope="module")
def train_step():
    return training.make_train_step(MODEL, NANO, CONFIG)


def equal(one, two):
    """Whether two pytrees are bitwise equal."""

    def same(a, b):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()

    return jax.tree.all(jax.tree.map(same, one, two))


def run(train_step, state, steps):
    """Trains from a state up to a step."""
    seen = []
    for done, newest, metrics in training.train(train_step, state, batches(int(state.step)), steps):
        state = newest
        seen.append((done, metrics))
    return state, seen


def test_resume_equals_a_straight_run_bitwise(train_step, tmp_path):
    straight, seen = run(train_step, training.init_state(MODEL, CONFIG), 8)
    assert [done for done, _ in seen] == list(range(1, 9))
    half, _ = run(train_step, training.init_state(MODEL, CONFIG), 3)
    with checkpoints.Checkpoints(tmp_path / "run", {"a": 1}) as saved:
        assert saved.restore(half) is None
        saved.save(half)
    with checkpoints.Checkpoints(tmp_path / "run", {"a": 1}) as saved:
        assert saved.latest == 3
        restored = saved.restore(jax.eval_shape(lambda: training.init_state(MODEL, CONFIG)))
    with compilations() as compiled:
        resumed, _ = run(train_step, restored, 8)
    assert equal(straight, resumed)
    assert not [line for line in compiled if "train_step" in line], "a resumed state compiled the step anew"


def test_a_second_step_traces_nothing(monkeypatch):
    traced = chex.assert_max_traces(training.loss_and_gradients, n=1)
    monkeypatch.setattr("ldm_jax.training.step.loss_and_gradients", traced)
    run(training.make_train_step(MODEL, NANO, CONFIG), training.init_state(MODEL, CONFIG), 3)


def test_training_learns_and_reports(train_step):
    batch = examples.random_batch(NAMES, 4, 6, seed=0)
    cfg = dataclasses.replace(CONFIG, steps=60)
    step, state, losses = training.make_train_step(MODEL, NANO, cfg), training.init_state(MODEL, cfg), []
    for _, _, metrics in training.train(step, state, (batch for _ in range(60)), 60):
        losses.append(metrics.kl)
        assert set(metrics.kl_by_environment) == {0, 1}
        assert metrics.useful_tokens == sum(e.targets.weight.sum() for e in batch.values())
    assert losses[-1] < 0.5 * losses[0]
    assert min(losses) >= -1e-4, "the excess loss is never negative"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_seed_decides_the_parameters(optimizer):
    cfg = dataclasses.replace(CONFIG, optimizer=optimizer, steps=3)
    runs = [run(training.make_train_step(MODEL, NANO, c), training.init_state(MODEL, c), 3)[0] for c in (cfg, cfg)]
    assert equal(*runs)
    other = training.init_state(MODEL, dataclasses.replace(cfg, seed=1))
    assert not equal(runs[0].params, other.params)


def test_too_little_memory_names_the_ways_out():
    state = training.state_shapes(make_model(SIZES["308m"]), dataclasses.replace(CONFIG, optimizer="adamw"))
    cost.check_state_fits(state, 8 << 30)
    with pytest.raises(ConfigError, match=r"take 6\.1 GB on each device, which has 4\.3 GB: split them .* along fsdp"):
        cost.check_state_fits(state, 4 << 30)

    def greedy_step(state, batch):
        return jnp.zeros(1 << 56, jnp.uint8), None

    with pytest.raises(training.TrainingError, match=r"not enough memory for a step: .*accumulation.*remat='full'"):
        list(training.train(greedy_step, state._replace(step=np.int32(0)), [{}], 1))


def test_a_step_that_is_not_finite_changes_nothing_and_stops_the_run(train_step):
    good = list(itertools.islice(batches(), 6))
    name = max(good[2])
    numeric = good[2][name].inputs.features.numeric.copy()
    numeric[1, 3] = np.inf
    features = good[2][name].inputs.features._replace(numeric=numeric)
    bad = good[2] | {name: good[2][name]._replace(inputs=good[2][name].inputs._replace(features=features))}
    todo = [*good[:2], bad, *good[3:]]
    expected, _ = run(train_step, training.init_state(MODEL, CONFIG), 2)
    for paused in (1, 6):  # steps after it were under way already, and left all as it was
        with pytest.raises(training.NotFiniteError, match="at step 3") as caught:
            start = training.init_state(MODEL, CONFIG)
            steps = training.train(train_step, start, todo, 6, pause=lambda step, paused=paused: step % paused == 0)
            collections.deque(steps, 0)
        assert equal(caught.value.state, expected) and caught.value.step == 3
    found = diagnosis.diagnose(MODEL, NANO, CONFIG, expected, bad)
    assert found.leaves == [f"{name}/inputs/features/numeric"] and not found.parameters
    assert [(bucket, row) for bucket, row, _ in found.rows] == [(name, 1)]
    assert not np.isfinite(found.loss) and "tokens/numeric" in found.gradients and found.updates


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_that_would_not_be_finite_are_never_kept(optimizer):
    # The loss and its gradient are finite: it is the step that is too long.
    cfg = dataclasses.replace(CONFIG, optimizer=optimizer, warmup=0, learning_rate=1e30, weight_decay=1e30)
    step, state = training.make_train_step(MODEL, NANO, cfg), training.init_state(MODEL, cfg)
    expected = training.init_state(MODEL, cfg)
    with pytest.raises(training.NotFiniteError, match="at step 1") as caught:
        collections.deque(training.train(step, state, batches(), 4, pause=lambda step: step == 4), 0)
    assert equal(caught.value.state, expected)
    found = diagnosis.diagnose(MODEL, NANO, cfg, expected, next(batches()))
    assert np.isfinite(found.loss) and np.isfinite(found.gradient_norm) and not found.gradients
    assert found.updates and all("kernel" in name for name in found.updates)


def test_step_state_and_metrics_agree_at_every_pause(train_step):
    alone, asked, seen = dict(run(train_step, training.init_state(MODEL, CONFIG), 8)[1]), [], {}

    def pause(step):
        asked.append(step)
        return step % 3 == 0

    for step, state, metrics in training.train(
        train_step, training.init_state(MODEL, CONFIG), batches(), 8, pause=pause
    ):
        assert int(state.step) == step
        seen[step] = metrics
    assert asked == list(range(1, 9)), "asked once of every step, the last one too"
    assert seen == {step: alone[step] for step in (3, 6, 8)}


@hypothesis.given(hypothesis.strategies.data())
@hypothesis.settings(max_examples=12, deadline=None)
def test_nothing_in_a_place_without_a_label_reaches_loss_or_gradient(data):
    batch = examples.random_batch(["mixed", "continuous"], 2, 6, seed=data.draw(hypothesis.strategies.integers(0, 9)))
    poison = data.draw(hypothesis.strategies.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
    fields = data.draw(
        hypothesis.strategies.sets(
            hypothesis.strategies.sampled_from(["probabilities", "mean", "scale", "changed"]), min_size=1
        )
    )

    def poisoned(example):
        signature, targets = example.inputs.signature, example.targets
        steps = targets.weight > 0
        choices = (signature.choice_mask & (signature.choice_slots > 0)[..., None])[:, None] & steps[..., None, None]
        numbers = (signature.continuous_slots > 0)[:, None] & steps[..., None]
        real = {"probabilities": choices, "mean": numbers, "scale": numbers, "changed": steps}
        changed = {name: np.where(real[name], getattr(targets, name), np.float32(poison)) for name in fields}
        return example._replace(targets=targets._replace(**changed))

    results = [GRADIENT(PARAMETERS, each) for each in (batch, {name: poisoned(each) for name, each in batch.items()})]
    assert equal(*results)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (lambda: jax.enable_x64(True), "jax_enable_x64 was False there and is True now"),
        (lambda: jax.default_matmul_precision("highest"), "jax_default_matmul_precision was None there and is highest"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_their_names(tmp_path, setting, name):
    with checkpoints.Checkpoints(tmp_path, {"a": 1}) as saved:
        saved.save(training.init_state(MODEL, CONFIG))
    with setting(), checkpoints.Checkpoints(tmp_path, {"a": 1}) as saved:
        with pytest.raises(checkpoints.CheckpointError, match=name) as caught:
            saved.restore(training.state_shapes(MODEL, CONFIG))
        assert "remove" not in str(caught.value) and "damaged" not in str(caught.value)


def test_a_run_draws_the_same_whatever_kind_of_keys_is_the_default(train_step, tmp_path):
    straight, _ = run(train_step, training.init_state(MODEL, CONFIG), 4)
    half, _ = run(train_step, training.init_state(MODEL, CONFIG), 2)
    with checkpoints.Checkpoints(tmp_path, {}) as saved:
        saved.save(half)
    with jax.default_prng_impl("rbg"), checkpoints.Checkpoints(tmp_path, {}) as saved:
        assert equal(training.init_state(MODEL, CONFIG), jax.device_get(training.init_state(MODEL, CONFIG)))
        restored = saved.restore(training.state_shapes(MODEL, CONFIG))
    assert equal(run(train_step, restored, 4)[0], straight)


def test_matrices_are_moved_as_by_optax_one_after_the_other():
    rng = np.random.default_rng(0)
    shapes = {"square": (2, 8, 8), "wide": (8, 24), "tall": (3, 2, 24, 8), "other": (4, 8)}

    def draw():
        return {name: jnp.asarray(rng.normal(0, 1e-3, shape), jnp.float32) for name, shape in shapes.items()}

    numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    theirs = contrib.muon(-1.0, muon_weight_dimension_numbers=dict.fromkeys(shapes, numbers))
    ours, params = muon.scale_by_muon(), draw()
    updates, their_updates = jax.jit(ours.update), jax.jit(theirs.update)
    state, their_state = ours.init(params), theirs.init(params)
    for _ in range(2):
        gradients = draw()
        moved, state = updates(gradients, state)
        wanted, their_state = their_updates(gradients, their_state, params)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), moved, wanted)


def test_states_and_configurations_are_pickled_and_copied(train_step):
    for optimizer in ("adamw", "muon"):
        cfg = dataclasses.replace(CONFIG, optimizer=optimizer)
        assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == cfg
        state = training.init_state(MODEL, cfg)
        if optimizer == CONFIG.optimizer:
            state, _ = run(train_step, state, 2)
        for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
            assert jax.tree.structure(other) == jax.tree.structure(state) and equal(other, state)


def test_a_batch_in_pieces_has_the_loss_and_gradient_of_the_whole():
    pieces = 2
    batch = examples.random_batch(NAMES, 4, 6, seed=1)
    # pieces with very different numbers of labels
    for i, (name, example) in enumerate(sorted(batch.items())):
        weight = example.targets.weight * (np.arange(4) % 2 >= i)[:, None]
        batch[name] = example._replace(targets=example.targets._replace(weight=weight))
    state = training.init_state(MODEL, CONFIG)
    results = []
    for count in (1, pieces):
        cfg = dataclasses.replace(CONFIG, accumulation=count)
        function = jax.jit(functools.partial(training.loss_and_gradients, MODEL, NANO, cfg))
        results.append(jax.device_get(function(state, batch)))
    ((loss, rows), gradients), ((loss_2, rows_2), gradients_2) = results
    np.testing.assert_allclose(loss_2, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6), rows, rows_2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6), gradients, gradients_2)


def test_the_state_is_donated(train_step):
    state, batch = training.init_state(MODEL, CONFIG), next(batches())
    before = jax.tree.leaves((state.params, state.optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of donated memory that it has no use for
        text = train_step.lower(state, batch).as_text()
    assert text.count("tf.aliasing_output") >= len(before), "a part of the state is copied at every step"
    train_step(state, batch)
    assert all(leaf.is_deleted() for leaf in before)


def test_a_step_is_waited_for_only_when_the_next_is_under_way(train_step, monkeypatch):
    events, wait = [], jax.block_until_ready

    def recorded(state, batch):
        events.append(("dispatched", len([e for e in events if e[0] == "dispatched"]) + 1))
        return train_step(state, batch)

    def waited(metrics):
        events.append(("waited", len([e for e in events if e[0] == "waited"]) + 1))
        return wait(metrics)

    monkeypatch.setattr(jax, "block_until_ready", waited)
    state = training.init_state(MODEL, CONFIG)
    for done, _, _ in training.train(recorded, state, batches(), 10, pause=lambda step: step == 4):
        events.append(("read", done))
        if done == 4:
            break
    assert events == [
        ("dispatched", 1),
        *[event for step in (2, 3) for event in (("dispatched", step), ("waited", step - 1))],
        ("dispatched", 4),
        ("read", 4),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_moments_are_float32_whatever_is_computed_in(dtype):
    cfg = dataclasses.replace(NANO, dtype=dtype)
    model, batch = make_model(cfg), next(batches())
    state = training.state_shapes(model, CONFIG)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    step = functools.partial(training.loss_and_gradients, model, cfg, CONFIG)
    text = str(jax.make_jaxpr(step)(state, batch))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", text)
    assert products and (products.count("bf16") > len(products) // 2) == (dtype == "bfloat16")


def test_the_loss_against_a_direct_formula():
    codec = examples.make_codec("category")
    example = examples.random_example(codec, 2, 5, seed=3)
    params = INIT(jax.random.key(0))
    total, metrics = LOSS(params, {"rows": example})
    logits = np.asarray(APPLY(params, {"rows": example.inputs})[0]["rows"].choice_logits, np.float64)
    expected, entropy, count = 0.0, 0.0, 0
    for row, t in np.argwhere(example.targets.weight > 0):
        for slot, size in enumerate((2, 5)):
            p = example.targets.probabilities[row, t, slot, :size].astype(np.float64)
            log_q = logits[row, t, slot, :size] - np.log(np.exp(logits[row, t, slot, :size]).sum())
            expected -= (p * log_q).sum() / 2
            entropy -= (p * np.log(p)).sum() / 2
        count += 1
    np.testing.assert_allclose(total, expected / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["rows"].entropy.sum(), entropy, rtol=1e-4)


def test_the_last_step_of_an_episode_is_not_learned():
    codec = examples.make_codec("vector")
    example = examples.random_example(codec, 2, 8, seed=4)
    ends = example.inputs.features.flags[..., :2].any(-1)
    assert ends.any()
    changed = example.targets.probabilities.copy()
    changed[ends] = np.roll(changed[ends], 1, -1)
    params = INIT(jax.random.key(0))
    losses = [
        LOSS(params, {"rows": e})[0]
        for e in (example, example._replace(targets=example.targets._replace(probabilities=changed)))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mean", [-1.0, -0.99, 0.0, 0.3137, 1.0])
def test_a_continuous_label_survives_its_bins_at_the_edges_too(mean):
    target = np.asarray(bin_probabilities(NANO, np.float32(mean), np.float32(0.0)))
    np.testing.assert_allclose(target.sum(), 1, atol=1e-5)
    assert (target >= 0).all()
    decoded = np.clip(target @ bin_centers(NANO), -1, 1)
    assert abs(decoded - mean) < NANO.bin_width / 2
    assert abs(bin_centers(NANO)[target.argmax()] - mean) <= NANO.bin_width / 2 + 1e-5


def test_bins_follow_the_gaussian():
    edges = bin_edges(NANO).astype(np.float64)
    sigma = np.sqrt(0.25**2 + (NANO.sigma_bins * NANO.bin_width) ** 2)
    cumulative = scipy.stats.norm(0.2, sigma).cdf(edges)
    cumulative[0], cumulative[-1] = 0, 1
    target = bin_probabilities(NANO, np.float32(0.2), np.float32(0.25))
    np.testing.assert_allclose(target, np.diff(cumulative), atol=1e-5)


def test_previous_actions_are_hidden_in_whole_rows():
    example = examples.random_example(examples.make_codec("vector"), 64, 5, seed=5)
    dropped = drop_previous_actions(jax.random.key(0), {"rows": example}, 0.25)["rows"]
    before, after = example.inputs.features.has_previous, np.asarray(dropped.inputs.features.has_previous)
    hidden = (after == 0).all(1)
    assert 4 < hidden.sum() < 32
    np.testing.assert_array_equal(after[~hidden], before[~hidden])


def test_decoding_modes():
    choices = np.log(np.array([[[0.1, 0.7, 0.2]]], np.float32))
    bins = np.asarray(np.log(np.maximum(bin_probabilities(NANO, np.array([[0.5]]), np.array([[0.1]])), 1e-20)))
    predictions = Predictions(np.tile(choices, (2000, 1, 1)), np.tile(bins, (2000, 1, 1)))
    key = jax.random.key(0)
    greedy: Slots = acting.decode(NANO, predictions, "greedy", key)
    assert (greedy.categorical == 1).all()
    np.testing.assert_allclose(greedy.continuous, 0.5, atol=1e-3)
    np.testing.assert_allclose(acting.decode(NANO, predictions, "mode", key).continuous, 0.5, atol=NANO.bin_width)
    sampled = acting.decode(NANO, predictions, "sample", key)
    np.testing.assert_allclose(np.bincount(sampled.categorical[:, 0]) / 2000, [0.1, 0.7, 0.2], atol=0.04)
    assert 0.08 < sampled.continuous.std() < 0.16


@pytest.mark.parametrize("name", examples.SPACES)
def test_agents_act_within_the_space_and_forget(name):
    codec = examples.make_codec(name)
    agent = acting.make_agent(NANO, codec, "sample")
    params, memory = INIT(jax.random.key(0)), agent.init(3)
    observation = examples.random_tree(codec.card.observation_space, (3,), np.random.default_rng(0))
    no = np.zeros(3, bool)
    timestep = TimeStep(observation=observation, reward=np.zeros(3, np.float32), terminated=no, truncated=no, first=no)
    step = jax.jit(chex.assert_max_traces(lambda *arguments: agent.step(*arguments), n=1))
    for t in range(3):
        memory, action, _ = step(params, memory, timestep, jax.random.key(t))
        assert ldm_jax.spaces.check(codec.card.action_space, jax.tree.map(np.asarray, action), 3, "the action") == 0
    memory = acting.forget(memory, np.array([True, False, True]))
    assert memory.cache.length.tolist() == [0, 3, 0]


def test_a_saved_policy_acts_as_before(tmp_path):
    card = examples.make_codec("vector").card
    original = policy.Policy(NANO, INIT(jax.random.key(0)), {card.id: card}, "sample")
    original.save(tmp_path / "policy")
    original.save(tmp_path / "policy")  # replaces it
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    loaded = ldm_jax.load(tmp_path / "policy")
    assert loaded.cfg == NANO and loaded.cards == original.cards and loaded.decoding == "sample"
    assert equal(loaded.params, original.params)
    agent = loaded.agent(card.id)
    assert agent.init(2).cache.length.shape == (2,)
    with pytest.raises(policy.PolicyError, match="it has test/vector"):
        loaded.agent("test/vektor")
    with pytest.raises(ConfigError, match="greedy, mode, sample"):
        loaded.agent(card, "best")


def test_damaged_and_foreign_policies_are_refused(tmp_path):
    card = examples.make_codec("vector").card
    policy.Policy(NANO, INIT(jax.random.key(0)), {card.id: card}).save(tmp_path / "policy")
    with pytest.raises(policy.PolicyError, match="holds no policy"):
        ldm_jax.load(tmp_path)
    with pytest.raises(policy.PolicyError, match="exists and holds no policy"):
        policy.Policy(NANO, {}, {}).save(tmp_path)
    path = tmp_path / "policy" / "policy.json"
    description = json.loads(path.read_text())
    for change, message in (
        ({"schema": 99}, "schema 99"),
        ({"model": description["model"] | {"depth": 3}}, "another version"),
        (
            {"model": description["model"] | {"width": 64}},
            r"blocks/down/kernel was float32\[2, 64, 32\] there and is float32\[2, 64, 64\] now",
        ),
    ):
        path.write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match=message):
            ldm_jax.load(tmp_path / "policy")
    path.write_text('{"schema": 1, ')
    with pytest.raises(policy.PolicyError, match="damaged"):
        ldm_jax.load(tmp_path / "policy")


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(train_step, tmp_path):
    state = training.init_state(MODEL, CONFIG)
    with checkpoints.Checkpoints(tmp_path, {"model": dataclasses.asdict(NANO), "steps": 5}) as saved:
        saved.save(state)
    wider = dataclasses.asdict(dataclasses.replace(NANO, width=64))
    with (
        checkpoints.Checkpoints(tmp_path, {"model": wider, "steps": 5}) as saved,
        pytest.raises(checkpoints.CheckpointError, match=r"model\.width was 32 there and is 64 now"),
    ):
        saved.restore(state)


def test_a_damaged_checkpoint_says_so(tmp_path):
    state = training.init_state(MODEL, CONFIG)
    with checkpoints.Checkpoints(tmp_path, {"a": 1}) as saved:
        saved.save(state)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:
            path.write_bytes(path.read_bytes()[:100])
    with (
        checkpoints.Checkpoints(tmp_path, {"a": 1}) as saved,
        pytest.raises(checkpoints.CheckpointError, match="damaged") as caught,
    ):
        saved.restore(state)
    assert "remove" not in str(caught.value) and "\n" not in str(caught.value)


_KILLED = """
import itertools, sys, jax
sys.path.insert(0, {tests!r})
import test_training as t
from ldm_jax import training
from ldm_jax.training import checkpoints
state = training.init_state(t.MODEL, t.CONFIG)
with checkpoints.Checkpoints(sys.argv[1], {{"a": 1}}) as saved:
    for step in itertools.count(1):
        saved.save(state._replace(step=jax.numpy.asarray(step)))
        sys.stdout.write(f"{{step}}\\n")
        sys.stdout.flush()
"""


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path, monkeypatch):
    state = training.init_state(MODEL, CONFIG)
    with checkpoints.Checkpoints(tmp_path, {}) as saved:
        saved.save(state)
        saved.wait()
        total, used, _ = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: (total, used, 1000))
        with pytest.raises(checkpoints.CheckpointError, match=r"it takes \d+\.\d MB, .* has room for 0\.0 MB"):
            saved.save(state._replace(step=state.step + 1))
        assert saved.steps == [0] and [path.name for path in tmp_path.iterdir()] == ["0"]


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    script = _KILLED.format(tests=str(pathlib.Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            step = int(process.stdout.readline())
        process.kill()
    with checkpoints.Checkpoints(tmp_path, {"a": 1}) as saved:
        assert saved.latest >= step - 1, "the one before the last is complete when the last begins"
        restored = saved.restore(training.init_state(MODEL, CONFIG))
    assert equal(restored.params, training.init_state(MODEL, CONFIG).params)


PARAMS = {
    "down": {"kernel": np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 6, 4)},
    "norm": {"scale": np.ones(4, np.float32)},
    "head": {"bins": np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)},
}


def optimized(cfg, gradients):
    """Parameters and optimizer state after a step from `PARAMS`."""

    @jax.jit
    def step(params, gradients):
        optimizer = make_optimizer(cfg)
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    return step(PARAMS, gradients)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_alone_decay(optimizer):
    cfg = dataclasses.replace(CONFIG, optimizer=optimizer, warmup=0)
    after, _ = optimized(cfg, jax.tree.map(np.zeros_like, PARAMS))
    shrunk = PARAMS["down"]["kernel"] * (1 - cfg.learning_rate * cfg.weight_decay)
    np.testing.assert_allclose(after["down"]["kernel"], shrunk, rtol=1e-5)
    for part, name in (("norm", "scale"), ("head", "bins")):
        np.testing.assert_array_equal(after[part][name], PARAMS[part][name])
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    decayed = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes) if is_matrix(path)}
    assert decayed == {"kernel"}


def test_gradients_are_clipped_by_their_global_norm():
    cfg = dataclasses.replace(CONFIG, optimizer="adamw", clip_norm=0.5)
    _, state = optimized(cfg, jax.tree.map(lambda leaf: 100 * leaf, PARAMS))
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(optax.global_norm(moments), (1 - 0.9) * 0.5, rtol=1e-4)


def test_schedules():
    cosine = make_schedule(dataclasses.replace(CONFIG, steps=100, warmup=10), 2.0)
    np.testing.assert_allclose([cosine(t) for t in (0, 5, 10, 55, 100)], [0, 1, 2, 1.1, 0.2], atol=1e-6)
    wsd = make_schedule(dataclasses.replace(CONFIG, steps=100, warmup=10, schedule="wsd", decay=0.25), 2.0)
    np.testing.assert_allclose([wsd(t) for t in (0, 5, 10, 40, 75, 90, 100)], [0, 1, 2, 2, 2, 0.8, 0], atol=1e-6)


def test_checkpoints_are_kept_by_policy(tmp_path):
    with checkpoints.Checkpoints(tmp_path, {}, max_to_keep=2, keep_period=4) as saved:
        for step in range(1, 8):
            saved.save(training.state_with({"kernel": np.zeros(3)}, (), CONFIG, step))
        saved.wait()
        assert saved.steps == [4, 6, 7]


def test_what_is_being_saved_does_not_change_with_the_training(train_step, tmp_path):
    straight, _ = run(train_step, training.init_state(MODEL, CONFIG), 2)
    with checkpoints.Checkpoints(tmp_path, {}) as saved:
        state, _ = run(train_step, training.init_state(MODEL, CONFIG), 2)
        saved.save(state)  # written by a thread, while the next steps take the memory over
        run(train_step, state, 8)
    with checkpoints.Checkpoints(tmp_path, {}) as saved:
        assert equal(saved.restore(training.state_shapes(MODEL, CONFIG)), straight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "adamw or muon"),
        ({"warmup": 12}, "warmup is 12"),
        ({"drop_previous": 2}, "probability"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"schedule": "linear"}, "cosine or wsd"),
        ({"schedule": "wsd", "decay": 0.9}, r"decay is 0\.9 .* at most 0\.833"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"steps": 1 << 31}, "steps is 2147483648"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 32}, "keys hold no more"),
        ({"learning_rate": 1e39}, r"learning_rate is 1e\+39, expected a positive number up to 3\.4e\+38"),
    ],
)
def test_bad_training_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CONFIG) if field.type == "float"])
def test_no_number_of_a_configuration_is_infinite_or_no_number(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is {value}"):
        dataclasses.replace(CONFIG, **{name: value})


def test_targets_without_a_stored_distribution_are_the_action():
    codec = examples.make_codec("mixed")
    arrays = examples.random_stream(codec, 6, seed=6)
    arrays = {name: leaf for name, leaf in arrays.items() if not name.startswith("reference/")}
    targets: Targets = codec.window(arrays)[1]
    np.testing.assert_array_equal(targets.probabilities[:, 0].argmax(-1), arrays["reference_action/0"])
    np.testing.assert_allclose(targets.mean[:, :1], arrays["reference_action/1"], atol=1e-6)

"""Laws of the objective, the training step, checkpoints and saved policies."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import examples
import jax
import numpy as np
import pytest
import scipy.stats

import ldm_jax
from ldm_jax import acting, checkpoints, objective, policy, training
from ldm_jax.actions import Slots
from ldm_jax.codec import Targets
from ldm_jax.config import SIZES, ConfigError
from ldm_jax.heads import Predictions, bin_centres, bin_edges, bin_probabilities
from ldm_jax.model import make_model
from ldm_jax.types import TimeStep

NANO = dataclasses.replace(SIZES["nano"], values=64)
MODEL = make_model(NANO)
# Compiled as a whole: one by one, their many small operations take longer.
INIT, APPLY = jax.jit(MODEL.init), jax.jit(MODEL.apply)
LOSS = jax.jit(functools.partial(objective.loss, MODEL, NANO))
NAMES = ["vector", "continuous"]
CONFIG = training.TrainingConfig(steps=12, warmup=2)


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
    resumed, _ = run(train_step, restored, 8)
    assert equal(straight, resumed)
    assert train_step._cache_size() == 1, "a resumed state compiled the step anew"


def test_training_learns_and_reports(train_step):
    batch = examples.random_batch(NAMES, 4, 6, seed=0)
    cfg = dataclasses.replace(CONFIG, steps=60)
    step, state, losses = training.make_train_step(MODEL, NANO, cfg), training.init_state(MODEL, cfg), []
    for _, _, metrics in training.train(step, state, (batch for _ in range(60)), 60):
        losses.append(metrics.excess_loss)
        assert set(metrics.excess_by_environment) == {0, 1}
        assert metrics.useful_tokens == sum(e.targets.weight.sum() for e in batch.values())
    assert losses[-1] < 0.5 * losses[0]
    assert min(losses) >= -1e-4, "the excess loss is never negative"


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_the_seed_decides_the_parameters(optimiser):
    cfg = dataclasses.replace(CONFIG, optimiser=optimiser, steps=3)
    runs = [run(training.make_train_step(MODEL, NANO, c), training.init_state(MODEL, c), 3)[0] for c in (cfg, cfg)]
    assert equal(*runs)
    other = training.init_state(MODEL, dataclasses.replace(cfg, seed=1))
    assert not equal(runs[0].params, other.params)


def test_a_loss_that_is_not_finite_stops_the_run(train_step):
    batch = examples.random_batch(NAMES, 2, 6, seed=0)
    name = max(batch)
    poisoned = batch[name].targets._replace(weight=np.full_like(batch[name].targets.weight, np.nan))
    with pytest.raises(training.TrainingError, match="at step 1"):
        list(
            training.train(
                train_step,
                training.init_state(MODEL, CONFIG),
                [batch | {name: batch[name]._replace(targets=poisoned)}],
                5,
            )
        )


def test_the_loss_against_a_direct_formula():
    codec = examples.make_codec("category")
    example = examples.random_example(codec, 2, 5, seed=3)
    params = INIT(jax.random.key(0))
    total, metrics = LOSS(params, {"rows": example})
    logits = np.asarray(APPLY(params, {"rows": example.inputs})[0]["rows"].choices, np.float64)
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
    decoded = np.clip(target @ bin_centres(NANO), -1, 1)
    assert abs(decoded - mean) < NANO.bin_width / 2
    assert abs(bin_centres(NANO)[target.argmax()] - mean) <= NANO.bin_width / 2 + 1e-5


def test_bins_follow_the_gaussian():
    edges = bin_edges(NANO).astype(np.float64)
    sigma = np.sqrt(0.25**2 + (NANO.sigma_bins * NANO.bin_width) ** 2)
    cumulative = scipy.stats.norm(0.2, sigma).cdf(edges)
    cumulative[0], cumulative[-1] = 0, 1
    target = bin_probabilities(NANO, np.float32(0.2), np.float32(0.25))
    np.testing.assert_allclose(target, np.diff(cumulative), atol=1e-5)


def test_previous_actions_are_hidden_in_whole_rows():
    example = examples.random_example(examples.make_codec("vector"), 64, 5, seed=5)
    dropped = objective.drop_previous_actions(jax.random.key(0), {"rows": example}, 0.25)["rows"]
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
    agent = acting.make_agent(MODEL, dataclasses.replace(NANO, values=64), codec, "sample")
    params, memory = INIT(jax.random.key(0)), agent.init(3)
    observation = examples.random_tree(codec.card.observation_space, (3,), np.random.default_rng(0))
    no = np.zeros(3, bool)
    timestep = TimeStep(observation, np.zeros(3, np.float32), no, no, no)
    step = jax.jit(agent.step)
    for t in range(3):
        memory, action, _ = step(params, memory, timestep, jax.random.key(t))
        assert ldm_jax.spaces.check(codec.card.action_space, jax.tree.map(np.asarray, action), 3, "the action") == 0
    assert step._cache_size() == 1
    memory = acting.forget(memory, np.array([True, False, True]))
    assert memory.cache.length.tolist() == [0, 3, 0]


def test_a_saved_policy_acts_as_before(tmp_path):
    card = examples.make_codec("vector").card
    original = policy.Policy(NANO, INIT(jax.random.key(0)), {card.id: card}, "sample")
    ldm_jax.save(tmp_path / "policy", original)
    ldm_jax.save(tmp_path / "policy", original)  # replaces it
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
    ldm_jax.save(tmp_path / "policy", policy.Policy(NANO, INIT(jax.random.key(0)), {card.id: card}))
    with pytest.raises(policy.PolicyError, match="holds no policy"):
        ldm_jax.load(tmp_path)
    with pytest.raises(policy.PolicyError, match="exists and holds no policy"):
        ldm_jax.save(tmp_path, policy.Policy(NANO, {}, {}))
    path = tmp_path / "policy" / "policy.json"
    description = json.loads(path.read_text())
    for change, message in (
        ({"schema": 99}, "schema 99"),
        ({"model": description["model"] | {"depth": 3}}, "another version"),
        ({"model": description["model"] | {"width": 64}}, "not of this model"),
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
        pytest.raises(checkpoints.CheckpointError, match=r"model\.width is 32 there and 64 here"),
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
        pytest.raises(checkpoints.CheckpointError, match="damaged"),
    ):
        saved.restore(state)


_KILLED = """
import itertools, sys, jax
sys.path.insert(0, {tests!r})
import test_training as t
from ldm_jax import checkpoints, training
state = training.init_state(t.MODEL, t.CONFIG)
with checkpoints.Checkpoints(sys.argv[1], {{"a": 1}}) as saved:
    for step in itertools.count(1):
        saved.save(state._replace(step=jax.numpy.asarray(step)))
        sys.stdout.write(f"{{step}}\\n")
        sys.stdout.flush()
"""


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    script = _KILLED.format(tests=str(pathlib.Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            step = int(process.stdout.readline())
        process.kill()
    with checkpoints.Checkpoints(tmp_path, {"a": 1}) as saved:
        assert saved.latest >= step
        restored = saved.restore(training.init_state(MODEL, CONFIG))
    assert equal(restored.params, training.init_state(MODEL, CONFIG).params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": "sgd"}, "adamw or muon"),
        ({"warmup": 12}, "warmup is 12"),
        ({"drop_previous": 2}, "probability"),
        ({"clip_norm": 0}, "clip_norm"),
    ],
)
def test_bad_training_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_targets_without_a_stored_distribution_are_the_action():
    codec = examples.make_codec("mixed")
    arrays = examples.random_stream(codec, 6, seed=6)
    del arrays["reference/logits"]
    targets: Targets = codec.window(arrays)[1]
    np.testing.assert_array_equal(targets.probabilities[:, 0].argmax(-1), arrays["reference_action/0"])
    np.testing.assert_allclose(targets.mean[:, :1], arrays["reference_action/1"], atol=1e-6)

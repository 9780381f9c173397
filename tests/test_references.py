import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces

import environments
from data import references
from data.references import convolutions, memory, moments, networks, policy, ppo, tabular
from ldm_jax import cards, rollout, spaces
from ldm_jax.encoding.actions import NOT_ALLOWED_FLOAT16, Slots, action_layout, to_slots
from ldm_jax.types import EnvironmentSpec, TimeStep

QUICK = ppo.PPOConfig(
    budget_steps=30_000, num_envs=32, rollout_length=64, learning_rate=2e-3, hidden=(32,), minibatches=4
)


def recipe_of(**changes):
    return references.Recipe("ppo", dataclasses.replace(QUICK, **changes))


def trees_equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


def slow_advantages(value, reward, terminated, truncated, discount, gae_lambda):
    """Row by row, episode by episode, as the sum over all later errors that the definition is."""
    steps, rows = value.shape[0] - 1, value.shape[1]
    result, valid = np.zeros((steps, rows)), np.zeros((steps, rows), bool)
    for b in range(rows):
        for t in range(steps):
            if terminated[t, b] or truncated[t, b]:
                continue
            valid[t, b] = True
            for k in range(t, steps):
                after = 0.0 if terminated[k + 1, b] else value[k + 1, b]
                error = reward[k + 1, b] + discount * after - value[k, b]
                result[t, b] += (discount * gae_lambda) ** (k - t) * error
                if terminated[k + 1, b] or truncated[k + 1, b]:
                    break
    return result, valid


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_advantages_are_what_their_definition_says(seed):
    rng = np.random.default_rng(seed)
    value, reward = rng.normal(size=(2, 10, 3)).astype(np.float32)
    terminated, truncated = rng.random((2, 10, 3)) < rng.choice([0.05, 0.4])
    expected, valid = slow_advantages(value, reward, terminated, truncated, 0.9, 0.8)
    got = ppo.advantages(value, reward, terminated, truncated, 0.9, 0.8)
    np.testing.assert_array_equal(got[1], valid)
    np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_nan_where_nothing_counts_changes_no_advantage():
    rng = np.random.default_rng(0)
    value, reward = rng.normal(size=(2, 40, 3)).astype(np.float32)
    terminated, truncated = rng.random((2, 40, 3)) < 0.2
    clean, valid = ppo.advantages(value, reward, terminated, truncated, 0.9, 0.8)
    first = np.concatenate([np.zeros((1, 3), bool), (terminated | truncated)[:-1]])
    reward = np.where(first, np.nan, reward)  # what an ignored action met
    value = np.where(terminated, np.nan, value)  # a terminal observation has no value
    got, _ = ppo.advantages(value, reward, terminated, truncated, 0.9, 0.8)
    np.testing.assert_array_equal(got, clean)
    assert np.isfinite(got).all() and (np.asarray(got)[~np.asarray(valid)] == 0).all()


RICH_OBSERVATION = gym_spaces.Dict(
    {
        "vector": gym_spaces.Box(-np.inf, np.inf, (3,), np.float32),
        "grid": gym_spaces.Box(0, 9, (5, 5), np.uint8),
        "high": gym_spaces.Box(0, 255, (40, 36, 3), np.uint8),
        "wide": gym_spaces.Box(0, 255, (4, 36, 40), np.uint8),
        "one": gym_spaces.Discrete(3, start=-1),
        "many": gym_spaces.Discrete(5000),
        "several": gym_spaces.MultiDiscrete([2, 3]),
        "board": gym_spaces.MultiDiscrete(np.full((4, 4), 3)),
        "bits": gym_spaces.MultiBinary(4),
        "words": gym_spaces.Text(8),
    }
)
RICH_ACTION = gym_spaces.Tuple(
    (
        gym_spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([4.0, 1.0], np.float32)),
        gym_spaces.Discrete(3, start=2),
        gym_spaces.MultiDiscrete([2, 4]),
    )
)
RICH = EnvironmentSpec("here/Rich-v0", "here", "0", RICH_OBSERVATION, RICH_ACTION, 6, 10, "test", True)
ROWS, CHOICES = 6, 9


def rich_timestep(rng):
    observation = {}
    for leaf in spaces.leaves(RICH_OBSERVATION):
        struct = spaces.leaf_shape_dtype(leaf.space)
        if isinstance(leaf.space, gym_spaces.Text):
            value = rng.integers(97, 120, (ROWS, *struct.shape))
        else:
            value = np.stack([leaf.space.sample() for _ in range(ROWS)])
        observation[leaf.path[0]] = value.astype(struct.dtype)
    no, zeros = np.zeros(ROWS, bool), np.zeros(ROWS, np.float32)
    mask = rng.random((ROWS, CHOICES)) < 0.5
    mask[:, [0, 3, 8]] = True
    return TimeStep(observation=observation, reward=zeros, terminated=no, truncated=no, first=~no, action_mask=mask)


@pytest.fixture(scope="module")
def rich():
    config = ppo.PPOConfig(hidden=(16,))
    network = networks.network(RICH_OBSERVATION, action_layout(RICH_ACTION), config.hidden, config.activation)
    params = {
        "perceptrons": network.init(np.random.default_rng(0)),
        "log_std": np.zeros(2, np.float32),
    }
    return config, network, params


def seen_once(network, timestep):
    """Moments of one time step: before the first, numbers say nothing."""
    numbers = network.numbers(timestep.observation)
    return moments.add_moments(moments.init_moments(network.size), numbers, np.ones(ROWS, bool))


def test_any_space_is_seen_and_acted_in(rich):
    _, network, params = rich
    timestep = rich_timestep(np.random.default_rng(1))
    agent = ppo.agent(RICH, ppo.PPOConfig(hidden=(16,)))
    learned = {"network": params, "moments": seen_once(network, timestep)._asdict()}
    layout = action_layout(RICH_ACTION)
    step = jax.jit(agent.step)
    for decoding in policy.DECODINGS:
        _, action, record = step(policy.with_decoding(learned, decoding), (), timestep, jax.random.key(0))
        assert spaces.check(RICH_ACTION, action, ROWS, "the action") == 0
        slots = to_slots(layout, action)
        offsets = np.array([0, 3, 5])
        assert timestep.action_mask[np.arange(ROWS)[:, None], offsets + np.asarray(slots.categorical)].all()
        assert (np.asarray(record.logits)[~timestep.action_mask] <= NOT_ALLOWED_FLOAT16).all()
        assert np.isfinite(np.asarray(record.logits, np.float16)).all()  # as it is stored
        if decoding == "greedy":
            assert (np.asarray(record.scale) == 0).all()
            np.testing.assert_allclose(record.mean, action[0], rtol=1e-6)
        if decoding == "sample":
            np.testing.assert_allclose(record.scale, np.broadcast_to([3.0, 0.5], (ROWS, 2)))


def test_each_part_of_an_observation_reaches_policy_and_value(rich):
    _, network, params = rich
    rng = np.random.default_rng(2)
    timestep = rich_timestep(rng)
    seen = seen_once(network, timestep)
    apply = jax.jit(network.apply)
    before = apply(params["perceptrons"], seen, timestep.observation, None)
    for name, value in timestep.observation.items():
        other = rich_timestep(rng).observation[name]
        assert not np.array_equal(other, value)
        after = apply(params["perceptrons"], seen, timestep.observation | {name: other}, None)
        assert not np.array_equal(before[0], after[0]) and not np.array_equal(before[2], after[2]), name


def test_a_row_that_does_not_count_changes_no_gradient(rich):
    config, network, params = rich
    layout, timestep = action_layout(RICH_ACTION), rich_timestep(np.random.default_rng(3))
    seen = seen_once(network, timestep)
    ones = jnp.ones(ROWS)
    slots = Slots(jnp.zeros((ROWS, 3), jnp.int32), jnp.full((ROWS, 2), 0.3))
    valid = jnp.arange(ROWS) != 2
    batch = ppo.Batch(timestep.observation, None, slots, -ones, jnp.arange(6.0), ones, valid)
    gradient = jax.jit(
        jax.grad(lambda params, batch: ppo.loss(params, config, layout, memory.memoryless(network), seen, batch))
    )
    clean = gradient(params, batch)

    def spoil(x):
        return jnp.asarray(x).at[2].set(jnp.nan) if np.issubdtype(np.asarray(x).dtype, np.floating) else x

    spoilt = gradient(params, jax.tree.map(spoil, batch)._replace(valid=valid))
    assert trees_equal(clean, spoilt)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(spoilt))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(spoilt))


def test_a_mask_that_allows_nothing_does_no_harm():
    layout = action_layout(gym_spaces.Discrete(3))
    network = networks.network(gym_spaces.Discrete(2), layout, (8,), "tanh")
    params = network.init(np.random.default_rng(0))
    logits, _, _ = network.apply(params, moments.init_moments(0), np.zeros(1, np.int32), np.zeros((1, 3), bool))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(policy.choice_logits(layout, logits), np.full((1, 1, 3), -np.log(3)), rtol=1e-6)


@pytest.fixture(scope="module")
def catch():
    """One environment, made once, so that training in it compiles once."""
    made = environments.make("gymnax/Catch-bsuite", batch_size=QUICK.num_envs)

    def make(id, batch_size):
        return made if batch_size == QUICK.num_envs else environments.make(id, batch_size=batch_size)

    return make


@pytest.fixture(scope="module")
def scored(catch):
    trained = references.train_reference(catch, "gymnax/Catch-bsuite", recipe_of(), seed=1)
    return references.score_reference(catch, trained, seed=1, num_envs=QUICK.num_envs, least=128)


def test_ppo_learns_where_everything_is_traced(scored):
    assert scored.reference_returns.mean > 0.5  # random: -0.7
    assert scored.random_returns.mean < -0.4
    assert scored.admission.admitted
    assert scored.policy.reference.budget_steps == QUICK.budget_steps
    assert scored.reference_returns.episodes == scored.random_returns.episodes == 128


def test_the_same_seed_gives_the_same_policy_bitwise(catch, scored):
    again = references.train_reference(catch, "gymnax/Catch-bsuite", recipe_of(), seed=1)
    assert trees_equal(again.params["policy"], scored.policy.params["policy"])
    rescored = references.score_reference(catch, again, seed=1, num_envs=QUICK.num_envs, least=128)
    assert rescored.reference_returns == scored.reference_returns


def test_another_seed_gives_another_policy(catch, scored):
    other = references.train_reference(catch, "gymnax/Catch-bsuite", recipe_of(), seed=2)
    assert not trees_equal(other.params["policy"], scored.policy.params["policy"])


def test_ppo_learns_in_a_simulator_with_hidden_state():
    reports = []
    trained = references.train_reference(
        environments.make,
        "envpool/CartPole-v1",
        recipe_of(budget_steps=80_000),
        progress=lambda *report: reports.append(report),
    )
    scored = references.score_reference(environments.make, trained, num_envs=32)
    assert scored.reference_returns.mean > 150  # random: 22
    assert reports[-1][0] == reports[-1][1] >= 0.95 * 80_000


@pytest.mark.parametrize(("id", "least"), [("envpool/CliffWalking-v1", -13.0), ("envpool/FrozenLake-v1", 0.65)])
def test_planning_solves_small_worlds(id, least):
    how = references.Recipe("tabular", tabular.TabularConfig(budget_steps=150_000))
    scored = references.score_reference(
        environments.make, references.train_reference(environments.make, id, how), episodes_per_env=2
    )
    assert scored.reference_returns.mean >= least
    assert scored.admission.admitted


def test_a_table_shares_the_probability_among_the_best_actions():
    # Two ways from 0 to the end at 2, one through 1: action 0 stays, 1 and 2 both go.
    rows = [(0, 0, 0, 0), (0, 1, 1, 0), (0, 2, 1, 0), (1, 0, 1, 0), (1, 1, 2, 1), (1, 2, 2, 1)]
    transitions = np.array(rows, np.int64)
    model = tabular.EmpiricalMDP(3, 3, transitions, np.full(6, 4), np.full(6, -4.0))
    probability = np.exp(tabular._best(model, tabular.TabularConfig()))
    np.testing.assert_allclose(probability[:2], [[0, 0.5, 0.5]] * 2, atol=1e-9)


def test_the_model_leaves_out_ignored_steps():
    last = np.array([[False], [True], [False]])
    timestep = TimeStep(
        observation=None,
        reward=np.array([[0.0], [1.0], [0.0]]),
        terminated=last,
        truncated=np.zeros_like(last),
        first=None,
    )
    model = tabular.add_experience(tabular.empty_mdp(4, 2), np.array([[1], [3], [0]]), np.array([[1], [0]]), timestep)
    np.testing.assert_array_equal(model.transitions, [[1, 1, 3, 1]])
    np.testing.assert_array_equal(model.rewards, [1.0])


def test_a_reference_no_better_than_random_is_refused():
    id = "envpool/FrozenLake-v1"
    spec, config = environments.make(id).spec, tabular.TabularConfig()
    uniform = references.ReferencePolicy(
        tabular.agent(spec, config),
        policy.with_decoding({"logits": np.zeros((16, 4), np.float32)}, "sample"),
        cards.Reference("tabular", "sample", 1, 0),
        spec,
        config,
    )
    scored = references.score_reference(environments.make, uniform, num_envs=32)
    assert not scored.admission.admitted
    assert "random" in scored.admission.reason


def test_a_saved_reference_acts_and_scores_the_same(tmp_path, catch, scored):
    references.save_reference(tmp_path / "one", scored)
    references.save_reference(tmp_path / "one", scored)  # replaced
    loaded = references.load_reference(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]  # nothing left aside
    assert loaded.policy.reference == scored.policy.reference
    assert loaded.policy.config == scored.policy.config
    assert loaded.policy.spec == scored.policy.spec
    assert loaded.reference_returns == scored.reference_returns
    assert loaded.random_returns == scored.random_returns
    environment = catch("gymnax/Catch-bsuite", QUICK.num_envs)

    def act(reference):
        loop = rollout.start(environment, reference.agent, jax.random.key(0))
        return rollout.rollout(environment, reference.agent, reference.params, loop, jax.random.key(1), 12)[1]

    assert trees_equal(act(scored.policy), act(loaded.policy))


def test_damaged_and_foreign_folders_are_refused(tmp_path, scored):
    directory = tmp_path / "reference"
    with pytest.raises(references.ReferencePolicyError, match="not a saved reference"):
        references.load_reference(directory)
    references.save_reference(directory, scored)
    (params,) = directory.glob("params-*.npz")
    whole = params.read_bytes()
    params.write_bytes(whole[:-10])
    with pytest.raises(references.ReferencePolicyError, match="damaged"):
        references.load_reference(directory)
    params.unlink()
    with pytest.raises(references.ReferencePolicyError, match="damaged"):
        references.load_reference(directory)
    description = json.loads((directory / "reference.json").read_text())
    (directory / "reference.json").write_text(json.dumps(description | {"version": 0}))
    with pytest.raises(references.ReferencePolicyError, match="version 0"):
        references.load_reference(directory)
    (directory / "reference.json").write_text("{")
    with pytest.raises(references.ReferencePolicyError, match="cannot be read"):
        references.load_reference(directory)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(references.ReferencePolicyError, match="not a saved reference"):
        references.save_reference(foreign, scored)
    assert (foreign / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"minibatches": 7}, "minibatches"),
        ({"discount": 1.5}, "discount"),
        ({"num_envs": 0}, "num_envs"),
        ({"activation": "no"}, "no"),
    ],
)
def test_impossible_hyperparameters_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(QUICK, **changes)


def test_small_grids_and_vectors_are_not_images():
    assert convolutions.is_image(gym_spaces.Box(0, 255, (84, 84, 4), np.uint8))
    assert convolutions.is_image(gym_spaces.Box(0, 255, (3, 64, 64), np.uint8))
    assert not convolutions.is_image(gym_spaces.Box(0, 1, (10, 10, 4)))
    assert not convolutions.is_image(gym_spaces.Box(0, 1, (1000,)))

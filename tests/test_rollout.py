import dataclasses
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import environments
import ldm_jax
from data.references import random_agent
from ldm_jax import rollout, spaces
from ldm_jax.environment import EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.types import Agent

JITTABLE, HOST = "gymnax/Catch-bsuite", "envpool/FrozenLake-v1"


@pytest.fixture(scope="module", params=[JITTABLE, HOST])
def environment(request):
    made = environments.make(request.param, batch_size=5)
    yield made
    made.close()


@pytest.fixture(scope="module")
def agent(environment):
    """Random, with a memory and a record, so that both are seen to be carried."""
    space = environment.spec.action_space

    def step(params, carry, timestep, key):
        carry = jnp.where(timestep.first, 0, carry + 1)
        action = spaces.sample(key, space, timestep.reward.shape[0])
        return carry, action, {"age": carry, "draw": jax.random.uniform(key, (timestep.reward.shape[0],)) + params}

    return Agent(lambda batch_size: jnp.full(batch_size, -7), step)


def step_by_step(environment, agent, params, loop, key, steps):
    carry, state, timestep = loop
    kept = []
    for t in range(steps):
        carry, action, record = agent.step(params, carry, timestep, jax.random.fold_in(key, t))
        kept.append(rollout.Trajectory(timestep, action, record))
        state, timestep = environment.step(state, action)
    return (carry, timestep), jax.tree.map(lambda *leaves: np.stack(leaves), *kept)


def test_the_loop_equals_single_steps(environment, agent):
    key, steps = jax.random.key(3), 24
    expected_end, expected = step_by_step(
        environment, agent, 0.5, rollout.start(environment, agent, jax.random.key(1)), key, steps
    )
    loop = rollout.start(environment, agent, jax.random.key(1))
    (carry, _, timestep), trajectory = rollout.rollout(environment, agent, 0.5, loop, key, steps)
    chex.assert_trees_all_equal(trajectory, expected)
    chex.assert_trees_all_equal((carry, timestep), expected_end)
    assert trajectory.timestep.first.sum() > 5  # episodes ended on the way


def test_a_traced_rollout_equals_the_plain_one():
    environment = environments.make("gymnax/Pendulum-v1", batch_size=3)
    agent = random_agent(environment.spec.action_space)
    loop = rollout.start(environment, agent, jax.random.key(0))
    plain = rollout.rollout(environment, agent, (), loop, jax.random.key(1), 12)

    @jax.jit
    def traced(loop):
        return rollout.rollout(environment, agent, (), loop, jax.random.key(1), 12)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), plain[1], traced(loop)[1])


def test_same_key_same_result_and_nothing_is_compiled_again(environment, agent, caplog):
    agent = agent._replace(step=lambda *args, step=agent.step: step(*args))  # one that nothing was compiled for

    def once():
        loop = rollout.start(environment, agent, jax.random.key(5))
        end, trajectory = rollout.rollout(environment, agent, 0.0, loop, jax.random.key(6), 16)
        return end[0], end[2], trajectory, rollout.run_episodes(environment, agent, 0.0, jax.random.key(7), 1)

    def compilations():
        caplog.clear()
        with jax.log_compiles():
            result = once()
        return result, [record for record in caplog.records if "Compiling" in record.getMessage()]

    before, compiled = compilations()
    assert compiled
    after, compiled = compilations()
    chex.assert_trees_all_equal(before, after) and not compiled


@pytest.mark.parametrize("id", [JITTABLE, HOST])
def test_what_was_compiled_for_an_environment_goes_with_it(id):
    agent, gone = None, []
    for _ in range(2):
        made = environments.make(id, batch_size=2)
        agent = agent or random_agent(made.spec.action_space)  # it outlives the environments
        loop = rollout.start(made, agent, jax.random.key(0))
        rollout.rollout(made, agent, (), loop, jax.random.key(1), 4)
        rollout.run_episodes(made, agent, (), jax.random.key(1), 1)
        made.close()
        gone.append(weakref.ref(made))
        del made, loop
        gc.collect()
        assert gone[-1]() is None


def test_a_rollout_goes_on_where_the_last_one_ended(environment, agent):
    loop = rollout.start(environment, agent, jax.random.key(5))
    loop, _ = rollout.rollout(environment, agent, 0.0, loop, jax.random.key(6), 16)
    carry, _, timestep = jax.tree.map(np.array, (loop.carry, (), loop.timestep))
    _, trajectory = rollout.rollout(environment, agent, 0.0, loop, jax.random.key(7), 16)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], trajectory.timestep), timestep)
    chex.assert_trees_all_equal(trajectory.record["age"][0], np.where(timestep.first, 0, carry + 1))


def test_evaluation_counts_what_the_rollout_shows(environment, agent):
    """Rows have the same number of episodes, their first ones, with the returns that the time steps add up to."""
    key, episodes = jax.random.key(9), 3
    result = rollout.run_episodes(environment, agent, 0.0, key, episodes)
    assert result.returns.shape == result.lengths.shape == (5, episodes)
    reset_key, act_key = jax.random.split(key)
    loop = rollout.start(environment, agent, reset_key)
    _, trajectory = rollout.rollout(environment, agent, 0.0, loop, act_key, 256)
    timestep = trajectory.timestep
    for row in range(5):
        ends = np.flatnonzero(np.asarray(timestep.last)[:, row])[:episodes]
        begins = [0, *(ends[:-1] + 1)]
        returns = [np.asarray(timestep.reward)[a : b + 1, row].sum() for a, b in zip(begins, ends, strict=True)]
        np.testing.assert_allclose(result.returns[row], returns, rtol=1e-6)
        np.testing.assert_array_equal(result.lengths[row], ends - begins)


def test_a_fixed_count_per_row_is_not_biased_to_short_episodes():
    environment = environments.make("gymnax/CartPole-v1", batch_size=64)
    agent = random_agent(environment.spec.action_space)
    fixed = rollout.run_episodes(environment, agent, (), jax.random.key(0), 16)
    assert abs(fixed.returns.mean() - 22.2) < 1.0  # 1,024 episodes: two standard errors are 0.75
    finish = fixed.lengths.cumsum(1).ravel()
    first_to_finish = fixed.returns.ravel()[np.argsort(finish)[:50]]
    assert first_to_finish.mean() < 18


def test_executed_actions_lie_in_the_space():
    environment = environments.make("gymnax/Pendulum-v1", batch_size=2)
    wild = Agent(lambda batch_size: (), lambda params, carry, timestep, key: (carry, jnp.full((2, 1), 19.8), ()))
    loop = rollout.start(environment, wild, jax.random.key(0))
    _, trajectory = rollout.rollout(environment, wild, (), loop, jax.random.key(1), 4)
    assert (np.asarray(trajectory.action) == 2.0).all()


def test_progress_ends_at_the_total(environment, agent):
    reports = []
    rollout.run_episodes(environment, agent, 0.0, jax.random.key(2), 2, lambda *report: reports.append(report))
    assert reports[-1] == (10, 10)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


@pytest.mark.parametrize("count", [0, -1, np.nan])
def test_less_than_one_is_refused(environment, agent, count):
    loop = rollout.start(environment, agent, jax.random.key(5))
    with pytest.raises(ConfigError, match=f"steps is {count}, expected a whole number"):
        rollout.rollout(environment, agent, 0.0, loop, jax.random.key(6), count)
    with pytest.raises(ConfigError, match=f"episodes_per_row is {count}, expected a whole number"):
        rollout.run_episodes(environment, agent, 0.0, jax.random.key(2), count)


@dataclasses.dataclass(frozen=True, eq=False)
class Spoilt:
    """A real environment of which one thing is wrong."""

    inner: ldm_jax.Environment
    spec: object
    spoil: object

    def reset(self, key):
        return self.inner.reset(key)

    def step(self, state, action):
        state, timestep = self.inner.step(state, action)
        return state, self.spoil(timestep)


def test_a_nan_return_raises():
    inner = environments.make(JITTABLE, batch_size=4)
    spoilt = Spoilt(inner, inner.spec, lambda timestep: timestep._replace(reward=timestep.reward * jnp.nan))
    with pytest.raises(EnvironmentFaultError, match="NaN"):
        rollout.run_episodes(spoilt, random_agent(inner.spec.action_space), (), jax.random.key(0), 1)


def test_episodes_that_never_end_raise():
    inner = environments.make(JITTABLE, batch_size=4)
    never = jnp.zeros(4, bool)
    spec = dataclasses.replace(inner.spec, time_limit=9)
    spoilt = Spoilt(inner, spec, lambda timestep: timestep._replace(terminated=never, truncated=never))
    with pytest.raises(EnvironmentFaultError, match="time limit"):
        rollout.run_episodes(spoilt, random_agent(inner.spec.action_space), (), jax.random.key(0), 1)

"""Laws of playing in many environments at once: one program for all of a bucket, and everyone plays as if alone."""

import contextlib
import dataclasses
import functools
import gc

import examples
import jax
import numpy as np
import pytest

import environments
from ldm_jax import acting, cards, rollout
from ldm_jax.acting import mixed, playing, rows
from ldm_jax.encoding.codec import Codec
from ldm_jax.environment import Environment, EnvironmentFaultError
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.policy import Policy, PolicyError
from ldm_jax.types import TimeStep

NANO = SIZES["nano"]
PARAMS = examples.random_params(make_model(NANO))
ROWS = 3
# Of one bucket, stepped in Python; the last is in JAX, and of another bucket.
HOST = ("envpool/FrozenLake-v1", "envpool/FrozenLake8x8-v1", "envpool/CliffWalking-v1")
LAKE, JITTABLE = IDS = HOST[0], "gymnax/CartPole-v1"


@functools.cache
def card_of(id):
    with contextlib.closing(environments.make(id, 1)) as environment:
        spec = environment.spec
    made = examples.make_card(spec.observation_space, spec.action_space)
    names = ("statistics", "random_returns", "reference_returns", "reference")
    return cards.EnvironmentCard.of(spec, **{name: getattr(made, name) for name in names})


def trial(id, decoding="sample", **changes):
    made = playing.Trial(
        codec=Codec(card_of(id)),
        make=functools.partial(environments.make, id, ROWS),
        rows=ROWS,
        episodes=2,
        key=jax.random.key(len(id)),
        decoding=decoding,
    )
    return made._replace(**changes)


def play(*trials, rows=2 * ROWS):
    return {played.trial.codec.card.id: played for played in playing.play_trials(NANO, PARAMS, trials, rows)}


@pytest.fixture(scope="module")
def together():
    """What was played together, and how many acting programs were compiled for it."""
    rows.act_packed.clear_cache()
    played = play(*map(trial, (*HOST, JITTABLE)))
    return played, rows.act_packed._cache_size()  # what is compiled by other threads is in no log of this one


def assert_same(one, other):
    for a, b in zip(one.episodes, other.episodes, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_environments_of_a_bucket_share_one_program(together):
    played, programs = together
    assert len(played) == 4 and all(one.error is None for one in played.values())
    assert programs == len({one.trial.codec.bucket for one in played.values()}) == 2
    before = rows.act_packed._cache_size()
    play(trial(HOST[1]), trial(HOST[2], key=jax.random.key(0)), trial(LAKE, "greedy"))
    assert rows.act_packed._cache_size() == before, "neither an environment nor a decoding is compiled for"


@pytest.mark.parametrize("id", [LAKE, JITTABLE])
def test_an_environment_is_played_as_if_alone(together, id):
    # Alone there are fewer rows, in another program.
    assert_same(play(trial(id))[id], together[0][id])
    assert not np.array_equal(play(trial(id, key=jax.random.key(99)))[id].episodes.lengths, together[0][id].episodes[1])


@pytest.mark.parametrize("id", [LAKE, JITTABLE])
def test_playing_gives_what_a_rollout_of_the_same_policy_gives(id):
    agent = acting.make_agent(NANO, Codec(card_of(id)), "greedy")
    with contextlib.closing(environments.make(id, ROWS)) as environment:
        alone = rollout.run_episodes(environment, agent, PARAMS, jax.random.key(len(id)), 2)
    played = play(trial(id, "greedy"))[id]
    np.testing.assert_array_equal(played.episodes.returns, alone.returns)
    np.testing.assert_array_equal(played.episodes.lengths, alone.lengths)


def test_the_card_says_how_actions_are_taken():
    card = card_of(LAKE)
    assert card.reference.decoding == "greedy"
    assert_same(play(trial(LAKE, "card"))[LAKE], play(trial(LAKE, "greedy"))[LAKE])
    sampled = dataclasses.replace(card, reference=dataclasses.replace(card.reference, decoding="sample"))
    assert_same(play(trial(LAKE, "card", codec=Codec(sampled)))[LAKE], play(trial(LAKE, "sample"))[LAKE])


@dataclasses.dataclass(eq=False)
class Broken:
    """A real environment that breaks when it has been stepped so often, or says what is wrong."""

    inner: Environment
    after: int
    spoil: object = None
    closed: bool = False

    @property
    def spec(self):
        return self.inner.spec

    def reset(self, key):
        return self.inner.reset(key)

    def step(self, state, action):
        self.after -= 1
        if self.after < 0 and self.spoil is None:
            raise EnvironmentFaultError("its worker died")
        state, timestep = self.inner.step(state, action)
        return state, self.spoil(timestep) if self.spoil else timestep

    def close(self):
        self.closed = True
        self.inner.close()


def nan_rewards(timestep):
    return timestep._replace(reward=np.full_like(timestep.reward, np.nan))


def never_over(timestep):
    over = np.zeros_like(timestep.terminated)
    return timestep._replace(terminated=over, truncated=over)


@pytest.mark.parametrize(
    ("after", "spoil", "message"),
    [
        (5, None, "its worker died"),
        (3, lambda timestep: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (0, nan_rewards, "are NaN or infinite"),
        (0, never_over, "adapter must truncate"),
    ],
)
def test_an_environment_that_breaks_costs_its_own_episodes_alone(together, after, spoil, message):
    made = []

    def make():
        made.append(Broken(environments.make(LAKE, ROWS), after, spoil))
        return made[0]

    played = play(trial(LAKE, make=make), trial(HOST[2]))
    assert isinstance(played[LAKE].error, EnvironmentFaultError) and message in str(played[LAKE].error)
    assert made[0].closed and played[LAKE].episodes is None
    assert_same(played[HOST[2]], together[0][HOST[2]])


def test_what_is_held_does_not_grow_with_the_environments_that_were_played(together):
    def held():
        gc.collect()
        programs = jax.devices()[0].client.live_executables()
        return len(programs), len(jax.live_arrays()), len(rollout._COMPILED)

    def play_some(*seeds):
        for played in playing.play_trials(
            NANO, PARAMS, [trial(id, key=jax.random.key(s)) for s in seeds for id in IDS], ROWS
        ):
            assert played.error is None

    play_some(1)
    before = held()
    play_some(2, 3, 4)
    assert held() == before


def test_what_does_not_fit_is_said_of_each_and_the_others_play(together):
    other = dataclasses.replace(card_of(HOST[1]), time_limit=7)
    played = play(
        trial(LAKE, codec=Codec(dataclasses.replace(card_of(LAKE), version="0"))),
        trial(HOST[1], codec=Codec(other)),
        trial(HOST[2], make=functools.partial(environments.make, HOST[2], ROWS + 1)),
        trial(JITTABLE),
    )
    assert "version was 0 there" in str(played[LAKE].error)
    assert "time_limit was 7 there" in str(played[HOST[1]].error)
    assert isinstance(played[HOST[2]].error, ConfigError) and "with 4 rows, expected 3" in str(played[HOST[2]].error)
    assert_same(played[JITTABLE], together[0][JITTABLE])
    refused = play(trial(LAKE, episodes=0), trial(JITTABLE, "best"))
    assert "expected at least 1" in str(refused[LAKE].error) and "decoding is 'best'" in str(refused[JITTABLE].error)


def test_who_stops_early_has_what_was_finished_and_everything_is_closed(together):
    made = []

    def make(id):
        made.append(Broken(environments.make(id, ROWS), 10**6))
        return made[-1]

    trials = [trial(id, make=functools.partial(make, id)) for id in HOST]
    games = playing.play_trials(NANO, PARAMS, trials, ROWS)
    first = next(games)
    games.close()
    assert made and all(one.closed for one in made)
    done = first.trial.codec.card.id
    assert_same(first, together[0][done])
    for id, played in play(*(trial(id) for id in HOST if id != done)).items():
        assert_same(played, together[0][id])


def test_a_batch_refuses_what_is_out_of_order():
    codec, seeds = Codec(card_of(LAKE)), rows.seeds(jax.random.key(0), 2)
    batch = rows.Seats(NANO, PARAMS, codec, 3)
    with pytest.raises(acting.ActingError, match="out of order"):
        batch.send()
    with pytest.raises(acting.ActingError, match="no actions on their way"):
        batch.receive()
    with pytest.raises(acting.ActingError, match="is of bucket"):
        batch.seat(Codec(card_of(JITTABLE)), seeds, "greedy")
    places = batch.seat(codec, seeds, "greedy")
    with pytest.raises(acting.ActingError, match="brings 2 rows, expected at most 1"):
        batch.seat(codec, seeds, "greedy")
    batch.leave(places)
    assert batch.free == 3


# Acting by hand in several environments at once

POLICY = Policy(NANO, PARAMS, {id: card_of(id) for id in IDS})
BATCH = {LAKE: 2, JITTABLE: 3}


def steps_of(rows_of, seed):
    rng = np.random.default_rng(seed)
    return {
        id: TimeStep(
            observation=examples.random_tree(card_of(id).observation_space, (count,), rng),
            reward=rng.normal(0, 1, count).astype(np.float32),
            terminated=rng.random(count) < 0.2,
            truncated=np.zeros(count, bool),
            first=np.zeros(count, bool),
        )
        for id, count in rows_of.items()
    }


def act_by_hand(act, memory, steps=NANO.window + 2, forgotten=None):
    actions = []
    for t in range(steps):
        if forgotten and t == steps // 2:
            memory = mixed.forget_mixed(memory, forgotten)
        memory, action = act(PARAMS, memory, steps_of(BATCH, t), jax.random.key(t))
        actions.append(jax.tree.map(np.asarray, action))
    return actions


def test_a_mixed_batch_acts_as_each_agent_does_traced_or_not():
    by_hand = act_by_hand(POLICY.act, POLICY.start(BATCH))
    traced = act_by_hand(jax.jit(POLICY.act), POLICY.start(BATCH))
    jax.tree.map(np.testing.assert_array_equal, by_hand, traced)
    for id, count in BATCH.items():
        agent = POLICY.agent(id)
        state, step = agent.init(count), jax.jit(agent.step)
        for t, actions in enumerate(by_hand):
            state, action, _ = step(PARAMS, state, steps_of(BATCH, t)[id], jax.random.key(0))
            np.testing.assert_array_equal(action, actions[id])


def test_rows_of_a_mixed_batch_forget_apart():
    forgotten = {JITTABLE: np.array([True, False, True])}
    steps = 2 * NANO.window
    whole, cut = (
        act_by_hand(functools.partial(POLICY.act, decoding="sample"), POLICY.start(BATCH), steps, each)
        for each in (None, forgotten)
    )
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(one[LAKE], other[LAKE])
        np.testing.assert_array_equal(one[JITTABLE][1], other[JITTABLE][1])
    memory = POLICY.start(BATCH)
    for t in range(3):
        memory, _ = POLICY.act(PARAMS, memory, steps_of(BATCH, t), jax.random.key(t))
    memory = mixed.forget_mixed(memory, {id: np.ones(count, bool) for id, count in BATCH.items()})
    _, fresh = POLICY.act(PARAMS, POLICY.start(BATCH), steps_of(BATCH, 9), jax.random.key(9))
    _, again = POLICY.act(PARAMS, memory, steps_of(BATCH, 9), jax.random.key(9))
    jax.tree.map(np.testing.assert_array_equal, fresh, again)


def test_a_mixed_batch_refuses_other_rows_and_environments():
    memory, steps = POLICY.start(BATCH), steps_of(BATCH, 0)
    with pytest.raises(acting.ActingError, match=r"\[3\], expected .*\[2\]"):
        POLICY.act(PARAMS, memory, steps_of({LAKE: 3, JITTABLE: 2}, 0), jax.random.key(0))
    with pytest.raises(acting.ActingError, match=f"time steps of {LAKE}, expected those of {LAKE}, {JITTABLE}"):
        POLICY.act(PARAMS, memory, {LAKE: steps[LAKE]}, jax.random.key(0))
    for wrong, message in (({LAKE: [0, 1, 2]}, "expected 2 booleans"), ({"test/Other": [True]}, "rows of test/Other")):
        with pytest.raises(acting.ActingError, match=message):
            mixed.forget_mixed(memory, wrong)
    for few in ({}, {LAKE: 0}):
        with pytest.raises(acting.ActingError, match="at least one row"):
            POLICY.start(few)
    with pytest.raises(PolicyError, match="no card of 'test/Other'"):
        POLICY.start({"test/Other": 1})
    image = examples.make_codec("image").card
    with pytest.raises(PolicyError, match="cannot share a batch"):
        Policy(NANO, PARAMS, {LAKE: card_of(LAKE), image.id: image}).start({LAKE: 1, image.id: 1})

"""Laws of a policy: it is saved whole, travels, acts in what it was trained in, and forgets."""

import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time

import examples
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compilations
from hypothesis import strategies as st
from runs import copy_while_still

import environments
import ldm_jax
from ldm_jax import acting, rollout
from ldm_jax import policy as policy_module
from ldm_jax.cards import CardError, EnvironmentCard
from ldm_jax.encoding.buckets import bucket_for, join_two
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import make_model
from ldm_jax.policy import Policy, PolicyError
from ldm_jax.types import TimeStep

NANO = dataclasses.replace(SIZES["nano"], values=64)
PARAMS = examples.random_params(make_model(NANO))
CARDS = {f"test/{name}": examples.make_codec(name).card for name in ("vector", "mixed")}


def make_policy(**fields):
    return Policy(**{"cfg": NANO, "params": PARAMS, "cards": CARDS} | fields)


def timestep(card, rows, seed):
    rng = np.random.default_rng(seed)
    first, over = rng.random(rows) < 0.2, rng.random(rows) < 0.2
    return TimeStep(
        observation=examples.random_tree(card.observation_space, (rows,), rng),
        reward=rng.normal(0, 1, rows).astype(np.float32) * ~first,
        terminated=over & ~first,
        truncated=np.zeros(rows, bool),
        first=first,
    )


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def compiled(lines):
    """Of what JAX logged, what it began to compile."""
    return [line for line in lines if line.startswith("Compiling")]


# What a policy says of itself


def test_printing_a_policy_says_what_it_is():
    shown = "Policy(0.0811M parameters, window 16, 2 environments (test 2), decoding 'card')"
    assert repr(make_policy()) == shown.replace("16", str(NANO.window))
    assert make_policy().ids == ("test/mixed", "test/vector")


def test_a_policy_acts_in_the_buckets_it_was_trained_in(tmp_path):
    def image(side, name="test/some"):
        return examples.make_card(examples.gs.Box(0, 255, (side, side, 3), np.uint8), examples.gs.Discrete(2), name)

    def bucket(card):
        return bucket_for(card.observation_space, card.action_space)

    large = join_two(bucket(image(90)), bucket(CARDS["test/vector"]), pad_parts=True)
    trained = make_policy(buckets={"test/small": large, "test/vector": large})
    assert trained.codec(image(20, "test/small")).bucket == large
    assert trained.codec(CARDS["test/vector"]).bucket == large
    assert trained.codec(image(40)).bucket == large, "an image is cut into patches as those that were trained on"
    assert trained.codec(image(100)).bucket == bucket(image(100)), "there is none that holds it"
    assert trained.codec(CARDS["test/mixed"]).bucket == bucket(CARDS["test/mixed"])
    trained.save(tmp_path / "policy")
    assert ldm_jax.load(tmp_path / "policy") == pickle.loads(pickle.dumps(trained)) == trained != make_policy()


def test_an_unknown_decoding_is_refused_where_it_is_first_seen():
    for make in (acting.check_decoding, lambda decoding: make_policy(decoding=decoding)):
        with pytest.raises(ConfigError, match=r"decoding is 'gredy', expected one of greedy, mode, sample"):
            make("gredy")


def act(agent, params, card, rows=2, steps=2):
    state, actions = agent.init(rows), []
    step = jax.jit(agent.step)
    for t in range(steps):
        state, action, _ = step(params, state, timestep(card, rows, t), jax.random.key(t))
        actions.append(action)
    return state, actions


def test_a_policy_is_pickled_copied_and_compared_before_and_after_it_acted():
    fresh, used = make_policy(), make_policy()
    card = CARDS["test/mixed"]
    _, actions = act(used.agent(card.id), used.params, card)
    assert used.model is used.model
    for policy in (fresh, used):
        for twin in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy), copy.copy(policy)):
            assert twin == policy == fresh and hash(twin) == hash(fresh)
            assert twin.agent(card.id) == policy.agent(card.id)
    agent = pickle.loads(pickle.dumps(used.agent(card.id)))
    assert_equal(act(agent, used.params, card)[1], actions)


def test_a_saved_policy_does_not_say_where_it_was_saved(tmp_path):
    make_policy().save(tmp_path / "somewhere")
    found = [path.read_bytes() for path in (tmp_path / "somewhere").rglob("*") if path.is_file()]
    assert found and not any(str(tmp_path).encode() in content for content in found)


def test_policies_differ_in_every_part_that_differs():
    policy = make_policy()
    deeper = dataclasses.replace(NANO, layers=3)
    changed = jax.tree.map(np.copy, PARAMS)
    changed["norm"]["scale"][0] += 1
    card = CARDS["test/vector"]
    others = [
        make_policy(cfg=deeper, params=examples.random_params(make_model(deeper))),
        make_policy(params=changed),
        make_policy(params={**PARAMS, "more": np.zeros(1)}),
        make_policy(cards={card.id: card}),
        make_policy(cards=CARDS | {card.id: dataclasses.replace(card, version="2")}),
        make_policy(decoding="sample"),
    ]
    assert policy == make_policy() and policy != "policy"
    for i, one in enumerate([policy, *others]):
        assert [one == other for other in [policy, *others]] == [i == j for j in range(1 + len(others))]


# Agents


def test_agents_of_equal_policies_environments_and_decodings_are_equal():
    policy, card = make_policy(), CARDS["test/vector"]
    agent = policy.agent(card.id)
    assert agent == policy.agent(card.id) == policy.agent(card) == make_policy().agent(card.id, "greedy")
    assert hash(agent) == hash(make_policy().agent(card))
    assert agent is policy.agent(card), "a function that is jitted twice is compiled twice unless it is the same"
    # Scores say nothing of how to act; all else on a card does.
    scored = dataclasses.replace(card, random_returns=card.reference_returns)
    assert agent == policy.agent(scored)
    colder = dataclasses.replace(card, statistics=dataclasses.replace(card.statistics, reward_scale=2.0))
    others = [policy.agent(colder), policy.agent(card, "sample"), policy.agent("test/mixed")]
    others.append(policy.agent(card, temperature=2.0))
    assert all(agent.step != other.step for other in others)


def test_a_second_agent_compiles_nothing():
    environment = environments.make("gymnax/Catch-bsuite", batch_size=2)
    card = EnvironmentCard.of(
        environment.spec,
        statistics=dataclasses.replace(CARDS["test/vector"].statistics, observation_mean=(), observation_std=()),
        **{name: getattr(CARDS["test/vector"], name) for name in ("random_returns", "reference_returns", "reference")},
    )
    policy = make_policy(cards={card.id: card})

    def play(policy, seed):
        # An environment of such an id, its spec and its id are one.
        for known in (environment, environment.spec, card.id):
            agent = policy.agent(known)
            loop = rollout.start(environment, agent, jax.random.key(seed))
            jax.block_until_ready(rollout.rollout(environment, agent, policy.params, loop, jax.random.key(seed), 3))
            return agent, loop

    def step_by_hand(policy):
        agent, loop = play(policy, 4)
        # By a new wrapper of jit each time, as in a cell of a notebook that is run again.
        jax.block_until_ready(jax.jit(agent.step)(policy.params, loop.carry, loop.timestep, jax.random.key(0)))

    with compilations() as first:
        play(policy, 0)
        step_by_hand(policy)
    with compilations() as second:
        play(policy, 1)
        step_by_hand(policy)
        play(make_policy(cards={card.id: card}), 2)
        play(pickle.loads(pickle.dumps(policy)), 3)
    assert compiled(first) and not compiled(second)


def spec_of(card, **changes):
    names = ["id", "library", "version", "observation_space", "action_space", "time_limit", "domain"]
    return ldm_jax.EnvironmentSpec(
        **{name: getattr(card, name) for name in names} | {"batch_size": 2, "jittable": True} | changes
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "version was 1 there and is 2 now"),
        ({"time_limit": 11}, "time_limit was 10 there and is 11 now"),
        ({"action_space": examples.gs.Discrete(4)}, "action_space"),
        ({"observation_space": examples.gs.Box(-1, np.inf, (5,))}, "observation_space"),
    ],
)
def test_an_environment_that_is_not_as_it_was_is_refused(change, message):
    policy, card = make_policy(), CARDS["test/vector"]
    assert policy.agent(spec_of(card)) == policy.agent(card.id)
    with pytest.raises(CardError, match=message):
        policy.agent(spec_of(card, **change))


def test_an_unknown_environment_is_refused_with_the_near_ones():
    policy = make_policy()
    for unknown in ("test/vektor", spec_of(CARDS["test/vector"], id="test/vektor")):
        with pytest.raises(PolicyError, match=r"no card of 'test/vektor'; it has test/vector, test/mixed, 2 in all"):
            policy.agent(unknown)
    with pytest.raises(PolicyError, match="expected an id, an environment, its spec or a card"):
        policy.agent(3)
    with pytest.raises(PolicyError, match="it has none, 0 in all"):
        make_policy(cards={}).agent("test/vector")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda step: jax.tree.map(lambda leaf: leaf[0], step),
            r"float32\[4\], expected float32\[2, 4\].*2 rows in front",
        ),
        (lambda step: step._replace(reward=np.float32(0)), r"the reward given to .*float32\[\], expected float32\[2\]"),
        (lambda step: step._replace(first=np.zeros(3, bool)), r"first .*\[3\], expected bool\[2\]"),
        (lambda step: step._replace(terminated=np.zeros(2)), r"terminated .*float32\[2\], expected bool\[2\]"),
        (lambda step: step._replace(observation=step.observation[:, :3]), r"float32\[2, 3\], expected float32\[2, 4\]"),
        (
            lambda step: step._replace(action_mask=np.ones((2, 4), bool)),
            r"action_mask .*bool\[2, 4\], expected bool\[2, 3\]",
        ),
    ],
)
def test_a_time_step_that_is_not_the_agent_s_is_refused(change, message):
    policy, card = make_policy(), CARDS["test/vector"]
    agent = policy.agent(card.id)
    with pytest.raises(acting.ActingError, match=message):
        jax.eval_shape(agent.step, PARAMS, agent.init(2), change(timestep(card, 2, 0)), jax.random.key(0))


def test_a_mask_that_comes_or_goes_is_refused():
    card = CARDS["test/vector"]
    masked = dataclasses.replace(card, statistics=dataclasses.replace(card.statistics, masked=True))
    plain = timestep(card, 2, 0)
    step = plain._replace(action_mask=np.ones((2, 3), bool))
    for known, right, wrong, now in ((card, plain, step, "an"), (masked, step, plain, "no")):
        agent = make_policy().agent(known)
        jax.eval_shape(agent.step, PARAMS, agent.init(2), right, jax.random.key(0))
        with pytest.raises(acting.ActingError, match=rf"has {now} action_mask, and had"):
            jax.eval_shape(agent.step, PARAMS, agent.init(2), wrong, jax.random.key(0))


@pytest.mark.parametrize("observation", [{}, np.zeros(2, np.float32)])
def test_an_observation_without_a_part_is_refused(observation):
    card = CARDS["test/mixed"]
    agent = make_policy().agent(card.id)
    with pytest.raises(acting.ActingError, match="has no observation, part 'at', expected by Dict"):
        agent.step(PARAMS, agent.init(2), timestep(card, 2, 0)._replace(observation=observation), jax.random.key(0))


def test_an_image_of_another_kind_of_number_is_refused():
    # As float32 in 0..1 it would be cast to zeros.
    card = CARDS["test/mixed"]
    agent, step = make_policy().agent(card.id), timestep(card, 2, 0)
    observation = step.observation | {"image": step.observation["image"] / np.float32(255)}
    with pytest.raises(acting.ActingError, match=r"'image', .*float32\[2, 7, 7, 3\], expected uint8\[2, 7, 7, 3\]"):
        agent.step(PARAMS, agent.init(2), step._replace(observation=observation), jax.random.key(0))


# Forgetting


FORGETTING = {name: make_policy(cards={f"test/{name}": examples.make_codec(name).card}) for name in examples.SPACES}
STEPS = {}


def stepper(name):
    if name not in STEPS:
        agent = FORGETTING[name].agent(f"test/{name}", "sample")
        STEPS[name] = agent, jax.jit(agent.step)
    return STEPS[name]


def poisoned(step, rows):
    """A time step with NaN wherever there is room for one in some rows."""

    def poison(leaf):
        return np.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), np.nan, leaf).astype(leaf.dtype)

    floating = lambda leaf: np.issubdtype(leaf.dtype, np.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: poison(leaf) if floating(leaf) else leaf, step)


@pytest.mark.parametrize("name", ["continuous", "mixed"])
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(before=st.integers(1, 3 * NANO.window), sick=st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_forgotten_row_is_a_fresh_one_whatever_it_saw(name, before, sick):
    sick, card = np.array(sick), FORGETTING[name].cards[f"test/{name}"]
    agent, step = stepper(name)
    state = healthy = agent.init(3)
    for t in range(before):
        seen = timestep(card, 3, t)
        healthy, _, _ = step(PARAMS, healthy, seen, jax.random.key(t))
        state, _, _ = step(PARAMS, state, poisoned(seen, sick), jax.random.key(t))
    state, fresh = acting.forget(state, sick), agent.init(3)

    def check(rows, one, other):
        assert_equal(*(jax.tree.map(lambda leaf: np.compress(rows, leaf, 0), state) for state in (one, other)))

    check(sick, state, fresh)
    check(~sick, state, healthy)
    for t in range(NANO.window + 2):
        seen, key = timestep(card, 3, 1000 + t), jax.random.key(t)
        state, action, _ = step(PARAMS, state, seen, key)
        fresh, wanted, _ = step(PARAMS, fresh, seen, key)
        assert_equal(*(jax.tree.map(lambda a: np.asarray(a)[sick], tree) for tree in (action, wanted)))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(action))


@pytest.mark.parametrize("rows", [[0, 2], np.array([0, 1, 2]), [True, False], True])
def test_rows_to_forget_are_booleans(rows):
    agent = make_policy().agent("test/vector")
    with pytest.raises(acting.ActingError, match="expected 3 booleans"):
        acting.forget(agent.init(3), rows)


# Saving


def test_a_policy_is_saved_whole_and_read_back_equal(tmp_path):
    policy = make_policy(decoding="mode")
    policy.save(tmp_path / "new" / "policy")
    policy.save(tmp_path / "new" / "policy")
    assert ldm_jax.load(tmp_path / "new" / "policy") == policy
    assert len(list((tmp_path / "new" / "policy").iterdir())) == 2, "old weights stay"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["policy"]


def test_what_is_saved_in_bfloat16_is_the_rounded_policy_in_half_the_room(tmp_path):
    make_policy().save(tmp_path / "whole")
    make_policy().save(tmp_path / "half", "bfloat16")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.bfloat16), np.float32), PARAMS)
    assert ldm_jax.load(tmp_path / "half") == make_policy(params=rounded)
    ldm_jax.load(tmp_path / "half").save(tmp_path / "again", "bfloat16")
    assert ldm_jax.load(tmp_path / "again") == ldm_jax.load(tmp_path / "half"), "what is round stays as it is"
    whole, half = (sum(path.stat().st_size for path in (tmp_path / name).rglob("*/d/*")) for name in ("whole", "half"))
    assert half < 0.7 * whole
    with pytest.raises(PolicyError, match="dtype is 'float16', expected float32 or bfloat16"):
        make_policy().save(tmp_path / "half", "float16")
    huge = jax.tree.map(lambda leaf: np.full_like(leaf, np.finfo(np.float32).max), PARAMS)
    with pytest.raises(PolicyError, match="not finite"):
        make_policy(params=huge).save(tmp_path / "half", "bfloat16")


def test_a_name_is_a_released_policy_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(policy_module, "_RELEASED", tmp_path / "package")
    make_policy().save(tmp_path / "package" / "panel")
    assert policy_module.released() == ("panel",) and ldm_jax.load("panel") == make_policy()
    with pytest.raises(PolicyError, match=r"no such folder.*, or 'panel'$"):
        ldm_jax.load("pannel")
    make_policy(decoding="mode").save("panel")
    assert ldm_jax.load("panel").decoding == "mode"


def test_saving_goes_through_symbolic_links_and_keeps_them(tmp_path):
    (tmp_path / "latest").symlink_to("run7")
    for policy in (make_policy(), make_policy(decoding="sample")):
        policy.save(tmp_path / "latest")
        assert os.readlink(tmp_path / "latest") == "run7"
        assert ldm_jax.load(tmp_path / "latest") == policy == ldm_jax.load(tmp_path / "run7")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "run7"]


def test_a_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_policy().save("~/policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"] and ldm_jax.load("~/policy") == make_policy()


def test_what_is_not_a_policy_stays_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(PolicyError, match="holds no policy: choose another folder"):
        make_policy().save(tmp_path / "mine")
    with pytest.raises(PolicyError, match="is a file: choose a folder"):
        make_policy().save(tmp_path / "file")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    make_policy().save(tmp_path / "empty")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, bad):
    make_policy().save(tmp_path / "policy")
    params = jax.tree.map(np.copy, PARAMS)
    params["norm"]["scale"][3] = bad
    with pytest.raises(PolicyError, match="norm/scale is not finite: nothing was saved"):
        make_policy(params=params).save(tmp_path / "policy")
    with pytest.raises(PolicyError, match="not finite"):
        make_policy(params=params).save(tmp_path / "other")
    assert ldm_jax.load(tmp_path / "policy") == make_policy() and not (tmp_path / "other").exists()


def test_a_save_that_fails_leaves_the_policy_of_before(tmp_path, monkeypatch):
    make_policy().save(tmp_path)
    for place in ("ldm_jax.training.checkpoints.save_params", "ldm_jax.files.write"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                make_policy(decoding="sample").save(tmp_path)
        assert ldm_jax.load(tmp_path) == make_policy()
    make_policy(decoding="sample").save(tmp_path)
    assert ldm_jax.load(tmp_path).decoding == "sample" and len(list(tmp_path.iterdir())) == 2


EVENTS = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def test_at_every_moment_of_a_save_there_is_a_policy(tmp_path):
    folder, copies, busy = tmp_path / "policy", [], threading.Lock()
    make_policy().save(folder)

    def copy_folder(event, _):
        # Python asks hooks before it renames or removes anything.
        if (
            event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
            and not done
            and busy.acquire(blocking=False)
        ):
            copies.append(tmp_path / str(len(copies)))
            shutil.copytree(folder, copies[-1], ignore=shutil.ignore_patterns("*.aside*"))
            busy.release()

    done = []
    sys.addaudithook(copy_folder)
    new = make_policy(decoding="sample")
    new.save(folder)
    done.append(True)
    found = [ldm_jax.load(copy) for copy in copies]
    assert make_policy() in found and new in found and all(policy in (make_policy(), new) for policy in found)
    assert ldm_jax.load(folder) == new


SAVER = """
import dataclasses, sys, time
import jax, numpy as np
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.policy import Policy
cfg = dataclasses.replace(SIZES["nano"], values=64)
shapes = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
policies = [Policy(cfg, jax.tree.map(lambda leaf: np.full(leaf.shape, i, np.float32), shapes), {}) for i in (1, 2)]
start = time.monotonic()
policies[0].save(sys.argv[1])
print(time.monotonic() - start, flush=True)
while True:
    for policy in policies:
        policy.save(sys.argv[1])
"""


@pytest.fixture
def start_saver(tmp_path):
    """Starts a process that saves two policies in turn; gives it and the seconds of one save."""
    with contextlib.ExitStack() as stack:

        def start():
            arguments = [sys.executable, "-c", SAVER, str(tmp_path / "policy")]
            process = stack.enter_context(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return process, float(process.stdout.readline())

        yield start


def check_one_of_the_two(policy):
    (value,) = {value for leaf in jax.tree.leaves(policy.params) for value in np.unique(leaf)}
    assert value in (1, 2)


def test_killed_at_any_moment_a_save_leaves_a_policy(tmp_path, start_saver):
    rng, (process, seconds) = random.Random(0), start_saver()
    for moment in range(8):
        time.sleep(rng.uniform(0, 2 * seconds))
        copy_while_still(process, tmp_path / "policy", tmp_path / str(moment))
        check_one_of_the_two(ldm_jax.load(tmp_path / str(moment)))
    process.kill()
    process.wait()
    check_one_of_the_two(ldm_jax.load(tmp_path / "policy"))
    for folder in tmp_path.iterdir():
        make_policy().save(folder)
        assert ldm_jax.load(folder) == make_policy() and len(list(folder.iterdir())) == 2, "what was left stays"


def test_two_that_save_and_one_that_loads_at_once_find_whole_policies(tmp_path, start_saver):
    processes = [start_saver()[0] for _ in range(2)]
    for _ in range(5):
        check_one_of_the_two(ldm_jax.load(tmp_path / "policy"))
    assert [process.poll() for process in processes] == [None, None]


def test_the_first_save_that_was_interrupted_does_not_stop_the_next(tmp_path):
    make_policy().save(tmp_path)
    (tmp_path / "policy.json").rename(tmp_path / ".policy.json.0a1b2c3d.aside")
    (tmp_path / ".params-00112233.0a1b2c3d.aside.orbax-checkpoint-tmp-7").mkdir()
    with pytest.raises(PolicyError, match="holds no policy"):
        ldm_jax.load(tmp_path)
    make_policy().save(tmp_path)
    assert ldm_jax.load(tmp_path) == make_policy() and len(list(tmp_path.iterdir())) == 2


# Loading


def test_what_cannot_be_loaded_says_what_to_pass_or_to_do(tmp_path):
    make_policy().save(tmp_path / "policy")
    path = tmp_path / "policy" / "policy.json"
    with pytest.raises(PolicyError, match=rf"policy.json is a file, expected the folder .*: pass {path.parent}$"):
        ldm_jax.load(path)
    with pytest.raises(PolicyError, match="holds no policy"):
        ldm_jax.load(tmp_path / "nothing")
    whole = json.loads(path.read_text())
    for broken, message in (
        (whole | {"schema": 2}, "schema 2, expected 3: train the policy anew"),
        ([], "schema None, expected 3"),
        ({name: part for name, part in whole.items() if name != "cards"}, "damaged: KeyError"),
        ({name: part for name, part in whole.items() if name != "model"}, "damaged: it lacks 'model'"),
        (whole | {"cards": 3}, "damaged"),
        (whole | {"decoding": "gredy"}, "decoding is 'gredy'"),
        (whole | {"weights": "params-00000000"}, "no folder"),
        (whole | {"model": whole["model"] | {"bins": float("nan")}}, "bins is nan"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(ldm_jax.LdmError, match=message):
            ldm_jax.load(path.parent)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="damaged"):
        ldm_jax.load(path.parent)


ELSEWHERE = """
import sys
sys.path.insert(0, {tests!r})
import jax, numpy as np, ldm_jax, test_policy as t
policy = ldm_jax.load(sys.argv[1])
assert {{str(leaf.dtype) for leaf in jax.tree.leaves(policy.params)}} == {{"float32"}}
state, actions = t.act(policy.agent("test/mixed"), policy.params, policy.cards["test/mixed"])
np.savez(sys.argv[2], *jax.tree.leaves(actions))
"""


@pytest.mark.parametrize("setting", [{"JAX_ENABLE_X64": "1"}, {"JAX_DEFAULT_PRNG_IMPL": "rbg"}])
def test_a_policy_acts_alike_under_other_settings_of_the_process(tmp_path, setting):
    make_policy().save(tmp_path / "policy")
    code = ELSEWHERE.format(tests=str(pathlib.Path(__file__).parent))
    arguments = [sys.executable, "-c", code, str(tmp_path / "policy"), str(tmp_path / "actions.npz")]
    subprocess.run(arguments, env=os.environ | setting, check=True, timeout=300)
    _, actions = act(make_policy().agent("test/mixed"), PARAMS, CARDS["test/mixed"])
    with np.load(tmp_path / "actions.npz") as there:
        for leaf, other in zip(jax.tree.leaves(actions), there.values(), strict=True):
            assert leaf.dtype == other.dtype
            np.testing.assert_allclose(leaf, other, atol=1e-5)


def test_a_policy_of_numpy_sizes_is_saved(tmp_path):
    numbers = {
        field.name: np.float32(value) if isinstance(value, float) else np.int64(value)
        for field in dataclasses.fields(NANO)
        if type(value := getattr(NANO, field.name)) in (int, float)
    }
    cfg = ModelConfig(**dataclasses.asdict(NANO) | numbers | {"qk_norm": np.bool_(True)})
    make_policy(cfg=cfg).save(tmp_path)
    assert ldm_jax.load(tmp_path) == make_policy()

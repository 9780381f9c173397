"""Zoos: references that others take: they are the same policies, half as large, and only of the same environment."""

import dataclasses
import json
import shutil

import chex
import gymnasium as gym
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import environments
import ldm_jax
from data import collect as collecting
from data import references
from data.references import ReferencePolicyError, load_reference, ppo, saving, zoo
from data.store import open_dataset
from environments import registry
from experiments import collect, evaluate, pack_zoo, references_table, score_zoo
from experiments import references as stage
from experiments.harness import making
from experiments.harness.experts import expert_policies
from experiments.harness.outcomes import UnitOutcome, read_outcome, write_outcome
from experiments.harness.stage import UnitsFailedError
from experiments.harness.workdir import WorkdirError
from ldm_jax import cards
from ldm_jax.evaluation import scores

ID = "gymnax/Catch-bsuite"
QUICK = references.Recipe("ppo", ppo.PPOConfig(budget_steps=60_000, rollout_length=32, hidden=(32,)))
CONFIG = stage.ReferencesConfig(budget=0.002, num_envs=16, workers=0)


@pytest.fixture(scope="module")
def scored():
    policy = references.train_reference(environments.make, ID, QUICK)
    return references.score_reference(environments.make, policy)


@pytest.fixture(scope="module")
def folder(scored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    zoo.add_to_zoo(folder, environments.make, scored, seed=1)
    return folder


def test_what_is_packed_is_half_as_large_and_plays_as_well(folder, scored, tmp_path):
    references.save_reference(tmp_path / "whole", scored)
    (packed,), (whole,) = folder.rglob("params-*.npz"), (tmp_path / "whole").glob("params-*.npz")
    assert packed.stat().st_size < 0.7 * whole.stat().st_size
    with np.load(packed, allow_pickle=False) as arrays:
        assert {array.dtype for array in arrays.values() if array.ndim >= 2} == {np.dtype(np.float16)}
    taken = zoo.take_from_zoo(folder, scored.policy.spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(taken.policy.params)} == {
        np.asarray(leaf).dtype for leaf in jax.tree.leaves(scored.policy.params)
    }
    chex.assert_trees_all_close(taken.policy.params, scored.policy.params, rtol=1e-3, atol=1e-4)
    assert taken.admission.admitted
    assert zoo.verify_reference(environments.make, taken, seed=2).holds


@hypothesis.given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, min_side=0), elements=st.floats(-1e9, 1e9, width=32))
)
def test_nothing_becomes_infinite_by_being_halved(array):
    halved = saving.half(array)
    assert np.isfinite(halved).all() and halved.shape == array.shape
    assert halved.dtype == (np.float16 if array.ndim > 1 and (np.abs(array) <= 65504).all() else np.float32)
    np.testing.assert_allclose(halved.astype(np.float32), array, rtol=1e-3, atol=1e-7)


def test_a_reference_that_needs_its_digits_keeps_them(scored, tmp_path, monkeypatch):
    """Where the rounded policy scores otherwise, the policy is packed as it is."""
    worse = dataclasses.replace(scored, reference_returns=scored.random_returns)
    monkeypatch.setattr(zoo, "score_reference", lambda *_: worse)
    zoo.add_to_zoo(tmp_path, environments.make, scored, seed=1)
    chex.assert_trees_all_equal(load_reference(tmp_path / ID).policy.params, scored.policy.params)


def test_what_is_not_admitted_is_not_packed(scored, tmp_path):
    worse = dataclasses.replace(scored, reference_returns=scored.random_returns)
    with pytest.raises(ReferencePolicyError, match="not admitted"):
        zoo.add_to_zoo(tmp_path, environments.make, worse)
    assert not [*tmp_path.iterdir()]


def test_it_is_taken_only_where_the_environment_is_still_the_one(folder, scored):
    spec = scored.policy.spec
    assert zoo.take_from_zoo(folder, dataclasses.replace(spec, id="gymnax/CartPole-v1")) is None
    for changes in ({"version": "0"}, {"observation_space": gym.spaces.Box(0, 1, (10, 6), np.float32)}):
        with pytest.raises(cards.CardError, match="is not of this environment"):
            zoo.take_from_zoo(folder, dataclasses.replace(spec, **changes))


def test_the_stage_takes_what_the_zoo_has_and_trains_the_rest(folder, tmp_path):
    config = dataclasses.replace(CONFIG, zoo=str(folder))
    stage.run(config, tmp_path, (ID, "gymnax/CartPole-v1"))
    made = tmp_path / "references"
    assert UnitOutcome(**json.loads((made / ID / "outcome.json").read_text())).verdict == "admitted"
    chex.assert_trees_all_equal(load_reference(made / ID).policy.params, load_reference(folder / ID).policy.params)
    assert load_reference(made / "gymnax/CartPole-v1").policy.reference.candidates


def test_a_zoo_that_is_not_there_is_no_reason_to_train(tmp_path):
    for verify in (False, True):
        config = dataclasses.replace(CONFIG, zoo=str(tmp_path / "zoo"), verify=verify)
        with pytest.raises(WorkdirError, match="there is no zoo"):
            stage.run(config, tmp_path / "run", (ID,))
    assert not (tmp_path / "run" / "references").exists()


def test_a_score_that_is_not_true_is_found(folder, scored, tmp_path, capsys):
    stage.run(dataclasses.replace(CONFIG, zoo=str(folder), verify=True), tmp_path / "unused", (ID,))
    assert "1 of 1 references hold" in capsys.readouterr().out and not (tmp_path / "unused" / "references").exists()
    better = cards.Returns(tuple(tuple(5.0 + value for value in row) for row in scored.reference_returns.values))
    references.save_reference(tmp_path / "references" / ID, dataclasses.replace(scored, reference_returns=better))
    with pytest.raises(UnitsFailedError, match=r"recorded .*measured"):
        stage.run(dataclasses.replace(CONFIG, verify=True), tmp_path, (ID,))


FINER = score_zoo.FinerConfig(num_envs=32, least_episodes=64, most_episodes=512, z_error=0.05, workers=0)


def test_a_score_is_made_finer_in_place_once(folder, scored, tmp_path):
    """The same policy, as small as it was, with returns of other episodes that tell z as finely as was asked."""
    rough = cards.Returns(((1.0, 1.0), (1.0, -1.0)))
    few = dataclasses.replace(zoo.take_from_zoo(folder, scored.policy.spec), reference_returns=rough)
    references.save_reference(tmp_path / "zoo" / ID, few, halved=True)
    write_outcome(tmp_path / "zoo" / ID, UnitOutcome("admitted", "", "", 0.5, 12.0, 3.0))
    config, (params,) = dataclasses.replace(FINER, folder=str(tmp_path / "zoo")), tmp_path.rglob("params-*.npz")
    content = params.read_bytes()
    score_zoo.run(config, tmp_path / "run")
    finer = load_reference(tmp_path / "zoo" / ID)
    assert scores.z_error_at_reference(finer.random_returns.array, finer.reference_returns.array) <= 0.05
    assert finer.reference_returns.episodes >= 64 and zoo._compare(scored, finer).holds
    said = read_outcome(tmp_path / "zoo" / ID)
    assert params.read_bytes() == content and said[3:5] == (0.5, 12.0) and said.score_seconds > 3.0
    references.save_reference(tmp_path / "zoo" / ID, few, halved=True)
    score_zoo.run(config, tmp_path / "run")  # it goes on, and this one is done
    assert load_reference(tmp_path / "zoo" / ID).reference_returns == rough


def test_what_was_admitted_by_luck_is_refused_once_it_is_scored_more_finely(scored, tmp_path):
    nothing = dataclasses.replace(scored.policy, params=jax.tree.map(np.zeros_like, scored.policy.params))
    few = cards.Returns(((1.0, 1.0), (1.0, 0.8)))
    lucky = dataclasses.replace(scored, policy=nothing.with_decoding("greedy"), reference_returns=few)
    assert lucky.admission.admitted
    references.save_reference(tmp_path / "zoo" / ID, lucky)
    score_zoo.run(dataclasses.replace(FINER, folder=str(tmp_path / "zoo"), z_error=0.01), tmp_path / "run")
    assert zoo.take_from_zoo(tmp_path / "zoo", scored.policy.spec) is None
    assert read_outcome(tmp_path / "zoo" / ID).verdict == "refused"


def test_a_score_that_would_be_no_finer_stays(folder, scored, tmp_path):
    shutil.copytree(folder, tmp_path / "zoo")
    fine = load_reference(tmp_path / "zoo" / ID)
    config = dataclasses.replace(FINER, folder=str(tmp_path / "zoo"), z_error=1e-6, least_episodes=2, num_envs=2)
    score_zoo.run(dataclasses.replace(config, most_episodes=4), tmp_path / "run")
    assert load_reference(tmp_path / "zoo" / ID) == fine


def test_a_workdir_is_packed_and_what_is_packed_stays(scored, tmp_path, capsys):
    references.save_reference(tmp_path / "run" / "references" / ID, scored)
    write_outcome(tmp_path / "run" / "references" / ID, UnitOutcome("admitted", "", "", 0.5, 12.0, 3.0))
    refused = dataclasses.replace(scored, reference_returns=scored.random_returns)
    refused = dataclasses.replace(
        refused,
        policy=dataclasses.replace(scored.policy, spec=dataclasses.replace(scored.policy.spec, id="gymnax/Other")),
    )
    references.save_reference(tmp_path / "run" / "references" / "gymnax/Other", refused)
    config = pack_zoo.ZooConfig(folder=str(tmp_path / "packed"))
    failed = UnitOutcome("failed", "the reward is -inf", "faults")
    write_outcome(tmp_path / "run" / "references" / "envpool/Taxi-v3", failed)
    # This says something of a machine and nothing of an environment.
    slow = UnitOutcome("failed", "it took more than 1 s", "out of time")
    write_outcome(tmp_path / "run" / "references" / "envpool/Slow-v0", slow)
    for _ in range(2):
        pack_zoo.run(config, tmp_path / "run")
        assert "has 1 references" in capsys.readouterr().out
    packed = tmp_path / "packed"
    assert zoo.take_from_zoo(packed, scored.policy.spec) is not None
    assert (
        read_outcome(packed / "gymnax/Other").verdict == "refused"
        and read_outcome(packed / "envpool/Taxi-v3") == failed
    )
    assert not (packed / "envpool/Slow-v0").exists()
    stage.run(dataclasses.replace(CONFIG, zoo=str(packed)), tmp_path / "other", (ID,))
    assert read_outcome(tmp_path / "other" / "references" / ID)[3:] == (0.5, 12.0, 3.0)  # what it took to make it


def test_what_was_refused_is_packed_once_it_is_admitted(scored, tmp_path):
    references.save_reference(tmp_path / "run" / "references" / ID, scored)
    write_outcome(tmp_path / "packed" / ID, UnitOutcome("refused", "the reference returns 0 and random 0"))
    pack_zoo.run(pack_zoo.ZooConfig(folder=str(tmp_path / "packed")), tmp_path / "run")
    assert zoo.take_from_zoo(tmp_path / "packed", scored.policy.spec) is not None
    assert read_outcome(tmp_path / "packed" / ID).verdict == "admitted"


def test_why_there_is_no_reference_is_taken_like_a_reference(tmp_path):
    refused = UnitOutcome("refused", "the reference returns 0 and random 0")
    write_outcome(tmp_path / "zoo" / ID, refused)
    stage.run(dataclasses.replace(CONFIG, zoo=str(tmp_path / "zoo")), tmp_path / "run", (ID,))
    assert read_outcome(tmp_path / "run" / "references" / ID) == refused


def test_what_a_zoo_refuses_is_refused_by_all_that_follows(scored, tmp_path):
    id, why = "bsuite/cartpole_noise/4", "the reference returns 0 and random 0"
    write_outcome(tmp_path / "zoo" / id, UnitOutcome("refused", why))
    zoo.save_reference(tmp_path / "zoo" / ID, scored)
    workdir = tmp_path / "run"
    stage.run(dataclasses.replace(CONFIG, zoo=str(tmp_path / "zoo")), workdir, (ID, id))
    small = collecting.CollectConfig(streams=4, steps=32)
    collect.run(collect.CollectStageConfig(data=small, workers=0), workdir, (ID, id))
    dataset = open_dataset(workdir / "dataset")
    assert [*dataset.ids] == [ID]
    found = {one.id: one for one in references_table.find_references(workdir / "references")}
    assert found[id].outcome.reason == why and found[id].scored is None and found[ID].scored is not None
    cfg = ldm_jax.SIZES["nano"]
    params = ldm_jax.make_model(cfg).init(jax.random.key(0))
    ldm_jax.Policy(cfg, params, {ID: dataset.card(ID)}).save(workdir / "policy")
    told = evaluate.run(evaluate.EvaluateConfig(num_envs=4, episodes=1, workers=0), workdir, (ID, id))
    (item,) = [item for item in told["environments"] if item["id"] == id]
    assert item["reason"] == why and item["domain"] == environments.spec(id).domain


def test_a_reference_of_an_isolated_environment_is_taken_without_building_what_it_lives_in(tmp_path, monkeypatch):
    id = "bsuite/cartpole_noise/4"
    policy = expert_policies(environments.spec(id))[0]
    returns = (cards.Returns(((mean, mean + 1.0), (mean, mean - 1.0))) for mean in (0.0, 100.0))
    references.save_reference(tmp_path / "zoo" / id, references.ScoredReference(policy, *returns))
    monkeypatch.setattr(registry, "build_group", None)
    monkeypatch.setattr(making, "opened", None)
    stage.run(dataclasses.replace(CONFIG, zoo=str(tmp_path / "zoo")), tmp_path / "run", (id,))
    assert load_reference(tmp_path / "run" / "references" / id).policy == policy

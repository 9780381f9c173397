"""Playing where a policy was not trained: each beside random, what is finished stays, and what fails is told."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import environments
import ldm_jax
from experiments import zero_shot
from experiments.harness.stage import UnitsFailedError
from experiments.harness.workdir import WorkdirError
from ldm_jax import measuring
from ldm_jax.cards import Returns

CONFIG = zero_shot.ZeroShotConfig(num_envs=4, episodes=2, workers=0)
ID = "gymnax/Catch-bsuite"


@pytest.fixture
def workdir(tmp_path):
    cfg = ldm_jax.SIZES["nano"]
    params = ldm_jax.make_model(cfg).init(jax.random.key(0))
    card = measuring.unmeasured_card(environments.spec("gymnax/CartPole-v1"))
    ldm_jax.Policy(cfg, params, {card.id: card}).save(tmp_path / "policy")
    return tmp_path


def test_each_is_played_once_beside_random_and_one_that_fails_is_told(workdir, capsys):
    too_large = "jumanji/PacMan-v1"  # for a model of this size
    with pytest.raises(UnitsFailedError, match=f"1 failed.*{too_large}"):
        zero_shot.run(CONFIG, workdir, (ID, too_large))
    page = (workdir / "zero_shot.md").read_text()
    assert page in capsys.readouterr().out
    assert f"| {ID} | " in page and f"| {too_large} | failed: " in page
    before = json.loads((workdir / "zero_shot" / f"{ID}.json").read_text())
    assert np.shape(before["model"]) == np.shape(before["random"]) == (4, 2)
    zero_shot.run(CONFIG, workdir, (ID,))
    assert json.loads((workdir / "zero_shot" / f"{ID}.json").read_text()) == before
    assert "0 failed" in (workdir / "zero_shot.md").read_text()


def test_what_another_policy_played_is_played_again(workdir):
    first = zero_shot.run(CONFIG, workdir, (ID,))
    policy = ldm_jax.load(workdir / "policy")
    dataclasses.replace(policy, params=jax.tree.map(lambda leaf: leaf + 0.5, policy.params)).save(workdir / "policy")
    assert zero_shot.run(CONFIG, workdir, (ID,))[ID].random == first[ID].random
    said = json.loads((workdir / "zero_shot" / f"{ID}.json").read_text())
    assert said["policy"] == zero_shot.fingerprint(ldm_jax.load(workdir / "policy"))


def test_where_a_policy_was_trained_it_is_not_new(workdir):
    with pytest.raises(WorkdirError, match=r"was trained in gymnax/CartPole-v1: experiments.evaluate"):
        zero_shot.run(CONFIG, workdir, (ID, "gymnax/CartPole-v1"))
    with pytest.raises(WorkdirError, match="no environment was named"):
        zero_shot.run(CONFIG, workdir, ())


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.0, "as random"), (0.01, "as random"), (5.0, "better"), (-5.0, "worse")]
)
def test_a_difference_counts_where_errors_do_not_explain_it(shift, verdict):
    values = np.random.default_rng(0).normal(size=(16, 4))
    model, random = (Returns(tuple(map(tuple, returns.tolist()))) for returns in (values + shift, values))
    assert zero_shot.ZeroShot(model, random).verdict == verdict

"""The policies that are part of the package: small enough, told by a card, and as good as the card says."""

import json
import pathlib

import jax
import pytest

import environments
import ldm_jax
from ldm_jax.model.network import count_parameters
from ldm_jax.policy import released

MEGABYTES, MILLIONS = 16, 8
PLAYED = (
    "bsuite/cartpole_noise/4",
    "bsuite/discounting_chain/1",
    "bsuite/memory_len/5",
    "nasim/TinyGenRgoal2D-v0",
    "nasim/TinySmall2D-v0",
)
"""Environments in which it is scored here: quick, and in interpreters that are built in half a minute."""


@pytest.fixture(params=released())
def folder(request):
    return pathlib.Path(ldm_jax.__file__).parent / "policies" / request.param


def test_the_package_has_a_policy():
    assert "panel200" in released()


def test_a_released_policy_is_small_and_told_by_its_card(folder):
    policy = ldm_jax.load(folder.name)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MEGABYTES * 1e6
    assert count_parameters(policy.params) <= MILLIONS * 1e6
    assert {leaf.dtype.name for leaf in jax.tree.leaves(policy.params)} == {"float32"}  # as the model computes
    card = (folder / "README.md").read_text("utf-8")
    assert f'ldm_jax.load("{folder.name}")' in card and all(f"| {id} | " in card for id in policy.ids)


def test_the_scores_of_a_released_policy_are_those_of_its_cards(folder):
    policy, scores = ldm_jax.load(folder.name), json.loads((folder / "scores.json").read_text())
    assert {*scores} <= {*policy.ids}
    for id, told in scores.items():
        card = policy.cards[id]
        assert told["random"] == pytest.approx(card.random_returns.mean, rel=1e-6, abs=1e-6)
        assert told["reference"] == pytest.approx(card.reference_returns.mean, rel=1e-6, abs=1e-6)
        z = (told["model"] - told["random"]) / (told["reference"] - told["random"])
        assert told["z"] == pytest.approx(z, rel=1e-6, abs=1e-6)
        assert told["z_low"] <= told["z_high"]


@pytest.mark.parametrize("id", PLAYED)
def test_a_released_policy_is_as_good_as_its_card_says(id):
    policy = ldm_jax.load("panel200")
    told = json.loads((pathlib.Path(ldm_jax.__file__).parent / "policies/panel200/scores.json").read_text())[id]
    environment = environments.make(id, 32, isolation="venv")
    found = ldm_jax.evaluate(policy, environment, jax.random.key(1), episodes=2)
    environment.close()
    low, high = told["z_low"], told["z_high"]  # None where all its episodes return the same
    assert found.z.low <= (told["z"] if high is None else high), (found, told)
    assert found.z.high >= (told["z"] if low is None else low), (found, told)

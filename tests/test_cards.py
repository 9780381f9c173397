"""Laws of environment cards: what they refuse, and what they say of an environment that is no longer theirs."""

import dataclasses

import examples
import numpy as np
import pytest
from gymnasium import spaces as gs

from ldm_jax import cards
from ldm_jax.types import EnvironmentSpec

CARD = examples.make_card(*examples.SPACES["mixed"], name="test/mixed")


def spec_of(card, **changes):
    names = [field.name for field in dataclasses.fields(EnvironmentSpec)]
    fields = {name: getattr(card, name) for name in names if hasattr(card, name)}
    return EnvironmentSpec(**{**fields, "batch_size": 3, "jittable": False, **changes})


def test_a_card_and_a_spec_match_the_environment_they_are_of_whatever_its_batch_size():
    cards.check_matches(CARD, spec_of(CARD), "the card")
    cards.check_matches(spec_of(CARD, batch_size=1), spec_of(CARD, batch_size=7, jittable=True), "the reference")


OBSERVATION = CARD.observation_space


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "test/other"}, "id was test/mixed there and is test/other now"),
        ({"version": "2"}, "version was 1 there and is 2 now"),
        ({"time_limit": 11}, "time_limit was 10 there and is 11 now"),
        (
            {"observation_space": gs.Dict({**OBSERVATION, "at": gs.Box(0, 8, (2,))})},
            "observation_space.spaces.at.high was 9.0 there and is 8.0 now",
        ),
        (
            {"observation_space": gs.Dict({**OBSERVATION, "at": gs.Box(0, 9, (2,), np.float64)})},
            "observation_space.spaces.at.dtype was float32 there and is float64 now",
        ),
        (
            {"observation_space": gs.Dict({**OBSERVATION, "facing": gs.Discrete(4, start=1)})},
            "observation_space.spaces.facing.start was 0 there and is 1 now",
        ),
        ({"action_space": gs.Discrete(4)}, "action_space.kind was Tuple there and is Discrete now"),
        (
            {"version": "2", "time_limit": 1},
            "time_limit was 10 there and is 1 now; version was 1 there and is 2 now",
        ),
    ],
)
def test_every_difference_of_an_environment_from_its_card_is_named(changes, message):
    with pytest.raises(cards.CardError) as raised:
        cards.check_matches(CARD, spec_of(CARD, **changes), "the policy in here")
    assert str(raised.value).startswith("the policy in here is not of this environment: ")
    assert message in str(raised.value)
    cards.check_matches(spec_of(CARD, **changes), spec_of(CARD, **changes), "itself")


def test_a_difference_of_many_bounds_is_cut():
    wide = examples.make_card(gs.Box(-np.arange(1, 999, dtype=np.float32), 1.0), gs.Discrete(2))
    other = spec_of(wide, observation_space=gs.Box(-np.arange(2, 1000, dtype=np.float32), 1.0))
    with pytest.raises(cards.CardError) as raised:
        cards.check_matches(wide, other, "it")
    assert "observation_space.low was" in str(raised.value) and len(str(raised.value)) < 600

"""Laws of environment cards: what they refuse, and what they say of an environment that is no longer theirs."""

import copy
import dataclasses
import json
import pickle

import examples
import numpy as np
import pytest
from gymnasium import spaces as gs
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces_strategies import action_spaces, any_spaces

from ldm_jax import cards
from ldm_jax.encoding.actions import action_layout
from ldm_jax.errors import ConfigError
from ldm_jax.types import MAX_TIME_LIMIT, EnvironmentSpec

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


@settings(max_examples=50, deadline=None)
@given(any_spaces, action_spaces)
def test_a_card_survives_json_pickle_and_copies_before_and_after_it_was_used(observation_space, action_space):
    card = examples.make_card(observation_space, action_space)
    for _ in range(2):
        text = json.dumps(card.to_json(), allow_nan=False)
        back = cards.EnvironmentCard.from_json(json.loads(text))
        assert json.dumps(back.to_json(), allow_nan=False) == text
        for other in (back, pickle.loads(pickle.dumps(card)), copy.deepcopy(card), copy.copy(card)):
            assert other == card
        spec = spec_of(card)
        assert spec == pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec)
        layout = action_layout(action_space, low=-1.0, high=1.0)
        assert layout == pickle.loads(pickle.dumps(layout)) == copy.deepcopy(layout)
        # Use it: fill what is cached.
        assert card.random_returns.array.size and isinstance(layout.sizes, tuple)
        card.observation_space.seed(0)
        card.observation_space.sample()


def test_layouts_differ_by_their_ranges():
    space = gs.Box(-np.inf, np.inf, (2,))
    assert action_layout(space, -1.0, 1.0) == action_layout(space, np.array([-1.0, -1.0]), 1.0)
    assert action_layout(space, -1.0, 1.0) != action_layout(space, -1.0, 2.0)
    assert action_layout(space, -1.0, 1.0) != action_layout(gs.Box(-1, 1, (2,)))


def test_printing_a_card_takes_one_line():
    wide = examples.make_card(gs.Box(-np.arange(1, 999, dtype=np.float32), 1.0), gs.MultiDiscrete(np.arange(2, 400)))
    for card in (CARD, wide):
        assert card.id in repr(card) and "greedy" in repr(card) and len(repr(card)) < 320
        assert f"{card.reference_returns.mean:.4g}" in repr(card)
        for part in (card.statistics, card.random_returns, card.reference):
            assert len(repr(part)) < 140 and "\n" not in repr(part)


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", BAD)
def test_no_number_of_a_card_may_be_nan_or_infinite(value):
    with pytest.raises(cards.CardError, match=f"a return has the value {value}"):
        cards.Returns(((1.0, value),))
    for name in ("observation_mean", "observation_std", "action_low", "action_high"):
        numbers = list(getattr(CARD.statistics, name))
        with pytest.raises(cards.CardError, match=f"{name} has the value {value}"):
            dataclasses.replace(CARD.statistics, **{name: (*numbers[:-1], value)})
    with pytest.raises(cards.CardError, match="reward_scale"):
        dataclasses.replace(CARD.statistics, reward_scale=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("observation_std", (0.0, 1.0)),
        ("observation_std", (-1.0, 1.0)),
        ("observation_mean", (0.0,)),
        ("action_low", ()),
        ("reward_scale", 0.0),
        ("reward_scale", -1.0),
        ("steps", -1),
        ("steps", 1.5),
        ("outside", True),
    ],
)
def test_statistics_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(cards.CardError, match=name):
        dataclasses.replace(CARD.statistics, **{name: value})


def test_returns_need_rows_of_equally_many_episodes():
    for values in ((), ((),), ((1.0,), (1.0, 2.0))):
        with pytest.raises(cards.CardError, match="at least one"):
            cards.Returns(values)


def test_a_reference_names_the_slots_whose_range_was_assumed_and_keeps_plain_numbers():
    reference = cards.Reference("ppo", "sample", np.int64(7), np.uint32(3), assumed_slots=np.array([0, 2]))
    assert reference == cards.Reference(**json.loads(json.dumps(dataclasses.asdict(reference))))
    assert reference.assumed_slots == (0, 2)
    with pytest.raises(cards.CardError, match="decoding is 'gredy', expected 'greedy' or 'sample'"):
        cards.Reference("ppo", "gredy", 7, 3)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([np.int8, np.int64, np.uint16, np.int32]), st.integers(1, 100), st.integers(1, 100))
def test_sizes_of_numpy_are_plain_numbers_of_a_spec(dtype, batch_size, time_limit):
    spec = spec_of(CARD, batch_size=dtype(batch_size), time_limit=dtype(time_limit))
    assert type(spec.batch_size) is int and type(spec.time_limit) is int
    assert spec == spec_of(CARD, batch_size=batch_size, time_limit=time_limit)
    assert json.loads(json.dumps([spec.batch_size, spec.time_limit])) == [batch_size, time_limit]


@pytest.mark.parametrize("name", ["batch_size", "time_limit"])
@pytest.mark.parametrize("value", [0, -1, True, np.True_, 2.0, np.float32(3), "4", None, np.nan])
def test_sizes_that_are_no_counts_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} of test/mixed is .*, expected a whole number, at least 1"):
        spec_of(CARD, **{name: value})


def test_a_time_limit_that_cannot_be_counted_is_refused_with_the_largest():
    assert spec_of(CARD, time_limit=MAX_TIME_LIMIT).time_limit == 2**31 - 2
    with pytest.raises(ConfigError, match="expected a whole number, at least 1 and at most 2147483646"):
        spec_of(CARD, time_limit=2**31 - 1)

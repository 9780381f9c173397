"""How the rows of a batch are shared: among environments, and among buckets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shares import DrawsConfig, allot, environment_shares
from ldm_jax.errors import ConfigError


def names(count):
    return [f"{'ab'[i % 2]}/{i}" for i in range(count)]


@given(
    st.lists(st.integers(1, 10**12), min_size=1, max_size=50),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.sampled_from(["", "a/0=7", "a=0.01", "a=1e6, a/0=1e-6"]),
)
def test_environments_share_by_their_steps_and_weights_and_none_starves(steps, alpha, floor, weights):
    draws = DrawsConfig(alpha, floor, weights)
    ids, least = names(len(steps)), floor / len(steps)
    shares = environment_shares(draws, ids, steps)
    assert shares.sum() == pytest.approx(1) and shares.min() >= least * (1 - 1e-9)
    own = [draws.own.get(id, draws.own.get(id[0], 1.0)) for id in ids]
    logs = alpha * np.log(steps) + np.log(own)
    (free,) = np.nonzero(shares > least * (1 + 1e-9))
    ratios = np.log(shares[free]) - logs[free]
    assert not ratios.size or np.ptp(ratios) < 1e-6


@given(st.data())
def test_buckets_share_the_rows_asked_for(data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=20))
    floor, multiple = data.draw(st.sampled_from([0.0, 0.1, 0.5])), data.draw(st.integers(1, 4))
    rows = multiple * data.draw(st.integers(1, 300))
    steps = data.draw(st.lists(st.integers(1, 10**6), min_size=sum(sizes), max_size=sum(sizes)))
    shares = environment_shares(DrawsConfig(1.0, floor), names(len(steps)), steps)
    parts = np.split(shares, np.cumsum(sizes)[:-1])
    allotted = allot(parts, rows, floor, multiple)
    total = sum(part.rows for part in allotted)
    assert total == max(rows, multiple * len(sizes))
    assert all(part.rows >= multiple and part.rows % multiple == 0 for part in allotted)
    enough = rows >= 2 * multiple * len(sizes)
    for part, wanted in zip(allotted, parts, strict=True):
        assert part.shares.sum() == pytest.approx(1)
        expected = part.rows / total * part.shares
        if enough:
            assert expected.min() >= floor / len(shares) * (1 - 1e-6)
        free = part.shares > part.shares.min() * (1 + 1e-9)  # not raised to the floor
        if free.any():
            assert np.ptp(np.log(part.shares[free] / wanted[free])) < 1e-6
        if not floor and all(rows * other.sum() >= multiple for other in parts):
            assert abs(part.rows - rows * wanted.sum()) < multiple * (1 + 1e-6)


def test_a_batch_does_not_grow_with_the_environments():
    for count in (13, 2000):
        shares = environment_shares(DrawsConfig(), names(count), [1000] * count)
        assert sum(part.rows for part in allot(np.array_split(shares, 8), 52)) == 52
    assert [part.rows for part in allot([np.full(n, 1 / 13) for n in (1, 5, 7)], 52)] == [4, 20, 28]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": 1.5}, r"draws\.alpha is 1\.5"),
        ({"floor": 0.6}, r"draws\.floor is 0\.6"),
        ({"floor": float("nan")}, "floor is nan"),
        ({"weights": "a/0"}, "'a/0', expected name=weight"),
        ({"weights": "a/0=0"}, r"expected name=weight with a number of 1e-06 to 1e\+06"),
        ({"weights": "a/0=x"}, "expected name=weight"),
        ({"weights": "c=1"}, "names c, on which nothing is trained"),
    ],
)
def test_draws_that_cannot_be_say_what_is_expected(change, words):
    with pytest.raises(ConfigError, match=words):
        environment_shares(DrawsConfig(**change), names(2), [1, 1])


def test_rows_that_do_not_divide_say_so():
    with pytest.raises(ConfigError, match="rows is 5, expected a multiple of rows_multiple, 2"):
        allot([np.ones(1)], 5, multiple=2)

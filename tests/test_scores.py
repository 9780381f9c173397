import dataclasses
import itertools
import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ldm_jax.evaluation import aggregates, bootstrap, scores


def normal(seed, mean, deviation, rows=32, episodes=4):
    return np.random.default_rng(seed).normal(mean, deviation, (rows, episodes))


def score(model, id="gymnax/A", random=0.0, reference=10.0, deviation=1.0, seed=0):
    """Scores a model of this mean return; every policy has the same deviation."""
    returns = [normal(seed + i, mean, deviation) for i, mean in enumerate((random, reference, model))]
    return scores.score(scores.Measurement(id, "games", *returns), seed=0, resamples=400)


def many():
    return [
        score(10.0, "gymnax/A"),
        score(8.0, "gymnax/B", seed=10),
        score(2.0, "envpool/C", seed=20),
        score(11.0, "envpool/D", seed=30, deviation=0.0),
        score(1.0, "envpool/Refused", reference=0.0, seed=40),
    ]


# The rule of admission


def test_admission_needs_three_standard_errors_and_z_to_a_tenth():
    # 64 episodes of deviation 1 each: the standard error is 1 / sqrt(32) = 0.177, and z needs ten of them.
    spread = np.tile([-1.0, 1.0], 32) * math.sqrt(63 / 64)
    assert "standard errors apart" in scores.admit(spread, spread + 0.52).reason
    unsure = scores.admit(spread, spread + 0.54)
    assert not unsure.admitted and "z has a standard error of 0.33 with 64 episodes" in unsure.reason
    assert unsure.standard_error == pytest.approx(1 / math.sqrt(32))
    assert unsure.difference == pytest.approx(0.54)
    assert not scores.admit(spread, spread + 1.76).admitted
    assert scores.admit(spread, spread + 1.78).admitted


def test_noisy_returns_need_more_episodes_and_are_not_refused_for_it():
    # Blackjack: -0.39 at random, -0.07 when well played, and a return of about -1 or 1 each time.
    random, reference = (np.where(np.linspace(0, 1, 4096) < share, 1.0, -1.0) for share in (0.305, 0.465))
    assert reference.mean() - random.mean() < 0.5 * random.std()
    assert "play more of them" in scores.admit(random[::16], reference[::16]).reason
    assert scores.admit(random, reference).admitted


@hypothesis.given(st.integers(0, 1000), st.floats(0.1, 3), st.floats(0.01, 100))
def test_the_error_of_z_does_not_tell_which_is_better(seed, gap, unit):
    one, other = normal(seed, 0, 1) * unit, normal(seed + 1, gap, 1) * unit
    assert scores.z_error(one, other) == pytest.approx(scores.z_error(-one, -other)) == scores.z_error(other, one)


@pytest.mark.parametrize("reference", [0.1, 0.1 - 1e-12, 0.1 + 1e-12, -5.0])
def test_a_reference_no_better_than_random_is_refused_even_without_variance(reference):
    admission = scores.admit(np.full(7, 0.1), np.full(50, reference))
    assert not admission.admitted and "not better than random" in admission.reason


def test_without_variance_any_real_difference_is_admitted():
    assert scores.admit(np.zeros(10), np.full(10, 0.01)).admitted


@hypothesis.given(st.integers(0, 1000), st.floats(-3, 3), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_admission_does_not_depend_on_the_units_of_the_return(seed, gap, scale, shift):
    random, reference = normal(seed, 0, 1), normal(seed + 1, gap, 1)
    plain, moved = scores.admit(random, reference), scores.admit(random * scale + shift, reference * scale + shift)
    near = min(abs(plain.difference / plain.standard_error - 3), abs(plain.z_error - scores.ADMIT_Z_ERROR)) < 1e-3
    hypothesis.assume(not near and abs(plain.difference) * scale > 1e-2)
    assert plain.admitted == moved.admitted


# z and its interval


def test_z_is_0_for_random_and_1_for_the_reference():
    assert bootstrap.z_score(-1200.0, -150.0, -1200.0) == 0.0
    assert bootstrap.z_score(-1200.0, -150.0, -150.0) == 1.0
    assert bootstrap.z_score(0.0, 10.0, 12.0) == 1.2


@pytest.mark.parametrize("reference", [5.0, 4.0])
def test_reference_below_random_has_no_z(reference):
    with pytest.raises(ValueError, match="z has no meaning"):
        bootstrap.z_score(5.0, reference, 5.0)
    with pytest.raises(ValueError, match="z has no meaning"):
        flat = np.full((4, 2), 5.0)
        bootstrap.bootstrap_z(flat, np.full((4, 2), reference), flat, seed=0)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_z_and_its_interval_do_not_depend_on_the_units_of_the_return(seed, scale, shift):
    returns = [normal(seed + i, mean, 1) for i, mean in enumerate((0, 10, 7))]
    plain, _ = bootstrap.bootstrap_z(*returns, seed=3, resamples=50)
    moved, _ = bootstrap.bootstrap_z(*(value * scale + shift for value in returns), seed=3, resamples=50)
    np.testing.assert_allclose(moved, plain, rtol=1e-6)
    assert plain.low <= plain.value <= plain.high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # Rows share a bad or good day, as they do when a context goes wrong: resampling episodes instead covers 69 %.
    hits, trials = 0, 300
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        model = rng.normal(8, 0.5, (16, 8)) + rng.normal(0, 2, (16, 1))
        random, reference = rng.normal(0, 3, (32, 4)), rng.normal(10, 3, (32, 4))
        estimate, _ = bootstrap.bootstrap_z(random, reference, model, seed=trial, resamples=200)
        hits += estimate.low <= 0.8 <= estimate.high
    assert 0.90 <= hits / trials <= 0.98


def test_the_interval_holds_the_chance_of_all_three_returns():
    exact, noisy = (0.0, 10.0, 5.0), 2.0

    def width(which):
        returns = [normal(i, mean, noisy if i == which else 0.0) for i, mean in enumerate(exact)]
        estimate, _ = bootstrap.bootstrap_z(*returns, seed=0, resamples=200)
        return estimate.high - estimate.low

    assert width(None) == 0
    assert all(width(which) > 0.01 for which in range(3))


def test_a_resample_without_a_z_widens_the_interval_and_never_counts_as_reached():
    # Two reference episodes, one as bad as random: a quarter of the resamples are not better than random.
    random, model = np.zeros((2, 1)), np.full((2, 1), 10.0)
    estimate, samples = bootstrap.bootstrap_z(random, np.array([[0.0], [1.0]]), model, seed=0, resamples=400)
    assert 0.1 < np.isnan(samples).mean() < 0.4
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)
    point = aggregates.curve(np.array([20.0]), np.array([estimate.low]), samples[None], taus=[1.0])[0]
    assert (point.low, point.count, point.conservative) == (0, 1, 0)


def test_the_same_seed_gives_the_same_interval_whatever_else_is_scored():
    first, second = score(7.0), score(7.0)
    assert first == second
    np.testing.assert_array_equal(first.z_samples, second.z_samples)
    assert score(7.0, id="gymnax/Other").z.low != first.z.low


@pytest.mark.parametrize("which", ["random", "reference", "model"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_returns_that_are_not_numbers_raise_with_the_environment_and_the_policy(which, bad):
    returns = {"random": normal(0, 0, 1), "reference": normal(1, 10, 1), "model": normal(2, 9, 1)}
    returns[which][3, 1] = bad
    with pytest.raises(ValueError, match=f"gymnax/A: 1 of 128 {which} returns are NaN or infinite"):
        scores.score(scores.Measurement("gymnax/A", "games", *returns.values()), seed=0)


def test_a_single_row_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 rows"):
        bootstrap.bootstrap_z(normal(0, 0, 1), normal(1, 10, 1), normal(2, 9, 1, rows=1), seed=0)


def test_first_episode_is_scored_apart():
    model = np.tile([0.0, 10.0, 10.0, 10.0], (8, 1))
    measured = scores.Measurement("gymnax/A", "games", np.zeros((8, 4)), np.full((8, 4), 10.0), model, 9.5)
    result = scores.score(measured, seed=0)
    assert (result.z_first_episode, result.z.value, result.model.episodes, result.model.rows) == (0.0, 0.75, 32, 8)
    assert result.public_target == 9.5


def test_a_refused_environment_is_listed_and_never_scored():
    result = score(0.0, reference=0.0)
    assert not result.admitted and result.z is None and result.z_first_episode is None
    assert result.model is not None
    found = result.to_json()
    assert found["z"] is None and found["z_low"] is None and found["model"] == result.model.mean
    assert scores.score(scores.Measurement("gymnax/A", "", np.zeros(3), np.zeros(3), None), seed=0).model is None
    with pytest.raises(bootstrap.ScoreError, match="no returns of the model"):
        scores.score(scores.Measurement("gymnax/A", "", np.zeros(3), np.ones(3), None), seed=0)


@pytest.mark.parametrize("which", ["random", "reference", "model"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_one_environment_without_a_result_costs_no_other(which, bad):
    sound = {"random": normal(0, 0, 1), "reference": normal(1, 10, 1), "model": normal(2, 9, 1)}
    broken = {name: returns.copy() for name, returns in sound.items()}
    if bad is None:
        broken[which] = None
    else:
        broken[which][3, 1] = bad
    measured = [scores.Measurement(id, "games", *sound.values()) for id in ("gymnax/A", "gymnax/C")]
    measured.insert(1, scores.Measurement("gymnax/B", "games", *broken.values()))
    found = scores.score_each(measured, seed=0, resamples=50)
    assert found[::2] == scores.score_each(measured[::2], seed=0, resamples=50)
    assert all(score.admitted for score in found[::2])
    listed = found[1]
    assert not listed.admitted and getattr(listed, which) is None
    assert all(getattr(listed, other) == getattr(found[0], other) for other in sound if other != which)
    assert ("no returns" if bad is None else f"1 of 128 {which} returns are NaN or infinite") in listed.reason
    report = aggregates.scores_json(found, 1, "greedy", seed=0)
    assert (report["registered"], report["admitted"]) == (3, 2)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert f"gymnax/B: {listed.reason}" in aggregates.table(report)


def test_why_an_environment_has_no_result_is_said_where_it_is_known():
    measured = scores.Measurement(
        "gymnax/A", "", np.zeros(3), np.ones(3), None, None, "the policy was not trained in it"
    )
    (listed,) = scores.score_each([measured], seed=0)
    assert not listed.admitted and listed.reason == "the policy was not trained in it"
    # The rule of admission comes first: what is refused needs no result.
    (refused,) = scores.score_each([measured._replace(reference_returns=np.zeros(3))], seed=0)
    assert "not better than random" in refused.reason


def test_distance_is_in_the_reference_s_own_deviations():
    # z forgives everything where random is disastrous: halfway to a crash is still z = 0.98.
    result = score(model=-20.0, random=-2000.0, reference=10.0)
    assert result.z.value > 0.98 and result.reference_distance < -25
    assert score(10.0, deviation=0.0).reference_distance == 0.0
    assert score(9.0, deviation=0.0).reference_distance is None


# The curve and the aggregates


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 1000), st.integers(1, 12))
def test_the_curve_falls_stays_in_its_band_and_the_conservative_one_below_it(seed, environments):
    rng = np.random.default_rng(seed)
    z = rng.normal(0.8, 0.4, environments)
    samples = z[:, None] + rng.normal(0, 0.1, (environments, 100))
    points = aggregates.curve(z, np.quantile(samples, 0.025, axis=1).clip(max=z), samples)
    assert [point.tau for point in points] == list(aggregates.TAUS) and aggregates.TAUS[-1] == 1.2
    assert all(earlier.count >= later.count for earlier, later in itertools.pairwise(points))
    assert all(0 <= p.low <= p.count <= p.high <= environments and p.conservative <= p.count for p in points)


def test_without_noise_the_curve_is_a_count():
    z = np.array([0.2, 0.5, 1.0, 1.1])
    points = {point.tau: point for point in aggregates.curve(z, z, np.repeat(z[:, None], 10, axis=1))}
    for tau, count in [(0.0, 4), (0.2, 4), (0.21, 3), (1.0, 2), (1.1, 1), (1.2, 0)]:
        assert (points[tau].low, points[tau].count, points[tau].high) == (count, count, count)


def test_doing_what_the_reference_does_reaches_1_in_spite_of_rounding():
    random, reference, model = np.full((7, 3), 0.1), np.full((50, 2), 0.7), np.full((11, 3), 0.7)
    result = scores.score(scores.Measurement("gymnax/A", "", random, reference, model), seed=0)
    found = aggregates.scores_json([result], 1, "greedy", seed=0)
    assert found["matches"] == 1
    assert next(point for point in found["curve"] if point["tau"] == 1.0)["low"] == 1


def test_interquartile_mean_and_optimality_gap():
    z = np.array([-100.0, 0.5, 0.7, 0.8, 1.0, 1.0, 1.0, 50.0])
    assert aggregates.interquartile_mean(z) == pytest.approx((0.7 + 0.8 + 1.0 + 1.0) / 4)
    assert aggregates.optimality_gap(np.array([0.5, 1.0, 3.0])) == pytest.approx(0.5 / 3)
    np.testing.assert_allclose(aggregates.interquartile_mean(np.stack([z, z + 1], 1)), [0.875, 1.875])


def test_the_bootstrap_of_an_aggregate_keeps_every_library():
    # One library at 0 and one at 1, no noise inside: only a bootstrap that ignored libraries would vary.
    low, high = score(0.0, "a/1", deviation=0.0), score(10.0, "b/1", deviation=0.0)
    items = [low, dataclasses.replace(low, id="a/2"), high, dataclasses.replace(high, id="b/2")]
    assert tuple(aggregates.aggregate(aggregates.optimality_gap, items, seed=0)) == (0.5, 0.5, 0.5)


@pytest.mark.filterwarnings("error")
def test_an_environment_whose_resamples_have_no_z_leaves_an_aggregate_without_a_lower_end():
    sound = score(10.0)
    item = dataclasses.replace(sound, id="envpool/B", z_samples=np.full(sound.z_samples.shape, np.nan))
    estimate = aggregates.aggregate(aggregates.interquartile_mean, [sound, item], seed=0)
    assert estimate.value == pytest.approx(sound.z.value) and estimate.low == -math.inf
    assert aggregates.scores_json([sound, item], 1, "greedy", seed=0)["admitted"] == 2


def test_nothing_admitted_is_said_and_not_scored():
    refused = [score(1.0, reference=0.0)]
    with pytest.raises(ValueError, match="no environment is admitted"):
        aggregates.aggregate(aggregates.optimality_gap, refused, seed=0)
    found = aggregates.scores_json(refused, 1, "greedy", seed=0)
    assert found["iqm"] is None and found["admitted"] == 0 and {point["count"] for point in found["curve"]} == {0}
    assert "admitted 0 of 1" in aggregates.table(found)


# JSON and the table


def test_json_has_the_fixed_keys_and_survives_strict_json():
    crashed = scores.Measurement("envpool/Crashed", "games", None, None, None, 3.0, "the simulator died")
    items = [*many(), *scores.score_each([crashed], seed=0)]
    found = aggregates.scores_json(items, parameters=1_000_000, decoding="greedy", seed=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["registered"], found["admitted"], found["parameters"], found["decoding"]) == (
        6,
        4,
        1_000_000,
        "greedy",
    )
    keys = "id library domain admitted random reference model public_target z z_low z_high z_first_episode episodes"
    assert all(set(keys.split()) <= set(item) for item in found["environments"])
    assert all(set(point) == {"tau", "count", "low", "high"} for point in found["curve"])
    assert [item["z"] is None for item in found["environments"]] == [False] * 4 + [True] * 2
    assert [item["library"] for item in found["environments"]] == ["gymnax"] * 2 + ["envpool"] * 4


def test_an_environment_counts_once():
    with pytest.raises(ValueError, match="more than one score of gymnax/A"):
        aggregates.scores_json([score(1.0), score(2.0)], 1, "greedy", seed=0)


def test_the_table_shows_every_environment_and_always_admitted_of_registered():
    text = aggregates.table(aggregates.scores_json(many(), 1, "greedy", seed=0))
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["environment", "random", "reference", "model"]
    assert all(any(line.lstrip().startswith(item.id) for line in lines) for item in many())
    assert "not better than random" in text or "standard" in text
    assert lines[-1].startswith("admitted 4 of 5 environments: z >= 0.8 in ")


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(None, ".2f", "-"), (-0.001, ".2f", "0.00"), (-2068.7, ".4g", "-2069"), (0.123456, ".4g", "0.1235")],
)
def test_numbers_for_people(value, form, text):
    assert aggregates.number(value, form) == text

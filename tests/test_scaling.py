"""The scaling law: what was put in is found again, and the script goes on where it was."""

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
import runs
from hypothesis import strategies as st

from experiments import pretrain, scaling
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation import scaling_law

N, D = (grid.ravel() for grid in np.meshgrid([1e4, 4e4, 2e5, 1e6], [1e5, 4e5, 2e6, 1e7]))


@st.composite
def laws(draw):
    """Laws whose three terms all matter somewhere among the runs."""
    a, b = draw(st.floats(0.2, 0.8)), draw(st.floats(0.2, 0.8))
    floor, size, amount = (draw(st.floats(0.1, 1.0)) for _ in range(3))
    return scaling_law.Law(floor, size * 3e4**a, a, amount * 3e5**b, b)


@hypothesis.given(laws())
@hypothesis.settings(max_examples=15, deadline=None)
def test_a_law_is_found_again(law):
    found = scaling_law.fit(N, D, law.predict(N, D))
    np.testing.assert_allclose(found, law, rtol=0.02)
    np.testing.assert_allclose(found.predict(1e7, 1e8), law.predict(1e7, 1e8), rtol=5e-3)


@hypothesis.given(laws(), st.integers(0, 2**32 - 1), st.integers(0, len(N) - 1))
@hypothesis.settings(max_examples=8, deadline=None)
def test_noise_and_one_failed_run_move_it_a_little(law, seed, odd):
    losses = law.predict(N, D) * np.exp(np.random.default_rng(seed).normal(0, 0.002, len(N)))
    losses[odd] *= 1.5
    found = scaling_law.fit(N, D, losses)
    others = np.arange(len(N)) != odd
    np.testing.assert_allclose(found.predict(N, D)[others], law.predict(N, D)[others], rtol=0.02)


@hypothesis.given(laws(), st.floats(13, 20))
def test_the_best_size_is_the_best(law, exponent):
    flops = 10.0**exponent
    best = law.best_size(flops)
    losses = [law.predict(n, flops / 6 / n) for n in (best / 1.1, best, best * 1.1)]
    assert losses[1] <= min(losses)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(scaling_law.ScalingError, match="at least 6"):
        scaling_law.fit(N[:5], D[:5], np.ones(5))
    with pytest.raises(scaling_law.ScalingError, match="positive"):
        scaling_law.fit(N, D, np.where(N > 1e5, np.nan, 1.0))
    for bad in (np.nan, np.inf, 0.0, -1.0):
        for n, d in ((np.where(N > 1e5, bad, N), D), (N, np.where(N > 1e5, bad, D))):
            with pytest.raises(scaling_law.ScalingError, match="tokens, expected positive numbers"):
                scaling_law.fit(n, d, np.ones(len(N)))
    with pytest.raises(ConfigError, match="'huge' is no size"):
        scaling.ScalingConfig(sizes="32x1,48x1,huge")
    with pytest.raises(ConfigError, match="3 or more of each"):
        scaling.ScalingConfig(sizes="32x1,48x1")
    for tokens in ("1e5,3e5,nan", "1e5,3e5,inf", "1e5,3e5,-1", "0,1,2"):
        with pytest.raises(ConfigError, match="positive numbers"):
            scaling.ScalingConfig(tokens=tokens)
    with pytest.raises(ConfigError, match="batches is 0"):
        scaling.ScalingConfig(batches=0)
    assert scaling.ScalingConfig(sizes="32x1, 48x1,64x1,32x1").names == ("32x1", "48x1", "64x1")
    with pytest.raises(ConfigError, match="held_out is 0"):
        scaling.ScalingConfig(pretrain=pretrain.PretrainConfig(held_out=0))


def test_a_run_that_contradicts_itself_is_found_before_the_first(tmp_path):
    runs.make_dataset(tmp_path / "dataset")
    base = dataclasses.replace(pretrain.PretrainConfig(), window=1 << 10, peak_flops=1e11)
    with pytest.raises(ConfigError, match=r"no environment can be trained on.*the longest part"):
        scaling.run(scaling.ScalingConfig(pretrain=base), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset"]


def test_the_script_trains_fits_draws_and_does_nothing_twice(tmp_path):
    runs.make_dataset(tmp_path / "dataset")
    flags = {
        "sizes": "16x1,24x1,32x1",
        "tokens": "160,320,640",
        "batches": 2,
        "pretrain.model.window": 8,
        "pretrain.window": 16,
        "pretrain.rows": 2,
        "pretrain.training.optimizer": "adamw",
        "pretrain.peak_flops": 1e11,
        "pretrain.evaluation.environments": runs.IDS[0],
        "pretrain.evaluation.rows": 2,
    }
    command = ["scaling", tmp_path, f"--environments={runs.IDS[0]}", *(f"--config.{k}={v}" for k, v in flags.items())]
    out, code = runs.finish(runs.start_script(*command))
    assert code == 0 and "KL = " in out, out
    found = json.loads((tmp_path / "scaling" / "scaling.json").read_text())
    assert len(found["points"]) == 9 and np.isfinite(list(found["law"].values())).all()
    assert np.isfinite([point["z"] for point in found["points"]]).all()
    assert [point["tokens"] for point in found["points"]] == [160] * 3 + [320] * 3 + [640] * 3
    assert (tmp_path / "scaling" / "scaling.png").stat().st_size > 10_000
    with (tmp_path / "scaling" / "16x1-160" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # a crash may cut a line off
    metrics = {path: path.stat().st_mtime_ns for path in (tmp_path / "scaling").glob("*/metrics.jsonl")}
    out, code = runs.finish(runs.start_script(*command))
    assert code == 0 and len(metrics) == 9, out
    assert json.loads((tmp_path / "scaling" / "scaling.json").read_text()) == found
    assert {path: path.stat().st_mtime_ns for path in metrics} == metrics

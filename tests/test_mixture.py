"""The mixture: a batch is a function of one integer, and windows are what they claim to be."""

import collections
import copy
import dataclasses
import itertools
import pickle
import uuid

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny_datasets import ID, append, card, episodes, leaves

import data
from data import mixture as mixture_module
from data import store
from data.batches import make_codecs
from data.mixture import BucketRows, Mixture, MixtureError, WindowSource
from ldm_jax.model.config import SIZES

LENGTH, WHERE = 16, "observation/value"
PARTS = {"x/a": [(40, 3), (16, 2), (90, 1)], "x/b": [(64, 4)], "x/c": [(33, 2), (10, 5)]}
"""Steps and streams of each part; the last is shorter than a window."""


def write(url: str) -> store.Dataset:
    dataset = store.create_dataset(url)
    for number, (id, shapes) in enumerate(PARTS.items()):
        for part, (steps, streams) in enumerate(shapes):
            step, stream = np.meshgrid(np.arange(steps), np.arange(streams), indexing="ij")
            where = np.stack([np.full_like(step, number), np.full_like(step, part), stream, step], -1)
            written = leaves(card(id), steps, streams, part) | {WHERE: where.astype(np.float32)}
            dataset = store.append_part(dataset, card(id), written, episodes(steps, streams))
    return dataset


@pytest.fixture(scope="module")
def dataset() -> store.Dataset:
    return write(f"memory://{uuid.uuid4()}")


def row(environment_index, leaves, seeds):
    return {"environment": np.full(len(seeds), environment_index, np.int32), "seed": seeds, **leaves}


def source(dataset, ids=("x/a", "x/b", "x/c"), weights=(1, 2, 3), length=LENGTH, seed=0, transform=row):
    return WindowSource(dataset, ids, weights, length, seed, transform)


def mixture(dataset, seed=0, **hosts) -> Mixture:
    buckets = {
        "small": BucketRows(source(dataset, ("x/a", "x/b"), (1, 1), seed=seed), 4),
        "large": BucketRows(source(dataset, ("x/c",), (1,), seed=seed), 8),
    }
    return Mixture(buckets, **hosts)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), one, other)


def take(iterator, count):
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.integers(0, (1 << 62) - 1), st.integers(0, 2**63), st.integers(1, 33))
def test_windows_are_contiguous_and_of_one_stream_and_part(dataset, index, seed, length):
    item = source(dataset, seed=seed, length=length)[index]
    where = item[WHERE]
    assert where.shape == (length, 4) and item["reward"].shape == (length,)
    assert (where[:, :3] == where[0, :3]).all()
    assert (np.diff(where[:, 3]) == 1).all()
    assert where[0, 0] == item["environment"]


def test_every_window_is_as_likely_as_the_next(dataset):
    windows = source(dataset, ("x/a",), (1,)).locate(range(40_000))
    counts = collections.Counter((window.part.name, window.stream, window.start) for window in windows)
    possible = [
        (f"part-{number + 1:05d}", stream, start)
        for number, (steps, streams) in enumerate(PARTS["x/a"])
        for stream in range(streams)
        for start in range(steps - LENGTH + 1)
    ]
    assert set(counts) == set(possible)
    expected = 40_000 / len(possible)
    chi_squared = sum((counts[window] - expected) ** 2 / expected for window in possible)
    degrees = len(possible) - 1
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


@hypothesis.given(st.integers(2, 20), st.integers(1, 60))
def test_held_out_streams_and_the_others_are_all_streams(every, streams):
    kept, rest = mixture_module.Streams(every, held_out=True), mixture_module.Streams(every)
    one, other = ([some.locate(i) for i in range(some.count(streams))] for some in (kept, rest))
    assert sorted(one + other) == list(range(streams)) and len(one) == streams // every


def test_no_window_of_a_held_out_stream_is_drawn_for_training(dataset):
    drawn = {}
    for held_out in (False, True):
        source_ = WindowSource(dataset, ["x/b"], [1], LENGTH, 0, row, mixture_module.Streams(4, held_out=held_out))
        drawn[held_out] = {window.stream for window in source_.locate(range(500))}
    assert drawn == {False: {0, 1, 2}, True: {3}}
    with pytest.raises(MixtureError, match="collect more streams"):
        WindowSource(dataset, ["x/b"], [1], LENGTH, 0, row, mixture_module.Streams(5, held_out=True))


def test_a_part_shorter_than_a_window_gives_none(dataset):
    assert {window.part.name for window in source(dataset, ("x/c",), (1,)).locate(range(500))} == {"part-00001"}


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    st.integers(0, 2**40),
    st.integers(0, 2**31),
)
def test_environments_follow_their_weights(dataset, weights, first, seed):
    count = 4000
    windows = source(dataset, weights=weights, seed=seed).locate(range(first, first + count))
    got = np.bincount([window.environment_index for window in windows], minlength=3) / count
    share = np.array(weights) / sum(weights)
    assert (abs(got - share) <= 5 * np.sqrt(share * (1 - share) / count) + 2 / count).all()


def test_the_seeds_of_windows_differ(dataset):
    seeds = [window.seed for window in source(dataset).locate(range(1000))]
    assert len({*seeds}) == 1000
    dropped = np.mean([seed % 5 == 0 for seed in seeds])
    assert abs(dropped - 0.2) < 5 * (0.2 * 0.8 / 1000) ** 0.5


def test_items_do_not_depend_on_what_is_read_with_them(dataset):
    windows = source(dataset)
    indices = [5, 3, 10**12, 3, *range(40)]
    together = windows.read(indices)
    assert_equal(together, jax.tree.map(lambda *rows: np.stack(rows), *(windows[index] for index in indices)))


def test_the_batches_replay_from_every_state(dataset):
    straight = take(mixture(dataset).batches(), 12)
    for start in range(12):
        assert_equal(take(mixture(dataset).batches(start), 3)[:1], straight[start : start + 1])
    assert_equal(take(mixture(dataset).batches(5), 7), straight[5:])
    assert_equal([mixture(dataset)[step] for step in range(12)], straight)
    assert jax.tree.map(lambda x: x.shape, straight[0]["large"][WHERE]) == (8, LENGTH, 4)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_hosts(dataset, count):
    shares = [take(mixture(dataset, process_index=index, process_count=count).batches(3), 4) for index in range(count)]
    joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *steps) for steps in zip(*shares, strict=True)]
    assert_equal(joined, [mixture(dataset)[step] for step in range(3, 7)])


def test_the_seed_is_all_that_chooses(dataset):
    again = write(f"memory://{uuid.uuid4()}")
    assert_equal(mixture(again)[7], mixture(dataset)[7])
    other = mixture(dataset, seed=1)[7]
    assert not np.array_equal(other["large"][WHERE], mixture(dataset)[7]["large"][WHERE])
    steps = [mixture(dataset)[step]["large"]["seed"] for step in range(20)]
    assert len({*np.concatenate(steps).tolist()}) == 160


def test_the_fingerprint_changes_with_what_is_drawn(dataset):
    assert mixture(dataset).fingerprint == mixture(write(f"memory://{uuid.uuid4()}")).fingerprint
    assert mixture(dataset).fingerprint == mixture(dataset, process_index=1, process_count=2).fingerprint
    sources = [source(dataset), source(dataset, seed=1), source(dataset, weights=(1, 1, 1)), source(dataset, length=9)]
    fingerprints = {Mixture({"all": BucketRows(one, rows)}).fingerprint for one in sources for rows in (1, 2)}
    assert len(fingerprints) == 8
    assert source(dataset).fingerprint in repr(source(dataset))


def test_data_written_later_changes_no_open_mixture():
    url = f"memory://{uuid.uuid4()}"
    windows = source(write(url))
    before = windows.read(range(20))
    write(url)
    assert_equal(windows.read(range(20)), before)


def test_sources_are_grains(dataset):
    import grain

    assert isinstance(source(dataset), grain.sources.RandomAccessDataSource)
    assert isinstance(mixture(dataset), grain.sources.RandomAccessDataSource)
    assert_equal(
        grain.MapDataset.source(source(dataset)).batch(3)[2][WHERE],
        np.stack([source(dataset)[i][WHERE] for i in (6, 7, 8)]),
    )


def test_what_cannot_be_drawn_is_refused(dataset):
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(MixtureError, match=f"the weight of x/b is {float(weight)}, expected a positive"):
            source(dataset, weights=(1, weight, 1))
    with pytest.raises(MixtureError, match="x/a is named twice"):
        source(dataset, ids=("x/a", "x/b", "x/a"))
    with pytest.raises(MixtureError, match="3 ids and 2 weights"):
        source(dataset, weights=(1, 2))
    with pytest.raises(MixtureError, match="at least one"):
        source(dataset, (), ())
    with pytest.raises(MixtureError, match="a window is 34 steps, but the longest part of x/c has 33"):
        source(dataset, length=34)
    with pytest.raises(MixtureError, match="window_length is 0, expected at least 1"):
        source(dataset, length=0)
    with pytest.raises(store.StoreError, match="no environment 'x/d'"):
        source(dataset, ids=("x/a", "x/b", "x/d"))
    with pytest.raises(MixtureError, match="'small' has 4 rows, expected a positive multiple of the 3 hosts"):
        mixture(dataset, process_count=3)
    with pytest.raises(MixtureError, match="process_index is 2, expected 0 to 1"):
        mixture(dataset, process_index=2, process_count=2)
    with pytest.raises(MixtureError, match="no bucket"):
        Mixture({})


def test_rows_that_do_not_stack_are_named(dataset):
    for transform in (
        lambda index, leaves, seeds: leaves[WHERE][:, : 1 + index],
        lambda index, leaves, seeds: leaves[WHERE].astype(np.float32 if index else np.float64),
        lambda index, leaves, seeds: {index: seeds},
    ):
        with pytest.raises(MixtureError, match="the rows of bucket 'b' differ in structure or shape: one has"):
            next(Mixture({"b": BucketRows(source(dataset, transform=transform), 8)}).batches())


def test_a_damaged_part_stops_the_iterator_with_its_name(tmp_path):
    dataset = append(store.create_dataset(tmp_path))
    for path in (tmp_path / ID / "part-00001" / "reward" / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    batches = Mixture({"b": BucketRows(source(dataset, (ID,), (1,)), 2)}).batches()
    with pytest.raises(store.StoreError, match="part-00001 of gymnax/CartPole-v1, leaf 'reward', cannot be read"):
        next(batches)


def test_weights_whose_sum_is_infinite_are_drawn_by(dataset):
    weights = (1e308, 1e308, 1e308)
    environments = [window.environment_index for window in source(dataset, weights=weights).locate(range(300))]
    equal = [window.environment_index for window in source(dataset, weights=(1, 1, 1)).locate(range(300))]
    assert environments == equal and {*environments} == {0, 1, 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5])
def test_no_count_is_a_fraction_or_nan(dataset, value):
    for make in (
        lambda: mixture_module.Streams(value),
        lambda: source(dataset, length=value),
        lambda: Mixture({"b": BucketRows(source(dataset), value)}),
        lambda: mixture(dataset, process_count=value),
    ):
        with pytest.raises(MixtureError, match=f"is {value}, expected a whole number"):
            make()


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_mixture_travels_before_and_after_use(dataset, travel):
    original = mixture(dataset)
    before = travel(original)
    batch = original[3]
    for copied in (before, travel(original)):
        assert copied == original and copied.fingerprint == original.fingerprint
        assert_equal(copied[3], batch)
    assert original != mixture(dataset, seed=1) and source(dataset) != source(dataset, weights=(1, 1, 1))
    assert len({source(dataset), source(dataset)}) == 1


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_what_a_model_is_trained_on_travels(travel):
    url, model = f"memory://{uuid.uuid4()}", dataclasses.replace(SIZES["nano"], values=64)
    dataset = append(append(store.create_dataset(url)), "x/other", streams=8)
    batches = data.mix(dataset, make_codecs(dataset, dataset.ids, model), data.Shape(16, 4, 0))
    copied = travel(batches)
    assert copied == batches != data.mix(dataset, make_codecs(dataset, dataset.ids, model), data.Shape(16, 4, 1))
    assert_equal(copied[5], batches[5])
    assert_equal(travel(batches)[5], batches[5])

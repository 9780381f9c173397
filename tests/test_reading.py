"""Windows are what was written, whatever is kept in memory, and what is kept is bounded."""

import uuid

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny_datasets import ID, card, episodes, leaves

from data import store
from data.store.chunks import OBJECT_BYTES, ChunkCache, ChunkReader

STEPS, STREAMS = 2500, 3
NAMES = ("reward", "observation/value", "first")


@pytest.fixture(scope="module")
def written() -> dict[str, np.ndarray]:
    return leaves(card(), STEPS, STREAMS)


@pytest.fixture(scope="module")
def part(written) -> store.Part:
    dataset = store.create_dataset(f"memory://{uuid.uuid4()}")
    return store.append_part(dataset, card(), written, episodes(STEPS, STREAMS)).parts(ID)[0]


steps = st.integers(0, STEPS)
windows = st.tuples(steps, steps, st.integers(0, STREAMS - 1)).filter(lambda window: window[0] < window[1])


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(windows, min_size=1, max_size=6))
def test_windows_read_together_are_what_was_written(part, written, drawn):
    read = store.read_many([store.Request(part, NAMES, *window) for window in drawn])
    for window, (start, stop, stream) in zip(read, drawn, strict=True):
        assert list(window) == list(NAMES)
        for name, value in window.items():
            np.testing.assert_array_equal(value, written[name][start:stop, stream], strict=True)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.integers(0, STEPS - 100), st.integers(0, STREAMS - 1)), min_size=1, max_size=6))
def test_stacked_windows_are_what_was_written(part, written, drawn):
    read = store.read_stacked([store.Request(part, NAMES, start, start + 100, stream) for start, stream in drawn])
    for name, value in read.items():
        expected = np.stack([written[name][start : start + 100, stream] for start, stream in drawn])
        np.testing.assert_array_equal(value, expected, strict=True)


@pytest.mark.parametrize("chunks", [0, 1, 3, 100])
def test_no_more_chunks_are_kept_than_there_is_room_for(part, written, chunks):
    array = part._reader("reward").array
    cache = ChunkCache(chunks * (4 * 1024 + OBJECT_BYTES))
    readers = [ChunkReader(array, cache) for _ in range(2)]
    assert readers[0].chunk_steps == 1024, "the array has chunks of several windows, and several in a stream"
    rng = np.random.default_rng(0)
    for _ in range(60):
        reader, start, stream = readers[rng.integers(2)], rng.integers(0, STEPS - 1500), rng.integers(STREAMS)
        window = np.zeros(1500, np.float32)
        for _, key, destination, where in reader.copy(window, start, stream):
            chunk = reader.begin(key).result()
            destination[...] = chunk[where]
            reader.keep(key, chunk)
            reader.keep(key, chunk)
        np.testing.assert_array_equal(window, written["reward"][start : start + 1500, stream])
        kept = [chunk for reader in readers for chunk in reader._chunks.values()]
        assert sum(chunk.nbytes + OBJECT_BYTES for chunk in kept) <= cache._limit_bytes
    assert len(kept) >= min(chunks, 10), "room is used"

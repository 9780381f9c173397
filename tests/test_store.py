"""The trajectory store: what is written is read back, and a writer may die anywhere."""

import concurrent.futures
import copy
import dataclasses
import json
import os
import pathlib
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time

import hypothesis
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import strategies as st
from spaces_strategies import action_spaces, any_spaces
from tiny_datasets import ID, append, card, episodes, leaves, memory

from data import store
from data.store import layout, manifest, records, storage
from ldm_jax.cards import CardError
from ldm_jax.errors import LdmError

quick = hypothesis.settings(max_examples=40, deadline=None)


@quick
@hypothesis.given(
    any_spaces, action_spaces, st.integers(1, 40), st.integers(1, 4), st.booleans(), st.booleans(), st.data()
)
def test_what_is_written_is_read_back(seen, acted, steps, streams, masked, distribution, data):
    made = card(observation_space=seen, action_space=acted)
    written = leaves(made, steps, streams, data.draw(st.integers(0, 99)), masked, distribution)
    url = memory()
    store.append_part(store.create_dataset(url), made, written, episodes(steps, streams))
    dataset = store.open_dataset(url)
    store.verify_dataset(dataset)
    (read,) = dataset.parts(ID)
    assert (read.steps, read.streams, read.leaf_names) == (steps, streams, tuple(sorted(written)))
    start = data.draw(st.integers(0, steps - 1))
    stop = data.draw(st.integers(start + 1, steps))
    stream = data.draw(st.integers(0, streams - 1))
    for name, value in read.read(read.leaf_names, start, stop, stream).items():
        assert value.dtype == written[name].dtype
        assert read.leaf(name) == (written[name].shape[2:], written[name].dtype)
        assert value.tobytes() == written[name][start:stop, stream].tobytes()


@quick
@hypothesis.given(st.lists(st.text(max_size=5).map(lambda text: text.encode()[:12]), min_size=1, max_size=20))
def test_text_bytes_are_read_back(texts):
    value = np.zeros((len(texts), 1, 12), np.uint8)
    for row, text in zip(value, texts, strict=True):
        row[0, : len(text)] = list(text)
    made = card(observation_space=spaces.Text(12))
    written = leaves(made, len(texts), 1) | {"observation/value": value}
    dataset = store.append_part(store.create_dataset(memory()), made, written, episodes(len(texts), 1))
    (part,) = dataset.parts(ID)
    np.testing.assert_array_equal(part.read(["observation/value"], 0, len(texts), 0)["observation/value"], value[:, 0])


@pytest.mark.parametrize(
    "name",
    ["/", "..", "../../up", "a//b", ".", "", "ü ? * : \\", "%2F", "zarr.json", "episodes.npy", "x" * 200, "ü" * 300],
)
def test_a_leaf_of_any_name_stays_in_its_folder(tmp_path, name):
    other = {"/": "%2F", "x" * 200: "x" * 199, "ü" * 300: "ü" * 299}.get(name, "other")
    made = card(observation_space=spaces.Dict({key: spaces.Box(0, 1) for key in (name, other)}))
    dataset = store.create_dataset(tmp_path / "inside")
    store.append_part(dataset, made, leaves(made, 5, 2), episodes(5, 2))
    store.verify_dataset(store.open_dataset(tmp_path / "inside"))
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert sorted(path.name for path in (tmp_path / "inside").iterdir()) == ["gymnax", "manifest", "manifest.json"]


@pytest.mark.parametrize("leaf", [((300, 50), np.float32), ((40, 7, 84, 84, 4), np.uint8), ((3000, 5, 6), np.float16)])
def test_chunks_hold_one_stream_and_shards_divide_into_them(leaf):
    shape, dtype = leaf
    value = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    metadata = layout.layout_of(value).metadata
    chunk = metadata["codecs"][0]["configuration"]["chunk_shape"]
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    assert chunk[1] == 1 and chunk[2:] == list(shape[2:])
    assert not any(outer % inner for outer, inner in zip(shard, chunk, strict=True))
    assert np.prod(shard) * value.itemsize <= 2 * manifest.SHARD_BYTES
    made, name = card(observation_space=spaces.Box(0, 255, shape[2:], dtype)), "observation/value"
    written = leaves(made, *shape[:2]) | {name: value}
    dataset = store.append_part(store.create_dataset(memory()), made, written, episodes(*shape[:2]))
    store.verify_dataset(dataset)
    window = dataset.parts(ID)[0].read([name], 10, shape[0], 3)[name]
    np.testing.assert_array_equal(window, value[10:, 3])


def test_the_files_of_an_array_are_those_it_is_looked_for_in_when_it_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 4096)
    dataset = append(store.create_dataset(tmp_path), steps=900, streams=5)
    (part,) = dataset.parts(ID)
    for name, record in part.record.leaves.items():
        folder = tmp_path / ID / part.name / name
        written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"zarr.json"}
        assert written == {*layout.shard_keys(record.layout)} and len(written) > 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_frame_of_a_stack_is_stored_once(tmp_path, dtype):
    """Frames that cannot be compressed: only that each is in four stacks can."""
    frames = (255 * np.random.default_rng(0).random((67, 2, 48, 48))).astype(dtype)
    stacks = np.stack([frames[i : i + 64] for i in range(4)], 2)
    made = card(observation_space=spaces.Box(0, 255, stacks.shape[2:], dtype))
    written = leaves(made, 64, 2) | {"observation/value": stacks}
    dataset = store.append_part(store.create_dataset(tmp_path), made, written, episodes(64, 2))
    (part,) = dataset.parts(ID)
    np.testing.assert_array_equal(part.read(["observation/value"], 3, 60, 1)["observation/value"], stacks[3:60, 1])
    assert sum(path.stat().st_size for path in _files(tmp_path, "observation/value")) < 1.5 * frames.nbytes


def test_windows_of_many_parts_are_read_together():
    dataset = store.create_dataset(memory())
    for value in range(3):
        dataset = append(dataset, value=value)
    requests = [store.Request(part, ("reward",), 0, 64, 1) for part in dataset.parts(ID)]
    assert [window["reward"].tolist() for window in store.read_many(requests)] == [[float(v)] * 64 for v in range(3)]


def test_the_card_and_the_episodes_are_read_back(tmp_path):
    dataset = append(store.create_dataset(tmp_path))
    assert dataset.ids == (ID,)
    assert dataset.card(ID) == card()
    for got, expected in zip(dataset.parts(ID)[0].episodes, episodes(70, 3), strict=True):
        np.testing.assert_array_equal(got, expected)
    newer = dataclasses.replace(card(), split="test")
    dataset_now = store.append_part(dataset, newer, leaves(newer), episodes(70, 3))
    assert dataset_now.card(ID).split == "test"
    assert dataset.card(ID).split == "train", "an open dataset stays as it was"


def test_appending_touches_no_written_file(tmp_path):
    dataset = append(store.create_dataset(tmp_path))
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / ID).rglob("*") if path.is_file()
    }
    append(dataset, value=1)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert [part.name for part in store.open_dataset(tmp_path).parts(ID)] == ["part-00001", "part-00002"]


def test_urls_of_files(tmp_path):
    append(store.create_dataset(tmp_path / "a b"))
    assert store.open_dataset(f"file://{tmp_path}/a b/").ids == (ID,)


def test_another_reader_of_the_same_format(tmp_path):
    """The files are plain zarr3 and npy, with nothing of ours needed to read them."""
    tensorstore = pytest.importorskip("tensorstore")
    append(store.create_dataset(tmp_path), value=3)
    folder = tmp_path / ID / "part-00001"
    array = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{folder}/reward/"}, open=True).result()
    assert (array.read().result() == 3).all()
    assert np.load(folder / "episodes.npy")["length"].tolist() == [70, 70, 70]


WRITER = """
import sys
sys.path.insert(0, {tests!r})
import tiny_datasets
dataset = tiny_datasets.store.create_dataset({url!r})
for value in range({start}, {start} + {count}):
    dataset = tiny_datasets.append(dataset, {id!r}, steps=200, streams=8, value=value)
    print(value, flush=True)
"""


def writer(url: pathlib.Path, id: str = ID, count: int = 10**6, start: int = 0) -> subprocess.Popen:
    code = WRITER.format(tests=str(pathlib.Path(__file__).parent), url=str(url), id=id, count=count, start=start)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_loses_at_most_the_part_in_flight(tmp_path):
    rng = random.Random(0)
    kept = 0
    for start in range(5):
        process = writer(tmp_path, start=kept)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        said = 1 + len(process.stdout.read().split())
        process.wait()
        dataset = store.open_dataset(tmp_path)
        store.verify_dataset(dataset)
        count = len(dataset.parts(ID))
        assert kept + said <= count <= kept + said + 1
        rewards = [float(part.read(["reward"], 0, 1, 0)["reward"][0]) for part in dataset.parts(ID)]
        assert rewards[kept : kept + said] == [float(kept + value) for value in range(said)], start
        kept = count
    dataset = append(dataset, steps=200, streams=8, value=kept)
    store.verify_dataset(store.open_dataset(tmp_path))
    folders = {path.name for path in (tmp_path / ID).iterdir() if path.is_dir()}
    assert folders == {part.name for part in dataset.parts(ID)}, "leftovers were taken over"
    claims = {path.stem for path in (tmp_path / ID).glob("*.claim")}
    assert claims <= folders, "of a writer killed between showing its part and giving up its claim"


def test_what_a_dead_writer_left_is_no_end_of_another_file(tmp_path):
    dataset = append(store.create_dataset(tmp_path))
    record, (card_file,) = tmp_path / records.record_key(ID), (tmp_path / ID).glob("card-*")
    newer = dataclasses.replace(card(), split="test")
    content = json.dumps(newer.to_json(), sort_keys=True).encode()
    card_file = card_file.with_name(manifest.card_name(content))
    for path in (record, card_file, tmp_path / ID / "part-00002.claim"):
        path.with_name(f"{path.name}.__lock").write_bytes(b"x" * 100_000)
    store.append_part(dataset, newer, leaves(newer), episodes(70, 3))
    store.verify_dataset(store.open_dataset(tmp_path))
    assert card_file.read_bytes() == content and b"xx" not in record.read_bytes()


def test_leftovers_of_a_dead_writer_do_no_harm(tmp_path):
    dataset = store.create_dataset(tmp_path)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / ID / "part-00001" / "reward").mkdir(parents=True)
    (tmp_path / ID / "part-00001" / "reward" / "zarr.json").write_text("half")
    claim = {"host": socket.gethostname(), "pid": int(dead.stdout), "time_s": time.time(), "token": "x"}
    (tmp_path / ID / "part-00001.claim").write_text(json.dumps(claim))
    assert store.open_dataset(tmp_path).ids == ()
    dataset = append(dataset)
    assert [part.name for part in dataset.parts(ID)] == ["part-00001"]
    store.verify_dataset(store.open_dataset(tmp_path))


def test_a_claim_of_a_live_writer_is_respected(tmp_path):
    dataset = store.create_dataset(tmp_path)
    (tmp_path / ID).mkdir(parents=True)
    claim = {"host": "another machine", "pid": 1, "time_s": time.time(), "token": "x"}
    (tmp_path / ID / "part-00001.claim").write_text(json.dumps(claim))
    assert [part.name for part in append(dataset).parts(ID)] == ["part-00002"]


def test_a_failed_append_leaves_nothing(tmp_path):
    dataset = append(store.create_dataset(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "leaf_folder", lambda name: "x" * 300 + "/" if name == "reward" else f"{name}/")
        with pytest.raises(store.StoreError, match="cannot write"):
            store.append_part(dataset, card(), leaves(card()), episodes(70, 3))
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]
    store.verify_dataset(append(store.open_dataset(tmp_path)))


@pytest.mark.parametrize("same", [True, False], ids=["one group", "a group each"])
def test_concurrent_threads_lose_nothing(same):
    url = memory()

    def write(number):
        return append(store.create_dataset(url), ID if same else f"gymnax/{number}", value=number)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    dataset = store.open_dataset(url)
    store.verify_dataset(dataset)
    parts = [part for id in dataset.ids for part in dataset.parts(id)]
    assert sorted(part.read(["reward"], 0, 1, 0)["reward"][0] for part in parts) == list(range(24))


def test_concurrent_processes_lose_nothing(tmp_path):
    processes = [writer(tmp_path, ID, 15, 0), writer(tmp_path, ID, 15, 100), writer(tmp_path, "gymnax/Other", 15, 200)]
    assert [process.communicate()[0].count("\n") for process in processes] == [15, 15, 15]
    assert all(process.returncode == 0 for process in processes)
    dataset = store.open_dataset(tmp_path)
    store.verify_dataset(dataset)
    got = [sorted(part.read(["reward"], 0, 1, 0)["reward"][0] for part in dataset.parts(id)) for id in dataset.ids]
    assert got == [[*range(15), *range(100, 115)], [*range(200, 215)]]


REMOVER = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny_datasets
dataset = tiny_datasets.store.open_dataset(sys.argv[2])
print(flush=True)
tiny_datasets.store.remove_group(dataset, tiny_datasets.ID)
"""


def test_a_group_whose_removal_was_killed_is_there_whole_or_not_at_all(tmp_path):
    rng = random.Random(0)
    dataset = append(store.create_dataset(tmp_path), "x/other", steps=9)
    for _ in range(4):
        for value in range(3):
            dataset = append(dataset, steps=9, value=value)
        command = [sys.executable, "-c", REMOVER, str(pathlib.Path(__file__).parent), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.wait()
        dataset = store.open_dataset(tmp_path)
        assert dataset.ids in {("x/other",), (ID, "x/other")}
        store.verify_dataset(dataset)
        if ID in dataset.ids:
            assert [part.read_leaf("reward")[0, 0] for part in dataset.parts(ID)] == [0, 1, 2]
            dataset = store.remove_group(dataset, ID)


def test_what_is_written_while_a_group_is_removed_is_whole_or_refused():
    url = memory()
    append(store.create_dataset(url), value=0)

    def work(number):
        try:
            if number % 4:
                append(store.open_dataset(url), steps=9, value=number)
            else:
                store.remove_group(store.open_dataset(url), ID)
        except store.StoreError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        said = [text for text in pool.map(work, range(24)) if text]
    assert all("was removed" in text or "has no environment" in text for text in said), said
    store.verify_dataset(store.open_dataset(url))


def test_a_removed_group_leaves_the_others(tmp_path):
    dataset = store.create_dataset(tmp_path)
    for id in ("x/a", "x/a/b", "x/ab"):
        dataset = append(dataset, id)
    dataset = store.remove_group(dataset, "x/a")
    assert dataset.ids == store.open_dataset(tmp_path).ids == ("x/a/b", "x/ab")
    store.verify_dataset(dataset)
    assert not [path for path in (tmp_path / "x/a").rglob("*") if path.is_file() and "b" not in path.parts]
    dataset = append(dataset, "x/a", value=5)
    assert dataset.parts("x/a")[0].read(["reward"], 0, 2, 0)["reward"].tolist() == [5, 5], "not what was cached"
    with pytest.raises(store.StoreError, match=r"no environment 'x/abc'; did you mean x/ab"):
        store.remove_group(dataset, "x/abc")


def _files(tmp_path, leaf):
    return [
        path for path in (tmp_path / ID / "part-00001" / leaf).rglob("*") if path.is_file() and path.name != "zarr.json"
    ]


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_damage_is_named_and_never_read_as_data(tmp_path, damage):
    append(store.create_dataset(tmp_path))
    (path,) = _files(tmp_path, "observation/value")
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    dataset = store.open_dataset(tmp_path)  # lazily: one bad part does not keep the rest from being used
    message = r"part-00001 of gymnax/CartPole-v1, leaf 'observation/value', cannot be read.*delete the group"
    with pytest.raises(store.StoreError, match=message):
        dataset.parts(ID)[0].read(["observation/value"], 0, 5, 0)
    with pytest.raises(store.StoreError, match=message):
        store.verify_dataset(dataset)
    assert dataset.parts(ID)[0].read(["reward"], 0, 5, 0)["reward"].shape == (5,)
    append(store.remove_group(dataset, ID))
    store.verify_dataset(store.open_dataset(tmp_path))


def test_a_swapped_file_fails_verification(tmp_path):
    dataset = append(append(store.create_dataset(tmp_path)), value=1)
    (path,) = _files(tmp_path, "reward")
    other = tmp_path / ID / "part-00002" / path.relative_to(tmp_path / ID / "part-00001")
    path.write_bytes(other.read_bytes())
    with pytest.raises(store.StoreError, match="leaf 'reward', cannot be read: its checksum differs"):
        store.verify_dataset(dataset)


@pytest.mark.parametrize("name", ["episodes.npy", "card"])
def test_a_damaged_index_or_card_is_named(tmp_path, name):
    dataset = append(store.create_dataset(tmp_path))
    (path,) = (tmp_path / ID).glob("card-*") if name == "card" else [tmp_path / ID / "part-00001" / name]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(store.StoreError, match=f"{name}.*{ID} again"):
        store.verify_dataset(dataset)


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_foreign_folder_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}")
    for use in (store.open_dataset, store.create_dataset):
        with pytest.raises(store.StoreError, match=r"is not a dataset.*empty folder"):
            use(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


def test_no_dataset(tmp_path):
    with pytest.raises(store.StoreError, match=r"there is no dataset.*create_dataset"):
        store.open_dataset(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_schema_version(tmp_path):
    append(store.create_dataset(tmp_path))
    path = tmp_path / "manifest.json"
    for version in (2, 99):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
        for use in (store.open_dataset, store.create_dataset):
            message = f"schema version {version}, this program reads and writes 3: collect anew"
            with pytest.raises(store.StoreError, match=message):
                use(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file" / "under", tmp_path / "file", "/proc/nothing", "/dev/full"):
        with pytest.raises(store.StoreError, match=r"cannot write manifest\.json at .*Choose a place") as caught:
            store.create_dataset(url)
        assert_one_line(caught.value)
    with pytest.raises(store.StoreError, match="Expected a path or a file, memory, s3 or gs URL"):
        store.open_dataset("ftp://x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.zeros((70, 2), np.float32)}, r"leaf 'reward' .* shape \(70, 2\)"),
        ({"reward": np.zeros((70, 3), np.complex64)}, "leaf 'reward' .*complex64.*, expected one of bool"),
        ({"reward": np.zeros((70, 3), object)}, "expected one of bool"),
        ({"reward": np.zeros((70, 3), ">f4")}, "expected one of bool"),
        ({"reward": np.zeros((70, 3), np.float64)}, r"reward is float64\[\], expected float32\[\]"),
        ({"extra": np.zeros((70, 3), np.float64)}, r"extra is float64\[\], expected no such leaf"),
        ({"reward/inner": np.zeros((70, 3), np.float64)}, r"reward/inner is float64\[\], expected no such leaf"),
        ({"episodes.npy": np.zeros((70, 3), np.float64)}, r"episodes.npy is float64\[\], expected no such leaf"),
        ({"action_mask": np.ones((70, 3, 2), bool)}, "leaf 'action_mask' .*but missing in part-00001.*same leaves"),
        ({"action_mask": np.ones((70, 3, 5), bool)}, r"action_mask is bool\[5\], expected bool\[2\]"),
    ],
)
def test_leaves_that_do_not_fit_are_refused(change, message):
    dataset = append(store.create_dataset(memory()))
    with pytest.raises(store.StoreError, match=message):
        store.append_part(dataset, card(), leaves(card()) | change, episodes(70, 3))
    assert len(store.open_dataset(dataset.url).parts(ID)) == 1


def test_every_leaf_that_is_missing_or_of_another_kind_is_named():
    made = leaves(card())
    del made["first"], made["action/value"]
    made["observation/value"] = made["observation/value"][..., :3]
    with pytest.raises(
        store.StoreError, match=r"action/value.*nothing.*first.*nothing.*float32\[3\], expected float32\[4\]"
    ):
        store.append_part(store.create_dataset(memory()), card(), made, episodes(70, 3))


@quick
@hypothesis.given(any_spaces, action_spaces, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_no_number_that_is_not_finite_is_stored(seen, acted, value, data):
    made = card(observation_space=seen, action_space=acted)
    written = leaves(made, 20, 3)
    name = data.draw(st.sampled_from(sorted(name for name in written if written[name].dtype.kind == "f")))
    hypothesis.assume(written[name].size)
    written[name] = written[name].copy()
    written[name].flat[data.draw(st.integers(0, written[name].size - 1))] = value
    dataset = store.create_dataset(memory())
    with pytest.raises(
        store.StoreError, match=r"leaf .* at step \d+ of stream \d, expected finite.*nothing was stored"
    ) as caught:
        store.append_part(dataset, made, written, episodes(20, 3))
    assert repr(name) in str(caught.value)
    assert store.open_dataset(dataset.url).ids == () and dataset.storage.list(f"{ID}/") == []


@pytest.mark.parametrize(
    "change",
    [
        {"version": "2"},
        {"time_limit": 200},
        {"observation_space": spaces.Box(-1, 1, (4,))},
        {"action_space": spaces.Discrete(2, start=1)},
    ],
)
def test_a_group_is_of_one_version_of_its_environment(change):
    dataset = append(store.create_dataset(memory()))
    made = card(**change)
    with pytest.raises(CardError, match=f"the group of {ID} in .*{next(iter(change))}"):
        store.append_part(dataset, made, leaves(made), episodes(70, 3))
    assert store.open_dataset(dataset.url) == dataset


def test_episodes_outside_the_part_are_refused():
    dataset, made = store.create_dataset(memory()), leaves(card())
    with pytest.raises(store.StoreError, match=r"episode 2 of .* outside 70 steps of 3 streams"):
        store.append_part(dataset, card(), made, episodes(70, 3)._replace(length=np.array([70, 70, 71])))
    with pytest.raises(store.StoreError, match="columns of the shapes"):
        store.append_part(dataset, card(), made, episodes(70, 3)._replace(length=np.array([70, 70])))
    for field, values in {
        "return_": [0, np.nan, 0],
        "noise": [0, 0, np.inf],
        "start": [0, 0.5, 0],
        "seed": [np.nan] * 3,
    }.items():
        with pytest.raises(store.StoreError, match=f"the {field} of an episode of {ID} is .*, expected"):
            store.append_part(dataset, card(), made, episodes(70, 3)._replace(**{field: np.array(values)}))


@pytest.mark.parametrize(
    "id",
    ["x/../../up", "x//y", "/x", "x/", "x/.", "x\\y", "x/\n", "", "manifest/x", "manifest.json/x", "x/" + "ü" * 40],
)
def test_ids_that_leave_the_folder_are_refused(tmp_path, id):
    dataset = store.create_dataset(tmp_path / "inside")
    with pytest.raises(store.StoreError, match="cannot name a folder"):
        store.append_part(dataset, dataclasses.replace(card(), id=id), leaves(card(), 5, 2), episodes(5, 2))
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "manifest.json"]


def test_windows_outside_the_part_are_refused():
    (part,) = append(store.create_dataset(memory())).parts(ID)
    for start, stop, stream in [(0, 71, 0), (-1, 5, 0), (5, 5, 0), (0, 5, 3), (0, 5, -1)]:
        with pytest.raises(store.StoreError, match="has 70 steps and 3 streams"):
            part.read(["reward"], start, stop, stream)
    with pytest.raises(
        store.StoreError, match=r"has no leaf 'rewards', only action/value, first, label_mask, .*, reward, "
    ):
        part.read(["rewards"], 0, 5, 0)


MAKERS = """
import multiprocessing, pathlib, sys
sys.path.insert(0, {tests!r})

def make(root, number, rounds, barrier):
    import tiny_datasets
    try:
        for i in range(rounds):
            barrier.wait(60)
            dataset = tiny_datasets.store.create_dataset(root / str(i))
            tiny_datasets.append(dataset, f"gymnax/{{number}}", steps=2, streams=1, value=number)
    except BaseException:
        barrier.abort()  # or the others wait for this one
        raise

if __name__ == "__main__":
    context, count, rounds = multiprocessing.get_context("spawn"), 4, 20
    root, barrier = pathlib.Path({root!r}), context.Barrier(count)
    processes = [context.Process(target=make, args=(root, number, rounds, barrier)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, process.exitcode
"""


def test_of_many_that_make_one_dataset_at_once_all_write_to_it(tmp_path):
    root = tmp_path / "root"
    for number in range(0, 20, 2):
        (root / str(number)).mkdir(parents=True)  # the others are missing
    script = tmp_path / "makers.py"
    script.write_text(MAKERS.format(tests=str(pathlib.Path(__file__).parent), root=str(root)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in root.iterdir():
        dataset = store.open_dataset(folder)
        store.verify_dataset(dataset)
        assert dataset.ids == tuple(f"gymnax/{number}" for number in range(4))


def test_a_dataset_made_while_its_folder_is_looked_at_is_no_stranger(tmp_path):
    class Slow(storage.Storage):
        def is_empty(self):
            append(store.create_dataset(tmp_path))  # the other writer, between the two looks
            return super().is_empty()

    found = store.dataset.read_manifest(Slow(str(tmp_path)))
    assert found.content == (tmp_path / store.MANIFEST).read_bytes()


# A place without room, or that cannot be read


def assert_one_line(error):
    assert isinstance(error, LdmError) and not {*"\n\0\t"} & {*str(error)} and "source locations" not in str(error)


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
import tiny_datasets
dataset = tiny_datasets.store.open_dataset({url!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    tiny_datasets.append(dataset, steps=2000, streams=8)
except tiny_datasets.store.StoreError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_leaves_the_dataset_as_it_was(tmp_path):
    append(store.create_dataset(tmp_path), steps=5)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    code = FULL.format(tests=str(pathlib.Path(__file__).parent), url=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("cannot write ") and "File too large. Choose a place with room" in line
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    store.verify_dataset(append(store.open_dataset(tmp_path)))


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only who may mount a file system can fill one")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_the_dataset_as_it_was(small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**19))
    with pytest.raises(
        store.StoreError, match=r"cannot write manifest.json .*No space left on device.*with room"
    ) as caught:
        store.create_dataset(small_disk / "data")
    assert_one_line(caught.value)
    filler.unlink()
    dataset, outcomes = append(store.create_dataset(small_disk / "data"), steps=5), set()
    for room in range(0, 200, 4):
        usage = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, usage.f_bavail * usage.f_bsize - room * 1024)))
        before, files = store.open_dataset(dataset.url), {*(small_disk / "data").rglob("*.npy")}
        try:
            append(dataset, steps=200, streams=8, value=room)
            outcomes.add("written")
        except store.StoreError as error:
            assert_one_line(error)
            assert "No space left on device" in str(error)
            assert store.open_dataset(dataset.url) == before and {*(small_disk / "data").rglob("*.npy")} == files
            outcomes.add(re.search(r"cannot write (\S*?)(part-\d+)?(/\S*)? at", str(error))[3])
        filler.unlink()
        store.verify_dataset(store.open_dataset(dataset.url))
        if "written" in outcomes:
            break
    assert "written" in outcomes and len(outcomes) > 2, f"filled at several files, not only at {outcomes}"


@pytest.mark.parametrize("name", ["observation/value", "episodes.npy", "card"])
def test_what_cannot_be_read_is_not_said_to_be_damaged(tmp_path, name):
    dataset = append(store.create_dataset(tmp_path))
    paths = {"card": (tmp_path / ID).glob("card-*"), "episodes.npy": [tmp_path / ID / "part-00001" / name]}
    (path,) = paths[name] if name in paths else _files(tmp_path, name)
    kept = path.rename(tmp_path / "kept")
    path.symlink_to(path.name)  # as a broken mount: even the superuser cannot read it
    dataset = store.open_dataset(tmp_path)
    with pytest.raises(store.StoreError, match=r"cannot (be )?read.*symbolic links") as caught:
        store.verify_dataset(dataset)
    assert "delete" not in str(caught.value) and "damaged. " not in str(caught.value)
    assert_one_line(caught.value)
    path.unlink()
    kept.rename(path)
    store.verify_dataset(dataset)


def test_what_was_removed_meanwhile_is_not_said_to_be_damaged(tmp_path):
    dataset = append(append(store.create_dataset(tmp_path)), "x/other")
    store.remove_group(dataset, ID)
    for read in (
        lambda: dataset.card(ID),
        lambda: dataset.parts(ID)[0].episodes,
        lambda: store.verify_dataset(dataset),
    ):
        with pytest.raises(store.StoreError, match="removed or replaced since the dataset was opened: open it again"):
            read()
    (part,) = dataset.parts("x/other")
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    for read in (lambda: part.read(["reward"], 0, 1, 0), lambda: part.episodes, lambda: dataset.card("x/other")):
        with pytest.raises(store.StoreError, match=r"The dataset is gone from .*unmounted") as caught:
            read()
        assert "delete" not in str(caught.value)


def test_a_manifest_that_another_program_changed(tmp_path):
    append(store.create_dataset(tmp_path))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"configuration": 3}))
    with pytest.raises(store.StoreError, match=r"the manifest\.json of .* was changed by another program"):
        store.open_dataset(tmp_path)


def test_a_flipped_byte_anywhere_in_a_record_is_found(tmp_path):
    append(append(store.create_dataset(tmp_path)), "x/other")
    path = tmp_path / records.record_key(ID)
    whole = path.read_bytes()
    group = records.decode_group("here", ID, whole)
    assert records.encode_group(ID, group) == whole
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1
        with pytest.raises(store.StoreError, match=r"manifest/gymnax%2FCartPole-v1.json of here .*collect .* again"):
            records.decode_group("here", ID, bytes(data))
    with pytest.raises(store.StoreError, match=f"it is that of {ID}"):
        records.decode_group("here", "x/other", whole)
    path.write_bytes(whole[:-40])
    dataset = store.open_dataset(tmp_path)  # lazily, as with parts
    assert dataset.ids == (ID, "x/other") and dataset.parts("x/other")
    for use in (lambda: dataset.card(ID), lambda: append(dataset), lambda: store.verify_dataset(dataset)):
        with pytest.raises(store.StoreError, match=f"delete that file and collect {ID} again"):
            use()


def test_the_configuration_of_a_dataset_is_kept_and_another_is_refused(tmp_path):
    made = {"seed": 0, "data": {"steps": 64}, "levels": (0, 1)}
    assert store.create_dataset(tmp_path, made).configuration == {**made, "levels": [0, 1]}
    dataset = append(store.create_dataset(tmp_path, made))
    for opened in (store.create_dataset(tmp_path), store.open_dataset(tmp_path)):
        assert opened == dataset
    message = (
        r"made with another configuration: data was \{'steps': 64\} there and is absent now; "
        r"seed was 0 there and is 1 now\. Give the same"
    )
    with pytest.raises(store.StoreError, match=message):
        store.create_dataset(tmp_path, {"seed": 1, "levels": [0, 1]})
    assert store.open_dataset(tmp_path) == dataset


def test_appending_reads_and_writes_the_same_files_whatever_the_number_of_environments(monkeypatch):
    """So that it costs the part, not the dataset."""
    asked = []

    def note(name):
        method = getattr(storage.Storage, name)

        def noted(self, key, *rest):
            asked.append((name, str(key)))
            return method(self, key, *rest)

        monkeypatch.setattr(storage.Storage, name, noted)

    for name in ("read", "write", "list", "read_all"):
        note(name)
    traffic = []
    for others in (0, 7):
        dataset = store.create_dataset(memory())
        for number in range(others):
            dataset = append(dataset, f"x/{number}", steps=2, streams=1)
        asked.clear()
        append(dataset, steps=2, streams=1)
        traffic.append(list(asked))
    assert traffic[0] == traffic[1]


# Paths, and what travels


def test_a_path_means_the_same_in_every_folder_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    append(store.create_dataset("~/mine"))
    for url in ("~/mine", "file://~/mine", tmp_path / "link" / "mine", pathlib.Path("~/mine")):
        assert store.open_dataset(url).ids == (ID,)
    assert store.open_dataset(tmp_path / "link/mine").url == f"{tmp_path}/link/mine", "a link may be pointed elsewhere"
    monkeypatch.chdir(tmp_path)
    dataset = store.create_dataset("here")
    monkeypatch.chdir(tmp_path / "home")
    append(dataset)
    assert store.open_dataset(tmp_path / "here").ids == (ID,)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["mine"]


def test_what_is_opened_is_shown_in_a_line():
    dataset = append(store.create_dataset("memory://repr"), steps=2000, streams=4)
    assert repr(dataset) == "Dataset(memory://repr, 1 environments, 8K steps)"
    assert repr(dataset.parts(ID)) == f"(Part({ID}/part-00001, 2000 steps of 4 streams),)"


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_what_is_opened_travels_before_and_after_use(tmp_path, travel):
    dataset = append(append(store.create_dataset(tmp_path)), value=1)
    part = dataset.parts(ID)[0]
    values = {"dataset": dataset, "part": part, "request": store.Request(part, ("reward",), 0, 5, 1)}
    before = {name: travel(value) for name, value in values.items()}
    window, values["episodes"] = part.read(["reward"], 0, 5, 1), part.episodes
    dataset.card(ID)
    after = {name: travel(value) for name, value in values.items()}
    for copies in (before, after):
        for name, value in copies.items():
            assert value == values[name] and (value != values[name]) is False
        assert copies["dataset"].card(ID) == dataset.card(ID)
        assert copies["part"].episodes == part.episodes
        np.testing.assert_array_equal(copies["part"].read(["reward"], 0, 5, 1)["reward"], window["reward"])
    assert len({part, before["part"], after["part"]}) == len({dataset, before["dataset"]}) == 1
    assert dataset != append(dataset) and part != dataset.parts(ID)[1]
    assert part.episodes != part.episodes._replace(noise=np.ones(3))


def test_a_dataset_is_read_by_another_process(tmp_path):
    dataset = append(store.create_dataset(tmp_path), value=3)
    dataset.parts(ID)[0].read(["reward"], 0, 1, 0)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).parts(sys.argv[1])[0].read(['reward'], 0, 2, 0))"
    done = subprocess.run(
        [sys.executable, "-c", code, ID], input=pickle.dumps(dataset), capture_output=True, check=True
    )
    assert b"array([3., 3.], dtype=float32)" in done.stdout

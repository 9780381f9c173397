"""Laws of what looks after datasets: damage is found, what is merged is whole, and other formats carry all of it."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny_datasets import ID, append, card, episodes, leaves, memory

from data import store
from experiments import dataset as script
from experiments.harness import outcomes
from ldm_jax.cards import Statistics
from ldm_jax.errors import LdmError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dataset of two environments, one of them in two parts."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    dataset = store.create_dataset(folder, {"seed": 3})
    for id, value in ((ID, 1), (ID, 2), ("x/other", 3)):
        dataset = append(dataset, id, steps=9, value=value)
    return folder


def damages(folder):
    """What is found, the manifest's included, which keeps a dataset from being opened."""
    try:
        return list(store.find_damage(store.open_dataset(folder)))
    except store.StoreError as error:
        return [error]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_every_flipped_byte_and_truncation_is_found(whole, data):
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged = content[:place]
    else:
        damaged = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    path.write_bytes(damaged)
    try:
        found = damages(whole)
    finally:
        path.write_bytes(content)
    assert found, (path, place)
    for each in found:
        if isinstance(each, store.Damage):
            assert path.is_relative_to(whole / each.id) or each.file == "record"


def test_what_is_whole_is_said_to_be_and_all_damage_is_listed(whole, tmp_path):
    assert damages(whole) == []
    copy = shutil.copytree(whole, tmp_path / "copy")
    command = [sys.executable, "-m", "experiments.dataset", "verify", f"--dataset={copy}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"Dataset({copy}, 2 environments, 81 steps) is whole\n"
    shard = copy / ID / "part-00002" / "reward" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (copy / "x/other/part-00001/episodes.npy").unlink()
    run = subprocess.run(command, capture_output=True, text=True)
    heading, *lines = run.stdout.splitlines()
    assert run.returncode == 1 and heading.split()[:3] == ["environment", "part", "file"]
    assert [line.split()[:3] for line in lines] == [
        [ID, "part-00002", "reward"],
        ["x/other", "part-00001", "episodes.npy"],
    ]
    assert run.stderr.splitlines()[-1] == f"error: 2 files or leaves of {copy} are damaged: they are listed above"


def test_a_record_that_was_removed_is_noticed_and_what_a_writer_has_in_flight_is_no_damage(tmp_path):
    dataset = append(append(store.create_dataset(tmp_path / "data"), steps=9), "x/other", steps=9)
    (tmp_path / "data" / ID / "part-00002" / "reward").mkdir(parents=True)
    (tmp_path / "data" / ID / "part-00002" / "reward" / "zarr.json").write_text("{}")
    (tmp_path / "data" / ID / "part-00002.claim").write_text("{}")
    store.verify_dataset(dataset)
    (tmp_path / "data" / store.records.record_key("x/other")).unlink()
    (damage,) = store.find_damage(store.open_dataset(dataset.url))
    assert damage[:3] == ("x/other", "part-00001", "record") and "restore manifest/x%2Fother.json" in str(damage.error)


def test_a_zarr_array_of_another_writer_is_no_part_of_a_dataset(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    append(store.create_dataset(tmp_path), value=1)
    folder = tmp_path / ID / "part-00001" / "reward"
    shutil.rmtree(folder)
    foreign = tensorstore.open(
        {"driver": "zarr3", "kvstore": f"file://{folder}/"}, create=True, shape=[70, 3], dtype="float32"
    ).result()
    foreign.write(np.ones((70, 3), np.float32)).result()
    (damage,) = damages(tmp_path)
    assert damage[:3] == (ID, "part-00001", "reward")
    assert "its zarr.json is not what was written, by another program perhaps" in str(damage.error)


def contents(dataset):
    return {
        id: sorted(
            (part.read_leaf("reward")[0, 0], {name: record.checksum for name, record in part.record.leaves.items()})
            for part in dataset.parts(id)
        )
        for id in dataset.ids
    }


def test_a_merged_dataset_has_all_that_its_sources_had_once(whole, tmp_path):
    other = append(append(store.create_dataset(tmp_path / "other", {"seed": 3}), steps=9, value=2), value=4)
    append(other, "x/third", value=5)
    for _ in range(2):  # again changes nothing
        merged = script.merge_datasets(tmp_path / "merged", [str(whole), str(tmp_path / "other")])
        assert damages(tmp_path / "merged") == [] and merged == store.open_dataset(tmp_path / "merged")
        assert merged.ids == (ID, "x/other", "x/third") and merged.configuration == {"seed": 3}
        rewards = {id: [reward for reward, _ in parts] for id, parts in contents(merged).items()}
        assert rewards == {ID: [1, 2, 4], "x/other": [3], "x/third": [5]}
    assert contents(merged)["x/other"] == contents(store.open_dataset(whole))["x/other"]


def test_the_card_of_a_merged_environment_is_the_one_measured_on_more():
    longer = dataclasses.replace(card(), statistics=Statistics((1.0,) * 4, (1.0,) * 4, 1.0, (), (), 99))
    short = append(store.create_dataset(memory()))
    long = store.append_part(store.create_dataset(memory()), longer, leaves(longer, seed=5), episodes(70, 3))
    for target, source in ((short, long), (long, short)):
        copied = store.create_dataset(memory())
        for each in (target, source):
            copied = store.merging.copy_parts(copied, each)
        assert copied.card(ID) == longer and len(copied.parts(ID)) == 2


def test_what_is_of_another_kind_is_not_merged_and_nothing_is_written(whole, tmp_path):
    newer = card(version="2")
    store.append_part(store.create_dataset(tmp_path / "newer", {"seed": 3}), newer, leaves(newer), episodes(70, 3))
    store.create_dataset(tmp_path / "seeded", {"seed": 4})
    for name, message in (
        ("newer", f"{ID} is another one in .*newer than in .*: version was 1"),
        ("seeded", "seed was 3"),
    ):
        with pytest.raises(store.StoreError, match=message):
            script.merge_datasets(tmp_path / "merged", [str(whole), str(tmp_path / name)])
        assert not (tmp_path / "merged").exists()
    with pytest.raises(store.StoreError, match="seed was 4 there and is 3 now"):
        script.merge_datasets(tmp_path / "seeded", [str(whole)])


def test_a_description_counts_what_is_there(whole):
    text = script.describe_dataset(store.open_dataset(whole))
    raw = sum(value[0, 0].nbytes for value in leaves(card()).values())
    assert text[:2] == [f"Dataset({whole}, 2 environments, 81 steps)", "made with seed=3"]
    all_row, own_row = (next(line.split() for line in text if line.startswith(word)) for word in ("all", ID))
    assert all_row[:4] == ["all", "2", "81", f"{raw:.1f}"] and float(all_row[4]) > 0
    assert own_row[:3] == [ID, "54", f"{raw:.1f}"] and own_row[-3:] == ["0.25", "to", "0.25"]
    assert len(script.describe_dataset(store.open_dataset(whole), ["x/other"])) == len(text) - 1


def test_the_page_of_a_dataset_says_what_is_there_and_what_was_left_out_and_why(whole, tmp_path):
    left_out, kept = (
        outcomes.UnitOutcome("failed", "no <b>licence</b>", "library missing"),
        outcomes.UnitOutcome("admitted", ""),
    )
    for id, outcome in {"x/gone": left_out, ID: kept}.items():
        outcomes.write_outcome(whole.parent / "references" / id, outcome)
    dataset = store.open_dataset(whole)
    found = [script.look_at(dataset, id) for id in dataset.ids]
    page = script.write_data_card(dataset, found, tmp_path / "new" / "card.html").read_text()
    assert "81 transitions of 2 environments" in page and "seed" in page
    assert "<code>x/gone</code> no &lt;b&gt;licence&lt;/b&gt;" in page and f"<code>{ID}</code>" not in page
    with pytest.raises(LdmError, match="Give another path"):
        script.write_data_card(dataset, found, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mend"], "error: got mend, expected one of verify, describe, merge, export-minari"),
        (["verify", "--dataset=/nowhere"], "error: there is no dataset at /nowhere"),
        (["merge", "--dataset=/nowhere"], "sources"),
    ],
)
def test_a_wrong_command_is_told_in_a_line(words, message):
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "experiments.dataset", *words], capture_output=True, text=True, cwd=root
    )
    assert run.returncode == 1 and message in run.stderr.splitlines()[-1]


def test_an_environment_goes_to_minari_and_back_and_twice_is_once(whole, tmp_path):
    pytest.importorskip("minari")
    for words in (
        ["export-minari", f"--dataset={whole}", "--environment=x/other", f"--folder={tmp_path / 'minari'}"],
        *[["import-minari", f"--dataset={tmp_path / 'back'}", f"--folder={tmp_path / 'minari'}"]] * 2,
    ):
        run = subprocess.run(
            [sys.executable, "-m", "experiments.dataset", *words], capture_output=True, text=True, check=True
        )
    assert run.stdout == f"Dataset({tmp_path / 'back'}, 1 environments, 27 steps)\n"
    assert damages(tmp_path / "back") == []

"""Laws of Minari's format: what is exported and imported again is the same transitions, and others' data come in."""

import gymnasium
import hypothesis
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import strategies as st
from tiny_datasets import ID, append, card, leaves, memory

from data import minari_format, store
from data.collect import index_episodes

minari = pytest.importorskip("minari")

SPACES = st.sampled_from(
    [
        spaces.Box(-np.inf, np.inf, (4,)),
        spaces.Box(0, 255, (40, 33, 3), np.uint8),
        spaces.Discrete(5, start=2),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.Dict({"b": spaces.Box(-1, 1, (2, 2)), "a": spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, ())])}),
    ]
)


def lawful(made, steps, streams, seed, masked):
    """Random leaves whose episodes begin and end as those of environments do."""
    rng, written = np.random.default_rng(seed), leaves(made, steps, streams, seed, masked)
    first = rng.random((steps, streams)) < 0.2
    first[0] = True
    ended = np.roll(first, -1, 0)
    ended[-1] = rng.random(streams) < 0.5
    by_limit = rng.random((steps, streams)) < 0.5
    return written | {
        "first": first,
        "terminated": ended & ~by_limit & ~first,
        "truncated": ended & by_limit & ~first,
        "reward": np.where(first, np.float32(0), written["reward"]),
    }


def episode_rows(dataset, id):
    """The rows of each episode of more than one, as bytes by leaf."""
    rows = []
    for part in dataset.parts(id):
        values = {name: part.read_leaf(name) for name in part.leaf_names}
        for begin, length, stream in zip(part.episodes.start, part.episodes.length, part.episodes.stream, strict=True):
            if length > 1:
                rows.append({name: value[begin : begin + length, stream].tobytes() for name, value in values.items()})
    return rows


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(SPACES, SPACES, st.booleans(), st.integers(0, 99))
def test_what_is_exported_and_imported_again_is_the_same(tmp_path_factory, seen, acted, masked, seed):
    folder = tmp_path_factory.mktemp("export") / "minari"
    made = card(observation_space=seen, action_space=acted)
    dataset = store.create_dataset(memory())
    for number in range(2):
        written = lawful(made, 12, 2, seed + number, masked)
        levels = np.array([0.0, 0.5], np.float32)
        dataset = store.append_part(dataset, made, written, index_episodes(written, seed, levels))
    count = minari_format.export_minari(dataset, ID, folder)
    imported = minari_format.import_minari(store.create_dataset(memory()), folder)
    store.verify_dataset(imported)
    assert imported.card(ID) == made
    assert episode_rows(imported, ID) == episode_rows(dataset, ID)
    whole = [index for part in dataset.parts(ID) for index in zip(*part.episodes, strict=True) if index[1] > 1]
    (index,) = (part.episodes for part in imported.parts(ID))
    for field in ("length", "return_", "seed", "noise"):
        place = store.EpisodeIndex._fields.index(field)
        np.testing.assert_allclose(getattr(index, field), [row[place] for row in whole], rtol=1e-6)
    opened = minari.MinariDataset(folder)  # as Minari alone sees it
    assert opened.total_episodes == count == len(whole)
    assert opened.total_steps == sum(row[1] - 1 for row in whole)
    assert opened.observation_space == seen and opened.action_space == acted


@pytest.mark.filterwarnings("ignore::UserWarning")  # of authors and links that are not told
def test_data_that_minari_itself_collected_become_an_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    environment = minari.DataCollector(gymnasium.make("CartPole-v1"))
    seen = []
    for seed in range(3):
        observation, _ = environment.reset(seed=seed)
        environment.action_space.seed(seed)
        seen.append([observation])
        ended = False
        while not ended:
            observation, _, terminated, truncated, _ = environment.step(environment.action_space.sample())
            seen[-1].append(observation)
            ended = terminated or truncated
    made = environment.create_dataset("cartpole/random-v0", algorithm_name="random")
    environment.close()
    folder, dataset = made.storage.data_path, store.create_dataset(memory())
    with pytest.raises(store.StoreError, match="nothing is known of the random policy"):
        minari_format.import_minari(dataset, folder)
    dataset = minari_format.import_minari(dataset, folder, random_return=20.0, domain="classic control")
    (id,) = dataset.ids
    found, (part,) = dataset.card(id), dataset.parts(id)
    assert id == "minari/cartpole/random-v0" and found.time_limit == 500 and found.domain == "classic control"
    assert found.reference_returns.array.ravel().tolist() == [len(rows) - 1 for rows in seen]
    np.testing.assert_array_equal(part.read_leaf("observation/value")[:, 0], np.concatenate(seen))
    lasts = np.cumsum([len(rows) for rows in seen]) - 1
    assert np.flatnonzero(part.read_leaf("terminated")).tolist() == lasts.tolist()
    assert np.flatnonzero(~part.read_leaf("label_mask")).tolist() == lasts.tolist()
    episodes = list(made.iterate_episodes())
    actions = np.delete(part.read_leaf("action/value")[:, 0], lasts)
    np.testing.assert_array_equal(actions, np.concatenate([episode.actions for episode in episodes]))
    assert (part.read_leaf("reference_action/value") == part.read_leaf("action/value")).all()


def test_what_minari_cannot_carry_or_is_not_there_is_refused(tmp_path):
    made = card(observation_space=spaces.Dict({"text": spaces.Text(8)}))
    dataset = store.create_dataset(memory())
    written = lawful(made, 9, 2, 0, False)
    texts = store.append_part(dataset, made, written, index_episodes(written, 0, np.zeros(2)))
    with pytest.raises(store.StoreError, match=f"{ID} has texts"):
        minari_format.export_minari(texts, ID, tmp_path / "texts")
    (tmp_path / "there").mkdir()
    with pytest.raises(store.StoreError, match="is there already"):
        minari_format.export_minari(append(store.create_dataset(memory())), ID, tmp_path / "there")
    with pytest.raises(store.StoreError, match=r"cannot read .*there as a dataset of Minari"):
        minari_format.import_minari(dataset, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

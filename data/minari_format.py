"""Environments of a dataset as datasets of Minari, and back. The one file that knows Minari.

An episode of n steps has n + 1 observations in both. Here a row holds what an action led to beside what was seen then,
so the rewards and endings of Minari's step t are those of row t + 1. What Minari has no place for (labels, the
reference's distribution, masks, the action of the last row) is kept in the `infos` of each episode, the noise level in
its `options`, and the card in the metadata. An episode of which only the first observation is there is left out.
"""

from __future__ import annotations

import collections.abc
import os
import pathlib
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax import files, spaces
from ldm_jax.cards import CardError, EnvironmentCard, Reference, Returns, Statistics
from ldm_jax.encoding.transition import Transition, from_leaves, to_leaves, transition_schema
from ldm_jax.types import EnvironmentSpec, PyTree, TimeStep

from .statistics import measure
from .store import Dataset, EpisodeIndex, Part, StoreError, append_part

KEY = "ldm_jax"
"""Under which our own things are found among Minari's."""
LIBRARY = "minari"
"""The library of environments that are known by their data alone."""
STEP = ("reward", "terminated", "truncated", "first")


def export_minari(
    dataset: Dataset,
    id: str,
    folder: str | os.PathLike[str],
    progress: collections.abc.Callable[[int], object] = lambda nbytes: None,
) -> int:
    """Writes the episodes of an environment as a dataset of Minari, whole or not at all.

    Args:
      dataset: where they are.
      id: the environment; of any space but texts.
      folder: where to write, new; `minari.MinariDataset(folder)` opens it.
      progress: called with the bytes, uncompressed, that were exported since the last call.

    Returns:
      The number of episodes.

    Raises:
      StoreError: there is no such environment, it has texts or is damaged, something is in the folder's place, or
        Minari is not installed.
    """
    minari, card = _minari(), dataset.card(id)
    _check_spaces(card)
    if os.path.exists(folder):
        raise StoreError(f"{folder} is there already: remove it, or give another folder")
    with files.replacing(folder) as aside:
        aside.mkdir()
        storage = minari.dataset.minari_storage.MinariStorage.new(
            aside, observation_space=card.observation_space, action_space=card.action_space, jpeg_encoding=False
        )
        storage.update_metadata(
            {
                "dataset_id": f"{id.replace('/', '-')}/{card.reference.algorithm}-v0",
                "minari_version": minari.__version__,
                "algorithm_name": card.reference.algorithm,
                "ref_min_score": card.random_returns.mean,
                "ref_max_score": card.reference_returns.mean,
                KEY: card.to_json(),
            }
        )
        for part in dataset.parts(id):
            storage.update_episodes(_episodes_of(card, part, progress))
        return storage.total_episodes


def _episodes_of(
    card: EnvironmentCard, part: Part, progress: collections.abc.Callable[[int], object]
) -> collections.abc.Iterator[typing.Any]:
    from minari.data_collector import EpisodeBuffer

    leaves, index = {name: part.read_leaf(name) for name in part.leaf_names}, part.episodes
    step_bytes = part.record.nbytes // (part.steps * part.streams)
    for begin, length, _, seed, noise, stream in zip(*(column.tolist() for column in index), strict=True):
        if length > 1:
            rows = {name: value[begin : begin + length, stream] for name, value in leaves.items()}
            transition = from_leaves(card.observation_space, card.action_space, rows)
            own = {name: value for name, value in rows.items() if _is_own(name)}
            yield EpisodeBuffer(
                seed=seed,
                options={"noise": noise},
                observations=transition.timestep.observation,
                actions=jax.tree.map(lambda value: value[:-1], transition.action),
                rewards=rows["reward"][1:],  # type: ignore[arg-type]  # lists or arrays, whatever it says
                terminations=rows["terminated"][1:],  # type: ignore[arg-type]
                truncations=rows["truncated"][1:],  # type: ignore[arg-type]
                infos={KEY: _nest(own)},
            )
        progress(length * step_bytes)


def _is_own(name: str) -> bool:
    return name not in STEP and not name.startswith("observation/") and name != "observation"


def import_minari(
    dataset: Dataset, folder: str | os.PathLike[str], random_return: float | None = None, domain: str = "imported"
) -> Dataset:
    """Adds a dataset of Minari as one environment: a part of one stream, its episodes one after another.

    One that `export_minari` wrote gets its card back. Any other is the environment `minari/<its id>`, whose reference
    is whoever acted in it: the labels are the actions.

    Args:
      dataset: where to write.
      folder: of Minari's dataset, the one with `metadata.json`.
      random_return: mean return of the random policy, where the metadata have no `ref_min_score`.
      domain: what the task is about, where there is no card.

    Returns:
      The dataset with the new part.

    Raises:
      StoreError: it is no dataset of Minari, it has no episodes, texts, or numbers that are not finite, or nothing is
        known of the random policy.
      SpaceError: a space that is not supported.
    """
    minari = _minari()
    try:
        source = minari.MinariDataset(pathlib.Path(folder))
        metadata, episodes = source.storage.metadata, list(source.iterate_episodes())
        options = list(source.storage.get_episode_metadata(source.episode_indices))
    except (ValueError, OSError, KeyError, AssertionError) as error:
        raise StoreError(
            f"cannot read {folder} as a dataset of Minari: {error}. Give the folder of metadata.json"
        ) from error
    if not episodes:
        raise StoreError(f"the dataset of Minari in {folder} has no episodes")
    card = EnvironmentCard.from_json(metadata[KEY]) if KEY in metadata else None
    spec = _spec(source, metadata, episodes, domain) if card is None else _spec_of(card)
    _check_spaces(spec)
    rows = [_rows(spec, episode) for episode in episodes]
    leaves = {name: np.concatenate([each[name] for each in rows])[:, None] for name in rows[0]}
    lengths = np.array([len(each["first"]) for each in rows])
    index = EpisodeIndex(
        start=lengths.cumsum() - lengths,
        length=lengths,
        return_=np.array([episode.rewards.astype(np.float64).sum() for episode in episodes]),
        seed=np.array([each.get("seed") or 0 for each in options]),
        noise=np.array([each.get("options", {}).get("noise", 0.0) for each in options]),
        stream=np.zeros(len(rows), np.int64),
    )
    if card is None:
        random = metadata.get("ref_min_score", random_return)
        card = _card(spec, metadata, random, index.return_, measure(spec, leaves))
    return append_part(dataset, card, leaves, index)


def _minari() -> typing.Any:
    try:
        import minari
        import minari.dataset.minari_storage
    except ImportError as error:
        raise StoreError(f"Minari is not installed ({error}): pip install 'ldm_jax[minari]'") from error
    return minari


def _check_spaces(described: EnvironmentCard | EnvironmentSpec) -> None:
    for space in (described.observation_space, described.action_space):
        for leaf in spaces.leaves(space):
            if isinstance(leaf.space, gymnasium.spaces.Text):
                raise StoreError(f"{described.id} has texts ({leaf.name}), which cannot be carried to or from Minari")
            if any(isinstance(key, str) and "/" in key for key in leaf.path):
                raise StoreError(f"{described.id} has the key {leaf.name!r}, which Minari's files would take for two")


def _nest(flat: dict[str, np.ndarray]) -> dict[str, typing.Any]:
    nested: dict[str, typing.Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return nested


def _flatten(nested: dict[str, typing.Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in nested.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _rows(spec: EnvironmentSpec, episode: typing.Any) -> dict[str, np.ndarray]:
    """The leaves `[n + 1, ...]` of an episode of n steps."""
    rows, last = len(episode.rewards) + 1, spaces.zeros(spec.action_space, (1,))
    action = jax.tree.map(lambda *each: np.concatenate(each), _as_tree(spec.action_space, episode.actions), last)
    transition = Transition(
        timestep=TimeStep(
            observation=_as_tree(spec.observation_space, episode.observations),
            reward=np.append(0.0, episode.rewards),
            terminated=np.append(False, episode.terminations),
            truncated=np.append(False, episode.truncations),
            first=np.arange(rows) == 0,
            action_mask=None,
        ),
        action=action,
        reference_action=action,
        distribution=None,
        label_mask=np.arange(rows) < rows - 1,
    )
    leaves = {
        name: np.asarray(value)
        for name, value in to_leaves(spec.observation_space, spec.action_space, transition).items()
    }
    own = _flatten((episode.infos or {}).get(KEY, {}))
    if not own:
        return leaves
    schema = transition_schema(
        spec.observation_space,
        spec.action_space,
        masked="action_mask" in own,
        distribution=any(name.startswith("reference/") for name in own),
    )
    return {name: (leaves | own)[name].astype(struct.dtype) for name, struct in schema.items()}


def _as_tree(space: gymnasium.Space, values: PyTree) -> PyTree:
    """In the structure of the space; a sequence of a Tuple's parts is one of arrays."""
    return spaces.unflatten(space, [np.asarray(spaces.get(values, leaf.path)) for leaf in spaces.leaves(space)])


def _spec_of(card: EnvironmentCard) -> EnvironmentSpec:
    return EnvironmentSpec(
        card.id,
        card.library,
        card.version,
        card.observation_space,
        card.action_space,
        1,
        card.time_limit,
        card.domain,
        False,
    )


def _spec(
    source: typing.Any, metadata: dict[str, typing.Any], episodes: list[typing.Any], domain: str
) -> EnvironmentSpec:
    longest = max(len(episode) for episode in episodes)
    return EnvironmentSpec(
        id=f"{LIBRARY}/{source.id}",
        library=LIBRARY,
        version=str(metadata["minari_version"]),
        observation_space=source.observation_space,
        action_space=source.action_space,
        batch_size=1,
        time_limit=getattr(source.env_spec, "max_episode_steps", None) or max(1, longest),
        domain=domain,
        jittable=False,
    )


def _card(
    spec: EnvironmentSpec,
    metadata: dict[str, typing.Any],
    random_return: float | None,
    returns: np.ndarray,
    statistics: Statistics,
) -> EnvironmentCard:
    if random_return is None:
        raise StoreError(
            f"nothing is known of the random policy's return in {spec.id}: give it, or scores could not be told"
        )
    try:
        return EnvironmentCard.of(
            spec,
            statistics=statistics,
            random_returns=Returns(((float(random_return),),)),
            reference_returns=Returns.of(returns[None]),
            reference=Reference(str(metadata.get("algorithm_name") or LIBRARY), "sample", 0, 0),
        )
    except CardError as error:
        raise StoreError(f"{spec.id} cannot be imported: {error}") from error

"""Acting by hand in rows of several environments of one bucket, as one batch; pure."""

from __future__ import annotations

import collections.abc
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.acting.agent import ActingError, check_timestep
from ldm_jax.acting.decoding import Decoding
from ldm_jax.acting.rows import RowDraws, act_rows, form_of
from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.codec import Codec
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.decoder import Cache, clear, init_cache
from ldm_jax.model.network import Inputs, Params
from ldm_jax.types import Array, Key, PyTree, TimeStep


class MixedState(typing.NamedTuple):
    """What a policy remembers of rows of several environments; a pytree.

    Attributes:
      cache: keys and values of the last W steps; the rows are those of the environments in sorted order of their ids.
      previous: by id, the slots of the previous action.
    """

    cache: Cache
    previous: dict[str, Slots]


def start_mixed(
    cfg: ModelConfig, codecs: collections.abc.Mapping[str, Codec], rows: collections.abc.Mapping[str, int]
) -> MixedState:
    """The memory of rows that have seen nothing.

    Args:
      cfg: shapes of the model.
      codecs: by id, all of one bucket.
      rows: of each of the environments.

    Returns:
      The memory.
    """
    previous = {
        id: Slots(
            jnp.zeros((count, codecs[id].bucket.choice_slots), jnp.int32),
            jnp.zeros((count, codecs[id].bucket.continuous_slots), jnp.float32),
        )
        for id, count in sorted(rows.items())
    }
    return MixedState(init_cache(cfg, sum(rows.values())), previous)


def forget_mixed(state: MixedState, rows: collections.abc.Mapping[str, Array]) -> MixedState:
    """Makes some rows as `start_mixed` makes them, whatever they had seen.

    Args:
      state: of the rows.
      rows: by id, `bool [B]`, true for those that are to forget; an id that is left out forgets nothing.

    Returns:
      The memory.

    Raises:
      ActingError: an id that has no rows, or something else than one boolean for each of its rows.
    """
    if unknown := sorted({*rows} - {*state.previous}):
        raise ActingError(f"got rows of {', '.join(unknown)}, expected some of {', '.join(state.previous)}")
    chosen = []
    for id, slots in sorted(state.previous.items()):
        count = slots.categorical.shape[0]
        these = jnp.asarray(rows.get(id, np.zeros(count, bool)))
        if these.shape != (count,) or these.dtype != np.bool_:
            raise ActingError(f"rows of {id} is {these}, expected {count} booleans, true for those that are to forget")
        chosen.append(these)
    # What stands in the slots of a row that has seen nothing is never read.
    return MixedState(clear(state.cache, jnp.concatenate(chosen)), state.previous)


def act_mixed(
    cfg: ModelConfig,
    codecs: collections.abc.Mapping[str, Codec],
    params: Params,
    state: MixedState,
    timesteps: collections.abc.Mapping[str, TimeStep],
    key: Key,
    decoding: Decoding,
) -> tuple[MixedState, dict[str, PyTree]]:
    """Acts once in rows of several environments; pure, may be traced, and called as it is compiles by bucket alone.

    Args:
      cfg: shapes of the model.
      codecs: by id, all of one bucket.
      params: of the model.
      state: from `start_mixed`, or what the last call returned.
      timesteps: by id, `[B, ...]` each.
      key: typed key; row i draws from the i-th of its seeds.
      decoding: how actions are taken.

    Returns:
      The memory, and the actions by id, `[B, ...]` each.

    Raises:
      ActingError: the environments, their rows or parts of a time step are not those of the memory.
    """
    ids = sorted(state.previous)
    if sorted(timesteps) != ids:
        raise ActingError(f"got time steps of {', '.join(sorted(timesteps))}, expected those of {', '.join(ids)}")
    counts = [state.previous[id].categorical.shape[0] for id in ids]
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, dict(timesteps))))
    xp: typing.Any = jnp if traced else np
    seen = _Seen(*jax.tree.map(xp.asarray, (state.previous, dict(timesteps), state.cache.length > 0)))
    places = np.cumsum(counts)[:-1].tolist()
    inputs = _mixed_inputs([codecs[id] for id in ids], seen, xp.split(seen.before, places))
    rows = sum(counts)
    forms = [form_of(decoding, codecs[id].card) for id in ids]
    draws = RowDraws(
        seed=jax.random.bits(key, (rows, 2), np.uint32),
        step=np.zeros(rows, np.uint32),
        form=np.repeat(np.array(forms, np.int32), counts),
        fresh=np.zeros(rows, bool),
    )
    cache, slots = act_rows(params, state.cache, inputs, draws, cfg=cfg)
    choices, numbers = (xp.split(xp.asarray(leaf), places) for leaf in slots)
    after = {id: Slots(*each) for id, *each in zip(ids, choices, numbers, strict=True)}
    return MixedState(cache, after), {id: codecs[id].action(after[id]) for id in ids}


class _Seen(typing.NamedTuple):
    """Previous actions and time steps by id, and whether a row has acted before, `bool [R]`."""

    previous: dict[str, Slots]
    timesteps: dict[str, TimeStep]
    before: Array


def _mixed_inputs(codecs: list[Codec], seen: _Seen, before: list[Array]) -> Inputs:
    """What the model reads of the rows of several environments, one after the other; `before` is that of each."""
    features, signatures = [], []
    for codec, acted in zip(codecs, before, strict=True):
        id, rows = codec.card.id, acted.shape[0]
        check_timestep(codec, seen.timesteps[id], rows)
        features.append(codec.features(seen.timesteps[id], codec.action(seen.previous[id]), acted))
        signatures.append(jax.tree.map(lambda leaf, rows=rows: np.repeat(leaf[None], rows, 0), codec.signature))
    xp = seen.before.__array_namespace__()
    joined = (jax.tree.map(lambda *leaves: xp.concatenate(leaves), *parts) for parts in (features, signatures))
    return Inputs(*joined)

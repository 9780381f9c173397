"""Observations as states: told apart by fingerprints of all their bytes, on the host and inside compiled programs.

64 bits tell apart the observations that a table has room for: among 2**17 of them two are alike with a chance of one in
two billions.
"""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array, PyTree

UNUSED = 0xFFFFFFFF
"""Both halves of the key of a place that holds no state."""

_ALIKE = 4  # keys that may share their first half: among 2**15 of them three are already one in 10**6 tables
_SALTS = (0x9E3779B9, 0x85EBCA6B)


class Known(typing.NamedTuple):
    """The states seen so far, numbered in the order they were found.

    Attributes:
      keys: `uint64 [S]`, fingerprints in ascending order.
      states: `int64 [S]`, the number of each.
    """

    keys: np.ndarray
    states: np.ndarray


def nothing_known() -> Known:
    """Before anything was seen."""
    return Known(np.zeros(0, np.uint64), np.zeros(0, np.int64))


def hash_observations(observation: PyTree) -> Array:
    """Two hashes of each observation, leaves `[B, ...]`: `uint32 [B, 2]`; may be traced."""
    words = jnp.concatenate([_words(jnp.asarray(leaf)) for leaf in jax.tree.leaves(observation)], -1)
    place = jnp.arange(1, words.shape[-1] + 1, dtype=jnp.uint32)
    halves = [
        _mix(_mix(words * jnp.uint32(salt | 1) + _mix(place * jnp.uint32(salt))).sum(-1, dtype=jnp.uint32))
        for salt in _SALTS
    ]
    return jnp.stack(halves, -1)


def number_states(known: Known, prints: np.ndarray) -> tuple[np.ndarray, Known]:
    """Numbers states, those not met before from the next free number on.

    Args:
      known: so far.
      prints: `uint32 [..., 2]`, of `hash_observations`.

    Returns:
      `int64 [...]`, and what is known then.
    """
    keys = prints[..., 0].astype(np.uint64) << np.uint64(32) | prints[..., 1].astype(np.uint64)
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    new = ~np.isin(unique, known.keys)
    merged = np.concatenate([known.keys, unique[new]])
    # In the order they were met, so that a number never depends on the value of a hash.
    fresh = np.empty(new.sum(), np.int64)
    fresh[np.argsort(first[new], kind="stable")] = len(known.keys) + np.arange(new.sum())
    states = np.concatenate([known.states, fresh])
    order = np.argsort(merged)
    known = Known(merged[order], states[order])
    return known.states[np.searchsorted(known.keys, unique)][inverse].reshape(keys.shape), known


def key_table(known: Known, places: int) -> np.ndarray:
    """The keys as `find_states` takes them, `uint32 [places, 2]`; row i is of state `known.states[i]`."""
    table = np.full((places, 2), UNUSED, np.uint32)
    table[: len(known.keys)] = np.stack([known.keys >> np.uint64(32), known.keys & np.uint64(UNUSED)], -1)
    return table


def find_states(table: Array, prints: Array) -> tuple[Array, Array]:
    """Looks fingerprints up; may be traced.

    Args:
      table: `uint32 [P, 2]`, of `key_table`.
      prints: `uint32 [B, 2]`.

    Returns:
      `int32 [B]`, the row of each, and `bool [B]`, whether it is there.
    """
    table = jnp.asarray(table)
    begin = jnp.searchsorted(table[:, 0], prints[:, 0])
    rows = jnp.minimum(begin[:, None] + jnp.arange(_ALIKE), table.shape[0] - 1)
    same = (table[rows] == prints[:, None]).all(-1)
    place = jnp.argmax(same, -1)[:, None]
    return jnp.take_along_axis(rows, place, -1)[:, 0].astype(jnp.int32), same.any(-1)


def _words(leaf: Array) -> Array:
    """`uint32 [B, W]`: numbers by their bits, 0 and -0 alike."""
    rows = leaf.reshape(leaf.shape[0], -1)
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(rows.astype(jnp.float32) + 0.0, jnp.uint32)


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

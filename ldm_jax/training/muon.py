"""Muon's part for matrices: orthogonalized momentum, all matrices of one shape at once (Jordan 2024)."""

from __future__ import annotations

import collections
import math
import typing

import jax
import jax.numpy as jnp
import optax

from ldm_jax.types import Array, PyTree

_BETA = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class MuonState(typing.NamedTuple):
    """The state of `scale_by_muon`; a pytree.

    Attributes:
      done: `int32 []`, updates so far.
      mu: mean of the gradients, of the updates' structure.
    """

    done: Array
    mu: PyTree


def scale_by_muon() -> optax.GradientTransformation:
    """Turns gradients of matrices `[..., inputs, outputs]` into their orthogonalized Nesterov momentum.

    The numbers are those of `optax.contrib.muon`, which works through one parameter after the other, five iterations of
    each written out: small products, and a program that takes as long to compile as the rest of the step.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: MuonState, params: PyTree | None = None) -> tuple[PyTree, MuonState]:
        done = optax.safe_increment(state.done)
        mu = jax.tree.map(lambda mean, new: _BETA * mean + (1 - _BETA) * new, state.mu, updates)
        now, ahead = (1 - jnp.power(_BETA, done + more).astype(jnp.float32) for more in (0, 1))
        momentum = jax.tree.map(lambda mean, new: _BETA * mean / ahead + (1 - _BETA) * new / now, mu, updates)
        return orthogonalize(momentum), MuonState(done, mu)

    return optax.GradientTransformation(init, update)


def orthogonalize(matrices: PyTree) -> PyTree:
    """Brings the singular values of matrices near 1, and scales by how much wider than tall they are.

    Args:
      matrices: leaves `[..., inputs, outputs]`, each of them as many matrices as the axes in front say.

    Returns:
      A tree of the same structure.

    Source:
      Jordan et al. 2024, Muon: five Newton-Schulz iterations, and width scaling `sqrt(max(1, outputs / inputs))`.
    """
    leaves, structure = jax.tree.flatten(matrices)
    groups = collections.defaultdict[tuple[int, int], list[int]](list)
    for index, leaf in enumerate(leaves):
        groups[min(leaf.shape[-2:]), max(leaf.shape[-2:])].append(index)
    turned = [_wide(leaf) for leaf in leaves]
    for indices in groups.values():
        together = _iterate(jnp.concatenate([turned[index] for index in indices]))
        begin = 0
        for index in indices:
            end = begin + len(turned[index])
            leaves[index], begin = _restored(together[begin:end], leaves[index].shape), end
    return jax.tree.unflatten(structure, leaves)


def _wide(leaf: Array) -> Array:
    """As `[N, m, n]`, m at most n: the products are by the shorter side."""
    flat = leaf.reshape(-1, *leaf.shape[-2:])
    return flat.swapaxes(1, 2) if leaf.shape[-2] > leaf.shape[-1] else flat


def _restored(x_NMN: Array, shape: tuple[int, ...]) -> Array:
    inputs, outputs = shape[-2:]
    own = x_NMN.swapaxes(1, 2) if inputs > outputs else x_NMN
    return own.reshape(shape) * math.sqrt(max(1.0, outputs / inputs))


def _iterate(x_NMN: Array) -> Array:
    a, b, c = _COEFFICIENTS

    def times(symmetric: Array, y: Array) -> Array:
        # By its transpose, which it equals: of batches, XLA spreads this form alone over the cores of a CPU.
        return jnp.einsum("nkm,nkl->nml", symmetric, y)

    def step(_: int, x: Array) -> Array:
        square = x @ x.swapaxes(1, 2)
        return a * x + times(b * square + c * times(square, square), x)

    norm = jnp.sqrt(jnp.sum(jnp.square(x_NMN), (1, 2), keepdims=True))
    return jax.lax.fori_loop(0, _ITERATIONS, step, x_NMN / (norm + 1e-8))

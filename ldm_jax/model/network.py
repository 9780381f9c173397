"""The model as three pure functions over a plain nested dict of arrays."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import typing

import chex
import jax
from flax import nnx

from ldm_jax import sharding
from ldm_jax.encoding.codec import Features, Signature
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.decoder import Cache, Decoder, init_cache, rematerialize
from ldm_jax.model.encoders import SignatureEncoder, StepEncoder
from ldm_jax.model.heads import DrawnSlots, Head, Predictions
from ldm_jax.model.layers import Norm
from ldm_jax.types import Array

Params = dict[str, "Params | Array"]
"""Parameters: nested dict of float32 arrays; those of the decoder's blocks have a leading axis of N layers."""


class Inputs(typing.NamedTuple):
    """One bucket's rows of a batch; a pytree.

    Attributes:
      features: leaves `[R, T, ...]`.
      signature: leaves `[R, ...]`.
      drawn: which action slots to predict; default: all.
    """

    features: Features
    signature: Signature
    drawn: DrawnSlots = DrawnSlots()


class Apply(typing.Protocol):
    """Reads tokens and predicts, see `Model`."""

    def __call__(
        self, params: Params, inputs: dict[str, Inputs], cache: Cache | None = None
    ) -> tuple[dict[str, Predictions], Cache | None]:
        """Predictions by name of bucket, and the cache with one more step, or None where none was given."""


class Model(typing.NamedTuple):
    """The policy network as pure functions; nothing is hidden in it but the shapes.

    Attributes:
      init: `init(key) -> params`.
      apply: `apply(params, inputs, cache=None) -> (predictions, cache)`. `inputs` maps bucket names to `Inputs`, and
        `predictions` has the same names. Without a cache all T steps are read at once; with one T is 1, and the rows of
        all buckets, in sorted order of their names, are the rows of the cache.
      init_cache: `init_cache(batch_size) -> cache` of rows that have seen nothing.
    """

    init: collections.abc.Callable[[jax.Array], Params]
    apply: Apply
    init_cache: collections.abc.Callable[[int], Cache]


class _Network(nnx.Module):
    def __init__(self, cfg: ModelConfig, mesh: jax.sharding.Mesh | None, rngs: nnx.Rngs):
        self.cfg, self.mesh = cfg, mesh
        decoder_cfg = dataclasses.replace(cfg, window=cfg.window * cfg.tokens_per_step)
        self.signature = SignatureEncoder(cfg, rngs)
        self.tokens = StepEncoder(cfg, rngs)
        self.decoder = Decoder(decoder_cfg, rngs)
        self.norm = Norm(cfg.width)
        self.head = Head(cfg, rngs)

    def __call__(self, inputs: dict[str, Inputs], cache: Cache | None) -> tuple[dict[str, Predictions], Cache | None]:
        names, per_step = sorted(inputs), self.cfg.tokens_per_step
        if cache is not None and per_step != 1:
            raise ConfigError(
                f"a model with tokens_per_step={per_step} reads whole windows only: call it without a cache"
            )
        for name in names:
            # Rows of another number, or a window too short, would be broadcast without a word.
            features, signature, drawn = inputs[name]
            chex.assert_equal_shape_prefix(jax.tree.leaves(features), 2)
            chex.assert_equal_shape_prefix([features.reward, *jax.tree.leaves((signature, drawn))], 1)
        conditions = {name: self.signature(inputs[name].signature.vector) for name in names}
        encode = rematerialize(self.tokens.__call__, self.cfg)
        predict = rematerialize(self.head.__call__, self.cfg)
        tokens = [encode(inputs[name].features, inputs[name].signature, conditions[name]) for name in names]
        x, cache = self.decoder(sharding.join_rows(self.mesh, tokens), cache)
        # The last token of a step is the observation's: the action is read off there.
        x = self.norm(x)[:, per_step - 1 :: per_step]
        rows = sharding.split_rows(self.mesh, x, [part.shape[0] for part in tokens])
        predictions = {
            name: predict(part, inputs[name].features, inputs[name].signature, conditions[name], inputs[name].drawn)
            for name, part in zip(names, rows, strict=True)
        }
        return predictions, cache


def make_model(cfg: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Builds the pure functions for a configuration; allocates nothing.

    >>> import jax, ldm_jax
    >>> model = ldm_jax.make_model(ldm_jax.SIZES["nano"])
    >>> params = jax.eval_shape(model.init, jax.random.key(0))
    >>> ldm_jax.model.count_parameters(params["decoder"])
    20672

    Args:
      cfg: shapes of the model.
      mesh: what the rows of its inputs are split over (see `ldm_jax.sharding`); None for one device.

    Returns:
      The functions.
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: _Network(cfg, mesh, nnx.Rngs(params=jax.random.key(0)))))

    def init(key: jax.Array) -> Params:
        state = nnx.state(_Network(cfg, mesh, nnx.Rngs(params=key)), nnx.Param)
        return nnx.to_pure_dict(state)

    def apply(
        params: Params, inputs: dict[str, Inputs], cache: Cache | None = None
    ) -> tuple[dict[str, Predictions], Cache | None]:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, sharding.gather(mesh, params))
        return nnx.merge(graph, state)(inputs, cache)

    return Model(init, apply, functools.partial(init_cache, cfg))


def count_parameters(params: Params) -> int:
    """The number of parameters, of arrays or of their shapes (`jax.eval_shape`)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

"""What a model costs, told from shapes alone: parameters, memory per device and arithmetic. Nothing is allocated."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import typing

import jax
import jax.extend.core
import jax.numpy as jnp

from ldm_jax import sharding
from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.buckets import Bucket
from ldm_jax.encoding.codec import Features, Signature, Targets
from ldm_jax.encoding.signature import SIGNATURE
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Inputs, Params, make_model
from ldm_jax.training.loss import Example, draw_slots, imitation_loss
from ldm_jax.training.optimizer import TrainingConfig
from ldm_jax.training.step import TrainState, state_shapes
from ldm_jax.types import Array, PyTree


class Flops(typing.NamedTuple):
    """Floating-point operations per token, a multiplication and an addition being two.

    Attributes:
      matrices: of the decoder's matrices, forward: 2N.
      attention: of the products of queries with keys and of weights with values that the mask lets through, forward.
    """

    matrices: float
    attention: float

    @property
    def forward(self) -> float:
        """Of one forward pass."""
        return self.matrices + self.attention

    @property
    def training(self) -> float:
        """Of one forward and one backward pass: 6N and attention; what is recomputed does not count."""
        return 3 * self.forward


class MemoryEstimate(typing.NamedTuple):
    """Bytes on one device while a training step runs.

    Attributes:
      parameters: float32.
      gradients: as many.
      optimizer: its state.
      batch: the rows of one step.
      activations: kept from the forward pass for the backward pass, before what the compiler saves; split over rows
        only, so an upper bound where the mesh has a tensor axis.
    """

    parameters: int
    gradients: int
    optimizer: int
    batch: int
    activations: int


def count_parts(cfg: ModelConfig) -> dict[str, int]:
    """Numbers of parameters by part of the model, `tokens/grid` for one; encoders apart."""
    shapes = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        part = "/".join(key.key for key in path[: 2 if path[0].key in ("tokens", "head") else 1])
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


def backbone_parameters(cfg: ModelConfig) -> int:
    """N, the parameters of the decoder's matrices: what sizes are named after and 6N is counted from."""
    attention = 2 * cfg.width * cfg.head_width * (cfg.heads + cfg.kv_heads)
    return cfg.layers * (attention + 3 * cfg.width * cfg.feed_forward)


def flops_per_token(cfg: ModelConfig, tokens: int) -> Flops:
    """Arithmetic of the decoder; the encoders' and the head's depends on the bucket, see `bucket_flops`.

    Args:
      cfg: shapes of the model.
      tokens: of a row; the mean is over all of them, the first of which see less than the window.

    Returns:
      The mean over the tokens of a row.

    Source:
      Kaplan et al. 2020, with attention restricted to what the causal window lets through.
    """
    window = cfg.window * cfg.tokens_per_step
    full = max(tokens - window, 0)
    partial = tokens - full
    seen = (partial * (partial + 1) / 2 + full * window) / tokens
    return Flops(2.0 * backbone_parameters(cfg), 4.0 * cfg.layers * cfg.heads * cfg.head_width * seen)


def bucket_flops(cfg: ModelConfig, bucket: Bucket, rows: int, steps: int) -> float:
    """Arithmetic of encoders and head, forward, in the mean over the time steps of a batch.

    Args:
      cfg: shapes of the model.
      bucket: of all rows.
      rows: R.
      steps: T.

    Raises:
      ConfigError: the bucket does not fit the model.
    """
    cfg.check_fits(bucket, f"the bucket {bucket.name}")

    def forward(layers: int) -> float:
        model = make_model(dataclasses.replace(cfg, layers=layers))
        params = jax.eval_shape(model.init, jax.random.key(0))
        inputs = {bucket.name: example_shapes(bucket, rows, steps).inputs}
        return count_matrix_flops(lambda params, inputs: model.apply(params, inputs)[0], params, inputs)

    # What is left without any layer.
    return (2 * forward(1) - forward(2)) / (rows * steps)


def count_matrix_flops(function: collections.abc.Callable[..., typing.Any], *arguments: PyTree) -> float:
    """Arithmetic of all matrix products that a function does as it is written, masked ones and recomputed ones too.

    Args:
      function: may be traced.
      *arguments: arrays or their shapes.

    Returns:
      Floating-point operations; the body of a loop without a fixed length counts once.
    """

    def count(jaxpr: jax.extend.core.Jaxpr) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, out = (
                    typing.cast(jax.core.ShapedArray, x.aval) for x in (equation.invars[0], equation.outvars[0])
                )
                total += 2.0 * math.prod(left.shape[axis] for axis in contracted) * math.prod(out.shape)
            inner = [part for value in equation.params.values() for part in jax.tree.leaves(value, is_leaf=_is_jaxpr)]
            total += equation.params.get("length", 1) * sum(
                count(getattr(part, "jaxpr", part)) for part in inner if _is_jaxpr(part)
            )
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _is_jaxpr(value: typing.Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def estimate_memory(
    cfg: ModelConfig,
    training_cfg: TrainingConfig,
    buckets: collections.abc.Mapping[Bucket, int],
    steps: int,
    mesh: sharding.AnyMesh | None = None,
) -> MemoryEstimate:
    """Memory of one training step on each device.

    Args:
      cfg: shapes of the model.
      training_cfg: the optimizer.
      buckets: of a batch, and the rows of each over all devices.
      steps: T of a row.
      mesh: over which everything is split, as `ldm_jax.sharding` says; an abstract one needs no devices.

    Returns:
      The largest share of a device.

    Raises:
      ConfigError: the model or the rows do not divide over the mesh, or a bucket does not fit the model.
    """
    model = make_model(cfg)
    state = state_shapes(model, training_cfg, mesh)
    sharding.check_rows(mesh, {bucket.name: rows for bucket, rows in buckets.items()})
    ways = sharding.row_shards(mesh)
    batch = {}
    for bucket, rows in buckets.items():
        cfg.check_fits(bucket, f"the bucket {bucket.name}")
        batch[bucket.name] = example_shapes(bucket, rows // ways, steps)

    def kept(rows_times: int) -> int:
        wide = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((rows_times * leaf.shape[0], *leaf.shape[1:]), leaf.dtype), batch
        )

        def differentiate(params: Params, batch: dict[str, Example]) -> collections.abc.Callable[..., typing.Any]:
            drawn = draw_slots(jax.random.key(0), batch, training_cfg.drawn_slots)
            return jax.vjp(lambda params: imitation_loss(model, cfg, params, drawn), params)[1]

        return _bytes(jax.eval_shape(differentiate, params, wide))

    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.params)
    return MemoryEstimate(
        parameters=_bytes(state.params),
        gradients=_bytes(state.params),
        optimizer=_bytes(state.optimizer),
        batch=_bytes(batch),
        # Twice the rows keep twice the activations, and the parameters once.
        activations=kept(2) - kept(1),
    )


def check_state_fits(state: TrainState, device_bytes: int) -> None:
    """Checks that what training holds between two steps fits a device, before anything is allocated.

    Args:
      state: shapes, as `training.state_shapes` splits them.
      device_bytes: memory of one device.

    Raises:
      ConfigError: parameters, gradients and the optimizer's state alone are larger.
    """
    needed = 2 * _bytes(state.params) + _bytes(state.optimizer)
    if needed > device_bytes:
        raise ConfigError(
            f"parameters, gradients and the optimizer's state take {needed / 1e9:.1f} GB on each device, which has "
            f"{device_bytes / 1e9:.1f} GB: split them over more devices along fsdp, or choose a smaller size "
            "(experiments.describe tells what each takes)"
        )


def _bytes(shapes: PyTree) -> int:
    """Of one device's share."""
    total = 0
    for leaf in jax.tree.leaves(shapes):
        place = getattr(leaf, "sharding", None)
        total += math.prod(place.shard_shape(leaf.shape) if place else leaf.shape) * leaf.dtype.itemsize
    return total


def example_shapes(bucket: Bucket, rows: int, steps: int) -> Example:
    """Shapes of a training example of a bucket.

    Args:
      bucket: the padded widths.
      rows: R.
      steps: T.

    Returns:
      `jax.ShapeDtypeStruct` in place of each array.
    """
    return jax.eval_shape(functools.partial(_zeros, bucket, rows, steps))


def _zeros(bucket: Bucket, rows: int, steps: int) -> Example:
    def row(*shape: int, dtype: typing.Any = jnp.float32) -> Array:
        return jnp.zeros((rows, *shape), dtype)

    def step(*shape: int, dtype: typing.Any = jnp.float32) -> Array:
        return row(steps, *shape, dtype=dtype)

    choices, numbers = (bucket.choice_slots, bucket.choices), bucket.continuous_slots
    features = Features(
        numeric=step(bucket.numeric, 2),
        categorical=step(bucket.categorical, dtype=jnp.int32),
        grids=tuple(step(grid.side, grid.side, grid.channels, dtype=grid.dtype) for grid in bucket.grids),
        texts=tuple(step(size, dtype=jnp.uint8) for size in bucket.texts),
        reward=step(2),
        flags=step(3),
        previous=Slots(step(bucket.choice_slots, dtype=jnp.int32), step(numbers)),
        has_previous=step(),
        action_mask=step(*choices, dtype=jnp.bool_),
    )
    signature = Signature(
        vector=row(SIGNATURE),
        numeric_mask=row(bucket.numeric),
        categorical_mask=row(bucket.categorical),
        grid_masks=tuple(row(grid.side, grid.side) for grid in bucket.grids),
        text_mask=row(len(bucket.texts)),
        choice_mask=row(*choices, dtype=jnp.bool_),
        choice_slots=row(bucket.choice_slots),
        continuous_slots=row(numbers),
    )
    targets = Targets(step(*choices), step(numbers), step(numbers), step(), step())
    return Example(Inputs(features, signature), targets, row(dtype=jnp.int32))

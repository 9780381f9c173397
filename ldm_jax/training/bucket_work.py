"""What a token of a bucket costs, part by part, so that the buckets that cost least can be chosen among thousands."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import typing

import jax

from ldm_jax.encoding.buckets import Bucket
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.heads import Predictions
from ldm_jax.model.network import Params, make_model
from ldm_jax.training import cost
from ldm_jax.training.loss import Example, draw_slots

EACH_BUCKET = 0.01
"""What one more bucket costs, as a part of the arithmetic of a step: a guess that no measurement has set yet."""

_ROWS, _STEPS = 8, 64
"""Of the batch that products are counted in; the mean over its tokens hardly depends on them."""

_MANY = 64
"""Numbers or components whose cost is counted: enough for what does not grow with them to vanish."""

_ALL = 1 << 20
"""More slots than any action has."""

_NOTHING = Bucket(0, 0, (), (), 0, 0, 0)


@functools.lru_cache(maxsize=4)
def bucket_work(cfg: ModelConfig, drawn_slots: int = _ALL) -> collections.abc.Callable[[Bucket], float]:
    """The arithmetic of a token as a function of its bucket: the products of encoders, decoder and head.

    The encoders and the head work on each part of a space alone, and most cost in proportion to its width. So a few
    parts are counted in the model as it is written, each when first asked for, and all buckets are sums of these.

    Args:
      cfg: shapes of the model.
      drawn_slots: the most of a kind that the head looks at, see `TrainingConfig`; default: all, as in acting.

    Returns:
      A function from a bucket to floating-point operations, forward. Each part of the bucket has to fit the model
      (`ConfigError`), all of its grids and texts together need not.
    """
    one = dataclasses.replace(cfg, layers=1)
    model = make_model(one)
    params = jax.eval_shape(model.init, jax.random.key(0))

    @functools.cache
    def counted(bucket: Bucket) -> float:
        batch = {"rows": cost.example_shapes(bucket, _ROWS, _STEPS)}

        def predict(params: Params, batch: dict[str, Example]) -> dict[str, Predictions]:
            drawn = draw_slots(jax.random.key(0), batch, drawn_slots)
            return model.apply(params, {"rows": drawn["rows"].inputs})[0]

        total = cost.count_matrix_flops(predict, params, batch)
        return total / (_ROWS * _STEPS)

    @functools.cache
    def part(**widths: typing.Any) -> float:
        return counted(dataclasses.replace(_NOTHING, **widths)) - counted(_NOTHING)

    def each(name: str) -> float:
        count = min(_MANY, getattr(cfg, name))
        return part(**{name: count}) / count

    decoder = cost.flops_per_token(cfg, 2 * cfg.window * cfg.tokens_per_step).forward * cfg.tokens_per_step
    nothing = decoder + cost.bucket_flops(cfg, _NOTHING, _ROWS, _STEPS)

    def work(bucket: Bucket) -> float:
        for one in _parts(bucket):
            cfg.check_fits(one, f"the bucket {bucket.name}")
        total = nothing + sum(part(grids=(grid,)) for grid in bucket.grids)
        if bucket.texts:
            total += part(texts=(cfg.text,)) * sum(bucket.texts) / cfg.text
        for name in ("numeric", "categorical"):
            if width := getattr(bucket, name):
                total += width * each(name)
        # Not in proportion: of many slots a few are drawn.
        if bucket.continuous_slots:
            total += part(continuous_slots=bucket.continuous_slots)
        if bucket.choice_slots:
            total += part(choice_slots=bucket.choice_slots, choices=bucket.choices)
        return total

    return work


def _parts(bucket: Bucket) -> collections.abc.Iterator[Bucket]:
    """Its grids and texts one by one, and what is left without them."""
    yield dataclasses.replace(bucket, grids=(), texts=())
    for grid in bucket.grids:
        yield dataclasses.replace(_NOTHING, grids=(grid,))
    for text in bucket.texts:
        yield dataclasses.replace(_NOTHING, texts=(text,))

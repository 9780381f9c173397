"""What breadth costs: the buckets that the whole catalog is trained in, their arithmetic, and compiling their step.

    python -m benchmarks.buckets [--size=32m] [--most=16] [--compile]

Nothing is trained: all is told from the spaces in the catalog, each verified id with an equal share of rows, and the
shapes of the model. The last line is one JSON object:

  environments: verified ids that fit the size, and `left_out`, those that do not: lines before say which and why;
  exact, buckets: the smallest bucket of each, and those that are left when joined;
  arithmetic: of a token in its joined bucket over that in its own, forward, with the decoder;
  outside_decoder: the same without the decoder;
  choose_s: seconds that the choice takes;
  compile_s, operations: with --compile, of the training step of all buckets left, and the size of its program.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import json
import time
import typing

import numpy as np

from data.shares import allot
from environments.catalog.entries import catalogued, entries_of
from ldm_jax import training
from ldm_jax.encoding.buckets import Bucket, bucket_for, join_buckets
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.errors import LdmError
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import make_model
from ldm_jax.spaces import from_json
from ldm_jax.training import cost
from ldm_jax.training.bucket_work import EACH_BUCKET, bucket_work
from ldm_jax.training.optimizer import TrainingConfig


class Fitting(typing.NamedTuple):
    """The verified ids of the catalog, beside a model.

    Attributes:
      buckets: how many ids have each for their smallest.
      categories: of the largest component of those that fit.
      left_out: why an id does not fit, by id.
    """

    buckets: collections.Counter[Bucket]
    categories: int
    left_out: dict[str, str]


def fit_catalog(cfg: ModelConfig) -> Fitting:
    """Counts the verified ids of the catalog by their smallest bucket, and says which do not fit a model."""
    made: dict[str, Bucket | str] = {}
    counts, categories, left_out = collections.Counter[Bucket](), 0, dict[str, str]()
    for entry in entries_of(catalogued()):
        if not (entry.verified and entry.observation_space and entry.action_space):
            continue
        key = json.dumps([entry.observation_space, entry.action_space])
        if key not in made:
            seen, largest = from_json(entry.observation_space), 0
            try:
                bucket = bucket_for(seen, from_json(entry.action_space))
                largest = max(observation_layout(seen).sizes, default=0)
                cfg.check_fits(bucket, "it", largest)
                made[key], categories = bucket, max(categories, largest)
            except LdmError as error:
                made[key] = str(error).partition(":")[0]
        found = made[key]
        if isinstance(found, Bucket):
            counts[found] += 1
        else:
            left_out[entry.id] = found
    return Fitting(counts, categories, left_out)


def compile_step(cfg: ModelConfig, shares: dict[Bucket, float], rows: int) -> dict[str, typing.Any]:
    """Compiles the training step of some buckets, and never runs it.

    Args:
      cfg: shapes of the model.
      shares: of the rows, of each bucket.
      rows: of a batch.
    """
    steps, training_cfg, model = 2 * cfg.window, TrainingConfig(), make_model(cfg)
    parts = allot([np.array([share]) for share in shares.values()], rows)
    batch = {
        bucket.name: cost.example_shapes(bucket, part.rows, steps) for bucket, part in zip(shares, parts, strict=True)
    }
    state = training.state_shapes(model, training_cfg)
    start = time.perf_counter()
    lowered = training.make_train_step(model, cfg, training_cfg).lower(state, batch)
    lowered.compile()
    return {
        "compile_s": round(time.perf_counter() - start, 1),
        "operations": lowered.as_text().count("\n"),
    }


def measure(options: argparse.Namespace) -> dict[str, typing.Any]:
    """What the last line says."""
    cfg = SIZES[options.size]
    counts, categories, left_out = fit_catalog(cfg)
    for id, reason in sorted(left_out.items()):
        print(f"left out: {id}: {reason}")
    total = counts.total()
    own = {bucket: count / total for bucket, count in counts.items()}
    start = time.perf_counter()
    work = bucket_work(cfg, TrainingConfig().drawn_slots)
    joined = join_buckets(own, options.most, work, each=options.each, pad_parts=True)
    chosen = time.perf_counter() - start
    shares = collections.defaultdict[Bucket, float](float)
    for bucket, share in own.items():
        shares[joined[bucket]] += share
    for bucket, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{share:7.2%} {work(bucket) / 1e6:8.1f} MFLOP  {bucket.name}")
    decoder = cost.flops_per_token(cfg, 2 * cfg.window).forward
    after, before = (sum(share * work(bucket) for bucket, share in part.items()) for part in (shares, own))
    found = {
        "size": options.size,
        "environments": total,
        "left_out": len(left_out),
        "exact": len(own),
        "buckets": len(shares),
        "arithmetic": round(after / before, 3),
        "outside_decoder": round((after - decoder) / (before - decoder), 3),
        "choose_s": round(chosen, 1),
    }
    return found | (compile_step(cfg.narrowed(shares, categories), shares, options.rows) if options.compile else {})


def main(arguments: collections.abc.Sequence[str] | None = None) -> None:
    """Prints the buckets, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.buckets", description="Buckets of the whole catalog.")
    parser.add_argument("--size", default="32m", choices=sorted(SIZES))
    parser.add_argument("--most", type=int, default=16, help="buckets that are left")
    parser.add_argument("--each", type=float, default=EACH_BUCKET, help="cost of one, as a part of the arithmetic")
    parser.add_argument("--rows", type=int, default=256, help="of a batch; they hardly change what compiling takes")
    parser.add_argument("--compile", action="store_true", help="the step too")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()

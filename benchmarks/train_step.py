"""How fast a training step is: against transformers' Llama, the machine's own matrix product, and two tokens per step.

All of them in turn, in one process, on the same 32 rows of 256 steps, in four pieces whose gradients are summed, with
full causal attention (W = 256):

  ours: the whole step, with encoders, head, loss, clipping and AdamW;
  transformers: `LlamaForCausalLM` of the same width, layers, heads and feed-forward in PyTorch, its whole step, with a
    vocabulary of 8, clipping and fused AdamW;
  two tokens: ours with an observation's token and an action's token for each step, as JAT, at the same transitions;
  product: square matrices of 1,024 to 4,096, the fastest of JAX's and PyTorch's.

    python -m benchmarks.train_step

`to_transformers` compares tokens per second. `to_matmul` is what part of the product's FLOP/s the step reaches, where
only 6N and causal attention count, N being the decoder's matrices. Its last line is one JSON object, for `32m` at the
top and for the other sizes by name.

On a GPU, `--sizes=308m --steps=1024 --dtype=bfloat16 --attention=cudnn --rows=16` compares in that precision with the
fused kernels of both; `to_matmul` is then the utilization of what the device reaches in a product, and
`--peak_tflops=989` adds `mfu`, of its data sheet.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import json
import statistics
import typing

import jax
import numpy as np
import torch
import transformers

from environments.cores import available_cores
from experiments.harness import allocator
from ldm_jax import training
from ldm_jax.encoding.buckets import Bucket
from ldm_jax.model.config import SIZES, ModelConfig
from ldm_jax.model.network import make_model
from ldm_jax.training import cost
from ldm_jax.training.loss import Example
from ldm_jax.training.optimizer import TrainingConfig

from .timing import PRODUCTS, Times, compare, matrix_products

BUCKET = Bucket(numeric=8, categorical=0, grids=(), texts=(), choice_slots=1, choices=8, continuous_slots=0)
"""Of a task as CartPole."""


def _example(rows: int, steps: int) -> Example:
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(leaf.dtype, np.floating):
            return rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype)
        return np.ones(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, cost.example_shapes(BUCKET, rows, steps))


def ours(cfg: ModelConfig, rows: int, steps: int, accumulation: int) -> collections.abc.Callable[[], object]:
    """A function that trains by one step and waits for it."""
    training_cfg = TrainingConfig(optimizer="adamw", accumulation=accumulation)
    model = make_model(cfg)
    state = training.init_state(model, training_cfg)
    train_step = training.make_train_step(model, cfg, training_cfg)
    batch = jax.device_put({BUCKET.name: _example(rows, steps)})

    def step() -> object:
        nonlocal state
        state, metrics = train_step(state, batch)
        return jax.block_until_ready((state, metrics))

    return step


def llama(cfg: ModelConfig, rows: int, steps: int, accumulation: int) -> collections.abc.Callable[[], object]:
    """The same with transformers' Llama of the same shapes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=BUCKET.choices,
        hidden_size=cfg.width,
        intermediate_size=cfg.feed_forward,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_width,
        max_position_embeddings=steps,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, BUCKET.choices, (rows, steps), device=device)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        for piece in tokens.chunk(accumulation):
            with torch.autocast(device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                loss = model(input_ids=piece, labels=piece, use_cache=False).loss / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def products(dtype: str) -> dict[str, collections.abc.Callable[[], object]]:
    """Square matrix products by name, JAX's and PyTorch's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contenders = dict(matrix_products(dtype))
    for size in PRODUCTS:
        tensor = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
        contenders[f"torch {size}"] = lambda tensor=tensor: (tensor @ tensor)[0, 0].item()
    return contenders


def measure(name: str, arguments: argparse.Namespace) -> dict[str, typing.Any]:
    """The ratios of one size."""
    rows, steps = arguments.rows, arguments.steps
    cfg = dataclasses.replace(SIZES[name], window=steps, dtype=arguments.dtype, attention=arguments.attention)
    contenders = products(arguments.dtype) | {
        "ours": ours(cfg, rows, steps, arguments.accumulation),
        "transformers": llama(cfg, rows, steps, arguments.accumulation),
        "two tokens": ours(dataclasses.replace(cfg, tokens_per_step=2), rows, steps, arguments.accumulation),
    }
    times = compare(contenders, arguments.repetitions, seconds=0.0)
    tokens = rows * steps
    work = {"ours": tokens * cost.flops_per_token(cfg, steps).training}
    work |= {f"{library} {size}": 2.0 * size**3 for library in ("jax", "torch") for size in PRODUCTS}
    gflops = {key: value / times.median(key) / 1e9 for key, value in work.items()}
    best = max((key for key in work if key != "ours"), key=gflops.__getitem__)
    _print(name, cfg, times, gflops, tokens)
    result = {
        "to_transformers": times.speed("ours", "transformers"),
        "to_matmul": statistics.median(
            work["ours"] / work[best] * product / ours
            for ours, product in zip(times.seconds["ours"], times.seconds[best], strict=True)
        ),
        "to_two_tokens": times.speed("ours", "two tokens"),
        "tokens_per_s": tokens / times.median("ours"),
        "gflops": gflops["ours"],
        "matmul_gflops": gflops[best],
    }
    if arguments.peak_tflops:
        result["mfu"] = gflops["ours"] / (1e3 * arguments.peak_tflops)
    return {key: float(f"{value:.4g}") for key, value in result.items()} | {"matmul": best}


def _print(name: str, cfg: ModelConfig, times: Times, gflops: dict[str, float], tokens: int) -> None:
    backbone = cost.backbone_parameters(cfg)
    print(f"\n{name}: N = {backbone:,}, {tokens:,} transitions a step, {cfg.dtype}")
    for key in times.seconds:
        median = times.median(key)
        rate = f"{tokens / median:10,.0f} transitions/s" if key not in gflops or key == "ours" else ""
        print(f"  {key:14}{1e3 * median:10.1f} ms  {gflops.get(key, float('nan')):8.1f} GFLOP/s  {rate}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="micro,32m", help="comma-separated; the last one tops the JSON")
    parser.add_argument("--rows", type=int, default=32, help="of a step, over all pieces")
    parser.add_argument("--steps", type=int, default=256, help="of a row; the window is as long")
    parser.add_argument("--accumulation", type=int, default=4, help="pieces that a batch is cut into, on both sides")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="blocks", choices=("blocks", "cudnn", "xla"), help="of ours")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="of the device's data sheet")
    arguments = parser.parse_args()
    allocator.keep_freed_memory()  # as the scripts do
    torch.set_num_threads(available_cores())
    results = {name: measure(name, arguments) for name in arguments.sizes.split(",")}
    *others, last = results
    print(json.dumps(results[last] | {"size": last} | {name: results[name] for name in others}))


if __name__ == "__main__":
    main()

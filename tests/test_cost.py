"""Laws of what is told of a model without making it: it is what the model turns out to be."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import examples
import jax
import pytest

from experiments import describe
from experiments.harness.mesh import MeshConfig, make_mesh
from ldm_jax import training
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import count_parameters, make_model
from ldm_jax.training import cost

NANO = dataclasses.replace(SIZES["nano"], values=64)
_ON_EIGHT_DEVICES = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_cost
test_cost.compare_devices()
"""


def nbytes(tree, device):
    """Bytes that the arrays of a tree have on a device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device]
    return sum(shard.data.nbytes for shard in shards)


def compare_devices():
    """Makes a training state on a mesh and counts what lies on each device; needs eight of them."""
    cfg, device = training.TrainingConfig(), jax.devices()[3]
    bucket = examples.make_codec("vector").bucket
    mesh = make_mesh(MeshConfig(2, 2, 2))
    told = cost.estimate_memory(NANO, cfg, {bucket: 8}, 6, mesh)
    state = training.init_state(make_model(NANO), cfg, mesh)
    assert told.parameters == told.gradients == nbytes(state.params, device)
    assert told.optimizer == nbytes(state.optimizer, device)
    assert told.parameters < cost.estimate_memory(NANO, cfg, {bucket: 8}, 6).parameters


def test_memory_is_what_lies_on_each_of_eight_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    subprocess.run([sys.executable, "-c", _ON_EIGHT_DEVICES], env=environment, check=True)


@pytest.mark.parametrize("size", ["nano", "micro"])
def test_parts_add_up_to_the_parameters_that_are_made(size):
    params = jax.jit(make_model(SIZES[size]).init)(jax.random.key(0))
    counts = cost.count_parts(SIZES[size])
    assert sum(counts.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert counts["decoder"] == count_parameters(params["decoder"])
    assert counts["tokens/grid"] == count_parameters(params["tokens"]["grid"])


@pytest.mark.parametrize("size", SIZES)
def test_the_backbone_is_the_decoder_s_matrices(size):
    shapes = jax.eval_shape(make_model(SIZES[size]).init, jax.random.key(0))["decoder"]
    matrices = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == "kernel"]
    assert cost.backbone_parameters(SIZES[size]) == count_parameters(matrices)


@pytest.mark.parametrize("change", [{}, {"kv_heads": 1}, {"tokens_per_step": 2}])
def test_arithmetic_is_what_the_model_s_products_do(change):
    cfg = dataclasses.replace(NANO, **change)
    bucket, steps = examples.make_codec("continuous").bucket, cfg.window
    tokens = steps * cfg.tokens_per_step

    def forward(cfg):
        model = make_model(cfg)
        params = jax.eval_shape(model.init, jax.random.key(0))
        inputs = cost.example_shapes(bucket, 3, steps).inputs
        return cost.count_matrix_flops(model.apply, params, {"rows": inputs})

    layer = (forward(dataclasses.replace(cfg, layers=3)) - forward(cfg)) / (3 * tokens)
    one = dataclasses.replace(cfg, layers=1)
    # Masked products are done as well, so attention does at least what the mask lets through and at most all pairs.
    told = cost.flops_per_token(one, tokens)
    assert told.matrices == 2 * cost.backbone_parameters(one)
    assert told.attention == 4 * cfg.width * (tokens + 1) / 2
    assert told.forward <= layer <= told.matrices + 4 * cfg.width * tokens
    outside = forward(cfg) / (3 * steps) - cfg.layers * layer * cfg.tokens_per_step
    assert cost.bucket_flops(cfg, bucket, 3, steps) == pytest.approx(outside)
    assert cost.flops_per_token(one, 10 * tokens).attention == pytest.approx(
        4 * cfg.width * (tokens - 0.05 * (tokens - 1))
    )


@pytest.mark.parametrize("name", examples.SPACES)
def test_shapes_of_a_bucket_are_those_of_its_windows(name):
    codec = examples.make_codec(name)
    real = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), examples.random_example(codec, 2, 3, seed=0))
    told = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cost.example_shapes(codec.bucket, 2, 3))
    assert real == told


def test_less_is_kept_the_more_is_recomputed():
    bucket, cfg = examples.make_codec("vector").bucket, training.TrainingConfig()
    kept = [
        cost.estimate_memory(dataclasses.replace(NANO, remat=remat), cfg, {bucket: 2}, 16).activations
        for remat in ("none", "dots", "full")
    ]
    assert kept[0] > kept[1] > kept[2] > 2 * 16 * NANO.layers * NANO.width * 4
    deep = dataclasses.replace(NANO, remat="none", layers=4)
    twice = cost.estimate_memory(deep, cfg, {bucket: 2}, 16).activations
    assert 1.3 * kept[0] < twice < 2 * kept[0]


def test_the_program_of_a_step_does_not_grow_with_depth():
    bucket, cfg = examples.make_codec("vector").bucket, training.TrainingConfig()

    def operations(layers):
        deep = dataclasses.replace(NANO, layers=layers)
        model = make_model(deep)
        state = training.state_shapes(model, cfg)
        batch = {"rows": cost.example_shapes(bucket, 2, 16)}
        return training.make_train_step(model, deep, cfg).lower(state, batch).as_text().count("\n")

    assert operations(9) <= 1.01 * operations(2)


def test_the_script_describes_large_models_on_meshes_that_are_not_there():
    command = [sys.executable, "-m", "experiments.describe"]
    done = subprocess.run(
        [*command, "--size=736m", "--mesh=data=4,fsdp=64", "--rows=256"], capture_output=True, text=True, check=True
    )
    assert "736,100,352" in done.stdout and "data 4 x fsdp 64 x tensor 1, 256 rows" in done.stdout


@pytest.mark.parametrize(
    ("mesh", "rows", "message"),
    [(["fsdp=3"], 3, "does not divide by the 3"), (["fsdp=4"], 6, "multiple of 4"), (["model=2"], 8, "'model=2'")],
)
def test_bad_meshes_name_the_way_out(mesh, rows, message):
    bucket = examples.make_codec("vector").bucket
    with pytest.raises(ConfigError, match=message):
        describe.describe(
            describe.DescribeConfig("nano", NANO, training.TrainingConfig(), describe.parse_mesh(mesh), rows, 8, bucket)
        )
    assert describe.parse_mesh(["1", "2", "4"]) == MeshConfig(1, 2, 4)

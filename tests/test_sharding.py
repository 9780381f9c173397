"""Laws of sharding, on eight virtual devices of one processor."""

import contextlib
import logging
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.mesh import MeshConfig, make_mesh
from ldm_jax import sharding, training
from ldm_jax.config import SIZES, ConfigError
from ldm_jax.model import make_model

_MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]

_ON_EIGHT_DEVICES = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_sharding
test_sharding.compare_meshes()
"""


@contextlib.contextmanager
def compilations():
    """Collects what JAX logs of compiling."""
    lines, logger, handler = [], logging.getLogger("jax"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield lines
    finally:
        logger.removeHandler(handler)


def compare_meshes():
    """Trains three steps on every mesh and holds each against the run without one; needs eight devices."""
    import examples

    cfg = training.TrainingConfig(steps=10, warmup=1)
    model, nano = make_model(SIZES["nano"]), SIZES["nano"]
    batches = [examples.random_batch(["vector", "continuous"], 8, 6, seed) for seed in range(3)]

    def run(mesh):
        step = training.make_train_step(model, nano, cfg, mesh)
        state = training.init_state(model, cfg, mesh)
        split = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        losses = []
        with compilations() as compiled:
            for _, newest, metrics in training.train(step, state, batches, 3, mesh):
                state = newest
                losses.append((metrics.loss, metrics.gradient_norm))
        assert sum("Finished XLA compilation of jit(train_step)" in line for line in compiled) == 1, "compiled anew"
        if mesh:
            same = jax.tree.map(lambda leaf, old: leaf.sharding.is_equivalent_to(old, leaf.ndim), state.params, split)
            assert jax.tree.all(same), "the parameters moved"
        return np.array(losses), jax.device_get(state.params)

    alone = run(None)
    for shape in _MESHES:
        mesh = make_mesh(MeshConfig(*shape))
        losses, params = run(mesh)
        np.testing.assert_allclose(losses, alone[0], rtol=1e-4, err_msg=str(shape))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, alone[1])
    query = params["decoder"]["blocks"]["attention"]["query"]["kernel"]
    shape = jax.eval_shape(lambda: params)
    placed = sharding.state_shardings(mesh, shape)["decoder"]["blocks"]["attention"]["query"]["kernel"]
    n, d, k = query.shape
    assert placed.shard_shape(query.shape) == (n, d // 2, k // 2)


def test_every_mesh_gives_the_run_without_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _ON_EIGHT_DEVICES], env=environment, check=True)


def test_every_large_parameter_is_split():
    shapes = jax.eval_shape(make_model(SIZES["32m"]).init, jax.random.key(0))
    whole = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if not any(sharding.partition(jax.tree_util.keystr(path, simple=True, separator="/")))
    }
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sum(whole.values()) < 0.15 * total, sorted(whole.items(), key=lambda item: -item[1])[:5]


def test_a_mesh_that_does_not_fit_names_the_way_out():
    count = jax.device_count()
    with pytest.raises(ConfigError, match=f"there are {count}: choose three numbers"):
        make_mesh(MeshConfig(count, 3, 1))
    mesh = jax.sharding.AbstractMesh((3, 1, 1), sharding.AXES)
    with pytest.raises(ConfigError, match="a multiple of 3"):
        sharding.check_rows(mesh, {"n8": 4})
    shapes = jax.eval_shape(make_model(SIZES["nano"]).init, jax.random.key(0))
    with pytest.raises(ConfigError, match="does not divide by the 3 devices along 'fsdp'"):
        sharding.state_shardings(jax.sharding.AbstractMesh((1, 3, 1), sharding.AXES), shapes)

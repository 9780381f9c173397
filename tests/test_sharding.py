"""Laws of sharding, on eight virtual devices of one processor."""

import dataclasses
import functools
import operator
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from compiling import compilations

from experiments.harness.mesh import MeshConfig, make_mesh
from ldm_jax import sharding, training
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.training import checkpoints
from ldm_jax.training.metrics import summarize

# Every set of axes that rows and parameters can be split over.
_MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2)]
# The programs run once: optimizing them would take most of the time.
_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes"
)
_HERE = pathlib.Path(__file__).parent
SMALL = dataclasses.replace(SIZES["nano"], layers=1, values=64)


def on_eight_devices(function):
    """Runs a function of this module on eight virtual devices; returns what was written to the error stream."""
    code = f"import sys; sys.path.insert(0, {str(_HERE)!r}); import test_sharding; test_sharding.{function}()"
    environment = os.environ | {"XLA_FLAGS": _FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def batches(names=("vector", "continuous")):
    import examples

    return [examples.random_batch(names, 8, 6, seed) for seed in range(3)]


def host(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def compare_meshes():
    """Holds loss and gradients on every mesh against those without one."""
    cfg = training.TrainingConfig(steps=10, warmup=1)
    batch = batches()[0]

    def gradients(mesh):
        model, placed = make_model(SMALL, mesh), sharding.place_batch(mesh, batch) if mesh else batch
        state = training.init_state(model, cfg, mesh)
        function = functools.partial(training.loss_and_gradients, model, SMALL, cfg, mesh=mesh)
        (loss, rows), found = jax.jit(function)(state, placed)
        return jax.device_get((loss, summarize(jax.device_get(rows)), found))

    alone = gradients(None)
    for shape in _MESHES:
        split = gradients(make_mesh(MeshConfig(*shape)))
        close(split[:2], alone[:2], rtol=1e-5)
        close(split[2], alone[2], rtol=1e-3, atol=1e-6)


def train_on_a_mesh():
    """Trains on one mesh, the batch in two pieces, and goes on over others; holds all against the run without one."""
    cfg = training.TrainingConfig(steps=10, warmup=1)
    half = dataclasses.replace(cfg, accumulation=2)

    def start(mesh, cfg):
        model = make_model(SMALL, mesh)
        step = training.make_train_step(model, SMALL, cfg, mesh)

        def run(state, steps):
            places = jax.tree.map(lambda leaf: leaf.sharding, state)
            todo = batches()[int(state.step) : steps]
            for _, newest, metrics in training.train(step, state, todo, steps, mesh=mesh):
                state = newest
                losses.append((metrics.loss, metrics.gradient_norm))
            if mesh:
                moved = jax.tree.map(
                    lambda leaf, old: not leaf.sharding.is_equivalent_to(old, leaf.ndim), state, places
                )
                assert not jax.tree.reduce(operator.or_, moved), f"moved: {moved}"
            return state

        return run, training.state_shapes(model, cfg, mesh), functools.partial(training.init_state, model, cfg, mesh)

    meshes = make_mesh(MeshConfig(2, 2, 2)), None, make_mesh(MeshConfig(4, 2, 1))
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoints.Checkpoints(folder, {}) as saved,
        compilations() as compiled,
    ):
        losses = []
        alone_run, _, init = start(None, cfg)
        alone_run(init(), 3)
        alone, losses, before = np.array(losses), [], None
        for steps, mesh, own in zip((1, 2, 3), meshes, (half, cfg, cfg), strict=True):
            run, shapes, init = start(mesh, own)
            run = run if mesh else alone_run  # compiled already
            state = init() if before is None else saved.restore(shapes)
            if before is not None:
                jax.tree.map(np.testing.assert_array_equal, host(state), before)
            state = run(state, steps)
            saved.save(state)
            before = host(state)
            if steps == 1:
                kernel = state.params["decoder"]["blocks"]["attention"]["query"]["kernel"]
                n, d, k = kernel.shape
                assert kernel.sharding.shard_shape(kernel.shape) == (n, d // 2, k // 2)
    np.testing.assert_allclose(losses, alone, rtol=1e-4)
    assert sum("Finished XLA compilation of jit(train_step)" in line for line in compiled) == 3, "compiled anew"


def test_every_mesh_gives_the_loss_and_gradients_without_one():
    assert "rematerialization" not in on_eight_devices("compare_meshes")


def test_a_run_on_a_mesh_equals_one_without_and_goes_on_over_another():
    assert "rematerialization" not in on_eight_devices("train_on_a_mesh")


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

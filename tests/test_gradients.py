"""The gradient of the whole loss: against the same program in float64, and that against finite differences."""

import dataclasses

import examples
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.model.config import SIZES
from ldm_jax.model.network import make_model
from ldm_jax.training.loss import imitation_loss

NANO = dataclasses.replace(SIZES["nano"], values=64, kv_heads=1)
STEP = 3e-4


def widen(tree):
    """Floating-point arrays in float64."""
    return jax.tree.map(lambda a: a.astype(np.float64) if np.issubdtype(a.dtype, np.floating) else a, tree)


def test_the_gradient_is_that_of_float64_and_of_finite_differences(monkeypatch):
    # One bucket with every kind of encoder and head, in rows that are longer than the window.
    batch = {"rows": examples.random_example(examples.make_codec("mixed"), 2, 3 * NANO.window, seed=0)}
    model = make_model(NANO)
    params = examples.random_params(model)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: imitation_loss(model, NANO, p, batch)[0]))(params)
    assert loss.dtype == np.float32

    with jax.enable_x64(True), monkeypatch.context() as patch:
        # Where the program says float32, float64 is meant: the same program, to more than twice the digits.
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(jnp, "dtype", lambda kind: np.dtype(np.float64 if kind == "float32" else kind))
        exact_model = make_model(NANO)
        exact = jax.jit(jax.value_and_grad(lambda p: imitation_loss(exact_model, NANO, p, widen(batch))[0]))
        wide = widen(params)
        exact_loss, exact_gradient = jax.device_get(exact(wide))
        assert exact_loss.dtype == np.float64

        rng = np.random.default_rng(1)
        for _ in range(3):
            # Every parameter moves by about the same share of its size.
            direction = jax.tree.map(lambda p: rng.normal(0, 1, p.shape) * np.std(p), wide)
            slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, exact_gradient, direction)))
            ahead, behind = (
                float(exact(jax.tree.map(lambda p, d, step=step: p + step * d, wide, direction))[0])
                for step in (STEP, -STEP)
            )
            # Beside the step's square, what is left of float32 in JAX's own softmax.
            np.testing.assert_allclose((ahead - behind) / (2 * STEP), slope, rtol=1e-4)

    np.testing.assert_allclose(loss, exact_loss, rtol=1e-5)
    for (path, single), double in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(gradient)), jax.tree.leaves(exact_gradient), strict=True
    ):
        error = np.linalg.norm(single.astype(np.float64) - double)
        assert error <= 1e-4 * np.linalg.norm(double) + 1e-9, jax.tree_util.keystr(path)

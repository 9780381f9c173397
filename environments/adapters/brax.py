"""Brax: rigid bodies in JAX, on the `generalized` physics that its environments take by themselves.

Compiling takes half a minute and more: the price of stepping thousands at once on an accelerator.
"""

from __future__ import annotations

import collections.abc
import contextlib
import types
import warnings

import gymnasium
import jax
import numpy as np

from ldm_jax.types import Array, PyTree

from ..jittable import JittableEnvironment, Outcome, box, check_installed, in_32_bits, make_spec, old_key, quiet

LIBRARY = "brax"

_DOMAINS = types.MappingProxyType(
    {
        "ant": "locomotion",
        "halfcheetah": "locomotion",
        "hopper": "locomotion",
        "humanoid": "locomotion",
        "humanoidstandup": "locomotion",
        "inverted_double_pendulum": "classic control",
        "inverted_pendulum": "classic control",
        "pusher": "manipulation",
        "reacher": "manipulation",
        "walker2d": "locomotion",
    }
)
_REFUSED = types.MappingProxyType(
    {
        "fast": "it is no task: brax times its own loops with it",
        "swimmer": "its water calls jax.numpy.clip with a name that JAX has dropped",
    }
)

_LIMIT = 1000  # steps, what brax takes where nothing else is said


def candidates() -> dict[str, str]:
    """Brax's own ids, each with the reason why it is not offered, empty where it is."""
    check_installed(LIBRARY)
    return dict.fromkeys(_DOMAINS, "") | _REFUSED


def domain(name: str) -> str:
    """What the task of an id is about."""
    return _DOMAINS.get(name, "locomotion")


@in_32_bits()
def make(name: str, batch_size: int, time_limit: int | None) -> JittableEnvironment:
    """Makes B environments by brax's own id; None limits an episode to 1,000 steps."""
    # MuJoCo says that it has not found an optional package.
    with quiet():
        from brax import envs
    with _without_log(), warnings.catch_warnings(action="ignore"):  # each makes known that brax is finished
        inner = envs.get_environment(name)
    struct = jax.eval_shape(inner.reset, jax.random.key(0))
    spec = make_spec(
        LIBRARY,
        name,
        observation_space=box(struct.obs),
        # The environments stretch this to the range of their motors themselves.
        action_space=gymnasium.spaces.Box(-1, 1, (inner.action_size,), np.float32),
        batch_size=batch_size,
        time_limit=time_limit or _LIMIT,
        domain=domain(name),
    )

    def outcome(state: PyTree) -> Outcome:
        return Outcome(state, state.obs, state.reward, state.done > 0)

    def reset(key: Array) -> Outcome:
        return outcome(inner.reset(old_key(key)))

    def step(key: Array, state: PyTree, action: PyTree) -> Outcome:
        return outcome(inner.step(state, action))

    return JittableEnvironment(spec, reset, step)


@contextlib.contextmanager
def _without_log() -> collections.abc.Iterator[None]:
    # MuJoCo finds fault with the wording of the models and would write that into a file in the working directory.
    import mujoco

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)

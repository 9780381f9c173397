"""controlgym's linear-quadratic controllers: of the state, or of what a Kalman filter makes of observations."""

import importlib.util
import os
import typing

import numpy as np


class Lqr:
    """The regulator of the state, which is not seen."""

    def __init__(self, seed):
        self._controller: typing.Any = None

    def reset(self, env, obs, info):
        if self._controller is None:
            self._controller = _load("lqr").LQR(env.unwrapped)

    def label(self, env, obs, info):
        return _action(env, self._controller.select_action(info["state"]))

    def observe(self, action, obs, reward, end, info):
        pass


class Lqg:
    """The same of an estimate of the state, from zero on, that follows whoever acts; no answer once it diverges."""

    def __init__(self, seed):
        self._controller: typing.Any = None

    def reset(self, env, obs, info):
        if self._controller is None:
            self._controller = _load("lqg").LQG(env.unwrapped)
        self._estimate, self._seen = np.zeros(env.unwrapped.n_state), np.asarray(obs, float)

    def label(self, env, obs, info):
        if not np.isfinite(self._estimate).all():
            return None
        return _action(env, self._controller.select_action(self._estimate))

    def observe(self, action, obs, reward, end, info):
        with np.errstate(all="ignore"):
            executed = np.asarray(action, float)
            self._estimate = self._controller.evolve_state_estimate(self._estimate, executed, self._seen)
        self._seen = np.asarray(obs, float)


def _action(env, action):
    space = env.action_space
    action = np.asarray(action, space.dtype).reshape(space.shape)
    return np.clip(action, space.low, space.high) if np.isfinite(action).all() else None


def _load(name):
    """The module of a controller: the package of all of them wants torch."""
    import controlgym

    path = os.path.join(os.path.dirname(controlgym.__file__), "controllers", f"{name}.py")
    spec: typing.Any = importlib.util.spec_from_file_location(f"ldm_jax_controlgym_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXPERTS = {"lqr": Lqr, "lqg": Lqg}

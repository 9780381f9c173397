"""Meta-World's scripted policies: functions of the observation, which envpool's Meta-World shows too.

They need NumPy alone, but their package wants a simulator. Where that is missing they are imported under a package that
is empty, which is gone again afterwards.
"""

import functools
import importlib
import importlib.util
import re
import sys
import types
import warnings

import numpy as np


class ScriptedPolicy:
    """The policy of the task that the environment's id names."""

    def __init__(self, seed):
        pass

    def reset(self, env, obs, info):
        self._act = _policies()[_task(env.name)]().get_action

    def label(self, env, obs, info):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that what it asks for is clipped, which is meant
            return np.clip(self._act(np.asarray(obs, np.float64)), -1, 1)

    def observe(self, action, obs, reward, end, info):
        pass


def _task(name):
    """Meta-World's own name of a task: `door-open-v3` of `MetaWorld/DoorOpen-v3`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name.rpartition("/")[2]).lower()


@functools.lru_cache(maxsize=None)
def _policies():
    if importlib.util.find_spec("mujoco") is not None:
        return importlib.import_module("metaworld.policies").ENV_POLICY_MAP
    spec = importlib.util.find_spec("metaworld")
    if spec is None:
        raise ModuleNotFoundError("Meta-World's policies are missing: pip install --no-deps 'metaworld>=3,<4'")
    empty = types.ModuleType("metaworld")
    empty.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["metaworld"] = empty
    try:
        return importlib.import_module("metaworld.policies").ENV_POLICY_MAP
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "metaworld"]:
            del sys.modules[name]


EXPERTS = {"scripted-policy": ScriptedPolicy}

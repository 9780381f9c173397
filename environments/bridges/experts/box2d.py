"""Gymnasium's own heuristics for its lunar lander and its walker: functions of the observation.

They are taken out of the files they stand in: these import the simulator, which envpool's versions of the tasks do not
need. They read the eight and the twenty-four numbers of the observation alone.
"""

import ast
import functools
import pathlib
import types

import gymnasium
import numpy as np


class LanderHeuristic:
    """What `heuristic` of Gymnasium's `lunar_lander.py` does; it only asks whether the engines are throttled."""

    def __init__(self, seed):
        self._act = _find("lunar_lander", "heuristic")

    def reset(self, env, obs, info):
        self._facts = types.SimpleNamespace(continuous=hasattr(env.action_space, "low"))
        self._facts.unwrapped = self._facts

    def label(self, env, obs, info):
        return self._act(self._facts, np.asarray(obs, np.float64))

    def observe(self, action, obs, reward, end, info):
        pass


class WalkerHeuristics:
    """What `BipedalWalkerHeuristics` does: a machine of three states, which follows what it observes."""

    def __init__(self, seed):
        pass

    def reset(self, env, obs, info):
        self._act = _find("bipedal_walker", "BipedalWalkerHeuristics")().step_heuristic

    def label(self, env, obs, info):
        return np.array(self._act(np.asarray(obs, np.float64)))

    def observe(self, action, obs, reward, end, info):
        pass


@functools.lru_cache(maxsize=None)
def _find(module, name):
    """A function or class of a file of Gymnasium's, without what else the file imports."""
    path = pathlib.Path(gymnasium.__file__).parent / "envs" / "box2d" / (module + ".py")
    nodes = [node for node in ast.parse(path.read_text("utf-8")).body if getattr(node, "name", "") == name]
    scope = {"np": np, "__name__": module}
    exec(compile(ast.Module(body=nodes, type_ignores=[]), str(path), "exec"), scope)
    return scope[name]


EXPERTS = {"lander-heuristic": LanderHeuristic, "walker-heuristic": WalkerHeuristics}

"""The heuristics that Gymnasium's lunar lander and bipedal walker ship: functions of what is seen, one with a state."""

import typing

import numpy as np


class Lander:
    """A controller of position and angle; of the environment it reads whether its actions are continuous."""

    def __init__(self, seed):
        pass

    def reset(self, env, obs, info):
        pass

    def label(self, env, obs, info):
        from gymnasium.envs.box2d.lunar_lander import heuristic

        action = heuristic(env.unwrapped, obs)
        return np.asarray(action, np.float32) if env.unwrapped.continuous else int(action)

    def observe(self, action, obs, reward, end, info):
        pass


class Walker:
    """A machine of three states that steps leg by leg, and so follows what it would have done itself."""

    def __init__(self, seed):
        self._gait: typing.Any = None

    def reset(self, env, obs, info):
        from gymnasium.envs.box2d.bipedal_walker import BipedalWalkerHeuristics

        self._gait = BipedalWalkerHeuristics()

    def label(self, env, obs, info):
        return np.clip(np.asarray(self._gait.step_heuristic(obs), np.float32), -1, 1)

    def observe(self, action, obs, reward, end, info):
        pass


EXPERTS = {"lander-heuristic": Lander, "walker-heuristic": Walker}

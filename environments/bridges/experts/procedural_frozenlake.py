"""procedural-frozenlake's own value iteration on the map of the moment, with the discount that it is published with."""

import numpy as np


class LakeValues:
    """The optimal action of each state of a map; a map that stays is solved once."""

    def __init__(self, seed):
        self._map, self._values = "", np.zeros(0)

    def reset(self, env, obs, info):
        lake = env.unwrapped
        known = str(lake.P)
        if known != self._map:
            self._map, self._values = known, np.asarray(lake.compute_q_table())

    def label(self, env, obs, info):
        return int(self._values[int(obs)].argmax())

    def observe(self, action, obs, reward, end, info):
        pass


EXPERTS = {"value-iteration": LakeValues}

"""gym-anm's model predictive control, which takes demand and weather to stay as they are: it sees what is seen."""

import typing

_GAMMA, _MARGIN, _STEPS = 0.995, 0.96, 8


class Mpc:
    """The controller of one network."""

    def __init__(self, seed):
        self._controller: typing.Any = None

    def reset(self, env, obs, info):
        from gym_anm.agents.mpc_constant import MPCAgentConstant

        if self._controller is None:
            network = env.unwrapped
            self._controller = MPCAgentConstant(network.simulator, env.action_space, _GAMMA, _MARGIN, _STEPS)

    def label(self, env, obs, info):
        return self._controller.act(env.unwrapped).astype(env.action_space.dtype)

    def observe(self, action, obs, reward, end, info):
        pass


EXPERTS = {"mpc": Mpc}

"""simglucose's basal-bolus controller, as patients practise it: it is told of meals, which are not seen."""

import types
import typing

import numpy as np


class BasalBolus:
    """The controller of one patient."""

    def __init__(self, seed):
        self._controller: typing.Any = None

    def reset(self, env, obs, info):
        from simglucose.controller.basal_bolus_ctrller import BBController

        self._controller = self._controller or BBController()

    def label(self, env, obs, info):
        seen = types.SimpleNamespace(CGM=float(obs[0]))
        known = {name: info.get(name) for name in ("sample_time", "patient_name", "meal")}
        rates = self._controller.policy(seen, 0.0, False, **known)
        space = env.action_space
        return np.clip(np.array([rates.basal + rates.bolus], space.dtype), space.low, space.high)

    def observe(self, action, obs, reward, end, info):
        pass


EXPERTS = {"basal-bolus": BasalBolus}

"""Meta-World's scripted policies: functions of the observation that know where the goal is."""

import typing

import numpy as np


class Scripted:
    """The policy of one task."""

    def __init__(self, seed):
        self._policy: typing.Any = None

    def reset(self, env, obs, info):
        from metaworld.policies import ENV_POLICY_MAP

        if self._policy is None:
            kind: typing.Any = ENV_POLICY_MAP[_name(env)]
            self._policy = kind()

    def label(self, env, obs, info):
        space = env.action_space
        return np.clip(self._policy.get_action(np.asarray(obs)), space.low, space.high).astype(space.dtype)

    def observe(self, action, obs, reward, end, info):
        pass


def _name(env):
    """The task's name, which the id of the bridge is."""
    layer = env
    while layer is not None:
        spec = getattr(layer, "spec", None)
        name = (getattr(spec, "kwargs", None) or {}).get("env_name", "")
        if name:
            return name
        layer = getattr(layer, "env", None)
    return env.spec.id


EXPERTS = {"scripted-policy": Scripted}

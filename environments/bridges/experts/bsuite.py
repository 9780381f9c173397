"""Rules for bsuite's experiments: short ones, of what is seen, and the best action where a hidden mapping decides."""

import numpy as np


class SeenRule:
    """What to do by what is seen; of memory experiments, by what was seen at the start."""

    def __init__(self, seed):
        self._context = np.zeros(1)

    def reset(self, env, obs, info):
        self._rule = next(rule for start, rule in _RULES.items() if env.spec.id.startswith(start))
        self._context = np.ravel(obs)[2:]

    def label(self, env, obs, info):
        return int(self._rule(np.asarray(obs, float), self._context))

    def observe(self, action, obs, reward, end, info):
        pass


class HiddenMapping:
    """The best action where a mapping that is drawn when the experiment is made, and never seen, says which that is."""

    def __init__(self, seed):
        pass

    def reset(self, env, obs, info):
        layer = env.unwrapped._experiment
        while "_env" in layer.__dict__:  # what adds noise to the experiment or scales it
            layer = layer.__dict__["_env"]
        self._experiment = layer

    def label(self, env, obs, info):
        hidden = vars(self._experiment)
        if "_action_mapping" in hidden:  # deep sea: always to the right
            return int(hidden["_action_mapping"][hidden["_row"], hidden["_column"]])
        return int(np.argmax(hidden["_rewards"]))

    def observe(self, action, obs, reward, end, info):
        pass


def _catch(obs, context):
    ball = int(np.argmax(obs[:-1].sum(0)))
    return 1 + np.sign(ball - int(np.argmax(obs[-1])))


def _balance(obs, context):
    x, x_dot, sine, _, theta_dot, _ = obs[0]
    force = 3 * x + 4.5 * x_dot + 20 * sine + 5 * theta_dot
    return 1 + np.sign(force) * (abs(force) > 0.1)


def _climb(obs, context):
    return 2 if obs[0, 1] >= 0 else 0


def _take(obs, context):
    return obs[0, 0] > 0


def _recall(obs, context):
    return context[int(obs[0, 1])] > 0


_RULES = {
    "catch": _catch,
    "cartpole": _balance,
    "mountain_car": _climb,
    "umbrella": _take,
    "memory": _recall,
}

EXPERTS = {"rule": SeenRule, "mapping": HiddenMapping}

"""bsuite's experiments under their own ids, `catch/0`: one of those settings that differ in their seed alone."""

import typing

import gymnasium
import numpy as np


class Experiment(gymnasium.Env):
    """One experiment in one of its settings.

    Args:
      name: bsuite's own id.
    """

    def __init__(self, name):
        import bsuite

        self._experiment: typing.Any = bsuite.load_from_id(name)
        seen, moves = self._experiment.observation_spec(), self._experiment.action_spec()
        low, high = (getattr(seen, side, bound) for side, bound in (("minimum", -np.inf), ("maximum", np.inf)))
        self.observation_space = gymnasium.spaces.Box(
            np.broadcast_to(low, seen.shape).astype(np.float32),
            np.broadcast_to(high, seen.shape).astype(np.float32),
            seen.shape,
            np.float32,
        )
        self.action_space = gymnasium.spaces.Discrete(moves.num_values)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        layer = self._experiment
        while seed is not None and layer is not None:  # the experiment, and what adds noise to it or scales it
            layer.__dict__["_rng"] = np.random.RandomState(self.np_random.integers(1 << 31))
            layer = layer.__dict__.get("_env")
        return np.asarray(self._experiment.reset().observation, np.float32), {}

    def step(self, action):
        moment = self._experiment.step(action)
        ended = moment.last() and moment.discount == 0
        return np.asarray(moment.observation, np.float32), float(moment.reward), ended, moment.last() and not ended, {}


def register():
    """Puts the experiments into the registry, but for those on MNIST, whose pictures are downloaded."""
    from bsuite import sweep

    seen = set()
    for name in sweep.SWEEP:
        experiment = name.partition(sweep.SEPARATOR)[0]
        settings = {key: value for key, value in sweep.SETTINGS[name].items() if key != "seed"}
        if (experiment, str(settings)) not in seen and not experiment.startswith("mnist"):
            seen.add((experiment, str(settings)))
            gymnasium.register(name, entry_point=f"{__name__}:Experiment", kwargs={"name": name})

"""The planning problems of rddlrepository in pyRDDLGym: an id is the name of the problem, a dash and the instance.

Fluents come as arrays, objects as their places in their types. A problem may let only so many of its actions happen at
a time: then the agent has that many choices, each of one action or of none. Preconditions of actions are not enforced,
as is pyRDDLGym's own default.
"""

import importlib
import pathlib
import typing

import gymnasium
import numpy as np


class Problem(gymnasium.Env):
    """One instance of a problem.

    Args:
      domain: file of the problem.
      instance: file of its objects, its start and its horizon.
    """

    def __init__(self, domain, instance):
        import pyRDDLGym

        options = {"vectorized": True, "enforce_action_count_non_bool": False}
        self._problem: typing.Any = pyRDDLGym.make(domain, instance, **options)
        self.max_steps = int(self._problem.horizon)
        self.observation_space: typing.Any = self._problem.observation_space
        # Values of enumerated types have an @ in front in the type and none in the fluent.
        self._places = {name.lstrip("@"): place for name, place in self._problem.model.object_to_index.items()}
        self._idle = self._problem.sampler.noop_actions
        fluents = self._problem.action_space.spaces
        ranges = self._problem.model.action_ranges
        self._switches = [
            (name, place) for name in fluents if ranges[name] == "bool" for place in np.ndindex(fluents[name].shape)
        ]
        self._others = {name: space for name, space in fluents.items() if ranges[name] != "bool"}
        self._choices = min(int(self._problem.max_allowed_actions), len(self._switches))
        parts = dict(self._others)
        if self._choices == len(self._switches):
            parts.update((name, space) for name, space in fluents.items() if name not in parts)
            self._choices = 0
        elif self._choices == 1:
            parts["choice"] = gymnasium.spaces.Discrete(len(self._switches) + 1)
        else:
            parts["choice"] = gymnasium.spaces.MultiDiscrete([len(self._switches) + 1] * self._choices)
        self._single = next(iter(parts)) if len(parts) == 1 else ""
        self.action_space = parts[self._single] if self._single else gymnasium.spaces.Dict(parts)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self._problem.seed(seed)
        observation, info = self._problem.reset()
        self._over = self._problem.done
        return self._see(observation), info

    def step(self, action):
        if self._over:  # some are over before they begin
            return self._see(self._problem.reset()[0]), 0.0, True, False, {}
        parts = {self._single: action} if self._single else dict(action)
        if self._choices:
            for choice in np.ravel(parts.pop("choice")):
                if choice < len(self._switches):
                    name, place = self._switches[choice]
                    parts.setdefault(name, np.zeros(self._problem.action_space[name].shape, np.int32))[place] = 1
        shaped = {name: np.reshape(value, np.shape(self._idle[name])) for name, value in parts.items()}
        observation, *rest = self._problem.step(shaped)
        return (self._see(observation), *rest)

    def _see(self, observation):
        """The fluents as numbers: an object by its place in its type; 0 where nothing has been observed yet."""
        seen = {}
        for name, space in self.observation_space.spaces.items():
            value = np.asarray(observation[name])
            if value.dtype == object:
                value = np.clip(np.zeros(space.shape), space.low, space.high)
            elif value.dtype.kind == "U":
                value = np.array([self._places[each.lstrip("@")] for each in value.ravel()])
            seen[name] = value.astype(space.dtype).reshape(space.shape)
        return seen

    def close(self):
        self._problem.close()


def register():
    """Puts every instance of every problem into the registry."""
    import rddlrepository

    root = pathlib.Path(rddlrepository.__file__).parent
    for domain in sorted(root.glob("archive/**/domain.rddl")):
        folder = domain.parent
        module = importlib.import_module(".".join(folder.relative_to(root.parent).parts))
        if not (info := getattr(module, "info", {})):  # the repository does not name it either
            continue
        problem = "_".join(filter(None, (info["name"], info["context"])))
        for path in sorted(folder.glob("instance*.rddl"), key=lambda path: int(path.stem[8:])):
            paths = {"domain": str(domain), "instance": str(path)}
            gymnasium.register(f"{problem}-{path.stem[8:]}", entry_point=f"{__name__}:Problem", kwargs=paths)

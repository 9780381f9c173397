"""gem-controllers: the cascades of controllers that gym-electric-motor ships, tuned to the motor by its own rules."""

import sys
import types
import typing

import numpy as np


class Cascade:
    """The controller of one motor: of the measured state and its reference; its integrators follow each time step."""

    def __init__(self, seed):
        self._motor: typing.Any = None
        self._controller: typing.Any = None

    def reset(self, env, obs, info):
        if self._motor is not env.unwrapped:
            self._motor = env.unwrapped
            self._controller = _import().GemController.make(self._motor, env.spec.id, block_diagram=False)
        self._controller.reset()

    def label(self, env, obs, info):
        space = env.action_space
        with np.errstate(all="ignore"):
            action = np.asarray(self._controller.control(*obs))
        if not np.isfinite(action).all():
            return None
        if hasattr(space, "low"):
            return np.clip(action, space.low, space.high).astype(space.dtype).reshape(space.shape)
        return action.astype(np.int64).reshape(space.shape) if space.shape else int(action)

    def observe(self, action, obs, reward, end, info):
        pass


def _import():
    """The package, without what draws its block diagrams, which wants a notebook."""
    name = "gem_controllers.block_diagrams"
    for each in (name, f"{name}.block_diagram"):
        sys.modules.setdefault(each, types.ModuleType(each))
    vars(sys.modules[f"{name}.block_diagram"]).setdefault("build_block_diagram", None)
    import gem_controllers

    return gem_controllers


EXPERTS = {"cascade": Cascade}

"""Which algorithm makes the reference of an environment, and with which hyperparameters."""

from __future__ import annotations

import collections.abc
import dataclasses
import re
import types
import typing

from gymnasium import spaces

from ldm_jax.errors import ConfigError
from ldm_jax.spaces import leaves
from ldm_jax.types import EnvironmentSpec

from . import expert, ppo, tabular
from .algorithm import Algorithm
from .networks import is_image

ALGORITHMS: collections.abc.Mapping[str, Algorithm] = types.MappingProxyType(
    {
        "ppo": Algorithm(ppo.PPOConfig, ppo.settle, ppo.learn, ppo.agent, ppo.example),
        "tabular": Algorithm(tabular.TabularConfig, tabular.settle, tabular.learn, tabular.agent, tabular.example),
        "expert": Algorithm(expert.ExpertConfig, expert.settle, expert.learn, expert.agent, expert.example),
    }
)
"""By the name that a card says."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train a reference.

    Attributes:
      algorithm: a name in `ALGORITHMS`.
      config: its configuration.
    """

    algorithm: str
    config: ppo.PPOConfig | tabular.TabularConfig | expert.ExpertConfig

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"no algorithm {self.algorithm!r}; known are {', '.join(ALGORITHMS)}")
        expected = ALGORITHMS[self.algorithm].config
        if not isinstance(self.config, expected):
            raise ConfigError(f"got a {type(self.config).__name__} for {self.algorithm}, expected {expected.__name__}")


TUNED: collections.abc.Mapping[str, dict[str, typing.Any]] = types.MappingProxyType(
    {
        "CartPole": {"budget_steps": 300_000, "discount": 0.999, "gae_lambda": 0.98},
        "Pendulum": {"discount": 0.95},
        # White noise never reaches the goal; noise that lasts does at once. Were its size trained, it would be lost.
        "MountainCarContinuous": {"budget_steps": 200_000, "noise_correlation": 0.95, "learn_std": False},
        "Catch": {"budget_steps": 300_000},
        "Breakout": {"budget_steps": 1_500_000, "activation": "relu", "learning_rate": 2e-3},
        "Reacher": {"budget_steps": 1_000_000},
        "PointRobot": {"budget_steps": 1_500_000, "discount": 0.97, "learning_rate": 5e-4},
        "LunarLander": {
            "budget_steps": 1_000_000,
            "num_envs": 32,
            "rollout_length": 256,
            "minibatches": 16,
            "learning_rate": 5e-4,
            "discount": 0.999,
            "gae_lambda": 0.98,
        },
        "MiniGrid-Empty-5x5": {"budget_steps": 200_000},
    }
)
"""Changes to the automatic recipe, by the task's name without library, suite and version."""


def recipe(spec: EnvironmentSpec) -> Recipe:
    """The recipe of an environment: by the kinds of its spaces, with what is known to be better for some tasks.

    Args:
      spec: of the environment; its batch size does not matter.
    """
    if tabular.is_tabular(spec):
        return Recipe("tabular", tabular.TabularConfig())
    continuous = any(isinstance(leaf.space, spaces.Box) for leaf in leaves(spec.action_space))
    image = any(is_image(leaf.space) for leaf in leaves(spec.observation_space))
    config = ppo.PPOConfig(budget_steps=1_000_000 if image else 500_000, entropy_coef=0.0 if continuous else 0.01)
    name = re.sub(r"-(v\d+|bsuite|misc|MinAtar)$", "", spec.id.partition("/")[2])
    return Recipe("ppo", dataclasses.replace(config, **TUNED.get(name, {})))

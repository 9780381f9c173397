"""The algorithms that there are, and what it takes to train by one of them."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing

from ldm_jax.errors import ConfigError

from . import expert, ppo, pqn, sac, tabular
from .algorithm import Algorithm
from .ppo_loss import RecurrentPPOConfig

ALGORITHMS: collections.abc.Mapping[str, Algorithm] = types.MappingProxyType(
    {
        "ppo": Algorithm(ppo.PPOConfig, ppo.settle, ppo.learn, ppo.agent, ppo.example),
        "recurrent_ppo": Algorithm(RecurrentPPOConfig, ppo.settle, ppo.learn, ppo.agent, ppo.example),
        "pqn": Algorithm(pqn.PQNConfig, pqn.settle, pqn.learn, pqn.agent, pqn.example),
        "sac": Algorithm(sac.SACConfig, sac.settle, sac.learn, sac.agent, sac.example),
        "tabular": Algorithm(tabular.TabularConfig, tabular.settle, tabular.learn, tabular.agent, tabular.example),
        # The same where the environment does not number its states: what a card says of how they are told apart.
        "hashed": Algorithm(tabular.TabularConfig, tabular.settle, tabular.learn, tabular.agent, tabular.example),
        "expert": Algorithm(expert.ExpertConfig, expert.settle, expert.learn, expert.agent, expert.example),
    }
)
"""By the name that a card says."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train a reference.

    Attributes:
      algorithm: a name in `ALGORITHMS`.
      config: its configuration, of the algorithm's own class.
    """

    algorithm: str
    config: typing.Any

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"no algorithm {self.algorithm!r}; known are {', '.join(ALGORITHMS)}")
        expected = ALGORITHMS[self.algorithm].config
        if not isinstance(self.config, expected):
            raise ConfigError(f"got a {type(self.config).__name__} for {self.algorithm}, expected {expected.__name__}")

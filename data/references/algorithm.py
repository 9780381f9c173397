"""What a way to find a reference is: training that can pause, and who acts by what it found."""

from __future__ import annotations

import collections.abc
import typing

from ldm_jax.environment import Environment
from ldm_jax.types import Agent, EnvironmentSpec, PyTree

REPORTS = 20
"""How often training reports what it has come to."""


class Learned(typing.NamedTuple):
    """What training has come to at one of its reports.

    Attributes:
      steps: environment steps done so far.
      params: of the policy to be kept if training ended here, for the agent; arrays of NumPy or of JAX.
      mean_return: of the episodes that training itself ended since the last report, NaN where none has ended.
    """

    steps: int
    params: PyTree
    mean_return: float = float("nan")


class Algorithm(typing.NamedTuple):
    """One way to find a reference.

    Attributes:
      config: the class of its configuration, a frozen dataclass with `budget_steps` and `num_envs`.
      settle: `settle(environment, config, seed)`, the configuration with what it left open found by trying.
      learn: `learn(environment, config, seed)`, a generator of about twenty `Learned`, the last when the budget is
        spent. It goes on only when asked for the next: not to ask is to pause, to close it is to stop. Nobody else
        acts in the environment meanwhile, unless it is jittable. Closed or not, the same seed gives the same.
      agent: `agent(spec, config)`, who acts by the parameters.
      example: `example(spec, config)`, parameters of the same structure and shapes.
    """

    config: type
    settle: collections.abc.Callable[[Environment, typing.Any, int], typing.Any]
    learn: collections.abc.Callable[[Environment, typing.Any, int], collections.abc.Iterator[Learned]]
    agent: collections.abc.Callable[[EnvironmentSpec, typing.Any], Agent]
    example: collections.abc.Callable[[EnvironmentSpec, typing.Any], PyTree]

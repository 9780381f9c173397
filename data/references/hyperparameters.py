"""What every algorithm's hyperparameters must be, said in one place."""

from __future__ import annotations

import copy
import typing

from ldm_jax.errors import ConfigError, check_finite

_Config = typing.TypeVar("_Config", bound="Hyperparameters")


class Hyperparameters:
    """What the configurations of all algorithms that learn from rollouts share; each is a frozen dataclass.

    Attributes:
      traced: names of the numbers that no compiled program depends on: it takes them as arguments, so that
        configurations that differ in nothing else share it.
    """

    traced: typing.ClassVar[tuple[str, ...]] = ()
    budget_steps: int
    num_envs: int
    rollout_length: int

    @property
    def updates(self) -> int:
        """Rollouts that the budget pays for, at least one."""
        return max(1, self.budget_steps // (self.num_envs * self.rollout_length))

    @property
    def numbers(self) -> dict[str, typing.Any]:
        """Those that a compiled program takes as arguments."""
        return {name: float(getattr(self, name)) for name in self.traced}

    def with_numbers(self: _Config, numbers: dict[str, typing.Any]) -> _Config:
        """The configuration with other numbers, which may be traced and are not checked."""
        copied = copy.copy(self)
        for name, value in numbers.items():
            object.__setattr__(copied, name, value)
        return copied

    @property
    def structure(self: _Config) -> _Config:
        """The configuration without those numbers: equal ones compile to one program."""
        return self.with_numbers(dict.fromkeys(self.traced, 0.0))


def check_hyperparameters(
    config: typing.Any,
    *,
    whole: tuple[str, ...] = (),
    positive: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
    shares: tuple[str, ...] = (),
) -> None:
    """Checks the numbers of a configuration, a frozen dataclass; `hidden` becomes a tuple, a list as it is in JSON.

    Args:
      config: to be checked.
      whole: names of whole numbers of at least 1.
      positive: of numbers above 0.
      not_negative: of numbers of 0 or more.
      shares: of numbers from 0 to 1.

    Raises:
      ConfigError: one is not what it must be.
    """
    if hasattr(config, "hidden"):
        object.__setattr__(config, "hidden", tuple(config.hidden))
        if not config.hidden or min(config.hidden) < 1:
            raise ConfigError(f"hidden is {config.hidden}, expected widths of at least 1")
    check_finite(config)
    rules = (
        (whole, lambda value: value >= 1 and int(value) == value, "a whole number of at least 1"),
        (positive, lambda value: value > 0, "a positive number"),
        (not_negative, lambda value: value >= 0, "0 or more"),
        (shares, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    )
    for names, holds, expected in rules:
        for name in names:
            if not holds(getattr(config, name)):
                raise ConfigError(f"{name} is {getattr(config, name)}, expected {expected}")


def check_minibatches(pieces: int, minibatches: int) -> None:
    """Checks that the pieces of a rollout can be dealt out evenly.

    Raises:
      ConfigError: they cannot.
    """
    if pieces % minibatches:
        raise ConfigError(f"a rollout of {pieces} steps or sequences does not split into {minibatches} minibatches")

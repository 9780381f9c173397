"""What every algorithm's hyperparameters must be, said in one place."""

from __future__ import annotations

import typing

from ldm_jax.errors import ConfigError, check_finite


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

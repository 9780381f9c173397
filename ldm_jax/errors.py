"""What a user can put right, as one family of exceptions, and how two configurations differ."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import math
import typing


class LdmError(Exception):
    """What a user can put right: scripts say it in one line, without a traceback."""


class ConfigError(LdmError, ValueError):
    """A configuration that contradicts itself, or a space that a model cannot take."""


def did_you_mean(
    name: str,
    known: collections.abc.Iterable[str],
    most: int = 3,
    shown: collections.abc.Callable[[str], str] = str,
) -> str:
    """The end of an error about a name that is not known.

    Args:
      name: that was given.
      known: the names that there are.
      most: of them are said.
      shown: how one of them is written.

    Returns:
      `; did you mean A or B?`, those that are like it, whatever their case; empty where none is.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = [shown(by_lower[each]) for each in difflib.get_close_matches(name.lower(), by_lower, n=most, cutoff=0.5)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def differences(found: typing.Any, wanted: typing.Any, name: str = "") -> list[str]:
    """Names every value in which two configurations, nested mappings of JSON values, differ, with both.

    Args:
      found: the one that is there.
      wanted: the one that is asked for.
      name: of the two, where they are part of something.

    Returns:
      One line for each; long values are cut.
    """
    if isinstance(found, collections.abc.Mapping) and isinstance(wanted, collections.abc.Mapping):
        names = sorted({*found, *wanted})
        prefix = f"{name}." if name else ""
        return [
            line
            for key in names
            for line in differences(found.get(key, "absent"), wanted.get(key, "absent"), prefix + key)
        ]
    if _plain(found) == _plain(wanted):
        return []
    return [f"{name} was {_shorten(found)} there and is {_shorten(wanted)} now"]


def _shorten(value: typing.Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:80]} ... ({len(text)} characters)"


def _plain(value: typing.Any) -> typing.Any:
    # JSON has no tuples.
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_at_least(config: typing.Any, least: collections.abc.Mapping[str, float], where: str = "") -> None:
    """Checks that numbers of a configuration are not too small, in their order; a NaN is.

    Args:
      config: a dataclass.
      least: the least value, by the name of the field.
      where: the configuration is, before the names in the error.

    Raises:
      ConfigError: names the field.
    """
    for name, value in least.items():
        if not getattr(config, name) >= value:
            raise ConfigError(f"{where}{name} is {getattr(config, name)}, expected at least {value}")


def check_finite(config: typing.Any) -> None:
    """Checks that no number of a configuration is NaN or infinite; comparisons would let a NaN pass.

    Args:
      config: a dataclass.

    Raises:
      ConfigError: names the field.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{type(config).__name__}.{field.name} is {value}, expected a finite number")

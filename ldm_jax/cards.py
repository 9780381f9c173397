"""The environment card: all that is known of an environment and its reference, as one JSON object."""

from __future__ import annotations

import dataclasses
import functools
import typing

import gymnasium
import numpy as np

from ldm_jax import spaces
from ldm_jax.errors import LdmError, differences
from ldm_jax.types import EnvironmentSpec


class CardError(LdmError, ValueError):
    """A card that lacks a field or holds a wrong one."""


@dataclasses.dataclass(frozen=True)
class Returns:
    """The undiscounted returns of a policy over fresh episodes.

    Attributes:
      values: one row per parallel environment, one return per episode, all rows equally long, in order of time.
    """

    values: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        if len({len(row) for row in self.values}) != 1:
            raise CardError("every row of returns needs the same number of episodes, at least one")

    @classmethod
    def of(cls, returns: np.ndarray) -> Returns:
        """From `[rows, episodes]`."""
        return cls(tuple(map(tuple, np.asarray(returns, np.float64).tolist())))

    @functools.cached_property
    def array(self) -> np.ndarray:
        """`float64 [rows, episodes]`."""
        return np.array(self.values)

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(self.array.mean())

    @property
    def std(self) -> float:
        """Of one episode's return."""
        return float(self.array.std(ddof=1)) if self.episodes > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.std / self.episodes**0.5

    @property
    def episodes(self) -> int:
        """The number of episodes over all rows."""
        return self.array.size


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What was measured on an environment's data; what standardizes it.

    Attributes:
      observation_mean: of each number of the numeric observation vector, in canonical order.
      observation_std: the same, standard deviation, floored.
      reward_scale: a typical size of a reward that is not 0; positive.
      action_low: of each continuous action slot, the range that was executed, in the space's own units.
      action_high: the same.
      steps: the number of steps that this was measured on.
      outside: the number of observations with a part outside the declared bounds.
    """

    observation_mean: tuple[float, ...]
    observation_std: tuple[float, ...]
    reward_scale: float
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    steps: int
    outside: int = 0

    def __post_init__(self):
        if any(not deviation > 0 for deviation in self.observation_std):
            raise CardError("observation_std must be positive: floor it")
        if not self.reward_scale > 0:
            raise CardError(f"reward_scale is {self.reward_scale}, expected a positive number")


@dataclasses.dataclass(frozen=True)
class Reference:
    """How the reference policy was made.

    Attributes:
      algorithm: `"ppo"`, `"tabular"`, ...
      decoding: `"greedy"` or `"sample"`, whichever scored better; scores and labels follow it.
      budget_steps: environment steps spent on training.
      seed: of the training.
    """

    algorithm: str
    decoding: typing.Literal["greedy", "sample"]
    budget_steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class EnvironmentCard:
    """An environment, its reference and its data.

    Attributes:
      id: `library/<the library's own id>`.
      library: the library.
      version: its version.
      domain: what the task is about.
      observation_space: of one environment.
      action_space: of one environment.
      time_limit: in steps.
      statistics: of the data.
      random_returns: of the uniformly random policy.
      reference_returns: of the reference, on other episodes than those that chose it.
      reference: how it was made.
      image_digest: what the library ran in while the data were collected, see `EnvironmentSpec.image_digest`.
      split: `"train"`, or the name of the held-out split.
    """

    id: str
    library: str
    version: str
    domain: str
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    time_limit: int
    statistics: Statistics
    random_returns: Returns
    reference_returns: Returns
    reference: Reference
    image_digest: str = ""
    split: str = "train"

    @classmethod
    def of(cls, spec: EnvironmentSpec, **fields: typing.Any) -> EnvironmentCard:
        """A card for the environment that `spec` describes; `fields` are those the spec does not have."""
        shared = {
            field.name: getattr(spec, field.name) for field in dataclasses.fields(cls) if hasattr(spec, field.name)
        }
        return cls(**shared, **fields)

    def to_json(self) -> dict[str, typing.Any]:
        """As JSON values; `from_json` is the inverse."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("observation_space", "action_space"):
            fields[name] = spaces.to_json(fields[name])
        for name in ("statistics", "reference"):
            fields[name] = dataclasses.asdict(fields[name])
        for name in ("random_returns", "reference_returns"):
            returns = fields[name]
            summary = ("mean", "std", "standard_error", "episodes")
            fields[name] = {key: getattr(returns, key) for key in summary} | {"values": returns.values}
        return fields

    @classmethod
    def from_json(cls, description: dict[str, typing.Any]) -> EnvironmentCard:
        """From what `to_json` wrote.

        Raises:
          CardError: a field is missing.
        """
        try:
            fields = {field.name: description[field.name] for field in dataclasses.fields(cls)}
            for name in ("observation_space", "action_space"):
                fields[name] = spaces.from_json(fields[name])
            statistics: dict[str, typing.Any] = {
                key: tuple(value) if isinstance(value, list | tuple) else value
                for key, value in fields["statistics"].items()
            }
            fields["statistics"] = Statistics(**statistics)
            fields["reference"] = Reference(**fields["reference"])
            for name in ("random_returns", "reference_returns"):
                fields[name] = Returns(tuple(map(tuple, fields[name]["values"])))
        except (KeyError, TypeError) as error:
            name = description.get("id", "an environment")
            raise CardError(f"the card of {name} is not of this version: {error}; collect its data again") from error
        return cls(**fields)


def check_matches(recorded: EnvironmentSpec | EnvironmentCard, live: EnvironmentSpec, what: str) -> None:
    """Checks that an environment is still the one that something was recorded of.

    Args:
      recorded: what was said of the environment then.
      live: what it says now.
      what: what was recorded, for the error ("the policy in DIR", "the reference of gymnax/CartPole-v1").

    Raises:
      CardError: names every difference of id, version, spaces (bounds and dtypes included) and time limit.
    """
    if wrong := differences(_identity(recorded), _identity(live)):
        raise CardError(
            f"{what} is not of this environment: {'; '.join(wrong)}. "
            f"Install what it was made with, or make it anew with this environment"
        )


def _identity(description: EnvironmentSpec | EnvironmentCard) -> dict[str, typing.Any]:
    return {
        "id": description.id,
        "version": description.version,
        "observation_space": spaces.to_json(description.observation_space),
        "action_space": spaces.to_json(description.action_space),
        "time_limit": description.time_limit,
    }

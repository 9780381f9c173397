"""The environment card: all that is known of an environment and its reference, as one JSON object."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import operator
import typing

import gymnasium
import numpy as np

from ldm_jax import spaces
from ldm_jax.errors import LdmError, differences
from ldm_jax.types import EnvironmentSpec


class CardError(LdmError, ValueError):
    """A card that lacks a field or holds a wrong one."""


def _check_finite(what: str, values: collections.abc.Iterable[float]) -> None:
    if odd := [value for value in values if not math.isfinite(value)]:
        raise CardError(f"{what} has the value {odd[0]}, expected finite numbers: look at the environment's data")


@dataclasses.dataclass(frozen=True)
class Returns:
    """The undiscounted returns of a policy over fresh episodes.

    Attributes:
      values: one row per parallel environment, one return per episode, all rows equally long, in order of time.
    """

    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.values}
        if len(lengths) != 1 or 0 in lengths:
            raise CardError(
                f"got rows of returns with {sorted(lengths)} episodes, expected as many in every row, at least one"
            )
        _check_finite("a return", (value for row in self.values for value in row))

    def __repr__(self) -> str:
        return f"Returns(mean={self.mean:.4g}, standard_error={self.standard_error:.2g}, episodes={self.episodes})"

    @classmethod
    def of(cls, returns: np.ndarray) -> Returns:
        """Takes the returns `[rows, episodes]` of an array."""
        return cls(tuple(map(tuple, np.asarray(returns, np.float64).tolist())))

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The returns as `float64 [rows, episodes]`."""
        return np.array(self.values)

    @property
    def mean(self) -> float:
        """Mean return of all episodes."""
        return float(self.array.mean())

    @property
    def std(self) -> float:
        """Standard deviation of one episode's return; 0 of a single episode."""
        return float(self.array.std(ddof=1)) if self.episodes > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Standard error of the mean return."""
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
      masked: whether time steps had an action mask.
      unlabelled: the number of steps whose action counts and that have no label: an expert had no answer there.
    """

    observation_mean: tuple[float, ...]
    observation_std: tuple[float, ...]
    reward_scale: float
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    steps: int
    outside: int = 0
    masked: bool = False
    unlabelled: int = 0

    def __post_init__(self) -> None:
        for name in ("observation_mean", "observation_std", "action_low", "action_high"):
            _check_finite(name, getattr(self, name))
        for one, other in (("observation_mean", "observation_std"), ("action_low", "action_high")):
            if len(getattr(self, one)) != len(getattr(self, other)):
                raise CardError(
                    f"{one} has {len(getattr(self, one))} numbers and {other} {len(getattr(self, other))}, "
                    "expected as many"
                )
        if not all(std > 0 for std in self.observation_std):
            raise CardError("observation_std must be positive: floor it")
        if not 0 < self.reward_scale < math.inf:
            raise CardError(f"reward_scale is {self.reward_scale}, expected a positive number")
        for name in ("steps", "outside", "unlabelled"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))

    def __repr__(self) -> str:
        return (
            f"Statistics({len(self.observation_mean)} numbers, {len(self.action_low)} continuous action slots, "
            f"reward_scale={self.reward_scale:.4g}, steps={self.steps}, outside={self.outside})"
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """How the reference policy was made.

    Attributes:
      algorithm: `"ppo"`, `"tabular"`, ...
      decoding: `"greedy"` or `"sample"`, whichever scored better; scores and labels follow it.
      budget_steps: environment steps that its training was planned for.
      seed: of the training.
      assumed_slots: the places of continuous action slots without bounds whose range was assumed, not known, while it
        was trained: what lies beyond was never tried (`ActionLayout.assumed`).
      expert: the name of the expert that a library ships and whose answers these are; empty where it was trained.
      expert_version: of that expert.
      privileged: whether the expert reads what a policy does not see.
      labels_any_state: whether the expert can label states that others brought about; where it cannot, it was only
        replayed, and the data hold no noise.
      candidate: what was special about it among those tried.
      candidates: all that were tried.
      steps: environment steps of all of them together, what chose among them included.
      seconds: that it took; the only field that two equal runs may differ in, and not compared.
      curve: environment steps of its own training, and the mean return of the episodes that training ended then.
      forms: name, mean return, its standard error and number of episodes of the greedy and the sampled form, on the
        episodes that chose between them and are not reported.
      public_target: a published return for the task, None where none is known.
      stopped: why training ended before its budget, `"solved"` or `"flat"`; empty where it did not.
    """

    algorithm: str
    decoding: typing.Literal["greedy", "sample"]
    budget_steps: int
    seed: int
    assumed_slots: tuple[int, ...] = ()
    expert: str = ""
    expert_version: str = ""
    privileged: bool = False
    labels_any_state: bool = True
    candidate: str = ""
    candidates: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    steps: int = dataclasses.field(default=0, repr=False)
    seconds: float = dataclasses.field(default=0.0, compare=False, repr=False)
    curve: tuple[tuple[int, float], ...] = dataclasses.field(default=(), repr=False)
    forms: tuple[tuple[str, float, float, int], ...] = dataclasses.field(default=(), repr=False)
    public_target: float | None = None
    stopped: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.decoding not in ("greedy", "sample"):
            raise CardError(f"decoding is {self.decoding!r}, expected 'greedy' or 'sample'")
        for name in ("budget_steps", "steps"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        object.__setattr__(self, "seed", operator.index(self.seed))
        places = tuple(_count("assumed_slots", place) for place in self.assumed_slots)
        object.__setattr__(self, "assumed_slots", places)
        for name in ("curve", "forms"):
            object.__setattr__(self, name, tuple(map(tuple, getattr(self, name))))
        object.__setattr__(self, "candidates", tuple(self.candidates))
        numbers = [value for row in (*self.curve, *self.forms) for value in row if isinstance(value, float)]
        _check_finite("the reference", [*numbers, self.seconds, self.public_target or 0.0])

    def __repr__(self) -> str:
        """Short: what is as usual is left out."""
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(self) if field.repr)
        return f"Reference({', '.join(f'{field.name}={value!r}' for field, value in fields if value != field.default)})"


WEAK = 0.5
"""A reference that gets less of the way from random to a public target is weak: z against it is easily had."""


def share_of_target(random: float, mean: float, target: float | None) -> float | None:
    """How much of the way from random to a public target a policy gets.

    Args:
      random: mean return of the random policy.
      mean: return of the policy.
      target: a published return, or None.

    Returns:
      The share, 1 at the target; None where there is no target above random.
    """
    if target is None or not target > random:
        return None
    return (mean - random) / (target - random)


def _count(name: str, value: typing.Any) -> int:
    """A plain int, of NumPy's too, which JSON does not know."""
    try:
        number = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise CardError(f"{name} is {value!r}, expected a whole number that is not negative")
    return number


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

    @property
    def share_of_target(self) -> float | None:
        """How much of the way from random to the public target the reference gets, None where none is known."""
        return share_of_target(self.random_returns.mean, self.reference_returns.mean, self.reference.public_target)

    @property
    def weak(self) -> bool:
        """Whether the reference is known to be weak: less than `WEAK` of the way to a public target."""
        share = self.share_of_target
        return share is not None and share < WEAK

    def __repr__(self) -> str:
        seen, acted = (_shorten(space) for space in (self.observation_space, self.action_space))
        random, reference, made = self.random_returns, self.reference_returns, self.reference
        return (
            f"EnvironmentCard({self.id!r}, {seen} -> {acted}, {self.time_limit} steps, returns {random.mean:.4g} "
            f"random, {reference.mean:.4g} {made.algorithm} {made.decoding})"
        )

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
        except (KeyError, TypeError, AttributeError, spaces.SpaceError) as error:
            name = description.get("id", "an environment")
            raise CardError(f"the card of {name} is not of this version: {error}; collect its data again") from error
        return cls(**fields)


def _shorten(space: gymnasium.Space) -> str:
    text = " ".join(str(space).split())
    return text if len(text) <= 80 else f"{text[:60]}... of {len(spaces.leaves(space))} parts"


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

"""A zoo: a folder of admitted references that others take instead of training their own, small enough to be shipped.

Parameters are in float16 where the policy that they make scores no differently. Each is taken only where its
environment is still the one that it was made for.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import typing

import jax
import numpy as np

from ldm_jax import cards
from ldm_jax.types import EnvironmentSpec, PyTree

from .opening import MakeEnvironment
from .pipeline import ScoredReference, score_reference
from .saving import ReferencePolicyError, half, load_reference, save_reference

EpisodeCounts = tuple[int, int, int, int]
"""Episodes that are played, as `score_reference` takes them: environments, episodes of each in a round, least, most."""

EPISODE_COUNTS: EpisodeCounts = (64, 1, 64, 4096)

NO_FURTHER = 3.0
"""Standard errors of a difference of means up to which two scores are the same."""


class Comparison(typing.NamedTuple):
    """Returns that were written down, and those of other episodes.

    Attributes:
      recorded: of the random policy and of the reference.
      measured: the same anew.
    """

    recorded: tuple[cards.Returns, cards.Returns]
    measured: tuple[cards.Returns, cards.Returns]

    @property
    def holds(self) -> bool:
        """Whether no mean differs by more than its error explains."""
        return all(map(_is_same, self.recorded, self.measured))


def _is_same(one: cards.Returns, other: cards.Returns) -> bool:
    rounding = 1e-6 * max(abs(one.mean), abs(other.mean))
    return abs(one.mean - other.mean) <= NO_FURTHER * math.hypot(one.standard_error, other.standard_error) + rounding


def take_from_zoo(folder: str | os.PathLike[str], spec: EnvironmentSpec) -> ScoredReference | None:
    """The reference of an environment, None where the zoo has none.

    Args:
      folder: of the zoo, with `<id>/` for each.
      spec: of the environment as it is now.

    Raises:
      CardError: it was made for another version of the environment, or other spaces.
      ReferencePolicyError: it is damaged.
    """
    path = pathlib.Path(folder) / spec.id
    if not (path / "reference.json").exists():
        return None  # a zoo may say instead why there is none
    found = load_reference(path)
    cards.check_matches(found.policy.spec, spec, f"the reference in {path}")
    return found


def add_to_zoo(
    folder: str | os.PathLike[str],
    make: MakeEnvironment,
    scored: ScoredReference,
    seed: int = 0,
    played: EpisodeCounts = EPISODE_COUNTS,
) -> ScoredReference:
    """Puts a reference into a zoo, in float16 where that changes no score beyond its error.

    Args:
      folder: of the zoo.
      make: makes the environment, as for training.
      scored: an admitted reference.
      seed: of the episodes that tell; not the one that it was scored with.
      played: how many they are, as `score_reference` takes them after the seed.

    Returns:
      What was put there: in float16 with the scores of the rounded policy, else as it was.

    Raises:
      ReferencePolicyError: it is not admitted.
    """
    spec = scored.policy.spec
    if not scored.admission.admitted:
        raise ReferencePolicyError(f"the reference of {spec.id} is not admitted: {scored.admission.reason}")
    path = pathlib.Path(folder) / spec.id
    rounded = dataclasses.replace(scored.policy, params=_rounded(scored.policy.params))
    if not scored.policy.reference.expert:
        anew = score_reference(make, rounded, seed, *played)
        same_form = anew.policy.reference.decoding == scored.policy.reference.decoding
        if same_form and anew.admission.admitted and _compare(scored, anew).holds:
            save_reference(path, anew, halved=True)
            return anew
    save_reference(path, scored)
    return scored


def verify_reference(
    make: MakeEnvironment, scored: ScoredReference, seed: int, played: EpisodeCounts = EPISODE_COUNTS
) -> Comparison:
    """Scores a reference on other episodes and compares.

    Args:
      make: makes the environment, as for training.
      scored: the reference.
      seed: of the episodes; not the one that it was scored with.
      played: how many they are, as `score_reference` takes them after the seed.

    Raises:
      CardError: the environment is no longer the one that it was made for.
    """
    return _compare(scored, score_reference(make, scored.policy, seed, *played))


def _compare(before: ScoredReference, after: ScoredReference) -> Comparison:
    return Comparison(
        (before.random_returns, before.reference_returns), (after.random_returns, after.reference_returns)
    )


def _rounded(params: PyTree) -> PyTree:
    """As they are once they were saved in half of their size."""
    return jax.tree.map(lambda leaf: half(leaf).astype(np.asarray(leaf).dtype), params)

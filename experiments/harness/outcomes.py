"""What came of each environment: `references/<id>/outcome.json`, one small file each, and the table of all."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import json
import pathlib
import typing

from data.references import DivergenceError, ReferencePolicyError
from experiments.harness.units import OUT_OF_MEMORY
from ldm_jax import files, spaces
from ldm_jax.environment import LibraryMissingError
from ldm_jax.errors import LdmError

OUTCOME = "outcome.json"
TOO_LARGE = "space too large for the model"
Verdict = typing.Literal["admitted", "collected", "evaluated", "refused", "left out", "failed"]
_VERDICTS: tuple[Verdict, ...] = typing.get_args(Verdict)
_WIDTH = 100  # of a reason in the table


class UnitOutcome(typing.NamedTuple):
    """What came of one environment.

    Attributes:
      verdict: "admitted", or "refused" by what the reference scored, or "failed": there is no reference. Of later
        stages "collected" and "evaluated", or "left out": what they need of it is not there.
      reason: why, in one sentence.
      cause: the kind of the reason where it failed, in a few words that many share; empty elsewhere.
      budget: share of an environment's training steps that its last try had; 0 where nothing was tried again.
      train_seconds: of training a reference, all tries together.
      score_seconds: of choosing and scoring it.
    """

    verdict: Verdict
    reason: str
    cause: str = ""
    budget: float = 0.0
    train_seconds: float = 0.0
    score_seconds: float = 0.0


def failure(error: BaseException, cause: str = "") -> UnitOutcome:
    """What an error comes to; its cause is told from its kind unless it is given."""
    return UnitOutcome("failed", in_one_line(error), cause or _cause(error))


def in_one_line(error: BaseException) -> str:
    """An error in one line; what is not the project's own names its class."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LdmError) else f"{type(error).__name__}: {text}"


def _cause(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return OUT_OF_MEMORY
    if isinstance(error, LibraryMissingError):
        return "system package missing" if "apt-get install" in str(error) else "library missing"
    kinds = {
        spaces.SpaceError: "space not supported",
        DivergenceError: "training diverged",
        ReferencePolicyError: "damaged reference",
    }
    return next((cause for kind, cause in kinds.items() if isinstance(error, kind)), "faults")


def with_costs(outcome: UnitOutcome, said: UnitOutcome | None) -> UnitOutcome:
    """An outcome with what another says that it took; as it is where nobody says so."""
    if said is None:
        return outcome
    return outcome._replace(budget=said.budget, train_seconds=said.train_seconds, score_seconds=said.score_seconds)


def read_outcome(directory: pathlib.Path) -> UnitOutcome | None:
    """What came of the environment of a folder, if it is written there."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return UnitOutcome(**json.loads((directory / OUTCOME).read_text()))
    return None


def read_refusal(directory: pathlib.Path) -> UnitOutcome | None:
    """Why the environment of a folder was refused, where nothing else of its reference was kept, as in a zoo."""
    said = read_outcome(directory)
    return said if said and said.verdict == "refused" and not (directory / "reference.json").exists() else None


def write_outcome(directory: pathlib.Path, outcome: UnitOutcome) -> None:
    """Writes what came of the environment of a folder, which is made if need be."""
    if read_outcome(directory) != outcome:
        directory.mkdir(parents=True, exist_ok=True)
        files.write(directory / OUTCOME, json.dumps(outcome._asdict(), indent=1) + "\n")


def forget_failed(references: pathlib.Path, ids: collections.abc.Iterable[str]) -> None:
    """Removes the outcomes of those that failed, so that they are tried again.

    Args:
      references: folder of the references.
      ids: of the environments.
    """
    for id in ids:
        found = read_outcome(references / id)
        if found and found.verdict == "failed":
            (references / id / OUTCOME).unlink()


def outcome_table(outcomes: collections.abc.Mapping[str, UnitOutcome]) -> str:
    """All outcomes, a line each, and how many there are of each kind."""
    order = sorted(outcomes, key=lambda id: (_VERDICTS.index(outcomes[id].verdict), outcomes[id].cause, id))
    rows = [("environment", "outcome", "reason")]
    for id in order:
        verdict, reason, cause = outcomes[id][:3]
        rows.append((id, verdict, _shorten(f"{cause}: {reason}" if cause else reason)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{id:{widths[0]}} {verdict:{widths[1]}} {reason}".rstrip() for id, verdict, reason in rows]
    return "\n".join([*lines, "", _summary(outcomes)])


def _summary(outcomes: collections.abc.Mapping[str, UnitOutcome]) -> str:
    verdicts: collections.Counter[str] = collections.Counter(outcome.verdict for outcome in outcomes.values())
    causes = collections.Counter(outcome.cause for outcome in outcomes.values() if outcome.verdict == "failed")
    told = ", ".join(f"{verdicts[name]} {name}" for name in _VERDICTS if verdicts[name])
    why = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    return f"{len(outcomes)} environments: {told}{f' ({why})' if why else ''}"


def _shorten(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."

"""Publishes what a run came to: `python -m experiments.publish --workdir=runs/panel200 --config.name=panel200`.

Puts the policy into the package, where `ldm_jax.load(name)` finds it, with a card (`README.md`) and its scores
(`scores.json`) beside the weights; and writes the page of results, `docs/results/<name>.md`, with the picture and the
report that it shows. It takes what the workdir has, and plays and trains nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import typing

import ldm_jax
from data.references import ReferencePolicyError, load_reference
from experiments.evaluate import fingerprint
from experiments.harness.costs import read_costs
from experiments.harness.outcomes import OUTCOME, read_outcome
from experiments.harness.stage import stage
from experiments.harness.workdir import WorkdirError, listed
from experiments.report.results import ReferenceFacts, Results, render_card, render_results
from experiments.report.runs import SCORES, ReportError, read_run
from ldm_jax import files
from ldm_jax.policy import PolicyError, rounded
from ldm_jax.training.checkpoints import CheckpointError

_ROOT = pathlib.Path(__file__).parents[1]
_WORDS = ("random", "reference", "model", "z", "z_low", "z_high")


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """What is written where.

    Attributes:
      name: of the policy and of the page.
      policies: folder of the policies of the package.
      pages: folder of the pages of results.
      commands: that make the run, one a line, for the page.
      remark: a paragraph below the headline of the page and of the card; empty for none.
    """

    name: str = ""
    policies: str = str(_ROOT / "ldm_jax" / "policies")
    pages: str = str(_ROOT / "docs" / "results")
    commands: str = "make panel"
    remark: str = ""


@stage("publish")
def run(config: PublishConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> None:
    """Writes the policy, its card and the page.

    Args:
      config: where to.
      workdir: of a run that is finished.
      environments: none: what was evaluated is published, and nothing left out.

    Raises:
      WorkdirError: no name was given, environments were, the run is not finished, or what was evaluated is not what
        would be published.
      PolicyError: there is no policy.
    """
    if not config.name:
        raise WorkdirError("no name was given: give --config.name=panel200 or the like")
    if environments:
        raise WorkdirError("got environments, expected none: all that was evaluated is published")
    found = read_results(workdir, config.name)._replace(remark=config.remark)
    folder, policy = pathlib.Path(config.policies) / config.name, ldm_jax.load(workdir / "policy")
    if found.provenance.get("Evaluation", {}).get("Policy") != fingerprint(policy):
        raise WorkdirError(f"the policy of {workdir} is not the one of its report: run experiments.evaluate first")
    if policy != dataclasses.replace(policy, params=rounded(policy.params, "bfloat16")):
        raise WorkdirError(
            f"the policy of {workdir} was evaluated in float32, and bfloat16 is published: pretrain it with "
            "--config.weights_dtype=bfloat16"
        )
    if not _holds(folder, policy):  # the same weights under a new name would double a history of versions
        policy.save(folder, "bfloat16")
    told = {item["id"]: {word: item[word] for word in (*_WORDS, "episodes")} for item in found.scored}
    files.write(folder / SCORES, json.dumps(told, indent=1) + "\n")
    files.write(folder / "README.md", render_card(found))
    pages = pathlib.Path(config.pages)
    (pages / config.name).mkdir(parents=True, exist_ok=True)
    for source, target in (("curve.png", "curve.png"), ("index.html", "report.html")):
        files.write(pages / config.name / target, (workdir / "report" / source).read_bytes())
    files.write(pages / f"{config.name}.md", render_results(found, config.commands.splitlines()))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB\n{pages / config.name}.md")


def read_results(workdir: pathlib.Path, name: str) -> Results:
    """Reads what a run came to.

    Args:
      workdir: of the run.
      name: of what is published.

    Raises:
      WorkdirError: it is not finished.
    """
    try:
        read = read_run(workdir)
    except ReportError as error:
        raise WorkdirError(str(error)) from error
    zero_shot = workdir / "zero_shot.md"
    return Results(
        name=name,
        scores=read.scores,
        provenance=read.provenance,
        references=_reference_facts(workdir / "references", [item["id"] for item in read.scores["environments"]]),
        last=read.training[-1] if read.training else {},
        kl=_late_kl(read.training),
        costs=_costs(workdir),
        zero_shot=zero_shot.read_text("utf-8") if zero_shot.exists() else "",
    )


def _late_kl(rows: typing.Sequence[typing.Mapping[str, typing.Any]]) -> dict[str, float]:
    """The KL of each environment over the last tenth of the rows of metrics: one batch has a few windows of each."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for row in rows[-max(1, len(rows) // 10) :]:
        for id, kl in row.get("kl_by_environment", {}).items():
            found[id].append(kl)
    return {id: sum(each) / len(each) for id, each in found.items()}


def _holds(folder: pathlib.Path, policy: ldm_jax.Policy) -> bool:
    with contextlib.suppress(PolicyError, CheckpointError):
        return ldm_jax.load(folder) == policy
    return False


def _costs(workdir: pathlib.Path) -> dict[str, float]:
    """Seconds of each stage, and those that references took which were taken from a zoo; without what holds stages."""
    ids = listed(workdir / "references", names=(OUTCOME,))
    outcomes = [said for id in ids if (said := read_outcome(workdir / "references" / id))]
    made = sum(said.train_seconds + said.score_seconds for said in outcomes)
    stages = {stage: seconds for stage, seconds in read_costs(workdir).items() if stage != "quickstart"}
    return {"references, whenever they were made, one process": made, **stages}


def _reference_facts(references: pathlib.Path, ids: typing.Iterable[str]) -> dict[str, ReferenceFacts]:
    found = {}
    for id in ids:
        with contextlib.suppress(ReferencePolicyError):
            scored = load_reference(references / id)
            made = scored.policy.reference
            if scored.admission.admitted:
                found[id] = ReferenceFacts(made.expert or made.algorithm, scored.weak)
    return found


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": PublishConfig()})

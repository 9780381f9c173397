"""Looks after datasets: `python -m experiments.dataset describe --dataset=runs/mine/dataset`.

    verify --dataset=URL                     reads everything again and lists what is damaged; status 1 if anything is
    describe --dataset=URL [--page=FILE]     environments, transitions, bytes, returns and noise levels; as a page, too
    merge --dataset=URL --sources=URL,URL    copies what other datasets have into one, made if need be
    export-minari --dataset=URL --environment=ID --folder=FOLDER    one environment in Minari's format
    import-minari --dataset=URL --folder=FOLDER                     and a dataset of Minari as an environment

A URL is a path, or a file, s3 or gs URL. What is killed is started again with the same command. The flags of a verb are
told by its own --help, such as `ldm-jax dataset describe --help`, which is the same script.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import pathlib
import sys
import tempfile
import typing

import numpy as np
from absl import flags

from data import minari_format
from data.store import Dataset, create_dataset, find_damage, merging, open_dataset
from experiments.harness import progress
from experiments.harness.flags import run_app
from experiments.harness.ids import parse_ids
from experiments.harness.outcomes import OUTCOME, read_outcome
from experiments.report.data_card import CardRow, render_data_card
from experiments.report.provenance import dataset_digest
from experiments.report.runs import write_page
from ldm_jax.cards import EnvironmentCard, Reference
from ldm_jax.errors import LdmError, did_you_mean


class DamagedError(LdmError, RuntimeError):
    """A dataset of which not everything is as it was written."""


def list_damage(dataset: Dataset) -> list[str]:
    """Reads everything again.

    Args:
      dataset: what to read.

    Returns:
      A line for each damage, below a heading; empty where there is none.
    """
    rows = [("environment", "part", "file", "what is wrong")]
    with progress.bar("verify", _raw_bytes(dataset), "B") as advance:
        rows += [(each.id, each.part, each.file, str(each.error)) for each in find_damage(dataset, advance)]
    return _columns(rows) if len(rows) > 1 else []


def _raw_bytes(dataset: Dataset) -> int:
    total = 0
    for id in dataset.ids:
        try:
            total += sum(part.record.nbytes for part in dataset.parts(id))
        except LdmError:
            continue  # it is found when it is its turn
    return total


class Described(typing.NamedTuple):
    """What is told of one environment.

    Attributes:
      card: its card.
      transitions: steps of all streams.
      raw: bytes, uncompressed.
      stored: bytes of its files; None where the place does not say.
      returns: `float64 [E]`, of the episodes that ended.
      noise: `float32 [E]`, of all episodes.
      ended: `bool [N]`, which of all episodes those of `returns` are.
      failed: episodes that ended with no more than the random policy gets on average.
    """

    card: EnvironmentCard
    transitions: int
    raw: int
    stored: int | None
    returns: np.ndarray
    noise: np.ndarray
    ended: np.ndarray
    failed: int


def look_at(dataset: Dataset, id: str) -> Described:
    """What there is of an environment; reads its card and its episodes alone."""
    returns, noise, ended = [np.zeros(0)], [np.zeros(0, np.float32)], [np.zeros(0, bool)]
    parts, card, failed = dataset.parts(id), dataset.card(id), 0
    for part in parts:
        index = part.episodes
        ended.append(index.ended(part.steps))
        returns.append(index.return_[ended[-1]])
        failed += int(index.failed(part.steps, card.random_returns.mean).sum())
        noise.append(index.noise)
    return Described(
        card,
        sum(part.steps * part.streams for part in parts),
        sum(part.record.nbytes for part in parts),
        dataset.storage.stored_bytes(f"{id}/"),
        np.concatenate(returns),
        np.concatenate(noise),
        np.concatenate(ended),
        failed,
    )


def describe_dataset(
    dataset: Dataset, ids: collections.abc.Sequence[str] = (), found: collections.abc.Sequence[Described] = ()
) -> list[str]:
    """Describes a dataset.

    Args:
      dataset: what is described.
      ids: the environments; empty for all.
      found: what there is of them, where it was looked at already.

    Returns:
      Lines of text: a table of domains, and one of environments.

    Raises:
      StoreError: there is no such environment, or its card or episodes are damaged.
    """
    found = found or [look_at(dataset, id) for id in ids or dataset.ids]
    domains = collections.defaultdict(list)
    for each in found:
        domains[each.card.domain].append(each)
    rows = [("domain", "environments", "transitions", "bytes a transition", "stored")]
    for domain, members in [*sorted(domains.items()), ("all", found)]:
        transitions = sum(each.transitions for each in members)
        sizes = [each.stored for each in members]
        stored = None if None in sizes else sum(size or 0 for size in sizes)
        raw = sum(each.raw for each in members)
        rows.append((domain, str(len(members)), f"{transitions:,}", *_per(transitions, raw, stored)))
    heads = ("transitions", "bytes", "stored", "episodes", "failed", "returns", "random", "reference")
    named = [("environment", *heads, "labels", "by", "noise")]
    for each in found:
        named.append(
            (
                each.card.id,
                f"{each.transitions:,}",
                *_per(each.transitions, each.raw, each.stored),
                f"{len(each.returns):,}",
                f"{each.failed:,}",
                _quantiles(each.returns),
                f"{each.card.random_returns.mean:.4g}",
                f"{each.card.reference_returns.mean:.4g}",
                f"{1 - each.card.statistics.unlabelled / each.card.statistics.steps:.4g}",
                _who(each.card.reference),
                f"{each.noise.min():.2f} to {each.noise.max():.2f}" if len(each.noise) else "",
            )
        )
    settings = ", ".join(f"{name}={value}" for name, value in sorted(dataset.configuration.items()))
    heading = [repr(dataset), *([f"made with {settings}"] if settings else [])]
    return [
        *heading,
        "",
        *_columns(rows),
        "",
        "returns: quantiles 0.1, 0.5 and 0.9 of episodes that ended; failed: of these, no better than random is on "
        "average; labels: the share of steps that have one, the "
        "ends of episodes aside; by: whose they are",
        *_columns(named),
    ]


def write_data_card(dataset: Dataset, found: collections.abc.Sequence[Described], path: pathlib.Path) -> pathlib.Path:
    """Writes the card of a dataset as one self-contained page.

    Args:
      dataset: what is described.
      found: what there is of its environments, from `look_at`.
      path: of the page, replaced whole.

    Returns:
      The path of the page.

    Raises:
      ReportError: the page cannot be written.
    """
    place = pathlib.Path(dataset.url)
    rows = [
        CardRow(
            id=each.card.id,
            domain=each.card.domain,
            transitions=each.transitions,
            raw=each.raw,
            stored=each.stored,
            random=each.card.random_returns.mean,
            reference=each.card.reference_returns.mean,
            returns=each.returns,
            noise=each.noise[each.ended],
            labels=1 - each.card.statistics.unlabelled / each.card.statistics.steps,
            by=_who(each.card.reference),
        )
        for each in found
    ]
    refused = collections.defaultdict(list)
    references = place.parent / "references"
    for folder in sorted(told.parent for told in references.rglob(OUTCOME)):
        id, outcome = folder.relative_to(references).as_posix(), read_outcome(folder)
        if outcome and outcome.verdict != "admitted" and id not in dataset.groups:
            refused[outcome.cause or outcome.verdict].append((id, outcome.reason))
    made = {f"Made with {name}": _plainly(value) for name, value in sorted(dataset.configuration.items())}
    origin = {"Digest": dataset_digest(dataset)} | made
    return write_page(path, render_data_card(place.name, rows, refused, origin))


def _plainly(value: typing.Any) -> str:
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)


def _who(reference: Reference) -> str:
    """Whose labels they are, and whether an expert had to be replayed for them."""
    if not reference.expert:
        return f"{reference.algorithm} {reference.decoding}"
    return f"{reference.expert} {reference.expert_version}" + ("" if reference.labels_any_state else " replayed")


def _per(transitions: int, raw: int, stored: int | None) -> tuple[str, str]:
    count = max(1, transitions)
    return f"{raw / count:.1f}", "" if stored is None else f"{stored / count:.1f}"


def _quantiles(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in np.quantile(values, (0.1, 0.5, 0.9))) if len(values) else ""


def _columns(rows: collections.abc.Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns; the last is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def merge_datasets(url: str, sources: collections.abc.Sequence[str]) -> Dataset:
    """Copies what other datasets have into one; all are compared before anything is copied.

    Args:
      url: where to write; made with the configuration of the first source if there is nothing.
      sources: where they are.

    Raises:
      StoreError: configurations or cards that differ, a dataset that is missing or damaged, a place that cannot be
        written.
    """
    opened = [open_dataset(source) for source in sources]
    for number, source in enumerate(opened):
        for other in opened[:number]:
            merging.check_mergeable(other, source)
    target = create_dataset(url, opened[0].configuration)
    for source in opened:
        merging.check_mergeable(target, source)
    with progress.bar("merge", sum(map(_raw_bytes, opened)), "B") as advance:
        for source in opened:
            target = merging.copy_parts(target, source, advance)
    return target


def _verify() -> None:
    dataset = open_dataset(flags.FLAGS.dataset)
    if lines := list_damage(dataset):
        print("\n".join(lines))
        raise DamagedError(f"{len(lines) - 1} files or leaves of {dataset.url} are damaged: they are listed above")
    print(f"{dataset} is whole")


def _describe() -> None:
    dataset, page = open_dataset(flags.FLAGS.dataset), flags.FLAGS.page
    ids = parse_ids(flags.FLAGS.environments) or dataset.ids
    with progress.bar("describe", len(ids), "environment") as advance:
        found = []
        for id in ids:
            found.append(look_at(dataset, id))
            advance(1)
    print("\n".join(describe_dataset(dataset, ids, found)))
    if page:
        print(f"\npage: {write_data_card(dataset, found, pathlib.Path(page))}")


def _merge() -> None:
    print(merge_datasets(flags.FLAGS.dataset, flags.FLAGS.sources))


def import_once(url: str, folder: str, random_return: float | None, domain: str) -> Dataset:
    """Adds a dataset of Minari to one of ours, made if need be; what is there already is not added again.

    Args:
      url: where to write.
      folder: of Minari's dataset.
      random_return: of the random policy, where the dataset does not say it.
      domain: what the task is about, where the dataset does not say it.

    Raises:
      StoreError: see `data.minari_format.import_minari`.
    """
    with tempfile.TemporaryDirectory() as place:
        aside = create_dataset(place)
        imported = minari_format.import_minari(aside, folder, random_return, domain)
        target = create_dataset(url)
        return merging.copy_parts(target, dataclasses.replace(imported, configuration=target.configuration))


def _export() -> None:
    dataset, id, folder = open_dataset(flags.FLAGS.dataset), flags.FLAGS.environment, flags.FLAGS.folder
    total = sum(part.record.nbytes for part in dataset.parts(id))
    with progress.bar("export", total, "B") as advance:
        count = minari_format.export_minari(dataset, id, folder, advance)
    print(f"{count} episodes of {id} in {folder}")


def _import() -> None:
    values = flags.FLAGS
    print(import_once(values.dataset, values.folder, values.random_return, values.domain))


VERBS: dict[str, collections.abc.Callable[[], None]] = {
    "verify": _verify,
    "describe": _describe,
    "merge": _merge,
    "export-minari": _export,
    "import-minari": _import,
}


_HELP = ("-h", "--help", "--helpshort", "--helpfull")


def main(argv: list[str]) -> None:
    """Does what the first word of the command line says.

    Args:
      argv: the command line; the word is taken out of it, and flags are left.
    """
    verb = argv.pop(1) if len(argv) > 1 else "--help"
    if verb in _HELP:
        print(__doc__)
        return
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS, most=1) or "."
        sys.exit(f"error: got {verb}, expected one of {', '.join(VERBS)} first, then flags{hint} See --help")
    defined = _define(verb)
    if any(word in _HELP for word in argv):
        print("\n".join(_describe_verb(verb, defined)))
        return
    run_app(lambda _: VERBS[verb]())


def _define(verb: str) -> list[flags.FlagHolder[typing.Any]]:
    """Defines the flags of a verb."""
    defined: list[flags.FlagHolder[typing.Any]] = []
    defined += [flags.DEFINE_string("dataset", None, "path or URL of the dataset", required=True)]
    if verb == "describe":
        defined += [
            flags.DEFINE_string("environments", "", "ids with commas between; default: all"),
            flags.DEFINE_string("page", "", "where to write the data card, one HTML file; default: none is written"),
        ]
    if verb == "merge":
        sources = "paths or URLs with commas between, of what is copied"
        defined += [flags.DEFINE_list("sources", None, sources, required=True)]
    if verb in ("export-minari", "import-minari"):
        folder = "of the dataset of Minari, the one of metadata.json"
        defined += [flags.DEFINE_string("folder", None, folder, required=True)]
    if verb == "export-minari":
        defined += [flags.DEFINE_string("environment", None, "id", required=True)]
    if verb == "import-minari":
        unsaid = "where the dataset of Minari does not say it"
        defined += [
            flags.DEFINE_float("random_return", None, f"of the random policy, {unsaid}"),
            flags.DEFINE_string("domain", "imported", f"of the environment, {unsaid}"),
        ]
    return defined


def _describe_verb(verb: str, defined: collections.abc.Iterable[flags.FlagHolder[typing.Any]]) -> list[str]:
    """What a verb is for, and its flags."""
    told = next(line.strip() for line in (__doc__ or "").splitlines() if line.strip().startswith(verb))
    return [told, "", *(f"  --{each.name:<14} {flags.FLAGS[each.name].help}" for each in defined)]


if __name__ == "__main__":
    main(sys.argv)

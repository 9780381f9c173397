"""Packs a zoo of references: `python -m experiments.pack_zoo --workdir=runs/mine --config.folder=runs/zoo`.

Takes the admitted references of a workdir, in float16 where that changes no score beyond its error, and leaves what
the zoo has. `experiments.references --config.zoo=runs/zoo` takes them instead of training.
"""

from __future__ import annotations

import dataclasses
import pathlib

import environments as registry
from data.references import load_reference
from data.references.zoo import add_to_zoo
from experiments.harness import progress
from experiments.harness.outcomes import in_one_line
from experiments.harness.stage import UnitsFailedError, stage
from experiments.harness.workdir import WorkdirError, listed, seed_of
from ldm_jax.errors import LdmError


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """What is packed where.

    Attributes:
      folder: of the zoo; made if missing.
      seed: of the episodes that tell whether float16 will do.
    """

    folder: str = ""
    seed: int = 0


def _among(config: ZooConfig, workdir: pathlib.Path) -> tuple[str, ...]:
    del config
    return listed(workdir / "references")


@stage("pack_zoo", among=_among)
def run(config: ZooConfig, workdir: pathlib.Path, environments: tuple[str, ...] = ()) -> None:
    """Packs references.

    Args:
      config: where to.
      workdir: has `references/`.
      environments: their ids; default: all that the workdir has.

    Raises:
      WorkdirError: no folder was named, or the workdir has no references.
      UnitsFailedError: some could not be packed; the others are.
    """
    if not config.folder:
        raise WorkdirError("no folder was named: give --config.folder=runs/zoo or the like")
    folder = pathlib.Path(config.folder).expanduser().absolute()
    failed: dict[str, str] = {}
    ids = environments or _among(config, workdir)
    with progress.bar("pack", len(ids), "reference") as advance:
        for id in ids:
            try:
                _pack(config, workdir / "references" / id, folder, id)
            except LdmError as error:
                failed[id] = in_one_line(error)
            advance(1)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    print(f"{folder} has {len(list(folder.rglob('reference.json')))} references, {sum(sizes) / 1e6:.1f} MB")
    if failed:
        raise UnitsFailedError(failed)


def _pack(config: ZooConfig, source: pathlib.Path, folder: pathlib.Path, id: str) -> None:
    if (folder / id / "reference.json").exists():
        return
    scored = load_reference(source)
    if not scored.admission.admitted:
        progress.log("left out", id=id, reason=scored.admission.reason)
        return
    put = add_to_zoo(folder, registry.make, scored, seed_of(config.seed, "zoo", id))
    progress.log("packed", id=id, reference=put.reference_returns.mean, before=scored.reference_returns.mean)


if __name__ == "__main__":
    from experiments.harness.flags import launch

    launch(run, {"default": ZooConfig()})

"""Where a result comes from: the data's digest, the code's commit, configurations, versions and the kind of machine."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import jax

from data.store import Dataset, StoreError, open_dataset
from experiments.report.document import JsonValue

_PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "optax", "numpy", "gymnasium")
_STAGES = ("references", "collect", "pretrain", "evaluate")


def provenance(workdir: pathlib.Path) -> JsonValue:
    """What another person needs to repeat a run; nothing of it tells whose machine it was or where on it.

    Args:
      workdir: of the run.

    Returns:
      Names and values by heading, all of them JSON values.
    """
    return {
        "Data": _data(workdir / "dataset"),
        "Code": _code(),
        "Versions": {"Python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "Machine": _machine(),
        "Configuration": {stage: found for stage in _STAGES if (found := _configuration(workdir / f"{stage}.json"))},
    }


def dataset_digest(dataset: Dataset) -> str:
    """Changes with whatever a dataset holds: its records carry the checksums of all its files, and are read alone."""
    digest = hashlib.blake2b(digest_size=16)
    for id in dataset.ids:
        record = dataset.groups.records[id]  # type: ignore[attr-defined]
        digest.update(len(record).to_bytes(8) + record)
    return digest.hexdigest()


def _data(place: pathlib.Path) -> dict[str, str]:
    try:
        dataset = open_dataset(place)
        transitions = sum(part.steps * part.streams for id in dataset.ids for part in dataset.parts(id))
    except StoreError:
        return {"Dataset": "none beside the run"}
    return {
        "Digest of the dataset": dataset_digest(dataset),
        "Environments": f"{len(dataset.ids):,}",
        "Transitions": f"{transitions:,}",
    }


def _code() -> dict[str, str]:
    home = pathlib.Path(__file__).resolve().parents[2]
    if not (home / ".git").exists():
        return {"Commit": "unknown, installed from a wheel"}

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=home, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changed = " with changes that are not committed" if git("status", "--porcelain", "-uno") else ""
        return {"Commit": git("rev-parse", "HEAD") + changed}
    return {"Commit": "unknown, git does not tell"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, str]:
    devices = [device.device_kind for device in jax.devices()]
    facts = {
        "Devices": ", ".join(f"{devices.count(kind)} x {kind}" for kind in sorted({*devices})),
        "Processor": f"{os.cpu_count()} x {_processor()}",
        "System": f"{platform.system()} {platform.machine()}",
    }
    with contextlib.suppress(OSError, ValueError, AttributeError):
        facts["Memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _configuration(path: pathlib.Path) -> JsonValue:
    with contextlib.suppress(OSError, ValueError):
        return _nowhere(json.loads(path.read_text("utf-8")))
    return None


def _nowhere(value: JsonValue) -> JsonValue:
    """A configuration whose paths and addresses have only their last names: where things lay is nobody's business."""
    if isinstance(value, dict):
        return {name: _nowhere(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_nowhere(each) for each in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or "://" in value):
        return f"…/{value.rstrip('/').rpartition('/')[2]}"
    return value

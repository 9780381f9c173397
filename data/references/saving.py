"""A scored reference as one self-describing folder: `reference.json` and `params.npz`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import typing
import zipfile

import numpy as np

from ldm_jax import cards, spaces
from ldm_jax.errors import LdmError
from ldm_jax.types import EnvironmentSpec, PyTree

from .pipeline import ScoredReference
from .policy import ReferencePolicy
from .recipes import ALGORITHMS

FORMAT = "ldm_jax reference policy"
VERSION = 1
_DESCRIPTION, _PARAMS = "reference.json", "params.npz"


class ReferencePolicyError(LdmError, ValueError):
    """A folder that is not a saved reference, or a damaged one."""


def save_reference(directory: str | os.PathLike, scored: ScoredReference) -> None:
    """Writes a reference so that another process, days later, can act and label with it.

    It is written aside and renamed, so the folder is whole or not there. An older reference there is replaced.

    Args:
      directory: to be made.
      scored: what to save.

    Raises:
      ReferencePolicyError: the folder is there and holds something else.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and any(directory.iterdir()):
        _read_description(directory)  # refuses what is not ours to replace
    policy = scored.policy
    arrays: list[np.ndarray] = []
    structure = _number(policy.params, arrays)
    buffer = io.BytesIO()
    named: dict[str, typing.Any] = {str(i): array for i, array in enumerate(arrays)}
    np.savez(buffer, **named)
    spec = {field.name: getattr(policy.spec, field.name) for field in dataclasses.fields(policy.spec)}
    for name in ("observation_space", "action_space"):
        spec[name] = spaces.to_json(spec[name])
    description = {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec,
        "reference": dataclasses.asdict(policy.reference),
        "config": dataclasses.asdict(policy.config),
        "params": structure,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "random_returns": scored.random_returns.values,
        "reference_returns": scored.reference_returns.values,
        "admission": dataclasses.asdict(scored.admission),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (aside / _PARAMS).write_bytes(buffer.getvalue())
        (aside / _DESCRIPTION).write_text(json.dumps(description, indent=1))
        aside.chmod(0o755)  # a temporary folder is private
        if directory.exists():
            shutil.rmtree(directory)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_reference(directory: str | os.PathLike) -> ScoredReference:
    """Reads what `save_reference` wrote.

    Raises:
      ReferencePolicyError: the folder is not a saved reference, of another version, or damaged.
    """
    directory = pathlib.Path(directory)
    description = _read_description(directory)
    try:
        content = (directory / _PARAMS).read_bytes()
        if hashlib.sha256(content).hexdigest() != description["sha256"]:
            raise ReferencePolicyError(
                f"{directory / _PARAMS} is damaged (its checksum differs); train this reference again"
            )
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            params = _denumber(description["params"], arrays)
        reference = cards.Reference(**description["reference"])
        module, config_type = ALGORITHMS[reference.algorithm]
        config = config_type(**description["config"])
        fields = dict(description["spec"])
        for name in ("observation_space", "action_space"):
            fields[name] = spaces.from_json(fields[name])
        spec = EnvironmentSpec(**fields)
        returns = (
            cards.Returns(tuple(map(tuple, description[name]))) for name in ("random_returns", "reference_returns")
        )
        policy = ReferencePolicy(module.agent(spec, config), params, reference, spec, config)
        return ScoredReference(policy, *returns)
    except (OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ReferencePolicyError(f"{directory} is damaged ({error!r}); train this reference again") from error


def _read_description(directory: pathlib.Path) -> dict[str, typing.Any]:
    path = directory / _DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ReferencePolicyError(f"{directory} is not a saved reference: it has no {_DESCRIPTION}") from error
    except (OSError, ValueError) as error:
        raise ReferencePolicyError(f"{path} cannot be read ({error}); train this reference again") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ReferencePolicyError(f"{path} does not describe a reference policy; choose another folder")
    if description.get("version") != VERSION:
        raise ReferencePolicyError(
            f"{path} is of version {description.get('version')!r}, expected {VERSION}; train this reference again"
        )
    return description


def _number(tree: PyTree, arrays: list[np.ndarray]) -> typing.Any:
    """The tree with each array replaced by its place in `arrays`, as JSON values."""
    if isinstance(tree, dict):
        return {key: _number(child, arrays) for key, child in tree.items()}
    if isinstance(tree, list):
        return [_number(child, arrays) for child in tree]
    arrays.append(np.asarray(tree))
    return len(arrays) - 1


def _denumber(structure: typing.Any, arrays: typing.Mapping[str, np.ndarray]) -> PyTree:
    if isinstance(structure, dict):
        return {key: _denumber(child, arrays) for key, child in structure.items()}
    if isinstance(structure, list):
        return [_denumber(child, arrays) for child in structure]
    return arrays[str(structure)]

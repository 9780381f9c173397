"""A scored reference as one self-describing folder: `reference.json`, and the parameters in the file that it names.

New parameters are written under a new name and count once `reference.json`, replaced in one moment, names them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import typing
import zipfile

import jax
import numpy as np

from ldm_jax import cards, files, spaces
from ldm_jax.errors import LdmError
from ldm_jax.types import EnvironmentSpec, PyTree

from .pipeline import ScoredReference
from .policy import ReferencePolicy, with_decoding
from .recipes import ALGORITHMS

_FORMAT = "ldm_jax reference policy"
_VERSION = 2
_DESCRIPTION = "reference.json"


class ReferencePolicyError(LdmError, ValueError):
    """A folder that is not a saved reference, or a damaged one."""


def save_reference(directory: str | os.PathLike[str], scored: ScoredReference, *, halved: bool = False) -> None:
    """Writes a reference so that another process, days later, can act and label with it.

    A new folder is whole or not there; whatever interrupts the replacing of an older reference leaves that or the new.

    Args:
      directory: to be made.
      scored: what to save.
      halved: whether to write what `half` can make smaller in float16; it is read as float32.

    Raises:
      ReferencePolicyError: the folder is there and holds something else.
      OSError: the place cannot be written, or the disk is full.
    """
    directory = pathlib.Path(directory)
    policy = scored.policy
    arrays: list[np.ndarray] = []
    structure = _number(policy.params, arrays)
    arrays = list(map(half, arrays)) if halved else arrays
    buffer = io.BytesIO()
    named: dict[str, typing.Any] = {str(i): array for i, array in enumerate(arrays)}
    np.savez(buffer, **named)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    spec = {field.name: getattr(policy.spec, field.name) for field in dataclasses.fields(policy.spec)}
    for name in ("observation_space", "action_space"):
        spec[name] = spaces.to_json(spec[name])
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "spec": spec,
        "reference": dataclasses.asdict(policy.reference),
        "config": dataclasses.asdict(policy.config),
        "params": structure,
        "params_file": f"params-{digest[:16]}.npz",
        "sha256": digest,
        "random_returns": scored.random_returns.values,
        "reference_returns": scored.reference_returns.values,
        "distilled_returns": scored.distilled_returns and scored.distilled_returns.values,
        "admission": {"admitted": scored.admission.admitted, "reason": scored.admission.reason},
        "share_of_target": scored.share_of_target,
        "weak": scored.weak,
    }
    text = json.dumps(description, indent=1, default=_plain)
    if directory.exists() and any(directory.iterdir()):
        _read_description(directory)  # refuses what is not ours to replace
        _write(directory, description["params_file"], content, text)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(directory) as aside:
        aside.mkdir()
        _write(aside, description["params_file"], content, text)


def is_halved(directory: str | os.PathLike[str]) -> bool:
    """Whether a saved reference was written in half of its size.

    Raises:
      ReferencePolicyError: the folder is not a saved reference, of another version, or damaged.
    """
    path = pathlib.Path(directory) / _read_description(pathlib.Path(directory))["params_file"]
    with np.load(path, allow_pickle=False) as arrays:
        return any(array.dtype == np.float16 for array in arrays.values())


def half(array: np.ndarray) -> np.ndarray:
    """A matrix of float32 or a larger array in float16, where it holds all of its numbers; others as they are.

    Vectors are few numbers, and some of them spreads, of which none may become 0.
    """
    array = np.asarray(array)
    if array.dtype != np.float32 or array.ndim < 2 or not np.abs(array).max(initial=0.0) <= np.finfo(np.float16).max:
        return array
    return array.astype(np.float16)


def _write(directory: pathlib.Path, params_file: str, content: bytes, description: str) -> None:
    files.write(directory / params_file, content)
    files.write(directory / _DESCRIPTION, description)
    for other in directory.glob("params-*.npz"):
        if other.name != params_file:
            other.unlink(missing_ok=True)


def _plain(value: typing.Any) -> typing.Any:
    """NumPy's numbers as Python's, which mean the same."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} has no description in JSON")


def load_reference(directory: str | os.PathLike[str]) -> ScoredReference:
    """Reads what `save_reference` wrote.

    Where the reference meets an environment, `ldm_jax.cards.check_matches(scored.policy.spec, environment.spec, ...)`
    says whether it is still the one.

    Raises:
      ReferencePolicyError: the folder is not a saved reference, of another version, or damaged.
    """
    directory = pathlib.Path(directory)
    description = _read_description(directory)
    try:
        path = directory / description["params_file"]
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != description["sha256"]:
            raise ReferencePolicyError(f"{path} is damaged (its checksum differs); train this reference again")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            params = _denumber(description["params"], arrays)
        reference = cards.Reference(**description["reference"])
        algorithm = ALGORITHMS[reference.algorithm]
        config = algorithm.config(**description["config"])
        fields = dict(description["spec"])
        for name in ("observation_space", "action_space"):
            fields[name] = spaces.from_json(fields[name])
        spec = EnvironmentSpec(**fields)
        example = with_decoding(algorithm.example(spec, config), "greedy")
        params = _widened(params, example)
        if wrong := _misfits(params, example):
            raise ReferencePolicyError(
                f"the parameters in {path} do not fit its spaces and configuration: {'; '.join(wrong[:3])}; "
                "train this reference again"
            )
        returns = (
            description[name] and cards.Returns(tuple(map(tuple, description[name])))
            for name in ("random_returns", "reference_returns", "distilled_returns")
        )
        policy = ReferencePolicy(algorithm.agent(spec, config), params, reference, spec, config)
        return ScoredReference(policy, *returns)
    except ReferencePolicyError:
        raise
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ReferencePolicyError(f"{directory} is damaged ({error!r}); train this reference again") from error


def _widened(params: PyTree, example: PyTree) -> PyTree:
    """Parameters with what was saved in half of its size as float32 again."""
    if typing.cast(typing.Any, jax.tree.structure(params)) != jax.tree.structure(example):
        return params  # they do not fit, which is told of

    def widen(leaf: np.ndarray, like: typing.Any) -> np.ndarray:
        halved = leaf.dtype == np.float16 and np.asarray(like).dtype == np.float32
        return leaf.astype(np.float32) if halved else leaf

    return jax.tree.map(widen, params, example)


def _misfits(params: PyTree, example: PyTree) -> list[str]:
    """What differs in structure, shape or dtype, with both."""
    found, wanted = (
        {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, example)
    )

    def said(arrays: dict[str, np.ndarray], name: str) -> str:
        return f"{arrays[name].dtype}{list(arrays[name].shape)}" if name in arrays else "absent"

    pairs = {name: (said(found, name), said(wanted, name)) for name in sorted({*found, *wanted})}
    return [f"{name} is {got}, expected {want}" for name, (got, want) in pairs.items() if got != want]


def _read_description(directory: pathlib.Path) -> dict[str, typing.Any]:
    path = directory / _DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReferencePolicyError(f"{directory} is not a saved reference: it has no {_DESCRIPTION}") from error
    except (OSError, ValueError) as error:
        raise ReferencePolicyError(f"{path} cannot be read ({error}); train this reference again") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ReferencePolicyError(f"{path} does not describe a reference policy; choose another folder")
    if description.get("version") != _VERSION:
        raise ReferencePolicyError(
            f"{path} is of version {description.get('version')!r}, expected {_VERSION}; train this reference again, "
            "in another folder"
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


def _denumber(structure: typing.Any, arrays: collections.abc.Mapping[str, np.ndarray]) -> PyTree:
    if isinstance(structure, dict):
        return {key: _denumber(child, arrays) for key, child in structure.items()}
    if isinstance(structure, list):
        return [_denumber(child, arrays) for child in structure]
    return arrays[str(structure)]

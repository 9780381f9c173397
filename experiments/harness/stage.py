"""What all stages have in common before they do anything: where they work, on what, and that no other works there."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import typing

from experiments.harness.ids import parse_ids
from experiments.harness.mesh import HostsConfig
from experiments.harness.workdir import WorkdirError, lock
from ldm_jax.errors import LdmError


class UnitsFailedError(LdmError):
    """Some environments failed; the others are done.

    Attributes:
      reasons: why, by id.
    """

    def __init__(self, reasons: collections.abc.Mapping[str, str]):
        super().__init__(dict(reasons))
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        said = "; ".join(f"{id}: {reason}" for id, reason in self.reasons.items())
        return f"{len(self.reasons)} failed, the others are done. Put right what can be and start again. {said}"


F = typing.TypeVar("F", bound=collections.abc.Callable[..., typing.Any])


def stage(name: str) -> collections.abc.Callable[[F], F]:
    """Decorates `run(config, workdir, environments)` of a stage.

    The workdir is made absolute, so that nothing that changes the working directory moves results, the list of
    environments is read by `parse_ids`, and the workdir is locked until the stage ends.

    Args:
      name: of the stage.

    Returns:
      The decorator. What it makes raises WorkdirError where the workdir is none, or another process works in it.
    """

    def decorate(run: F) -> F:
        signature = inspect.signature(run)

        @functools.wraps(run)
        def inside(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            given["workdir"] = absolute(given["workdir"])
            if "environments" in given:
                given["environments"] = parse_ids(given["environments"])
            with lock(given["workdir"], name) if _locks(given["config"]) else contextlib.nullcontext():
                return run(*bound.args, **bound.kwargs)

        return typing.cast(F, inside)

    return decorate


def absolute(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path that stays the same wherever the process goes: `~` is expanded, symbolic links are kept.

    Raises:
      WorkdirError: it is no path, or the home folder is not known.
    """
    try:
        return pathlib.Path(path).expanduser().absolute()
    except (TypeError, RuntimeError) as error:
        raise WorkdirError(f"got the workdir {path!r}, expected the path of a folder ({error})") from error


def _locks(config: typing.Any) -> bool:
    """Whether this process is the one of its run that locks: several processes of several hosts work as one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, HostsConfig):
            return value.coordinator != "auto" and value.process == 0  # the cluster tells later which one this is
        if dataclasses.is_dataclass(value) and not _locks(value):
            return False
    return True

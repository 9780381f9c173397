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

from experiments.harness.costs import counted
from experiments.harness.dry_run import Planned, describe_plan
from experiments.harness.ids import Choice, chosen_ids
from experiments.harness.mesh import HostsConfig
from experiments.harness.outcomes import forget_failed
from experiments.harness.workdir import WorkdirError, lock
from ldm_jax.errors import LdmError

_NAMED = 5  # failures that the line about them names
Plan = collections.abc.Callable[[typing.Any, pathlib.Path, tuple[str, ...]], collections.abc.Sequence[Planned]]
"""`plan(config, workdir, environments)`, what a stage would do."""


class UnitsFailedError(LdmError):
    """Some environments failed; the others are done.

    Attributes:
      reasons: why, by id.
    """

    def __init__(self, reasons: collections.abc.Mapping[str, str]):
        super().__init__(dict(reasons))
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        said = [f"{id}: {reason}" for id, reason in self.reasons.items()]
        more = f"; and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
        return (
            f"{len(said)} failed, the others are done. Put right what can be and start again, references with "
            f"--retry=failed. {'; '.join(said[:_NAMED])}{more}"
        )


F = typing.TypeVar("F", bound=collections.abc.Callable[..., typing.Any])


def stage(
    name: str,
    *,
    among: collections.abc.Callable[[typing.Any, pathlib.Path], collections.abc.Iterable[str]] | None = None,
    plan: Plan | None = None,
    retries: bool = False,
) -> collections.abc.Callable[[F], F]:
    """Decorates `run(config, workdir, environments)` of a stage.

    The workdir is made absolute, so that nothing that changes the working directory moves results, the environments are
    chosen (see `ids.Choice`; a text or several ids will do), and the workdir is locked until the stage ends. A stage
    with an argument `engine` is told where to work.

    Args:
      name: of the stage.
      among: `among(config, workdir)`, the ids that patterns and selections choose from; default: all of the catalog.
      plan: says what a dry run does; default: there is none, and to ask for one is an error.
      retries: whether it keeps what failed, so that it can be asked to try again.

    Returns:
      The decorator. What it makes raises WorkdirError where the workdir is none, or another process works in it, and
      what `ids.chosen_ids` raises.
    """

    def decorate(run: F) -> F:
        signature = inspect.signature(run)

        @functools.wraps(run)
        def inside(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            config, workdir = given["config"], absolute(given["workdir"])
            asked = given.get("environments", ())
            choice = asked if isinstance(asked, Choice) else Choice(asked)
            ids = chosen_ids(choice, functools.partial(among, config, workdir) if among else None)
            if choice.retry and not retries:
                raise WorkdirError(f"experiments.{name} always tries again what failed: leave out --retry")
            if "engine" in signature.parameters:
                given.setdefault("engine", choice.engine)
            elif not choice.engine.is_local:
                raise WorkdirError(
                    f"experiments.{name} runs on this machine alone: leave out --engine={choice.engine.kind}"
                )
            if choice.dry_run:
                planned = (plan or _no_plan(name))(config, workdir, ids)
                print(describe_plan(name, planned, getattr(config, "workers", 1)))
                return None
            given["workdir"] = workdir
            if "environments" in given:
                given["environments"] = ids
            with _at_work(workdir, name) if _locks(config) else contextlib.nullcontext():
                if choice.retry:
                    forget_failed(workdir / "references", ids)
                return run(*bound.args, **bound.kwargs)

        return typing.cast(F, inside)

    return decorate


@contextlib.contextmanager
def _at_work(workdir: pathlib.Path, name: str) -> collections.abc.Iterator[None]:
    with lock(workdir, name), counted(workdir, name):
        yield


def _no_plan(name: str) -> typing.NoReturn:
    raise WorkdirError(
        f"experiments.{name} does not work environment by environment, and has no --dry_run: "
        "`python -m experiments.describe` says what training a size takes"
    )


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

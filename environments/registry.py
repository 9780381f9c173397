"""Finds the adapter of a library and makes environments by id.

An adapter is a module with two functions:

  `make(name, batch_size, time_limit) -> Environment`, where `name` is the library's own id and `time_limit` may be
  None, for the library's own limit;
  `list_ids() -> list[str]`, the library's own ids that work;

and, if it likes, `refusal(name) -> str | None`, why an id that the library has is not offered. It imports its library
inside these functions. A third party's package offers one under the entry-point group `ldm_jax.environments`, the
entry's name being the library and its value the module.

A library that cannot live in this interpreter needs no adapter but a description among `images/`, see `groups`: its
environments run in worker processes.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import types
import typing
import warnings

from . import groups
from .interface import Environment, LibraryMissingError

if typing.TYPE_CHECKING:
    from .isolation import Isolation

ENTRY_POINT_GROUP = "ldm_jax.environments"

BUILT_IN = types.MappingProxyType(
    {
        "gymnax": "environments.adapters.gymnax",
        "envpool": "environments.adapters.envpool",
    }
)
"""Adapter module of each library that this package serves itself; the extra to install has the library's name."""


class UnknownEnvironmentError(ValueError):
    """No environment goes by this id, or it is one that does not work."""


def make(
    id: str, batch_size: int = 1, *, time_limit: int | None = None, isolation: str | Isolation = "auto"
) -> Environment:
    """Makes B parallel environments of one kind.

    Args:
      id: `library/<the library's own id>`, as `list_ids` gives them.
      batch_size: B, at least 1.
      time_limit: steps after which an episode is truncated; None takes the library's own limit, or a default where the
        library has none.
      isolation: how a library that cannot live in this interpreter is kept apart: the kind alone, or an `Isolation`
        with the number of workers and their limits. What its interpreter needs is built the first time.

    Raises:
      UnknownEnvironmentError: no such library or environment, or one that is known not to work.
      LibraryMissingError: the library is not installed, or its interpreter cannot be built.
      ValueError: `batch_size` or `time_limit` is not a positive integer, or `isolation` is asked for where the library
        lives in this interpreter.
    """
    _check_positive("batch_size", batch_size)
    if time_limit is not None:
        _check_positive("time_limit", time_limit)
    library, slash, name = id.partition("/")
    if not slash:
        full = {known.partition("/")[2]: known for known in list_ids()}
        near = [full[name] for name in _near(id, full)]
        raise UnknownEnvironmentError(f"got the environment id {id!r}, expected `library/name`{_or(near)}")
    adapter = _adapter(library)
    known = _names(library, adapter)
    if name not in known:
        if hasattr(adapter, "refusal") and (reason := adapter.refusal(name)) is not None:
            raise UnknownEnvironmentError(f"{id} is not offered: {reason}")
        raise UnknownEnvironmentError(
            f"{library} has no environment {name!r}{_or([f'{library}/{near}' for near in _near(name, known)])}"
        )
    if not isinstance(adapter, groups.IsolatedLibrary):
        if isolation != "auto":
            raise ValueError(f"isolation is {isolation!r}, but {library} runs in this interpreter: leave it at 'auto'")
        return adapter.make(name, batch_size, time_limit)
    if isinstance(isolation, str):
        from .isolation import Isolation

        isolation = Isolation(isolation)
    return adapter.make(name, batch_size, time_limit, isolation)


def list_ids(library: str | None = None) -> list[str]:
    """The ids that `make` accepts, of one library or of all that are installed.

    A library that is not installed, or whose interpreter has not been built, is left out of the list of all, and one
    whose adapter fails is left out with a warning, so that one broken package does not take the others away.

    Raises:
      UnknownEnvironmentError: `library` is not known.
      LibraryMissingError: `library` is not installed.
    """
    if library is not None:
        return [f"{library}/{name}" for name in _names(library, _adapter(library))]
    ids = []
    for known in _libraries():
        try:
            if known in groups.libraries() and not groups.libraries()[known].is_built:
                continue
            ids += [f"{known}/{name}" for name in _names(known, _adapter(known))]
        except LibraryMissingError as error:
            if known not in BUILT_IN:
                warnings.warn(f"left out the environments of {known!r}: {error}", RuntimeWarning, stacklevel=2)
    return ids


def _libraries() -> dict[str, str]:
    """Adapter module of each known library: the built-in ones, those of groups, then those of entry points."""
    table = BUILT_IN | dict.fromkeys(groups.libraries(), groups.__name__)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        taken = table.get(entry.name)
        if taken is None:
            table[entry.name] = entry.value
        elif taken != entry.value:
            # Two modules for one name: the first stays, so that installing a package never changes what an id means.
            warnings.warn(
                f"ignored the entry point {entry.name} = {entry.value} of {_package(entry)}: the library "
                f"{entry.name!r} is already served by {taken}; rename the entry point",
                RuntimeWarning,
                stacklevel=3,
            )
    return table


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown package"


def _adapter(library: str) -> typing.Any:
    table = _libraries()
    if library not in table:
        raise UnknownEnvironmentError(
            f"no library {library!r} of environments; known are {', '.join(sorted(table))}{_or(_near(library, table))} "
            f"(a package adds one by an entry point in {ENTRY_POINT_GROUP!r})"
        )
    if library in groups.libraries():
        return groups.libraries()[library]
    try:
        return importlib.import_module(table[library])
    except Exception as error:  # a third party's module may fail in any way
        raise LibraryMissingError(
            f"the adapter {table[library]} of {library!r} cannot be imported: {error!r}"
        ) from error


@functools.cache
def _names(library: str, adapter: typing.Any) -> tuple[str, ...]:
    try:
        return tuple(adapter.list_ids())
    except ImportError as error:
        if library in BUILT_IN:
            raise LibraryMissingError(
                f"{library} is not installed ({error}); install it with: pip install 'ldm_jax[{library}]'"
            ) from error
        raise LibraryMissingError(f"{library} cannot be imported: {error!r}") from error
    except Exception as error:
        raise LibraryMissingError(f"{adapter.__name__}.list_ids() failed: {error!r}") from error


def _check_positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"{what} is {value!r}, expected an integer of at least 1")


def _near(name: str, known: typing.Iterable[str]) -> list[str]:
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]


def _or(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""

"""Finds the adapter of a library and makes environments by id.

An adapter is a module with two functions:

  `make(name, batch_size, time_limit) -> Environment`, where `name` is the library's own id and `time_limit` may be
  None, for the library's own limit;
  `candidates() -> dict[str, str]`, the ids that the library has, each with the reason why it is not offered, empty
  where it is; or simply `list_ids() -> list[str]`, those that are offered;

and, if it likes, `domain(name) -> str`, what a task is about. It imports its library inside these functions. A third
party's package offers one under the entry-point group `ldm_jax.environments`, the entry's name being the library and
its value the module.

A library that cannot live in this interpreter needs no adapter but a description among `images/`, see `groups`: its
environments run in worker processes.

For the libraries of this package the catalog says which of their ids work; adapters and workers are asked about ids
that are not in it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import types
import typing
import warnings

from ldm_jax.environment import Environment, EnvironmentFaultError, LibraryMissingError

from .catalog import entries
from .catalog.taxonomy import first_match
from .isolation import groups

if typing.TYPE_CHECKING:
    from .isolation.program import Isolation

ENTRY_POINT_GROUP = "ldm_jax.environments"

BUILT_IN = types.MappingProxyType(
    {
        "gymnax": "environments.adapters.gymnax",
        "envpool": "environments.adapters.envpool",
        "gymnasium": "environments.adapters.gymnasium",
        "jumanji": "environments.adapters.jumanji",
        "pgx": "environments.adapters.pgx",
        "navix": "environments.adapters.navix",
        "xminigrid": "environments.adapters.xminigrid",
        "brax": "environments.adapters.brax",
        "craftax": "environments.adapters.craftax",
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
      LibraryMissingError: the library is not installed; says the extra to install. Or its interpreter cannot be built.
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
    _check_offered(library, name, adapter)
    return _make(library, name, adapter, batch_size, time_limit, isolation)


def make_candidate(id: str) -> Environment:
    """Makes one environment by an id that need not work, whatever the catalog says; faults are not survived.

    Raises:
      Exception: whatever the library raises.
    """
    from .isolation.program import Isolation

    library, _, name = id.partition("/")
    adapter = _adapter(library)
    strict = Isolation("venv", workers=1, max_faults=0) if isinstance(adapter, groups.IsolatedLibrary) else "auto"
    return _make(library, name, adapter, 1, None, strict)


def candidates(library: str) -> dict[str, str]:
    """The library's own ids, each with the reason why it is not offered, empty where it is to be tried.

    The library must be installed; its interpreter, where it has its own, is built.

    Raises:
      UnknownEnvironmentError: `library` is not known.
      LibraryMissingError: `library` is not installed.
    """
    return dict(_candidates(library, _adapter(library)))


def list_ids(
    library: str | None = None, *, domain: str | None = None, action: str | None = None, verified: bool | None = True
) -> list[str]:
    """The ids of one library or of all.

    Where a library is in the catalog, nothing is imported and nothing needs to be installed: `make` says what is
    missing. Other libraries, a third party's, are asked for what they offer; one that fails is left out of the list of
    all with a warning, and so is one whose interpreter is not built, so that one package does not take the others away.

    Args:
      library: the library; None for all.
      domain: what the task is about, `"navigation"`. Of ids outside the catalog this is not known, nor is the action.
      action: the kind of the action space: `"Discrete"`, `"MultiDiscrete"`, `"Box"`, `"Dict"`, ...
      verified: True for those that work, False for those in the catalog that do not, None for both.

    Raises:
      UnknownEnvironmentError: `library` is not known.
      LibraryMissingError: `library` is not in the catalog, and not installed either.
    """
    ids = []
    for known in [library] if library is not None else _libraries():
        if listed := entries.entries(known):
            ids += [
                entry.id
                for entry in listed.values()
                if all(
                    wanted in (None, value)
                    for wanted, value in ((domain, entry.domain), (action, entry.action), (verified, entry.verified))
                )
            ]
        elif library is not None:
            ids += _uncatalogued(known) if domain is action is None and verified is not False else []
        elif domain is action is None and verified is not False:
            try:
                if known not in groups.libraries() or groups.libraries()[known].is_built:
                    ids += _uncatalogued(known)
            except LibraryMissingError as error:
                if known not in BUILT_IN:
                    warnings.warn(f"left out the environments of {known!r}: {error}", RuntimeWarning, stacklevel=2)
    return ids


def version(library: str) -> str:
    """The version of a library that is installed, or that its group pins."""
    if library in groups.libraries():
        return groups.libraries()[library].version
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def domain(library: str, name: str) -> str:
    """What the task of an id is about, as far as that is known without making it."""
    adapter = _adapter(library)
    return adapter.domain(name) if hasattr(adapter, "domain") else ""


def group(library: str) -> str:
    """The group whose interpreter serves a library; empty where an adapter in this interpreter does."""
    return groups.libraries()[library].venv.name if library in groups.libraries() else ""


def _check_offered(library: str, name: str, adapter: typing.Any) -> None:
    known = entries.entries(library)
    if name in known:
        if not known[name].verified:
            raise UnknownEnvironmentError(f"{library}/{name} is not offered: {known[name].reason}")
        return
    names = {name for name, entry in known.items() if entry.verified}
    if isinstance(adapter, groups.IsolatedLibrary):
        if reason := first_match(adapter.exclude, name):
            raise UnknownEnvironmentError(f"{library}/{name} is not offered: {reason}")
        if not known:
            return  # its worker will say
    else:
        offered = _candidates(library, adapter)
        if reason := offered.get(name, ""):
            raise UnknownEnvironmentError(f"{library}/{name} is not offered: {reason}")
        if name in offered:
            return
        names |= {name for name, reason in offered.items() if not reason} - known.keys()
    near = [f"{library}/{near}" for near in _near(name, names)]
    raise UnknownEnvironmentError(f"{library} has no environment {name!r}{_or(near)}")


def _make(
    library: str,
    name: str,
    adapter: typing.Any,
    batch_size: int,
    time_limit: int | None,
    isolation: str | Isolation,
) -> Environment:
    if not isinstance(adapter, groups.IsolatedLibrary):
        if isolation != "auto":
            raise ValueError(f"isolation is {isolation!r}, but {library} runs in this interpreter: leave it at 'auto'")
        try:
            return adapter.make(name, batch_size, time_limit)
        except ModuleNotFoundError as error:
            raise _missing(library, error) from error
    if isinstance(isolation, str):
        from .isolation.program import Isolation

        isolation = Isolation(isolation)
    return adapter.make(name, batch_size, time_limit, isolation)


def _uncatalogued(library: str) -> list[str]:
    found = _candidates(library, _adapter(library))
    return [f"{library}/{name}" for name, reason in found.items() if not reason]


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
def _candidates(library: str, adapter: typing.Any) -> typing.Mapping[str, str]:
    try:
        found = adapter.candidates() if hasattr(adapter, "candidates") else dict.fromkeys(adapter.list_ids(), "")
        return types.MappingProxyType(found)
    except (LibraryMissingError, EnvironmentFaultError):
        raise
    except ImportError as error:
        raise _missing(library, error) from error
    except Exception as error:
        raise LibraryMissingError(f"the adapter {adapter.__name__} cannot say which ids it has: {error!r}") from error


def _missing(library: str, error: ImportError) -> LibraryMissingError:
    if library in BUILT_IN:
        return LibraryMissingError(
            f"{library} is not installed ({error}); install it with: pip install 'ldm_jax[{library}]'"
        )
    return LibraryMissingError(f"{library} cannot be imported: {error!r}")


def _check_positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"{what} is {value!r}, expected an integer of at least 1")


def _near(name: str, known: typing.Iterable[str]) -> list[str]:
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]


def _or(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""

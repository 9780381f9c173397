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

import collections.abc
import contextlib
import importlib
import importlib.metadata
import operator
import types
import typing
import warnings

from ldm_jax import spaces
from ldm_jax.environment import Environment, EnvironmentFaultError, LibraryMissingError
from ldm_jax.errors import ConfigError, LdmError, did_you_mean
from ldm_jax.types import MAX_TIME_LIMIT, EnvironmentSpec

from .catalog import entries
from .catalog.experts import ExpertInfo, find_expert
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


STATEFUL = frozenset({"envpool", "gymnasium"})
"""The built-in libraries whose environments are no pure functions."""

_MAX_BATCH_SIZE = 2**31 - 1


class UnknownEnvironmentError(LdmError, ValueError):
    """No environment goes by this id, or it is one that does not work."""


def make(
    id: str,
    batch_size: int = 1,
    *,
    time_limit: int | None = None,
    isolation: str | Isolation = "auto",
    expert: str = "",
) -> Environment:
    """Makes B parallel environments of one kind.

    >>> import environments, jax
    >>> environment = environments.make("gymnax/CartPole-v1", batch_size=2)
    >>> state, time_step = environment.reset(jax.random.key(0))
    >>> time_step.observation.shape, time_step.first.tolist()
    ((2, 4), [True, True])

    Args:
      id: `library/<the library's own id>`, as `list_ids` gives them.
      batch_size: B, at least 1.
      time_limit: steps after which an episode is truncated, at most `MAX_TIME_LIMIT`; None takes the library's own
        limit, or a default where the library has none.
      isolation: how a library that cannot live in this interpreter is kept apart: the kind alone, or an `Isolation`
        with the number of workers and their limits. What its interpreter needs is built the first time.
      expert: the name of an expert, as `environments.experts` has them, which runs beside each environment or on what
        it shows, and labels the time steps (`TimeStep.expert`); empty for none.

    Raises:
      UnknownEnvironmentError: no such library or environment, or one that is known not to work.
      LibraryMissingError: the library is not installed; says the extra to install. Or its interpreter cannot be built.
      ConfigError: `batch_size` or `time_limit` is not a positive integer or too large, or `isolation` is asked for
        where the library lives in this interpreter.
      ExpertError: the environment has no such expert.
      EnvironmentFaultError: the library cannot make it, or not with this time limit.
      SpaceError: it has a space that is not supported.
    """
    library, name = split(id)
    batch_size = _check_count(f"batch_size of {id}", batch_size, _MAX_BATCH_SIZE)
    if time_limit is not None:
        time_limit = _check_count(f"time_limit of {id}", time_limit, MAX_TIME_LIMIT)
    adapter = _adapter(library)
    _check_known(library, name, adapter)
    asked = find_expert(id, expert) if expert else None
    beside = asked if asked is not None and asked.kind == "live" else None
    environment = _make(library, name, adapter, batch_size, time_limit, isolation, beside)
    try:
        _check_made(environment.spec, id, batch_size, time_limit)
    except EnvironmentFaultError:
        environment.close()
        raise
    if asked is not None and asked.kind == "observation":
        from .observing import ObservedEnvironment

        return ObservedEnvironment(environment, asked)
    return environment


def check_known(id: str) -> None:
    """Checks that an id is one that `make` would try; what the catalog knows costs no import.

    Raises:
      UnknownEnvironmentError: no such library or environment, or one that is known not to work.
      LibraryMissingError: the catalog does not know it, and its library cannot be asked.
    """
    library, name = split(id)
    known = entries.entries(library)
    if name not in known or not known[name].verified:
        _check_known(library, name, _adapter(library))


def unbuilt_group(library: str) -> str:
    """The group whose interpreter a library needs and that is not built yet; empty where nothing is to be built."""
    isolated = groups.isolated_libraries()
    return isolated[library].venv.name if library in isolated and not isolated[library].is_built else ""


def build_group(library: str) -> None:
    """Builds the interpreter that a library runs in, if it is not there.

    Raises:
      LibraryMissingError: it cannot be built; says what is missing.
    """
    from .isolation.program import Isolation

    groups.isolated_libraries()[library].prepare("", Isolation())


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


def version(library: str) -> str:
    """The version of a library that is installed, or that its group pins."""
    if library in groups.isolated_libraries():
        return groups.isolated_libraries()[library].version
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
    return groups.isolated_libraries()[library].venv.name if library in groups.isolated_libraries() else ""


def split(id: str) -> tuple[str, str]:
    """The library of an id, and the library's own id.

    Raises:
      UnknownEnvironmentError: it is not of the form `library/name`.
    """
    library, slash, name = id.partition("/") if isinstance(id, str) else ("", "", "")
    if slash:
        return library, name
    full = {entry.name: entry.id for entry in entries.entries_of(entries.catalogued()) if entry.verified}
    hint = did_you_mean(str(id), full, shown=full.__getitem__)
    raise UnknownEnvironmentError(f"got the environment id {id!r}, expected `library/name`{hint}")


def _check_known(library: str, name: str, adapter: typing.Any) -> None:
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
        found = _candidates(library, adapter)
        if reason := found.get(name, ""):
            raise UnknownEnvironmentError(f"{library}/{name} is not offered: {reason}")
        if name in found:
            return
        names |= {name for name, reason in found.items() if not reason} - known.keys()
    raise unknown_name(library, name, names)


def _make(
    library: str,
    name: str,
    adapter: typing.Any,
    batch_size: int,
    time_limit: int | None,
    isolation: str | Isolation,
    expert: ExpertInfo | None = None,
) -> Environment:
    asked = {} if expert is None else {"expert": expert}
    if not isinstance(adapter, groups.IsolatedLibrary):
        if isolation != "auto":
            raise ConfigError(
                f"isolation of {library}/{name} is {isolation!r}, but it runs in this interpreter: leave it at 'auto'"
            )
        with _naming(library, name):
            return adapter.make(name, batch_size, time_limit, **asked)
    if isinstance(isolation, str):
        from .isolation.program import Isolation

        isolation = Isolation(isolation)
    with _naming(library, name):
        return adapter.make(name, batch_size, time_limit, isolation, **asked)


@contextlib.contextmanager
def _naming(library: str, name: str) -> collections.abc.Iterator[None]:
    """Puts the id into whatever goes wrong while an environment is made."""
    id = f"{library}/{name}"
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, LibraryMissingError):
            raise
        raise LibraryMissingError(f"{id} cannot be made: {_missing(library, error)}") from error
    except LdmError as error:
        if id in str(error):
            raise
        kind = type(error) if isinstance(error, LibraryMissingError | spaces.SpaceError) else EnvironmentFaultError
        raise kind(f"{id} cannot be made: {error}") from error
    except (Exception, SystemExit) as error:  # libraries raise whatever they like, and some end the process
        raise EnvironmentFaultError(f"{id} cannot be made: it raised {error!r}") from error


def _check_made(made: EnvironmentSpec, id: str, batch_size: int, time_limit: int | None) -> None:
    wanted = {"id": id, "batch_size": batch_size} | ({} if time_limit is None else {"time_limit": time_limit})
    for field, value in wanted.items():
        if getattr(made, field) != value:
            raise EnvironmentFaultError(
                f"{id} was made with {field} {getattr(made, field)!r}, asked for {value!r}: its adapter cannot do it"
            )


def adapter_modules() -> dict[str, str]:
    """The adapter module of each known library: the built-in ones, those of groups, then those of entry points."""
    table = BUILT_IN | dict.fromkeys(groups.isolated_libraries(), groups.__name__)
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
    table = adapter_modules()
    if library not in table:
        raise unknown_library(library)
    if library in groups.isolated_libraries():
        return groups.isolated_libraries()[library]
    try:
        return importlib.import_module(table[library])
    except Exception as error:  # a third party's module may fail in any way
        raise LibraryMissingError(
            f"the adapter {table[library]} of {library!r} cannot be imported: {error!r}"
        ) from error


def _candidates(library: str, adapter: typing.Any) -> collections.abc.Mapping[str, str]:
    # Asked anew every time: an id may be registered, or a package installed, after a first try failed.
    try:
        return adapter.candidates() if hasattr(adapter, "candidates") else dict.fromkeys(adapter.list_ids(), "")
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


def unknown_library(library: str) -> UnknownEnvironmentError:
    """The error that says which libraries there are."""
    table = adapter_modules()
    return UnknownEnvironmentError(
        f"no library {library!r} of environments; known are {', '.join(sorted(table))}{did_you_mean(library, table)} "
        f"(a package adds one by an entry point in {ENTRY_POINT_GROUP!r})"
    )


def unknown_name(library: str, name: str, known: collections.abc.Iterable[str]) -> UnknownEnvironmentError:
    """The error that says which of the `known` names of a library are near."""
    hint = did_you_mean(name, known, shown=lambda near: f"{library}/{near}")
    return UnknownEnvironmentError(f"{library} has no environment {name!r}{hint}")


def _check_count(what: str, value: object, largest: int) -> int:
    """The value as a plain integer: one of NumPy's would be found out when the first file is written."""
    try:
        count = operator.index(typing.cast(typing.SupportsIndex, value))
    except TypeError:
        count = 0
    if isinstance(value, bool) or not 1 <= count <= largest:
        raise ConfigError(f"{what} is {value!r}, expected an integer of at least 1 and at most {largest}")
    return count

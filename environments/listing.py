"""What environments there are, answered from the catalog: nothing is imported, installed or built to know."""

from __future__ import annotations

import warnings

from ldm_jax import spaces
from ldm_jax.environment import LibraryMissingError
from ldm_jax.types import EnvironmentSpec

from . import registry
from .catalog import entries, selection
from .catalog.experts import experts
from .catalog.table import Table
from .isolation import groups
from .registry import UnknownEnvironmentError


def libraries() -> list[str]:
    """The libraries that `make` knows: those of this package, then those that installed packages add.

    >>> import environments
    >>> environments.libraries()[:4]
    ['gymnax', 'envpool', 'gymnasium', 'jumanji']
    """
    return list(registry.adapter_modules())


def list_ids(
    library: str | None = None,
    *,
    domain: str | None = None,
    action: str | None = None,
    verified: bool | None = True,
    expert: bool | None = None,
) -> list[str]:
    """The ids of one library or of all.

    Where a library is in the catalog, nothing is imported and nothing needs to be installed: `make` says what is
    missing. Other libraries, a third party's, are asked for what they offer; one that fails is left out of the list of
    all with a warning, and so is one whose interpreter is not built, so that one package does not take the others away.

    >>> import environments
    >>> environments.list_ids("gymnax", domain="bandits")
    ['gymnax/BernoulliBandit-misc', 'gymnax/GaussianBandit-misc', 'gymnax/SimpleBandit-bsuite']

    Args:
      library: the library; None for all.
      domain: what the task is about, `"navigation"`. Of ids outside the catalog this is not known, nor is the action.
      action: the kind of the action space: `"Discrete"`, `"MultiDiscrete"`, `"Box"`, `"Dict"`, ...
      verified: True for those that work, False for those in the catalog that do not, None for both.

      expert: True for those that an expert is listed for, see `experts`; False for the others.

    Raises:
      UnknownEnvironmentError: `library` is not known.
      LibraryMissingError: `library` is not in the catalog, and not installed either.
    """
    ids = []
    for known in [library] if library is not None else registry.adapter_modules():
        if entries.entries(known):
            ids += [entry.id for entry in _filter([known], domain=domain, action=action, verified=verified)]
        elif library is not None:
            ids += _uncatalogued(known) if domain is action is None and verified is not False else []
        elif domain is action is None and verified is not False:
            try:
                if known not in groups.isolated_libraries() or groups.isolated_libraries()[known].is_built:
                    ids += _uncatalogued(known)
            except LibraryMissingError as error:
                if known not in registry.BUILT_IN:
                    warnings.warn(f"left out the environments of {known!r}: {error}", RuntimeWarning, stacklevel=2)
    return ids if expert is None else [id for id in ids if bool(experts(id)) is expert]


def find(
    library: str | None = None, *, domain: str | None = None, action: str | None = None, verified: bool | None = True
) -> Table:
    """What the catalog knows of environments, as a table that a notebook shows.

    >>> import environments
    >>> environments.find("gymnax", domain="bandits")  # doctest: +ELLIPSIS
    3 environments of 1 library
    id                          domain  observation action       limit steps/s
    gymnax/BernoulliBandit-misc bandits Box(4)      Discrete(2)    100 ...
    gymnax/GaussianBandit-misc  bandits Box(4)      Discrete(2)    100 ...
    gymnax/SimpleBandit-bsuite  bandits Box(1, 1)   Discrete(11)   100 ...

    Args:
      library: the library; None for all of the catalog. What other packages add is not in it, see `list_ids`.
      domain: what the task is about, `"navigation"`.
      action: the kind of the action space: `"Discrete"`, `"MultiDiscrete"`, `"Box"`, `"Dict"`, ...
      verified: True for those that work, False for those that do not, None for both.

    Returns:
      The entries, an immutable sequence.

    Raises:
      UnknownEnvironmentError: `library` is not in the catalog.
    """
    if library is not None and not entries.entries(library):
        raise registry.unknown_library(library)
    chosen = entries.catalogued() if library is None else [library]
    return Table(_filter(chosen, domain=domain, action=action, verified=verified))


def select(query: str = "") -> Table:
    """Selects environments of the catalog by what is known of them: nothing is imported, installed or built.

    >>> import environments
    >>> environments.select("library=gymnax domain=bandits limit=2").ids
    ['gymnax/BernoulliBandit-misc', 'gymnax/GaussianBandit-misc']

    Terms stand with blanks between and all have to hold. `field=value,other` is one of the values, without regard to
    case, `_` for a blank, patterns as of file names allowed; the fields are id, library, version, task, family, domain,
    observation and action (the kinds of the spaces), group, expert (`yes` where one is listed) and verified (`yes`,
    unless given). `time_limit<=500` and `steps_per_s>=1000` are about numbers.

    `seed` (0) puts all ids into a line. `per_library`, `per_task`, `per_family` and `per_domain` keep so many of each,
    the first in that line, and `limit` the first of all that are left: a smaller limit is a part of a larger one.

    Args:
      query: the terms; empty for all that is verified.

    Returns:
      The entries in the order of the catalog, an immutable sequence.

    Raises:
      SelectionError: a term cannot be read, or leaves nothing; says which one, and the values that are there.
    """
    return Table(selection.parse(query).apply(entries.entries_of(entries.catalogued())))


def spec(id: str) -> EnvironmentSpec:
    """What is known of an environment without making it: the catalog's answer, which installs and imports nothing.

    >>> import environments
    >>> cart_pole = environments.spec("gymnax/CartPole-v1")
    >>> cart_pole.action_space, cart_pole.time_limit, cart_pole.domain
    (Discrete(2), 500, 'classic control')

    Args:
      id: `library/<the library's own id>`, as `list_ids` gives them.

    Returns:
      The spec of one environment, `batch_size` 1, as `make` would give it; without an image digest.

    Raises:
      UnknownEnvironmentError: the catalog does not have it, or as one that does not work.
    """
    library, name = registry.split(id)
    known = entries.entries(library)
    if name not in known:
        if not known and library not in registry.adapter_modules():
            raise registry.unknown_library(library)
        if not known:
            raise UnknownEnvironmentError(f"the catalog knows nothing of {library}: make {id} to see its spec")
        raise registry.unknown_name(library, name, [name for name, entry in known.items() if entry.verified])
    entry = known[name]
    if not entry.verified or entry.observation_space is None or entry.action_space is None:
        raise UnknownEnvironmentError(f"{id} is not offered: {entry.reason}")
    return EnvironmentSpec(
        id=id,
        library=library,
        version=entry.version,
        observation_space=spaces.from_json(entry.observation_space),
        action_space=spaces.from_json(entry.action_space),
        batch_size=1,
        time_limit=entry.time_limit,
        domain=entry.domain,
        jittable=library in registry.BUILT_IN and library not in registry.STATEFUL,
    )


def _uncatalogued(library: str) -> list[str]:
    found = registry.candidates(library)
    return [f"{library}/{name}" for name, reason in found.items() if not reason]


def _filter(libraries: list[str], **wanted: str | bool | None) -> list[entries.Entry]:
    """As a selection would; what leaves none is no error here."""
    asked = {name: value for name, value in wanted.items() if value is not None}
    said = {name: value if isinstance(value, str) else "yes" if value else "no" for name, value in asked.items()}
    terms = [selection.Term(name, "=", (value,)) for name, value in said.items()]
    return [entry for entry in entries.entries_of(libraries) if all(term.holds(entry) for term in terms)]

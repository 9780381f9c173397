"""One interface over every environment library.

Importing this package imports neither JAX nor any environment library: the program that runs inside a container
imports it too. Each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from .conformance import ConformanceError, check_environment
    from .interface import Environment, EnvironmentFaultError, LibraryMissingError, StaleStateError
    from .isolation import Isolation
    from .registry import UnknownEnvironmentError, list_ids, make

__all__ = [
    "ConformanceError",
    "Environment",
    "EnvironmentFaultError",
    "Isolation",
    "LibraryMissingError",
    "StaleStateError",
    "UnknownEnvironmentError",
    "check_environment",
    "list_ids",
    "make",
]

_HOMES = {
    "conformance": ("ConformanceError", "check_environment"),
    "interface": ("Environment", "EnvironmentFaultError", "LibraryMissingError", "StaleStateError"),
    "isolation": ("Isolation",),
    "registry": ("UnknownEnvironmentError", "list_ids", "make"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

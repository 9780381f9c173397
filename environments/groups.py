"""Groups of libraries that share an interpreter of their own, described in `images/<group>/`.

`group.json` says which Python, which libraries and how they are called; `requirements.txt` pins every package. A
library of a group has the functions of an adapter, so that the registry treats it as any other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
import types
import typing

from . import venvs
from .interface import LibraryMissingError

if typing.TYPE_CHECKING:
    from .isolation import IsolatedEnvironment, Isolation

_log = logging.getLogger(__name__)

IMAGES = pathlib.Path(__file__).parent / "images"
BRIDGES = pathlib.Path(__file__).parent / "bridges"


@dataclasses.dataclass(frozen=True, eq=False)
class IsolatedLibrary:
    """One library of a group, with the functions of an adapter.

    Attributes:
      name: of the library, the first part of its ids.
      recipe: what its interpreter is made of.
      program: fields of `isolation.Program` that all of its environments share.
      ids: the library's own ids that work.
      refused: why other ids of the library are not offered.
    """

    name: str
    recipe: venvs.Recipe
    program: typing.Mapping[str, typing.Any]
    ids: tuple[str, ...]
    refused: typing.Mapping[str, str]

    @property
    def is_built(self) -> bool:
        """Whether an environment can be made without building anything first."""
        from . import containers

        return venvs.built(self.recipe) is not None or containers.built(self.recipe)

    def list_ids(self) -> list[str]:
        """The library's own ids that work; nothing is built for it."""
        return list(self.ids)

    def refusal(self, name: str) -> str | None:
        """Why an id of the library is not offered; None where it is, or is not known."""
        return self.refused.get(name)

    def make(self, name: str, batch_size: int, time_limit: int | None, isolation: Isolation) -> IsolatedEnvironment:
        """Makes B environments in workers; builds their virtual environment if it is not there.

        Raises:
          LibraryMissingError: it cannot be built.
          EnvironmentFaultError: the library cannot make the environment.
        """
        from .isolation import IsolatedEnvironment, Program

        python, image, digest = self._build(isolation.kind)
        program = Program(python=python, image=image, digest=digest, library=self.name, name=name, **self.program)
        return IsolatedEnvironment(program, batch_size, time_limit, isolation)

    def _build(self, kind: str) -> tuple[str, str, str]:
        """The interpreter, the image of the container that it is in, if it is in one, and the digest of either."""
        from . import containers

        if kind == "container" or (kind == "auto" and containers.problem() is None):
            try:
                image = containers.build(self.recipe)
                return containers.PYTHON, image, containers.digest(image)
            except LibraryMissingError as error:
                if kind == "container":
                    raise
                _log.warning("%s runs in a virtual environment, as its container cannot be built: %s", self.name, error)
        return venvs.build(self.recipe), "", f"venv:{self.recipe.digest}"


@functools.cache
def libraries() -> typing.Mapping[str, IsolatedLibrary]:
    """The libraries of all groups by name.

    Raises:
      ValueError: a group's description is not as it should be.
    """
    found: dict[str, IsolatedLibrary] = {}
    for path in sorted(IMAGES.glob("*/group.json")):
        for library in read_group(path):
            if library.name in found:
                raise ValueError(f"{path} describes the library {library.name!r}, which another group has too")
            found[library.name] = library
    return types.MappingProxyType(found)


def read_group(path: pathlib.Path) -> list[IsolatedLibrary]:
    """Reads one group's description.

    Raises:
      ValueError: it is not as it should be.
    """
    try:
        group = json.loads(path.read_text("utf-8"))
        descriptions = group.pop("libraries")
        imports = dict.fromkeys(name for library in descriptions.values() for name in library["imports"])
        recipe = venvs.Recipe(
            name=path.parent.name,
            python=group.pop("python"),
            requirements=path.parent / "requirements.txt",
            build=tuple(group.pop("build", ())),
            imports=tuple(imports),
            apt=tuple(group.pop("apt", ())),
        )
        if group:
            raise ValueError(f"unknown fields {', '.join(group)}")
        return [_library(name, recipe, dict(fields)) for name, fields in descriptions.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a group of libraries: {error!r}") from error


def _library(name: str, recipe: venvs.Recipe, fields: dict[str, typing.Any]) -> IsolatedLibrary:
    ids, refused = tuple(fields.pop("ids")), fields.pop("refused", {})
    program = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    if bridge := program.pop("bridge", ""):
        path = BRIDGES / f"{bridge}.py"
        if not path.exists():
            raise ValueError(f"the library {name!r} has the bridge {bridge!r}, which is not in {BRIDGES}")
        program["bridge"] = str(path)
    allowed = {
        *("api", "imports", "bridge", "distribution", "domain", "kwargs", "variables"),
        *("seed_option", "seed_arguments", "seed_every_reset", "remake", "global_randomness", "time_limit"),
    }
    if unknown := set(program) - allowed:
        raise ValueError(f"the library {name!r} has unknown fields {', '.join(sorted(unknown))}")
    return IsolatedLibrary(name, recipe, types.MappingProxyType(program), ids, types.MappingProxyType(refused))

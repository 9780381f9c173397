"""Groups of libraries that share an interpreter of their own, described in `images/<group>/`.

`group.json` says which Python, which libraries and how they are called; `requirements.txt` pins every package. A
library of a group has the functions of an adapter, so that the registry treats it as any other.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import logging
import pathlib
import types
import typing

from ldm_jax.environment import LibraryMissingError

from ..catalog.experts import ExpertInfo
from ..catalog.taxonomy import first_match
from . import venvs

if typing.TYPE_CHECKING:
    from .environment import IsolatedEnvironment
    from .program import Isolation, WorkerSpec

_log = logging.getLogger(__name__)

GROUPS = pathlib.Path(__file__).parents[1] / "images"
BRIDGES = pathlib.Path(__file__).parents[1] / "bridges"


def expert_file(expert: ExpertInfo) -> pathlib.Path:
    """The file of the program of a live expert."""
    return BRIDGES / "experts" / f"{expert.module}.py"


class _Interpreter(typing.NamedTuple):
    """An interpreter, the image of the container that it is in, if it is in one, and the digest of either."""

    python: str
    image: str
    digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class IsolatedLibrary:
    """One library of a group, with the functions of an adapter.

    Attributes:
      name: of the library, the first part of its ids.
      venv: what its interpreter is made of.
      worker: fields of `isolation.WorkerSpec` that all of its environments share.
      domains: what the tasks are about, by pattern of ids, where it is not the domain of the whole library.
      include: patterns of the ids that are the library's, where the modules they come from do not tell.
      exclude: patterns of ids that are not even tried, with the reason.
    """

    name: str
    venv: venvs.VenvSpec
    worker: collections.abc.Mapping[str, typing.Any]
    domains: collections.abc.Mapping[str, str]
    include: tuple[str, ...]
    exclude: collections.abc.Mapping[str, str]

    @property
    def version(self) -> str:
        """The version of the library that its group pins."""
        pins = dict(line.split("==") for line in venvs.pinned(self.venv.requirements))
        found = {venvs.normalize_name(name.partition("[")[0]): version for name, version in pins.items()}
        return found.get(venvs.normalize_name(self.worker["distribution"]), "unknown")

    @property
    def is_built(self) -> bool:
        """Whether an environment can be made without building anything first; tries whether containers can start."""
        from . import containers

        if containers.may_be_built(self.venv):
            return containers.is_image_built(self.venv)
        return venvs.built(self.venv) is not None

    def candidates(self) -> dict[str, str]:
        """The ids that the library registers, each with the reason why it is not offered, empty where it is.

        Raises:
          LibraryMissingError: the library's interpreter, which is built if it is not there, cannot be built.
          EnvironmentFaultError: the library cannot be imported.
        """
        return dict(_candidates(self))

    def make(
        self, name: str, batch_size: int, time_limit: int | None, isolation: Isolation, expert: ExpertInfo | None = None
    ) -> IsolatedEnvironment:
        """Makes B environments in workers, an expert beside each where one is asked for.

        Their virtual environment is built if it is not there.

        Raises:
          LibraryMissingError: it cannot be built.
          EnvironmentFaultError: the library cannot make the environment.
        """
        from .environment import IsolatedEnvironment

        spec = self.prepare(name, isolation)
        if expert is not None:
            spec = dataclasses.replace(spec, expert=expert.name, expert_file=str(expert_file(expert)))
        return IsolatedEnvironment(spec, batch_size, time_limit, isolation)

    def prepare(self, name: str, isolation: Isolation) -> WorkerSpec:
        """What a worker runs to make an environment, with its interpreter, which is built if it is not there."""
        from .program import WorkerSpec

        fields = {**self.worker, "domain": self.domain(name)}
        return WorkerSpec(**self._build(isolation.kind)._asdict(), library=self.name, name=name, **fields)

    def domain(self, name: str) -> str:
        """What the task of an id is about."""
        return first_match(self.domains, name) or self.worker["domain"]

    def _build(self, kind: str) -> _Interpreter:
        from . import containers

        if kind == "container" or (kind == "auto" and containers.may_be_built(self.venv)):
            try:
                image = containers.build_image(self.venv)
                return _Interpreter(containers.PYTHON, image, containers.digest(image))
            except LibraryMissingError as error:
                if kind == "container":
                    raise
                containers.leave(self.venv)
                _log.warning("%s runs in a virtual environment, as its container cannot be built: %s", self.name, error)
        return _Interpreter(venvs.build(self.venv), "", f"venv:{self.venv.digest}")


@functools.cache
def _candidates(library: IsolatedLibrary) -> collections.abc.Mapping[str, str]:
    from .host import list_registered
    from .program import Isolation

    isolation = Isolation("venv" if venvs.built(library.venv) else "auto", workers=1)
    modules = list_registered(library.prepare("", isolation), isolation)
    ours = {"bridge", *(name.partition(".")[0] for name in library.worker["imports"])}
    if library.include:
        names = [name for name in modules if first_match(dict.fromkeys(library.include, "x"), name)]
    else:
        names = [name for name, module in modules.items() if module.partition(".")[0] in ours]
    return types.MappingProxyType({name: first_match(library.exclude, name) for name in sorted(names)})


@functools.cache
def isolated_libraries() -> collections.abc.Mapping[str, IsolatedLibrary]:
    """The libraries of all groups by name.

    Raises:
      ValueError: a group's description is not as it should be.
    """
    found: dict[str, IsolatedLibrary] = {}
    for path in sorted(GROUPS.glob("*/group.json")):
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
        variables = dict(item for library in descriptions.values() for item in library.get("variables", {}).items())
        venv = venvs.VenvSpec(
            name=path.parent.name,
            python=group.pop("python"),
            requirements=path.parent / "requirements.txt",
            build=tuple(group.pop("build", ())),
            imports=tuple(imports),
            apt=tuple(group.pop("apt", ())),
            variables=tuple(variables.items()),
        )
        if group:
            raise ValueError(f"unknown fields {', '.join(group)}")
        return [_library(name, venv, dict(fields)) for name, fields in descriptions.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a group of libraries: {error!r}") from error


def _library(name: str, venv: venvs.VenvSpec, fields: dict[str, typing.Any]) -> IsolatedLibrary:
    domains, exclude = (dict(fields.pop(key, {})) for key in ("domains", "exclude"))
    include = tuple(fields.pop("include", ()))
    program = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    if bridge := program.pop("bridge", ""):
        path = BRIDGES / f"{bridge}.py"
        if not path.exists():
            raise ValueError(f"the library {name!r} has the bridge {bridge!r}, which is not in {BRIDGES}")
        program["bridge"] = str(path)
    allowed = {
        *("api", "imports", "bridge", "distribution", "domain", "kwargs", "variables"),
        *(
            "seed_option",
            "seed_arguments",
            "seed_every_reset",
            "remake",
            "plain_integers",
            "global_randomness",
            "time_limit",
        ),
    }
    if unknown := set(program) - allowed:
        raise ValueError(f"the library {name!r} has unknown fields {', '.join(sorted(unknown))}")
    if missing := {"api", "imports", "distribution", "domain"} - set(program):
        raise ValueError(f"the library {name!r} lacks the fields {', '.join(sorted(missing))}")
    return IsolatedLibrary(name, venv, program, domains, include, exclude)

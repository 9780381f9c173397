"""The command line `ldm-jax`: what is here, what there is to act in, a policy at work, what came of a run.

    ldm-jax info                          versions, devices and ways to isolate, for reports of bugs
    ldm-jax list --domain=navigation      environments of the catalog; nothing is imported or built for it
    ldm-jax check nasim/Tiny-v0           whether an environment keeps the contract, law by law
    ldm-jax play gymnax/CartPole-v1 --policy=runs/quickstart/policy --video=cart.mp4
    ldm-jax report runs/a runs/b --to=both.html
    ldm-jax dataset describe --dataset=runs/quickstart/dataset

`ldm-jax VERB --help` says more of each. The stages of an experiment are scripts of their own:
`python -m experiments.quickstart --help`.
"""

from __future__ import annotations

import argparse
import collections.abc
import importlib.metadata
import pathlib
import platform
import re
import shutil
import sys
import typing

import jax
import shtab

import environments
import ldm_jax
from environments.catalog import entries
from environments.isolation import containers
from environments.isolation.caches import cache_folder
from environments.isolation.groups import isolated_libraries
from experiments import conformance, watching
from experiments.harness import compilation
from experiments.harness.flags import one_line
from ldm_jax.acting import Decoding
from ldm_jax.errors import LdmError, did_you_mean

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "gymnasium", "numpy"),
    *("tensorstore", "grain", "gymnax", "envpool", "podman", "ray"),
)


def describe_machine() -> list[str]:
    """What a report of a bug has to say: versions, devices, memory, ways to isolate, and what is built."""
    built = [name for name, library in isolated_libraries().items() if library.is_built]
    cannot = containers.problem()
    devices = [f"{device.device_kind} ({device.platform})" for device in jax.devices()]
    facts = {
        "ldm_jax": ldm_jax.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in _PACKAGES},
        "devices": f"{len(devices)} x {devices[0]}" if len({*devices}) == 1 else ", ".join(devices),
        "containers": f"no: {cannot}" if cannot else f"yes, {shutil.which('podman')}",
        "catalog": repr(environments.find()).splitlines()[0],
        "libraries": f"{len(built)} of {len(isolated_libraries())} with an interpreter of their own are built",
        "cache": str(cache_folder()),
    }
    width = max(map(len, facts))
    return [f"{name:<{width}}  {value}" for name, value in facts.items()]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _info(arguments: argparse.Namespace) -> None:
    print("\n".join(describe_machine()))


def _list(arguments: argparse.Namespace) -> None:
    terms = [f"{name}={value}" for name in ("library", "domain", "action") if (value := getattr(arguments, name))]
    found = environments.select(" ".join([*(term.replace(" ", "_") for term in terms), arguments.select]).strip())
    print("\n".join(found.ids) if arguments.ids else found)


def _check(arguments: argparse.Namespace) -> None:
    library, slash, _ = arguments.id.partition("/")
    if entries.entries(library) or not slash:
        environments.spec(arguments.id)  # says what is near, if it is unknown
    else:
        environments.list_ids(library)  # of another package, or there is none
    if broken := conformance.check_id(arguments.id, arguments.isolation):
        sys.exit(f"{arguments.id} breaks the contract: {broken}")
    print(f"{arguments.id} keeps the contract")


def _play(arguments: argparse.Namespace) -> None:
    lines = watching.play_policy(
        arguments.id,
        arguments.policy,
        arguments.episodes,
        arguments.seed,
        arguments.decoding,
        video=arguments.video,
        unknown=arguments.unknown,
    )
    print("\n".join(lines))


def _report(arguments: argparse.Namespace) -> None:
    from experiments.report.runs import report_runs  # brings matplotlib

    folders = [pathlib.Path(run) for run in arguments.runs]
    alone = folders[0] / "report" / "index.html"
    to = pathlib.Path(arguments.to or (alone if len(folders) == 1 else "side-by-side.html"))
    print(f"report: {report_runs(folders, to)}")


class _Verb(typing.NamedTuple):
    """A word of the command line.

    Attributes:
      do: what it does.
      text: what it is for.
      example: a line that works.
      define: adds its flags.
    """

    do: collections.abc.Callable[[argparse.Namespace], None]
    text: str
    example: str
    define: collections.abc.Callable[[argparse.ArgumentParser], None] = lambda parser: None


def _define_list(parser: argparse.ArgumentParser) -> None:
    for name, example in (("library", "minigrid"), ("domain", "navigation"), ("action", "Discrete")):
        parser.add_argument(f"--{name}", default="", help=f"only of this {name}, such as {example}")
    parser.add_argument("--select", default="", help="more terms, as the scripts take them: 'per_family=1 limit=20'")
    parser.add_argument("--ids", action="store_true", help="one id a line and nothing else, all of them")


def _define_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="such as nasim/Tiny-v0; its library is built if need be")
    parser.add_argument("--isolation", default="auto", choices=("auto", "venv", "container"), help="default: auto")


def _define_play(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="such as gymnax/CartPole-v1")
    parser.add_argument("--policy", required=True, help="the folder of the policy, such as runs/quickstart/policy")
    parser.add_argument("--episodes", type=int, default=5, help="default: 5")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    forms = typing.get_args(Decoding)
    parser.add_argument(
        "--decoding",
        default="card",
        choices=forms,
        help="how actions are taken; default: card, as its reference was scored",
    )
    parser.add_argument("--video", default="", help="an mp4 file to make of it")
    parser.add_argument("--unknown", action="store_true", help="also where the policy was not trained")


def _define_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a finished run, such as runs/quickstart; several stand side by side"
    )
    parser.add_argument(
        "--to", default="", help="the page; default: RUN/report/index.html, and side-by-side.html of several"
    )


COMMANDS: dict[str, _Verb] = {
    "info": _Verb(_info, "versions, devices and ways to isolate, for reports of bugs", "ldm-jax info"),
    "list": _Verb(
        _list, "environments of the catalog", "ldm-jax list --domain=navigation --library=minigrid", _define_list
    ),
    "check": _Verb(_check, "whether an environment keeps the contract", "ldm-jax check nasim/Tiny-v0", _define_check),
    "play": _Verb(
        _play,
        "a policy at work in an environment",
        "ldm-jax play gymnax/CartPole-v1 --policy=runs/quickstart/policy --video=cart.mp4",
        _define_play,
    ),
    "report": _Verb(
        _report,
        "one page of a finished run, or of several side by side",
        "ldm-jax report runs/a runs/b",
        _define_report,
    ),
}


class CommandError(LdmError, ValueError):
    """A word or a flag of the command line that it does not have."""


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as everything else does, and what is near."""

    def error(self, message: str) -> typing.NoReturn:
        chosen = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        hint = did_you_mean(chosen[1], re.findall(r"[\w-]+", chosen[2]), most=1) if chosen else ""
        raise CommandError(f"{message}{hint or '.'} See {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    described = (__doc__ or "").partition("\n\n")
    top = _Parser(
        "ldm-jax", description=described[0], epilog=described[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"ldm_jax {ldm_jax.__version__}")
    shtab.add_argument_to(top, help='a script of completions for the shell: eval "$(ldm-jax --print-completion bash)"')
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in COMMANDS.items():
        text = verb.text[0].upper() + verb.text[1:] + "."
        added = verbs.add_parser(
            name,
            help=verb.text,
            description=text,
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(do=verb.do)
        verb.define(added)
    verbs.add_parser("dataset", help="describe, verify, merge, export-minari, import-minari; see its --help")
    return top


def main() -> None:
    """Does what the command line says; mistakes of a user end it in one line and with status 1."""
    with one_line():
        if sys.argv[1:2] == ["dataset"]:
            from experiments import dataset  # needs the store, which `info` must not

            del sys.argv[1]
            dataset.main(sys.argv)
            return
        compilation.keep_programs(compilation.default_folder())
        arguments = parser().parse_args()
        arguments.do(arguments)


if __name__ == "__main__":
    main()

"""The command line `ldm-jax`: what is here, what there is to act in, whether it keeps the contract, a policy at work.

    ldm-jax info                          versions, devices and ways to isolate, for reports of bugs
    ldm-jax list --domain=navigation      environments of the catalog; nothing is imported or built for it
    ldm-jax check nasim/Tiny-v0           whether an environment keeps the contract, law by law
    ldm-jax play gymnax/CartPole-v1 --policy=runs/quickstart/policy
    ldm-jax dataset describe --dataset=runs/quickstart/dataset

The stages of an experiment are scripts: `python -m experiments.quickstart --help`.
"""

from __future__ import annotations

import argparse
import collections.abc
import importlib.metadata
import platform
import shutil
import sys

import jax
import numpy as np

import environments
import ldm_jax
from environments.isolation import containers
from environments.isolation.caches import cache_folder
from environments.isolation.groups import isolated_libraries
from experiments import conformance
from experiments.harness import compilation
from experiments.harness.flags import one_line
from ldm_jax import rollout
from ldm_jax.acting import Decoding
from ldm_jax.errors import ConfigError

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


def play_policy(id: str, policy_folder: str, episodes: int, seed: int, decoding: Decoding) -> list[str]:
    """Lets a policy act in an environment, one episode after the other, its context carried from each to the next.

    Args:
      id: of the environment; the policy has to have its card.
      policy_folder: what `Policy.save` wrote.
      episodes: how many.
      seed: of the episodes and of what is drawn.
      decoding: how actions are taken from their distribution; `card` as the reference was scored.

    Returns:
      Lines of text: one for each episode, and one of their mean beside the random policy's and the reference's.

    Raises:
      PolicyError: no policy there, or an environment that it does not know.
      CardError: the environment is not as it was when the policy was trained.
    """
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}, expected at least 1")
    policy = ldm_jax.load(policy_folder)
    agent = policy.agent(id, decoding)  # an id that it does not know is said before anything is made
    environment = environments.make(id, batch_size=1)
    try:
        policy.agent(environment)  # compares it with what the policy knows
        played = rollout.run_episodes(environment, agent, policy.params, jax.random.key(seed), episodes)
    finally:
        environment.close()
    card = policy.cards[id]
    random, reference = card.random_returns.mean, card.reference_returns.mean
    lines = [f"{'episode':>7}  {'return':>10}  {'steps':>6}  {'z':>6}"]
    for number, (total, length) in enumerate(zip(played.returns[0], played.lengths[0], strict=True), 1):
        lines.append(f"{number:>7}  {total:>10.5g}  {length:>6}  {_z(float(total), random, reference):>6}")
    mean = float(np.mean(played.returns))
    scales = f"random policy {random:.5g}, reference {reference:.5g}"
    return [*lines, f"mean return {mean:.5g}, z {_z(mean, random, reference)}; {scales}"]


def _z(value: float, random: float, reference: float) -> str:
    return f"{(value - random) / (reference - random):.2f}" if reference > random else "-"


def _info(arguments: argparse.Namespace) -> None:
    print("\n".join(describe_machine()))


def _list(arguments: argparse.Namespace) -> None:
    terms = [f"{name}={value}" for name in ("library", "domain", "action") if (value := getattr(arguments, name))]
    found = environments.select(" ".join([*(term.replace(" ", "_") for term in terms), arguments.select]).strip())
    print("\n".join(found.ids) if arguments.ids else found)


def _check(arguments: argparse.Namespace) -> None:
    environments.spec(arguments.id)  # says what is near, if it is unknown
    if broken := conformance.check_id(arguments.id, arguments.isolation):
        sys.exit(f"{arguments.id} breaks the contract: {broken}")
    print(f"{arguments.id} keeps the contract")


def _play(arguments: argparse.Namespace) -> None:
    print(
        "\n".join(play_policy(arguments.id, arguments.policy, arguments.episodes, arguments.seed, arguments.decoding))
    )


def parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    described = (__doc__ or "").partition("\n\n")
    top = argparse.ArgumentParser(
        "ldm-jax", description=described[0], epilog=described[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"ldm_jax {ldm_jax.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, do: collections.abc.Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(do=do)
        return added

    verb("info", _info, "versions, devices and ways to isolate, for reports of bugs")
    listing = verb("list", _list, "environments of the catalog")
    for name, example in (("library", "minigrid"), ("domain", "navigation"), ("action", "Discrete")):
        listing.add_argument(f"--{name}", default="", help=f"only of this {name}, such as {example}")
    listing.add_argument("--select", default="", help="more terms, as the scripts take them: 'per_family=1 limit=20'")
    listing.add_argument("--ids", action="store_true", help="one id a line and nothing else, all of them")
    checking = verb("check", _check, "whether an environment keeps the contract")
    checking.add_argument("id", help="such as nasim/Tiny-v0; its library is built if need be")
    checking.add_argument("--isolation", default="auto", choices=("auto", "venv", "container"))
    playing = verb("play", _play, "a policy at work in an environment")
    playing.add_argument("id", help="such as gymnax/CartPole-v1")
    playing.add_argument("--policy", required=True, help="the folder of the policy, such as runs/quickstart/policy")
    playing.add_argument("--episodes", type=int, default=5, help="default: 5")
    playing.add_argument("--seed", type=int, default=0, help="default: 0")
    playing.add_argument("--decoding", default="card", choices=("card", "greedy", "mode", "sample"))
    verbs.add_parser("dataset", help="verify, describe, merge, export-minari, import-minari; see its --help")
    return top


def main() -> None:
    """Does what the command line says; mistakes of a user end it in one line and with status 1."""
    if sys.argv[1:2] == ["dataset"]:
        from experiments import dataset  # needs the store, which `info` must not

        del sys.argv[1]
        dataset.main(sys.argv)
        return
    with one_line():
        compilation.keep_programs(compilation.default_folder())
        arguments = parser().parse_args()
        arguments.do(arguments)


if __name__ == "__main__":
    main()

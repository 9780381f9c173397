"""Command lines: frozen dataclass configurations as absl flags, and back."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
import typing

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from data.mixture import MixtureError
from data.references import ReferencePolicyError
from data.store import StoreError
from environments import UnknownEnvironmentError
from experiments.harness import signals
from experiments.harness.progress import logger
from experiments.harness.workdir import WorkdirError
from ldm_jax.cards import CardError
from ldm_jax.environment import EnvironmentFaultError, LibraryMissingError
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation.scaling_law import ScalingError
from ldm_jax.policy import PolicyError
from ldm_jax.spaces import SpaceError
from ldm_jax.training.checkpoints import CheckpointError
from ldm_jax.training.diagnosis import DiagnosisError
from ldm_jax.training.loop import TrainingError


class _Dataclass(typing.Protocol):
    __dataclass_fields__: typing.ClassVar[dict[str, typing.Any]]


T = typing.TypeVar("T", bound=_Dataclass)

EXPECTED_ERRORS = (
    CardError,
    CheckpointError,
    ConfigError,
    EnvironmentFaultError,
    LibraryMissingError,
    MixtureError,
    PolicyError,
    ReferencePolicyError,
    DiagnosisError,
    ScalingError,
    SpaceError,
    StoreError,
    TrainingError,
    UnknownEnvironmentError,
    WorkdirError,
)
"""What a user can put right: said in one line, without a traceback."""


def launch(run: typing.Callable[[T, pathlib.Path, tuple[str, ...]], typing.Any], presets: dict[str, T]) -> None:
    """Runs a script: `--workdir`, `--environments=a,b`, `--preset` and one `--config.<field>` per field of its config.

    Args:
      run: `run(config, workdir, environments)`; `environments` is empty where the flag is not given.
      presets: configurations by name, the first one the default.
    """
    names = list(presets)
    # The preset says what the other flags' defaults are, so it is read before they are defined.
    early = flags.FlagValues()
    for values in (early, flags.FLAGS):
        flags.DEFINE_enum("preset", names[0], names, "which defaults the configuration starts from", flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "folder of everything that is written", required=True)
    environments = flags.DEFINE_list("environments", [], "ids, with commas between; default: see the script")
    try:
        early(sys.argv, known_only=True)
        config = presets[early.preset]
        holder = config_flags.DEFINE_config_dict("config", ConfigDict(dataclasses.asdict(config)), "see its dataclass")
    except (flags.Error, AttributeError, KeyError) as error:
        sys.exit(f"error: {error}")

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"got {argv[1:]}, expected flags only")
        # Orbax alone says a hundred things for each checkpoint.
        absl_logging.set_verbosity(absl_logging.WARNING)
        logger.setLevel(logging.INFO)
        try:
            resolved = rebuild(config, holder.value)
        except ValueError as error:  # a configuration that checked itself
            sys.exit(f"error: {error}")
        try:
            with signals.ending():
                run(resolved, pathlib.Path(workdir.value), tuple(environments.value))
        except EXPECTED_ERRORS as error:
            logger.debug("", exc_info=True)
            sys.exit(f"error: {error}")

    app.run(main)


def rebuild(config: T, values: typing.Mapping[str, typing.Any]) -> T:
    """A configuration of the same class with other values, checked by its `__post_init__`.

    Args:
      config: a frozen dataclass, other ones in its fields where it likes.
      values: a value for each field, those of inner dataclasses as mappings.
    """
    fields = {}
    for field in dataclasses.fields(config):
        old, new = getattr(config, field.name), values[field.name]
        fields[field.name] = rebuild(old, new) if dataclasses.is_dataclass(type(old)) else type(old)(new)
    return type(config)(**fields)

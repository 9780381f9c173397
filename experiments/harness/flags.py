"""Command lines: frozen dataclass configurations as absl flags, and back, and every mistake in one line."""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import errno
import inspect
import logging
import os
import pathlib
import re
import select
import signal
import sys
import typing

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from experiments.harness import allocator, compilation, signals
from experiments.harness.ids import Choice
from experiments.harness.progress import logger
from experiments.harness.units import LOCAL, Engine
from ldm_jax import files
from ldm_jax.errors import LdmError, check_finite


class _Dataclass(typing.Protocol):
    __dataclass_fields__: typing.ClassVar[dict[str, typing.Any]]


T = typing.TypeVar("T", bound=_Dataclass)


Run = collections.abc.Callable[[T, pathlib.Path, typing.Any], object]
"""`run(config, workdir, environments)` of a stage, which is given a `Choice` of environments."""

_NO_WORKDIR = "no-workdir"  # of a dry run: nothing is there, and nothing gets there


def launch(run: Run[T], presets: dict[str, T]) -> None:
    """Runs a script: `--workdir`, `--environments`, `--select`, `--preset`, a `--config.<field>` per field.

    Args:
      run: the stage.
      presets: configurations by name, the first one the default.
    """
    flags.disclaim_key_flags()  # they are the script's: --help shows them
    with one_line():
        config = define(presets, sys.argv, flags.FLAGS)
    run_app(lambda argv: call(run, config, flags.FLAGS))


def define(presets: dict[str, T], argv: list[str], values: flags.FlagValues) -> T:
    """Defines the flags of a stage.

    Args:
      presets: configurations by name, the first one the default.
      argv: the command line: the preset that it names says what the defaults of the other flags are.
      values: where the flags are defined.

    Returns:
      The preset.

    Raises:
      absl.flags.Error: the command line names a preset or a field that is not there.
    """
    names, early = list(presets), flags.FlagValues()
    for each in (early, values):
        flags.DEFINE_enum("preset", names[0], names, "which defaults the configuration starts from", flag_values=each)
    _define_choice(values)
    early(argv, known_only=True)
    config = presets[early.preset]
    text = "\n".join(["the configuration, by its fields:", *describe_fields(config)])
    try:
        config_flags.DEFINE_config_dict("config", ConfigDict(dataclasses.asdict(config)), text, values, sys_argv=argv)
    except (AttributeError, KeyError) as error:
        raise flags.Error(f"the configuration has no such field: {_unquoted(error)}") from error
    values["config"].default_as_str = ""  # the fields have theirs
    flags.declare_key_flag("config", flag_values=values)
    return config


def _define_choice(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of everything that is written", flag_values=values)
    flags.DEFINE_string(
        "environments",
        "",
        "ids with commas between, patterns ('gymnax/*') and files of them (@ids.txt); default: see the script",
        flag_values=values,
    )
    flags.DEFINE_string(
        "select",
        "",
        "environments of the catalog: 'library=nasim,minigrid action=Discrete per_family=1 limit=100', "
        "see environments.select",
        flag_values=values,
    )
    flags.DEFINE_enum("retry", "", ["", "failed"], "what to try again of what is finished", flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "say what would be done, and do nothing", flag_values=values)
    define_engine(values)
    flags.register_multi_flags_validator(
        ["workdir", "dry_run"],
        lambda given: given["workdir"] is not None or given["dry_run"],
        "--workdir has to be given",
        flag_values=values,
    )


def define_engine(values: flags.FlagValues) -> None:
    """Defines `--engine` and `--ray_address`; `engine_of` reads them."""
    kinds = ["local", "ray"]
    flags.DEFINE_enum("engine", "local", kinds, "processes of this machine, or a Ray cluster", flag_values=values)
    address = "of the cluster: host:port, or auto for the one that this machine is part of"
    flags.DEFINE_string("ray_address", "auto", address, flag_values=values)


def engine_of(values: flags.FlagValues) -> Engine:
    """Where the flags say that units are worked on.

    Raises:
      absl.flags.Error: there is an address and nothing that is to be done there.
    """
    if values.engine == "local" and values["ray_address"].present:
        raise flags.Error(f"got --ray_address={values.ray_address} for this machine: give --engine=ray with it")
    return LOCAL if values.engine == "local" else Engine("ray", values.ray_address)


def call(run: Run[T], config: T, values: flags.FlagValues) -> None:
    """Calls a stage with what the flags say.

    Args:
      run: the stage.
      config: the preset that the configuration starts from.
      values: the flags, parsed.

    Raises:
      absl.flags.Error: the configuration does not hold together.
    """
    try:
        resolved = rebuild(config, values.config)
    except ValueError as error:
        raise flags.Error(str(error)) from error
    choice = Choice(values.environments, values.select, values.retry, values.dry_run, engine_of(values))
    run(resolved, pathlib.Path(values.workdir or _NO_WORKDIR), choice)


def run_app(main: collections.abc.Callable[[list[str]], None]) -> None:
    """Runs `main` with the flags read; what a user can put right is said in one line.

    Args:
      main: called with the name of the program alone: there are no arguments beside flags.
    """
    flags.disclaim_key_flags()
    text = "folder in which compiled programs are kept for other runs; empty for none"
    flags.DEFINE_string("compilation_cache", compilation.default_folder(), text)

    def parse(argv: list[str]) -> list[str]:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"got {' '.join(rest[1:])}, expected flags only")
        return rest

    def keep_and_run(argv: list[str]) -> None:
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax alone says a hundred things for each checkpoint
        allocator.keep_freed_memory()
        compilation.keep_programs(flags.FLAGS.compilation_cache)
        main(argv)

    with one_line():
        app.run(keep_and_run, flags_parser=parse)


def run_page(render: collections.abc.Callable[[pathlib.Path], str]) -> None:
    """Runs a script that writes, or prints, a page of what there is in a workdir.

    Args:
      render: is given `references/` of the workdir, and makes Markdown.
    """
    flags.DEFINE_string("workdir", None, "folder that has references/", required=True)
    flags.DEFINE_string("page", "", "file that the page is written to; default: it is printed")

    def write(_: list[str]) -> None:
        text = render(pathlib.Path(flags.FLAGS.workdir) / "references")
        if flags.FLAGS.page:
            files.write(pathlib.Path(flags.FLAGS.page), text)
        else:
            print(text)

    run_app(write)


def rebuild(config: T, values: collections.abc.Mapping[str, typing.Any]) -> T:
    """A configuration of the same class with other values, checked by its `__post_init__`.

    Args:
      config: a frozen dataclass, other ones in its fields where it likes.
      values: a value for each field, those of inner dataclasses as mappings.

    Raises:
      ValueError: what the configurations say of the values; a number that is NaN or infinite.
    """
    fields = {}
    for field in dataclasses.fields(config):
        old, new = getattr(config, field.name), values[field.name]
        fields[field.name] = rebuild(old, new) if dataclasses.is_dataclass(type(old)) else type(old)(new)
    rebuilt = type(config)(**fields)
    check_finite(rebuilt)
    return rebuilt


def describe_fields(config: typing.Any, prefix: str = "config") -> collections.abc.Iterator[str]:
    """Describes the flags of a configuration, one a line: name, what its dataclass says of the field, and default."""
    said = attributes(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from describe_fields(value, name)
        else:
            yield f"{name}: {said.get(field.name, '')} (default: {value})"


def attributes(documented: type) -> dict[str, str]:
    """What the docstring of a class, and of those that it is made from, says of each of its attributes."""
    said: dict[str, str] = {}
    for each in reversed(documented.__mro__[:-1]):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section.partition("\n\n")[0], re.MULTILINE)
        said |= {name: re.sub(r"\s+", " ", text) for name, text in found}
    return said


_WAYS_OUT = {
    errno.ENOSPC: "Make room there or give another --workdir, and start again: what was finished stays",
    errno.EDQUOT: "Make room there or give another --workdir, and start again: what was finished stays",
    errno.EFBIG: "Raise the limit of the size of files: ulimit -f unlimited",
    errno.EACCES: "Give a --workdir that this user may write",
    errno.EPERM: "Give a --workdir that this user may write",
    errno.EROFS: "Give a --workdir that can be written",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096",
}


@contextlib.contextmanager
def one_line() -> collections.abc.Iterator[None]:
    """Ends the script in one line and status 1 for what a user can put right; 130 or 143 for SIGINT or SIGTERM.

    Where nobody reads on what is printed, as with `| head`, it ends without a word, as other programs do. Anything else
    is a fault of ours, and keeps its traceback.
    """
    logger.setLevel(logging.INFO)
    try:
        with signals.ending():
            try:
                yield
            except SystemExit:  # of --help, say
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except Exception as error:
        if _is_unread(sys.stdout) and isinstance(error, BrokenPipeError):
            sys.exit(_UNREAD)
        if not (line := explain(error)):
            raise
        logger.debug("", exc_info=True)
        sys.exit(f"error: {' '.join(line.splitlines())}")


_UNREAD = 128 + signal.SIGPIPE
"""The status that a shell gives a program whose reader has gone."""


def _is_unread(stream: typing.TextIO) -> bool:
    """Whether nobody reads a stream any more; what it still holds is then dropped, or Python would try it again."""
    try:
        number, asked = stream.fileno(), select.poll()
    except (OSError, ValueError):  # no file of the system, or a closed one
        return False
    asked.register(number, 0)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), number)
    return True


_MISSING = re.compile(r"flag (--\S+)=None: Flag \1 must have a value other than None")


def explain(error: BaseException) -> str:
    """What a user can do about an error, in one line; empty where it is a fault of ours."""
    if isinstance(error, flags.Error):
        return _MISSING.sub(r"\1 has to be given", str(error))
    if isinstance(error, LdmError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            where = f": {cause.filename}" if cause.filename else ""
            way_out = _WAYS_OUT.get(cause.errno, "Put it right there, or give another --workdir")
            return f"{os.strerror(cause.errno)}{where}. {way_out}"
        for number in (errno.ENOSPC, errno.EDQUOT):  # libraries put it into words of their own
            if os.strerror(number) in str(cause):
                return f"{os.strerror(number)}. {_WAYS_OUT[number]}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _unquoted(error: Exception) -> str:
    # The text of a KeyError is the repr of its message, sometimes twice over.
    text = str(error)
    with contextlib.suppress(SyntaxError, ValueError):
        while isinstance(inner := ast.literal_eval(text), str):
            text = inner
    return text

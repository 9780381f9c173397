"""A policy: a trained model and the cards of its environments, in memory and as one self-describing folder.

The folder holds `policy.json`, which says all but the weights and names the folder beside it that holds those. New
weights are written under a new name and count once `policy.json`, replaced in one moment, names them: whatever
interrupts a save leaves the policy of before or the new one.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import difflib
import functools
import json
import os
import pathlib
import re
import secrets
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import acting, files
from ldm_jax.acting.mixed import MixedState, act_mixed, start_mixed
from ldm_jax.cards import EnvironmentCard, check_matches
from ldm_jax.encoding.buckets import Bucket, Grid, bucket_for, join_all, join_two
from ldm_jax.encoding.codec import Codec
from ldm_jax.environment import Environment
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Model, Params, count_parameters, make_model
from ldm_jax.training import checkpoints
from ldm_jax.types import Agent, EnvironmentSpec, Key, TimeStep

WeightsDtype = typing.Literal["float32", "bfloat16"]
"""What the numbers of a saved policy take."""

_SCHEMA = 3
_FILE = "policy.json"
_EXAMPLE = ", such as runs/quickstart/policy, which `make quickstart` writes"
_OURS = re.compile(r"params(-[0-9a-f]{8})?(\..*)?|\.(policy\.json|params-[0-9a-f]{8})\.[0-9a-f]+\.aside.*")
"""Weights, whole or interrupted, and what is written aside."""
_RELEASED = pathlib.Path(__file__).parent / "policies"
_TOLD = 5
"""Libraries that `repr` names."""


class PolicyError(LdmError, ValueError):
    """A folder without a policy, a policy that is not to be saved, or an environment that a policy does not know."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Policy:
    """A trained model and what it needs to act; equal to another with the same contents.

    Attributes:
      cfg: shapes of the model.
      params: its parameters, a nested dict of arrays.
      cards: of the environments it was trained in, by id.
      decoding: how actions are taken from their distribution unless one says otherwise.
      buckets: that environments were trained in, by id, where those are not the smallest ones.
    """

    cfg: ModelConfig
    params: Params
    cards: dict[str, EnvironmentCard]
    decoding: acting.Decoding = "card"
    buckets: dict[str, Bucket] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        acting.check_decoding(self.decoding)

    def __repr__(self) -> str:
        libraries = collections.Counter(card.library for card in self.cards.values()).most_common()
        told = ", ".join(f"{name} {count}" for name, count in libraries[:_TOLD])
        told += f" and {len(libraries) - _TOLD} more libraries" if len(libraries) > _TOLD else ""
        known = f"{len(self.cards)} environments" + (f" ({told})" if told else "")
        millions = count_parameters(self.params) / 1e6
        return f"Policy({millions:.3g}M parameters, window {self.cfg.window}, {known}, decoding {self.decoding!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Policy):
            return NotImplemented
        if any(getattr(self, name) != getattr(other, name) for name in ("cfg", "decoding", "cards", "buckets")):
            return False
        mine, theirs = (dict(jax.tree_util.tree_leaves_with_path(policy.params)) for policy in (self, other))
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[path], theirs[path]) for path in mine)

    def __hash__(self) -> int:
        return hash((self.cfg, self.decoding, self.ids))

    def __reduce__(self) -> tuple[typing.Any, ...]:
        # Without what is derived: functions of the model cannot be pickled.
        return Policy, (self.cfg, self.params, self.cards, self.decoding, self.buckets)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the environments it was trained in, sorted."""
        return tuple(sorted(self.cards))

    @functools.cached_property
    def model(self) -> Model:
        """The network as pure functions."""
        return make_model(self.cfg)

    @functools.cached_property
    def _trained(self) -> frozenset[Bucket]:
        return frozenset(self.buckets.values())

    @functools.cached_property
    def _agents(self) -> dict[Agent, Agent]:
        return {}

    def agent(
        self,
        environment: str | EnvironmentCard | EnvironmentSpec | Environment,
        decoding: acting.Decoding | None = None,
        temperature: float = 1.0,
    ) -> Agent:
        """The policy as an agent in one environment; call its step with `params`.

        The same environment and decoding give the same agent, and agents of equal policies are equal: a second one
        compiles nothing.

        Args:
          environment: an id the policy was trained in; an environment of such an id, or its spec, which are compared
            with what the policy knows; or the card of any environment.
          decoding: default: the policy's.
          temperature: what `sample` divides the logits by.

        Returns:
          The agent.

        Raises:
          PolicyError: an id without a card.
          CardError: the environment is not as it was when the policy was trained.
          ConfigError: the environment's spaces do not fit the model, an unknown decoding, or a temperature that is
            not a positive number.
        """
        codec, decoding = self.codec(self.card(environment)), self.decoding if decoding is None else decoding
        agent = acting.make_agent(self.cfg, codec, decoding, temperature)
        return self._agents.setdefault(agent, agent)

    def start(self, rows: collections.abc.Mapping[str, int]) -> MixedState:
        """The memory of rows of several environments that have seen nothing, for `act`.

        Args:
          rows: how many of each id.

        Returns:
          The memory; its rows are those of the environments in sorted order of their ids.

        Raises:
          PolicyError: an id without a card, or environments that cannot share a batch: their grids or texts differ.
          ActingError: fewer than one row.
          ConfigError: the environment's spaces do not fit the model.
        """
        if few := {id: count for id, count in rows.items() if count < 1} or not rows:
            raise acting.ActingError(f"got rows {few or rows}, expected at least one row of at least one environment")
        return start_mixed(self.cfg, self._codecs(rows), rows)

    def act(
        self,
        params: Params,
        memory: MixedState,
        timesteps: collections.abc.Mapping[str, TimeStep],
        key: Key,
        decoding: acting.Decoding | None = None,
    ) -> tuple[MixedState, dict[str, typing.Any]]:
        """Acts once in rows of several environments, as one batch; pure.

        It may be traced by `jax.jit`. Called as it is, it compiles for the widths and the number of rows alone,
        whichever the environments are. `acting.forget_mixed` makes rows of the memory as new.

        Args:
          params: of the model.
          memory: from `start`, or what the last call returned.
          timesteps: by id, `[B, ...]` each.
          key: typed key; each row draws from a key of its own.
          decoding: default: the policy's.

        Returns:
          The memory, and the actions by id.

        Raises:
          ActingError: the environments, their rows or parts of a time step are not those of the memory.
        """
        codecs = self._codecs(timesteps)
        return act_mixed(self.cfg, codecs, params, memory, timesteps, key, decoding or self.decoding)

    def _codecs(self, ids: collections.abc.Iterable[str]) -> dict[str, Codec]:
        """Codecs of one bucket, by id."""
        known = self._mixed.setdefault(tuple(sorted(ids)), {})
        if not known:
            own = {id: self.codec(self.card(id)) for id in ids}
            bucket = join_all(codec.bucket for codec in own.values())
            if not bucket:
                raise PolicyError(
                    f"{', '.join(sorted(own))} cannot share a batch, their grids or texts differ: act in them apart"
                )
            for id, codec in own.items():
                known[id] = Codec(codec.card, bucket)
                acting.check_agent(self.cfg, known[id], self.decoding)
        return known

    @functools.cached_property
    def _mixed(self) -> dict[tuple[str, ...], dict[str, Codec]]:
        return {}

    def codec(self, card: EnvironmentCard) -> Codec:
        """The codec to act in an environment with: what the model was trained on is padded as it was then."""
        own = bucket_for(card.observation_space, card.action_space)

        def holds(bucket: Bucket) -> bool:
            return join_two(bucket, own, pad_parts=True) == bucket

        if (trained := self.buckets.get(card.id)) and holds(trained):
            return Codec(card, trained)
        if not own.grids:
            return Codec(card, own)
        # An image of another environment: the nearest of the sides that were trained.
        sides = {bucket: [(grid.side, grid.channels) for grid in bucket.grids] for bucket in self._trained}
        return Codec(card, min(filter(holds, sides), key=lambda bucket: (sides[bucket], bucket), default=own))

    def card(self, environment: str | EnvironmentCard | EnvironmentSpec | Environment) -> EnvironmentCard:
        """What the policy knows of an environment.

        Args:
          environment: an id; an environment of such an id, or its spec, which are compared with what the policy knows;
            a card is given back.

        Raises:
          PolicyError: an id without a card.
          CardError: the environment is not as it was when the policy was trained.
        """
        if isinstance(environment, EnvironmentCard):
            return environment
        spec = environment.spec if isinstance(environment, Environment) else environment
        if not isinstance(spec, str | EnvironmentSpec):
            raise PolicyError(f"got {environment!r}, expected an id, an environment, its spec or a card")
        id = spec if isinstance(spec, str) else spec.id
        if id not in self.cards:
            near = difflib.get_close_matches(id, self.ids, n=3, cutoff=0.3) or self.ids[:3]
            raise PolicyError(
                f"the policy has no card of {id!r}; it has {', '.join(near) or 'none'}, {len(self.ids)} in all "
                "(Policy.ids). Pass the card of an environment it was not trained in"
            )
        if isinstance(spec, EnvironmentSpec):
            check_matches(self.cards[id], spec, "the policy")
        return self.cards[id]

    def save(self, directory: str | os.PathLike[str], dtype: WeightsDtype = "float32") -> None:
        """Writes the policy; one that was there stays until the new one is complete, whatever interrupts this.

        Args:
          directory: the folder to make, or one that holds a policy, which is replaced; a symbolic link is followed.
          dtype: of the numbers in the file; `"bfloat16"` rounds them, to half of the size. They are read as float32.

        Raises:
          PolicyError: something else is there, a parameter is NaN or infinite, or an unknown dtype.
        """
        if dtype not in typing.get_args(WeightsDtype):
            raise PolicyError(f"dtype is {dtype!r}, expected {' or '.join(typing.get_args(WeightsDtype))}")
        params = rounded(self.params, dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not np.isfinite(leaf).all():
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise PolicyError(f"the parameter {name} is not finite: nothing was saved; go back to a checkpoint")
        target = _folder(directory)
        if target.exists() and not target.is_dir():
            raise PolicyError(f"{target} is a file: choose a folder")
        target.mkdir(parents=True, exist_ok=True)
        with files.lock_folder(target):
            present = {path.name for path in target.iterdir()}
            if _FILE not in present and not all(map(_OURS.fullmatch, present)):
                raise PolicyError(f"{target} exists and holds no policy: choose another folder")
            weights = f"params-{secrets.token_hex(4)}"
            with files.replacing(target / weights) as aside:
                checkpoints.save_params(aside, params)
            description = {
                "schema": _SCHEMA,
                "weights": weights,
                "dtype": dtype,
                "model": dataclasses.asdict(self.cfg),
                "decoding": self.decoding,
                "cards": {id: card.to_json() for id, card in self.cards.items()},
                "buckets": {id: dataclasses.asdict(bucket) for id, bucket in self.buckets.items()},
            }
            files.write(target / _FILE, json.dumps(description, indent=1))
            for name in present - {_FILE}:
                if _OURS.fullmatch(name):
                    files.remove(target / name)


def rounded(params: Params, dtype: WeightsDtype) -> Params:
    """Parameters as NumPy arrays of another dtype, which compare with those of a policy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)


def load(directory: str | os.PathLike[str]) -> Policy:
    """Reads a policy that was saved, or one that is part of the package.

    >>> import jax, ldm_jax
    >>> cfg = ldm_jax.SIZES["nano"]
    >>> params = ldm_jax.make_model(cfg).init(jax.random.key(0))
    >>> ldm_jax.Policy(cfg, params, cards={}).save("policy")
    >>> ldm_jax.load("policy")  # doctest: +ELLIPSIS
    Policy(...M parameters, window ..., 0 environments, decoding 'card')

    Args:
      directory: the folder that `Policy.save` wrote; or a name in `released`, where no such folder is here.

    Returns:
      The policy.

    Raises:
      PolicyError: no policy there, or one of another version.
      CheckpointError: damaged weights, or weights of another size than the configuration says.
    """
    target = _folder(directory)
    if not target.exists() and directory in released():
        target = _RELEASED / directory
    if target.is_file():
        hint = f": pass {target.parent}" if (target.parent / _FILE).exists() else _EXAMPLE
        raise PolicyError(f"{target} is a file, expected the folder of a policy{hint}")
    if not target.is_dir():
        names = f", or {' or '.join(map(repr, released()))}" if released() else ""
        raise PolicyError(f"{target} holds no policy: there is no such folder; expected one{_EXAMPLE}{names}")
    with files.lock_folder(target, shared=True):
        return _read(target, _describe(target))


def released() -> tuple[str, ...]:
    """The names of the policies that are part of the package, with a card each, `README.md` beside the weights."""
    return tuple(sorted(path.parent.name for path in _RELEASED.glob(f"*/{_FILE}")))


def _describe(target: pathlib.Path) -> dict[str, typing.Any]:
    path = target / _FILE
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        inside = target / "policy"  # of a run
        hint = f"; pass {inside}" if (inside / _FILE).exists() else f"; expected a folder{_EXAMPLE}"
        raise PolicyError(f"{target} holds no policy: there is no {path}{hint}") from error
    except ValueError as error:
        raise PolicyError(f"{path} is damaged: {error}") from error
    schema = description.get("schema") if isinstance(description, dict) else None
    if schema != _SCHEMA:
        raise PolicyError(f"{path} has schema {schema}, expected {_SCHEMA}: train the policy anew with this version")
    return description


def _read(target: pathlib.Path, description: dict[str, typing.Any]) -> Policy:
    path = target / _FILE
    try:
        cfg = ModelConfig(**description["model"])
    except TypeError as error:
        raise ConfigError(f"{path} describes a model of another version: {error}") from error
    except KeyError as error:
        raise PolicyError(f"{path} is damaged: it lacks {error}") from error
    try:
        weights, decoding = target / description["weights"], description["decoding"]
        dtype = description.get("dtype", "float32")  # there was no other before it was written down
        cards = {id: EnvironmentCard.from_json(card) for id, card in description["cards"].items()}
        buckets = {id: _bucket(**bucket) for id, bucket in description["buckets"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{path} is damaged: {error!r}") from error
    shapes = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    saved = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), checkpoints.load_params(weights, saved))
    return Policy(cfg, params, cards, decoding, buckets)


def _bucket(grids: list[dict[str, typing.Any]], texts: list[int], **widths: int) -> Bucket:
    return Bucket(grids=tuple(Grid(**grid) for grid in grids), texts=tuple(texts), **widths)


def _folder(directory: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(os.path.realpath(os.path.expanduser(directory)))

"""A saved policy: one self-describing folder with weights, configuration and the cards of its environments."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import pathlib
import shutil
import typing

import jax

from ldm_jax import acting
from ldm_jax.cards import EnvironmentCard
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Model, Params, make_model
from ldm_jax.training import checkpoints
from ldm_jax.types import Agent

_SCHEMA = 1


class PolicyError(LdmError, ValueError):
    """A folder that holds no policy, or an environment that the policy does not know."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained model and what it needs to act.

    Attributes:
      cfg: shapes of the model.
      params: its parameters, a nested dict of arrays.
      cards: of the environments it was trained in, by id.
      decoding: how actions are taken from their distribution unless one says otherwise.
    """

    cfg: ModelConfig
    params: Params
    cards: dict[str, EnvironmentCard]
    decoding: acting.Decoding = "greedy"

    @functools.cached_property
    def model(self) -> Model:
        """The network as pure functions."""
        return make_model(self.cfg)

    def agent(self, environment: str | EnvironmentCard, decoding: acting.Decoding | None = None) -> Agent:
        """The policy as an agent in one environment; call its step with `params`.

        Args:
          environment: an id the policy was trained in, or the card of any environment.
          decoding: default: the policy's.

        Returns:
          The agent.

        Raises:
          PolicyError: an id without a card.
          ConfigError: the environment's spaces do not fit the model.
        """
        if isinstance(environment, str):
            if environment not in self.cards:
                near = difflib.get_close_matches(environment, self.cards, n=3, cutoff=0.3)
                raise PolicyError(
                    f"the policy has no card of {environment!r}; it has {', '.join(near or sorted(self.cards))}. "
                    "Pass the card of an environment it was not trained in"
                )
            environment = self.cards[environment]
        return acting.make_agent(self.model, self.cfg, Codec(environment), decoding or self.decoding)


def save(directory: str | os.PathLike[str], policy: Policy) -> None:
    """Writes a policy; what was in its place stays until the new one is complete.

    Args:
      directory: the folder to make, or to replace where it holds a policy.
      policy: what to write.

    Raises:
      PolicyError: the folder exists and holds something else.
    """
    target = pathlib.Path(directory)
    if target.exists() and not (target / "policy.json").is_file():
        raise PolicyError(f"{target} exists and holds no policy: choose another folder")
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    checkpoints.save_params(aside / "params", policy.params)
    description = {
        "schema": _SCHEMA,
        "model": dataclasses.asdict(policy.cfg),
        "decoding": policy.decoding,
        "cards": {name: card.to_json() for name, card in policy.cards.items()},
    }
    (aside / "policy.json").write_text(json.dumps(description, indent=1))
    if target.exists():
        old = target.with_name(f".{target.name}.old.{os.getpid()}")
        target.rename(old)
        aside.rename(target)
        shutil.rmtree(old)
    else:
        aside.rename(target)


def load(directory: str | os.PathLike[str]) -> Policy:
    """Reads a policy that `save` wrote.

    Args:
      directory: the folder.

    Returns:
      The policy.

    Raises:
      PolicyError: no policy there, or one of another version.
      CheckpointError: damaged weights, or weights of another size than the configuration says.
    """
    path = pathlib.Path(directory) / "policy.json"
    try:
        description: dict[str, typing.Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise PolicyError(f"{directory} holds no policy: there is no {path}") from error
    except json.JSONDecodeError as error:
        raise PolicyError(f"{path} is damaged: {error}") from error
    if description.get("schema") != _SCHEMA:
        raise PolicyError(f"{path} has schema {description.get('schema')}, expected {_SCHEMA}: save the policy again")
    try:
        cfg = ModelConfig(**description["model"])
    except TypeError as error:
        raise ConfigError(f"{path} describes a model of another version: {error}") from error
    shapes = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    return Policy(
        cfg=cfg,
        params=checkpoints.load_params(pathlib.Path(directory) / "params", shapes),
        cards={name: EnvironmentCard.from_json(card) for name, card in description["cards"].items()},
        decoding=description["decoding"],
    )

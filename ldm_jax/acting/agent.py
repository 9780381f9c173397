"""An agent: one token in, one action out, the history in a ring buffer."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.acting.decoding import Decoding, check_decoding, decode, resolve_decoding
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError, LdmError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.decoder import Cache, clear, init_cache
from ldm_jax.model.network import Inputs, Model, Params, make_model
from ldm_jax.spaces import get, leaf_shape_dtype, leaves, zeros
from ldm_jax.types import Agent, Array, PyTree, TimeStep


class ActingError(LdmError, ValueError):
    """A time step, or a choice of rows, that does not fit the agent it was given to."""


class AgentState(typing.NamedTuple):
    """What the agent remembers of its rows; a pytree.

    Attributes:
      cache: keys and values of the last W steps.
      previous_action: `[B, ...]`, as executed.
    """

    cache: Cache
    previous_action: PyTree


def make_agent(cfg: ModelConfig, codec: Codec, decoding: Decoding, temperature: float = 1.0) -> Agent:
    """An agent that acts in one environment; its params are the model's.

    A row starts with an empty context and keeps it over its episodes. Agents of equal arguments are equal, so that
    programs compiled for one serve the others.

    Args:
      cfg: shapes of the model.
      codec: of the environment.
      decoding: how actions are taken from their distribution.
      temperature: of `sample`, see `decode`.

    Returns:
      The agent; what it records of a step is `()`.

    Raises:
      ConfigError: the environment does not fit the model, the model is one that does not act, an unknown decoding, or
        a temperature that is not a positive number.
    """
    check_agent(cfg, codec, decoding)
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}, expected a positive number; near 0, use mode")
    return Agent(_Init(cfg, codec), _Step(cfg, codec, resolve_decoding(decoding, codec.card), temperature))


def check_agent(cfg: ModelConfig, codec: Codec, decoding: Decoding) -> None:
    """Checks that a model can act in an environment.

    Args:
      cfg: shapes of the model.
      codec: of the environment.
      decoding: how actions are taken from their distribution.

    Raises:
      ConfigError: the environment does not fit the model, the model is one that does not act, or an unknown decoding.
    """
    check_decoding(decoding)
    if cfg.tokens_per_step != 1:
        raise ConfigError(
            f"the model has tokens_per_step={cfg.tokens_per_step}, which is there to compare training with: "
            "train one with tokens_per_step=1 to act"
        )
    try:
        cfg.check_fits(codec.bucket, codec.card.id, max(codec.observation_layout.sizes, default=0))
    except ConfigError as error:
        parts = {name: getattr(codec.card, f"{name}_space") for name in ("observation", "action")}
        told = [f"{name} {leaf.name} {_short(leaf.space)}" for name, space in parts.items() for leaf in leaves(space)]
        more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        raise ConfigError(f"{error}. Its parts are {', '.join(told[:_TOLD])}{more}") from None


_TOLD = 8
"""Parts of an environment that an error names."""


def _short(space: gymnasium.Space) -> str:
    """A leaf space in a few words: its shape, or its choices."""
    if isinstance(space, gymnasium.spaces.Box):
        return f"{space.dtype}{list(space.shape)}"
    text = " ".join(str(space).split())
    return text if len(text) <= 60 else f"{type(space).__name__}{list(space.shape or ())}"


class _ByValue:
    """A function that is equal to another whose arguments say the same, and that can be copied and pickled."""

    _arguments: tuple[typing.Any, ...]

    @functools.cached_property
    def _key(self) -> str:
        return json.dumps([type(self).__name__, *map(_said, self._arguments)], sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByValue) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[typing.Any, ...]:
        return type(self), self._arguments


def _said(argument: ModelConfig | Codec | str | float) -> typing.Any:
    if isinstance(argument, Codec):
        # Scores of others are on the card too, and have no say in what is done.
        card = {name: part for name, part in argument.card.to_json().items() if not name.endswith("_returns")}
        return [card, dataclasses.asdict(argument.bucket)]
    return dataclasses.asdict(argument) if isinstance(argument, ModelConfig) else argument


class _Init(_ByValue):
    """`init` of an agent."""

    __name__ = "init"

    def __init__(self, cfg: ModelConfig, codec: Codec):
        self._arguments = (cfg, codec)

    def __call__(self, batch_size: int) -> AgentState:
        cfg, codec = self._arguments
        previous = jax.tree.map(jnp.array, zeros(codec.card.action_space, (batch_size,)))
        return AgentState(init_cache(cfg, batch_size), previous)


@functools.lru_cache(maxsize=4)
def _model(cfg: ModelConfig) -> Model:
    """One model for the agents of all environments."""
    return make_model(cfg)


class _Step(_ByValue):
    """`step` of an agent."""

    __name__ = "step"  # in what JAX logs of compiling it

    def __init__(self, cfg: ModelConfig, codec: Codec, decoding: Decoding, temperature: float):
        self._arguments = (cfg, codec, decoding, float(temperature))

    def __call__(
        self, params: Params, state: AgentState, timestep: TimeStep, key: Array
    ) -> tuple[AgentState, PyTree, tuple[()]]:
        cfg, codec, decoding, temperature = self._arguments
        timestep = jax.tree.map(jnp.asarray, timestep)
        rows = state.cache.length.shape[0]
        check_timestep(codec, timestep, rows)
        features = codec.features(timestep, state.previous_action, state.cache.length > 0)
        inputs = Inputs(
            features=jax.tree.map(lambda leaf: leaf[:, None], features),
            signature=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), codec.signature),
        )
        predictions, cache = _model(cfg).apply(params, {"rows": inputs}, state.cache)
        assert cache is not None  # one was given
        now = jax.tree.map(lambda leaf: leaf[:, 0], predictions["rows"])
        action = codec.action(decode(cfg, now, decoding, key, temperature))
        return AgentState(cache, action), action, ()


def check_timestep(codec: Codec, timestep: TimeStep, rows: int) -> None:
    """Checks that a time step is one of so many rows of an environment; reads shapes alone.

    Args:
      codec: of the environment.
      timestep: what is to be acted on.
      rows: B.

    Raises:
      ActingError: a part is missing, of another shape or kind, or a mask came or went.
    """
    card = codec.card
    expected: dict[str, jax.ShapeDtypeStruct] = {}
    found: dict[str, Array] = {}
    for leaf in leaves(card.observation_space):
        name = f"observation, part {leaf.name!r},"
        expected[name] = leaf_shape_dtype(leaf.space)
        try:
            found[name] = get(timestep.observation, leaf.path)
        except (KeyError, IndexError, TypeError) as error:
            raise ActingError(
                f"a time step given to the agent of {card.id} has no {name} expected by {card.observation_space}"
            ) from error
    for field in ("reward", "terminated", "truncated", "first"):
        expected[field] = jax.ShapeDtypeStruct((), np.float32 if field == "reward" else np.bool_)
        found[field] = getattr(timestep, field)
    if timestep.action_mask is not None:
        expected["action_mask"] = jax.ShapeDtypeStruct((codec.action_layout.flat_choices,), np.bool_)
        found["action_mask"] = timestep.action_mask
    for name, want in expected.items():
        value = found[name]
        if value.shape != (rows, *want.shape) or not np.can_cast(value.dtype, want.dtype, "same_kind"):
            raise ActingError(
                f"the {name} given to the agent of {card.id} is {value.dtype}{list(value.shape)}, expected "
                f"{want.dtype}{[rows, *want.shape]}: each leaf of a time step has the agent's {rows} rows in front"
            )
    if (timestep.action_mask is not None) != card.statistics.masked:
        now, then = ("no", "an") if card.statistics.masked else ("an", "no")
        raise ActingError(
            f"a time step given to the agent of {card.id} has {now} action_mask, and had {then} action_mask when the "
            "data of its card were collected: act in the environment as it was, or collect and train anew"
        )


def forget(state: AgentState, rows: Array) -> AgentState:
    """Makes some rows as `init` makes them, whatever they had seen.

    Args:
      state: of B rows.
      rows: `bool [B]`, true for those that are to forget.

    Returns:
      The state.

    Raises:
      ActingError: `rows` is something else, such as the indices of rows.
    """
    count, rows = state.cache.length.shape[0], jnp.asarray(rows)
    if rows.shape != (count,) or rows.dtype != np.bool_:
        raise ActingError(f"rows is {rows}, expected {count} booleans, true for the rows that are to forget")

    def clear_leaf(leaf: Array) -> Array:
        # Selected, not multiplied: what is forgotten may be NaN.
        return jnp.where(rows.reshape(count, *[1] * (leaf.ndim - 1)), jnp.zeros_like(leaf), leaf)

    return AgentState(clear(state.cache, rows), jax.tree.map(clear_leaf, state.previous_action))

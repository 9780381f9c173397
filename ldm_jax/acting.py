"""Acting with a model: one token in, one action out, the history in a ring buffer."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp

from ldm_jax.encoding.actions import Slots
from ldm_jax.encoding.codec import Codec
from ldm_jax.errors import ConfigError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.decoder import Cache
from ldm_jax.model.heads import Predictions, bin_centers
from ldm_jax.model.network import Inputs, Model, Params
from ldm_jax.spaces import zeros
from ldm_jax.types import Agent, Array, PyTree, TimeStep

Decoding = typing.Literal["greedy", "mode", "sample"]
"""How an action is taken from its distribution: `greedy` takes the most likely choice and the mean of the bins, `mode`
the most likely choice and bin, `sample` draws both."""


class AgentState(typing.NamedTuple):
    """What the agent remembers of its rows; a pytree.

    Attributes:
      cache: keys and values of the last W steps.
      previous_action: `[B, ...]`, as executed.
    """

    cache: Cache
    previous_action: PyTree


def decode(cfg: ModelConfig, predictions: Predictions, decoding: Decoding, key: Array) -> Slots:
    """Takes an action from the predicted distributions.

    Args:
      cfg: the bins.
      predictions: `[..., K, V]` and `[..., C, bins]`.
      decoding: how.
      key: typed key; used by `sample`.

    Returns:
      Slots `[..., K]` and `[..., C]`, the continuous ones within -1..1.
    """
    centers = jnp.asarray(bin_centers(cfg))
    choice_key, bin_key = jax.random.split(key)
    if predictions.choices.shape[-1] == 0:
        choices = jnp.zeros(predictions.choices.shape[:-1], jnp.int32)
    elif decoding == "sample":
        choices = jax.random.categorical(choice_key, predictions.choices)
    else:
        choices = predictions.choices.argmax(-1)
    if decoding == "greedy":
        numbers = jax.nn.softmax(predictions.bins, -1) @ centers
    elif decoding == "mode":
        numbers = centers[predictions.bins.argmax(-1)]
    else:
        numbers = centers[jax.random.categorical(bin_key, predictions.bins)]
    return Slots(choices.astype(jnp.int32), jnp.clip(numbers, -1.0, 1.0))


def make_agent(model: Model, cfg: ModelConfig, codec: Codec, decoding: Decoding) -> Agent:
    """An agent that acts in one environment; its params are the model's.

    A row starts with an empty context and keeps it over its episodes.

    Args:
      model: the pure functions.
      cfg: the model's configuration.
      codec: of the environment.
      decoding: how actions are taken from their distribution.

    Returns:
      The agent; what it records of a step is `()`.

    Raises:
      ConfigError: the environment does not fit the model, the model is one that does not act, or an unknown decoding.
    """
    if decoding not in typing.get_args(Decoding):
        raise ConfigError(f"decoding is {decoding!r}, expected one of {', '.join(typing.get_args(Decoding))}")
    if cfg.tokens_per_step != 1:
        raise ConfigError(
            f"the model has tokens_per_step={cfg.tokens_per_step}, which is there to compare training with: "
            "train one with tokens_per_step=1 to act"
        )
    cfg.check_fits(codec.bucket, codec.card.id)

    def init(batch_size: int) -> AgentState:
        previous = jax.tree.map(jnp.asarray, zeros(codec.card.action_space, (batch_size,)))
        return AgentState(model.init_cache(batch_size), previous)

    def step(
        params: Params, memory: AgentState, timestep: TimeStep, key: Array
    ) -> tuple[AgentState, PyTree, tuple[()]]:
        timestep = jax.tree.map(jnp.asarray, timestep)
        features = codec.features(timestep, memory.previous_action, memory.cache.length > 0)
        rows = timestep.reward.shape[0]
        inputs = Inputs(
            features=jax.tree.map(lambda leaf: leaf[:, None], features),
            signature=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), codec.signature),
        )
        predictions, cache = model.apply(params, {"rows": inputs}, memory.cache)
        assert cache is not None  # one was given
        now = jax.tree.map(lambda leaf: leaf[:, 0], predictions["rows"])
        action = codec.action(decode(cfg, now, decoding, key))
        return AgentState(cache, action), action, ()

    return Agent(init, step)


def forget(memory: AgentState, rows: Array) -> AgentState:
    """Empties the context of some rows.

    Args:
      memory: of B rows.
      rows: `bool [B]`, which to empty.

    Returns:
      The memory.
    """
    cache = memory.cache
    return memory._replace(cache=cache._replace(length=jnp.where(rows, 0, cache.length)))

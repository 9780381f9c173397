"""The decoder's weights in the layout of Hugging Face's Llama, and back.

The decoder is a Llama without vocabulary: `transformers.LlamaModel` reads the same tokens as `inputs_embeds` and gives
the same states after its last norm, as long as no window is longer than what attention sees. Only NumPy is needed here.
"""

from __future__ import annotations

import collections.abc
import functools
import operator
import typing

import jax
import numpy as np

from ldm_jax.errors import ConfigError
from ldm_jax.model.config import ModelConfig
from ldm_jax.model.network import Params, make_model
from ldm_jax.types import Array, PyTree

_NAMES = {
    "decoder/blocks/attention_norm/scale": "layers.{}.input_layernorm.weight",
    "decoder/blocks/attention/query/kernel": "layers.{}.self_attn.q_proj.weight",
    "decoder/blocks/attention/key/kernel": "layers.{}.self_attn.k_proj.weight",
    "decoder/blocks/attention/value/kernel": "layers.{}.self_attn.v_proj.weight",
    "decoder/blocks/attention/out/kernel": "layers.{}.self_attn.o_proj.weight",
    "decoder/blocks/feed_forward_norm/scale": "layers.{}.post_attention_layernorm.weight",
    "decoder/blocks/gate/kernel": "layers.{}.mlp.gate_proj.weight",
    "decoder/blocks/up/kernel": "layers.{}.mlp.up_proj.weight",
    "decoder/blocks/down/kernel": "layers.{}.mlp.down_proj.weight",
    "norm/scale": "norm.weight",
}
"""Our parameters and Llama's: ours have all layers stacked, and matrices from inputs to outputs; its are transposed."""
_UNREAD = ("embed_tokens.weight", "lm_head.weight")
"""Of a Llama's vocabulary, which we have not."""


def llama_config(cfg: ModelConfig) -> dict[str, typing.Any]:
    """Keyword arguments of `transformers.LlamaConfig` for the decoder of a configuration.

    Args:
      cfg: shapes of the model.

    Returns:
      The arguments; a vocabulary of one stands for ours of none.

    Raises:
      ConfigError: Llama has no counterpart (`qk_norm`).
    """
    _check(cfg)
    return {
        "vocab_size": 1,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.feed_forward,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "max_position_embeddings": cfg.window,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def to_llama(cfg: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The state dict of a `LlamaModel` with the weights of our decoder and last norm.

    Args:
      cfg: shapes of the model.
      params: all parameters of it, or anything of the same structure, such as gradients.

    Returns:
      `float32` arrays by Llama's names; `torch.from_numpy` takes them.

    Raises:
      ConfigError: Llama has no counterpart (`qk_norm`).
    """
    _check(cfg)
    state = {"embed_tokens.weight": np.zeros((1, cfg.width), np.float32)}
    for path, name in _NAMES.items():
        value = np.asarray(_at(params, path), np.float32)
        for layer, weight in enumerate(value if "{}" in name else [value]):
            state[name.format(layer)] = weight.T.copy()
    return state


def from_llama(cfg: ModelConfig, state: collections.abc.Mapping[str, Array]) -> Params:
    """Our decoder and last norm with the weights of a Llama.

    Args:
      cfg: shapes of the model that is to hold them.
      state: arrays by the names of `LlamaModel` or `LlamaForCausalLM`; embeddings and the last matrix are not read.

    Returns:
      The entries `decoder` and `norm` of parameters, float32 NumPy arrays: `params | from_llama(cfg, state)`.

    Raises:
      ConfigError: Llama has no counterpart (`qk_norm`), or weights that are missing, too many, or of other shapes.
    """
    _check(cfg)
    given = {name.removeprefix("model."): value for name, value in state.items()}
    expected = {name.format(layer) for name in _NAMES.values() for layer in range(cfg.layers)}
    if expected != given.keys() - _UNREAD:
        lacking, beside = sorted(expected - given.keys()), sorted(given.keys() - expected - {*_UNREAD})
        raise ConfigError(
            f"got the state of another model than a Llama with {cfg.layers} layers and no biases: it lacks "
            f"{lacking[:3]} and has {beside[:3]} beside; make the configuration from that of the Llama"
        )

    def read(path: tuple[jax.tree_util.DictKey, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = _NAMES["/".join(key.key for key in path)]
        weights = [given[name.format(layer)] for layer in range(shape.shape[0] if "{}" in name else 1)]
        want = (shape.shape[1:] if "{}" in name else shape.shape)[::-1]
        if wrong := [tuple(weight.shape) for weight in weights if tuple(weight.shape) != want]:
            raise ConfigError(
                f"{name.format('*')} is {wrong[0]}, expected {want}: make the configuration from that of the Llama"
            )
        stacked = np.stack([np.asarray(weight, np.float32).T for weight in weights])
        return stacked if "{}" in name else stacked[0]

    shapes = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(read, {part: shapes[part] for part in ("decoder", "norm")})


def _at(params: Params, path: str) -> PyTree:
    return functools.reduce(operator.getitem, path.split("/"), typing.cast(PyTree, params))


def _check(cfg: ModelConfig) -> None:
    if cfg.qk_norm:
        raise ConfigError("qk_norm is on, which Llama does not have: make the model with qk_norm=False")

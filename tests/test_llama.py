"""The decoder against an independent implementation: Hugging Face's Llama, forward and backward."""

import dataclasses

import examples
import jax
import numpy as np
import pytest
from flax import nnx

from ldm_jax.errors import ConfigError
from ldm_jax.model.config import SIZES
from ldm_jax.model.decoder import Decoder
from ldm_jax.model.layers import Norm
from ldm_jax.model.llama import from_llama, llama_config, to_llama
from ldm_jax.model.network import make_model

torch = pytest.importorskip("torch", reason="the extra `peers` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `peers` is not installed")

NANO = dataclasses.replace(SIZES["nano"], qk_norm=False, window=64, layers=3, heads=4)
LLAMAS = {
    "nano": NANO,
    "grouped": dataclasses.replace(NANO, kv_heads=2, heads=4, feed_forward=48),
    "one key": dataclasses.replace(NANO, layers=2, kv_heads=1, rope_base=500_000.0),
    "32m, two layers": dataclasses.replace(SIZES["32m"], qk_norm=False, layers=2, kv_heads=4),
}


def decode(cfg, params, x_BTD):
    """Our decoder and last norm, on tokens."""
    graph, state = nnx.split(nnx.eval_shape(lambda: (Decoder(cfg, nnx.Rngs(0)), Norm(cfg.width))))
    nnx.replace_by_pure_dict(state, {0: params["decoder"], 1: params["norm"]})
    decoder, norm = nnx.merge(graph, state)
    return norm(decoder(x_BTD, None)[0])


def random_params(cfg, seed):
    """Parameters of decoder and norm."""
    params = examples.random_params(make_model(cfg), seed)
    return {part: params[part] for part in ("decoder", "norm")}


def llama_of(cfg, state):
    """The other implementation."""
    llama = transformers.LlamaModel(transformers.LlamaConfig(**llama_config(cfg), attn_implementation="eager"))
    llama.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    return llama


def close(one, two, tolerance):
    """Whether two arrays agree, relative to the size of the second one's numbers."""
    two = np.asarray(two)
    np.testing.assert_allclose(np.asarray(one), two, atol=tolerance * max(1.0, np.sqrt(np.mean(two**2))), rtol=0)


@pytest.mark.parametrize("name", LLAMAS)
def test_states_logits_and_gradients_are_those_of_llama(name):
    cfg = LLAMAS[name]
    params, rng = random_params(cfg, 0), np.random.default_rng(1)
    x = rng.normal(0, 1, (2, 60, cfg.width)).astype(np.float32)
    matrix = (rng.normal(0, 1, (cfg.width, 50)) / np.sqrt(cfg.width)).astype(np.float32)
    direction = rng.normal(0, 1, (2, 60, 50)).astype(np.float32)

    def product(params, x):
        states = decode(cfg, params, x)
        logits = states @ matrix
        return (logits * direction).sum(), (states, logits)

    ours = jax.jit(jax.value_and_grad(product, argnums=(0, 1), has_aux=True))
    (_, (states, logits)), (gradients, x_gradient) = ours(params, x)

    llama, tokens = llama_of(cfg, to_llama(cfg, params)), torch.from_numpy(x).requires_grad_()
    other_states = llama(inputs_embeds=tokens).last_hidden_state
    other_logits = other_states @ torch.from_numpy(matrix)
    (other_logits * torch.from_numpy(direction)).sum().backward()
    close(states, other_states.detach(), 1e-4)
    close(logits, other_logits.detach(), 1e-4)
    close(x_gradient, tokens.grad, 1e-4)
    expected = {key: value.grad.numpy() for key, value in llama.named_parameters() if value.grad is not None}
    found = to_llama(cfg, gradients)
    assert expected.keys() == found.keys() - {"embed_tokens.weight"}
    for key, value in expected.items():
        close(found[key], value, 2e-4)


@pytest.mark.parametrize("name", ["nano", "grouped"])
def test_a_llama_that_was_made_elsewhere_gives_the_same_logits_here(name):
    cfg = LLAMAS[name]
    settings = llama_config(cfg) | {"vocab_size": 30, "initializer_range": 0.2}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    state = {key: value.detach().numpy() for key, value in llama.state_dict().items()}
    words = np.random.default_rng(2).integers(0, 30, (3, 40))
    states = decode(cfg, from_llama(cfg, state), state["model.embed_tokens.weight"][words])
    logits = states @ state["lm_head.weight"].T
    close(logits, llama(input_ids=torch.from_numpy(words)).logits.detach(), 1e-4)


def test_weights_survive_the_way_there_and_back():
    cfg = LLAMAS["grouped"]
    params = random_params(cfg, 3)
    back = from_llama(cfg, to_llama(cfg, params))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_llama_that_does_not_fit_names_the_way_out():
    cfg = LLAMAS["nano"]
    state = to_llama(cfg, random_params(cfg, 4))
    with pytest.raises(ConfigError, match="qk_norm=False"):
        llama_config(SIZES["nano"])
    with pytest.raises(ConfigError, match=r"2 layers .* has \['layers\.2\.input"):
        from_llama(dataclasses.replace(cfg, layers=2), state)
    with pytest.raises(ConfigError, match=r"lacks \['norm\.weight'\]"):
        from_llama(cfg, {name: value for name, value in state.items() if name != "norm.weight"})
    with pytest.raises(ConfigError, match=r"down_proj\.weight is \(32, 64\), expected \(32, 96\)"):
        from_llama(dataclasses.replace(cfg, feed_forward=96), state)

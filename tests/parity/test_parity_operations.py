"""The lowest rungs: norms, rotary embedding, feed-forward blocks and single decoder layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from closeness import assert_close
from hf_reference import Pair
from transformers.models.mllama.configuration_mllama import MllamaTextConfig as HfTextConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaRotaryEmbedding,
    MllamaTextRMSNorm,
    _prepare_cross_attention_mask,
    apply_rotary_pos_emb,
)

from mllama_jax.configs import MllamaTextConfig
from mllama_jax.decoder import CrossAttentionLayer, DecoderInputs, SelfAttentionLayer, TextMLP
from mllama_jax.execution import Execution
from mllama_jax.layers import ACTIVATIONS, RMSNorm
from mllama_jax.masks import CausalMask, TileMask
from mllama_jax.rope import inverse_frequencies, rotary_table, rotate

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def test_rms_norm():
    x, scale = 3 * normal(2, 5, 14), normal(14)
    x[0, 0] *= 1e-3  # where epsilon decides
    reference = MllamaTextRMSNorm(14, eps=1e-3)
    reference.weight.data = torch.from_numpy(scale)
    ours = RMSNorm(1e-3, Execution()).apply({"params": {"scale": scale}}, x)
    expected = reference(torch.from_numpy(x))
    assert_close(ours, expected)
    assert_close(ours[0, 0], expected[0, 0])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str):
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    assert_close(ACTIVATIONS[name](x), ACT2FN[name](torch.from_numpy(x)), name)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "llama3",
            "factor": 3.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 300,
        },
    ],
    ids=["default", "linear", "llama3 as released", "llama3"],
)
def test_rotary_embedding(scaling: dict):
    shape = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {**shape, "rope_theta": 500_000.0, "rope_scaling": scaling}
    reference = MllamaRotaryEmbedding(HfTextConfig(**settings))
    speeds = inverse_frequencies(MllamaTextConfig(**settings))
    np.testing.assert_allclose(speeds, reference.inv_freq.numpy(), rtol=1e-6)

    q, k = normal(2, 4, 3, 128), normal(2, 4, 1, 128)
    # Within 500 turns float32's angles agree to the tolerance; beyond, the last bit decides.
    positions = np.array([[0, 1, 7, 500], [3, 2, 90, 301]])
    cos, sin = reference(torch.from_numpy(q), torch.from_numpy(positions))
    expected = apply_rotary_pos_emb(
        torch.from_numpy(q), torch.from_numpy(k), cos, sin, unsqueeze_dim=2
    )
    table = rotary_table(jnp.asarray(positions), speeds)
    for x, rotated, name in ((q, expected[0], "queries"), (k, expected[1], "keys")):
        assert_close(rotate(jnp.asarray(x), *table), rotated, name)
        for t in range(4):  # as in decoding
            of_token = (part[:, t : t + 1] for part in table)
            found = rotate(jnp.asarray(x[:, t : t + 1]), *of_token)
            assert_close(found, rotated[:, t : t + 1], f"{name}, token {t}")


def test_plain_rotary_embedding_without_scaling():
    """transformers 4.54.1 cannot do this one: it needs ``rope_scaling``."""
    shape = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    plain = inverse_frequencies(MllamaTextConfig(**shape, rope_scaling=None))
    named = inverse_frequencies(MllamaTextConfig(**shape, rope_scaling={"rope_type": "default"}))
    np.testing.assert_array_equal(plain, named)
    np.testing.assert_allclose(plain, 500_000.0 ** -(np.arange(6) / 6), rtol=1e-6)


@pytest.mark.parametrize("pair", ["aperiodic", "periodic"])
def test_text_mlp(pair: str, request: pytest.FixtureRequest):
    pair: Pair = request.getfixturevalue(pair)
    x = normal(2, 3, pair.text_config.hidden_size)
    reference, params = pair.decoder_layer(4)
    ours = TextMLP(pair.text_config, Execution())
    with torch.no_grad():
        expected = reference.mlp(torch.from_numpy(x))
    assert_close(ours.apply({"params": params["mlp"]}, x), expected)


B, T, TILES, PATCHES = 2, 8, 3, 5


def layer_inputs(pair: Pair) -> tuple[np.ndarray, np.ndarray, DecoderInputs, dict]:
    """A state, the real tokens, and what the layers share: ours and the reference's."""
    config = pair.text_config
    x = normal(B, T, config.hidden_size)
    states = normal(B, TILES * PATCHES, config.hidden_size)
    positions = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 5, 6, 9, 30, 31]])
    valid = np.ones((B, T), bool)
    valid[1, :2] = False
    tiles = RANDOM.random((B, T, TILES)) < 0.5
    tiles[0, :3] = False
    tiles[:, 3:, 1] = True
    sees_image = tiles.any(-1)
    cos, sin = rotary_table(jnp.asarray(positions), inverse_frequencies(config))
    ours = DecoderInputs(
        cos=cos,
        sin=sin,
        mask=CausalMask(jnp.arange(T), jnp.asarray(valid)),
        start=jnp.zeros((), jnp.int32),
        cache=None,
        cross_attention_states=jnp.asarray(states),
        cross_mask=TileMask(jnp.asarray(tiles | ~sees_image[..., None]), PATCHES),
        sees_image_BT=jnp.asarray(sees_image),
    )
    text_model = pair.reference.model.language_model
    cross_mask, full_row_mask = _prepare_cross_attention_mask(
        torch.from_numpy(tiles[:, :, None].astype(np.int64)), PATCHES, torch.float32
    )
    reference = {
        "cross_attention_states": torch.from_numpy(states),
        "cross_attention_mask": cross_mask,
        "full_text_row_masked_out_mask": full_row_mask,
        "attention_mask": text_model._update_causal_mask(
            torch.from_numpy(valid.astype(np.int64)), torch.from_numpy(x), torch.arange(T), None
        ),
        "position_embeddings": text_model.rotary_emb(
            torch.from_numpy(x), torch.from_numpy(positions)
        ),
        "cache_position": torch.arange(T),
        "output_attentions": True,
    }
    return x, valid, ours, reference


@pytest.mark.parametrize("pair", ["aperiodic", "periodic"])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_decoder_layer(kind: str, pair: str, request: pytest.FixtureRequest):
    pair: Pair = request.getfixturevalue(pair)
    x, valid, inputs, reference_inputs = layer_inputs(pair)
    reference, params = pair.decoder_layer({"self": 3, "cross": 1}[kind])
    with torch.no_grad():
        expected, expected_weights = reference(torch.from_numpy(x), **reference_inputs)
    shared = (pair.text_config, Execution())
    layer = SelfAttentionLayer(*shared) if kind == "self" else CrossAttentionLayer(*shared, True)

    @jax.jit
    def run(params: dict, x: jax.Array, inputs: DecoderInputs):
        index = jnp.zeros((), jnp.int32)
        out, _, _ = layer.apply({"params": params}, x, inputs, index, False)
        also_out, _, weights = layer.apply({"params": params}, x, inputs, index, True)
        return out, also_out, weights

    out, also_out, weights = run(params, x, inputs)
    assert_close(out, expected, "output", where=valid)
    assert_close(also_out, expected, "output beside the weights", where=valid)
    real = {"where": valid} if kind == "self" else {}
    assert_close(weights.transpose(0, 2, 1, 3), expected_weights.transpose(1, 2), "weights", **real)

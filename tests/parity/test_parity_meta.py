"""Our default semantics against Meta's own code, the one that the weights were trained with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import meta_reference
import numpy as np
import pytest
import torch
from closeness import assert_close, relative_difference
from hf_reference import randomise
from meta_reference import ModelArgs, meta

import mllama_jax as mj
from mllama_jax.configs import MllamaTextConfig
from mllama_jax.rope import inverse_frequencies, rotary_table

pytestmark = pytest.mark.filterwarnings("ignore:.*all_gather_tensor. is deprecated:FutureWarning")

VISION: dict[str, Any] = {
    "model_type": "mllama_vision_model",
    "hidden_size": 33,
    "attention_heads": 3,
    "intermediate_size": 49,
    "num_hidden_layers": 5,
    "num_global_layers": 2,
    "intermediate_layers_indices": [0, 2, 3],
    "vision_output_dim": 132,
    "image_size": 20,
    "patch_size": 5,
    "max_num_tiles": 4,
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}
TEXT: dict[str, Any] = {
    "model_type": "mllama_text_model",
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "cross_attention_layers": [1, 5],
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "rope_theta": 50.0,
    "rms_norm_eps": 1e-3,
}
B, T, PROMPT, TILES, PATCHES = 3, 12, 9, 4, 3
RANDOM = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with meta_reference.process_group():
        yield


def test_vision_encoder(tmp_path):
    reference = meta.VisionEncoder(
        max_num_tiles=4,
        image_size=VISION["image_size"],
        patch_size=VISION["patch_size"],
        width=VISION["hidden_size"],
        heads=VISION["attention_heads"],
        layers=VISION["num_hidden_layers"],
        mlp_ratio=1.5,
        n_global_layers=VISION["num_global_layers"],
        return_intermediate=VISION["intermediate_layers_indices"],
    )
    randomise(reference, 3)
    meta_reference.save(tmp_path, VISION, meta_reference.vision_tensors(reference, VISION))
    model, params = mj.MllamaVisionModel.from_pretrained(tmp_path)

    ids = np.array([[2, 6], [7, 1], [4, 5]])
    ratios = np.array(VISION["supported_aspect_ratios"])[ids - 1]
    mask = (np.arange(4) < ratios.prod(-1)[..., None]).astype(np.int64)
    pixels = normal(3, 2, 4, 3, 20, 20) * mask[..., None, None, None].astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(pixels), torch.from_numpy(ratios))
    ours = jax.jit(model.apply)({"params": params}, pixels, ids, mask)
    assert_close(ours.last_hidden_state, expected)


@dataclass(frozen=True)
class Decoder:
    """Meta's decoder and ours, tokens, made-up image features and who sees them."""

    reference: Any
    model: mj.MllamaForCausalLM
    params: Any
    tokens: np.ndarray
    states: np.ndarray
    mask: np.ndarray
    reference_masks: tuple[torch.Tensor, torch.Tensor]

    def expected(
        self,
        positions: range,
        *,
        text_only: bool = False,
        row_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Meta's logits; it keeps what it computed for earlier positions."""
        reference, place = self.reference, torch.arange(positions.start, positions.stop)
        cross_mask, derived = self.reference_masks
        row_mask = derived if row_mask is None else row_mask
        with torch.no_grad():
            caches = torch.stack(
                [
                    layer.compute_xattn_kv_cache(torch.from_numpy(self.states).flatten(1, 3))
                    for layer in reference.cross_attention_layers
                ]
            )
            tokens = torch.from_numpy(self.tokens)[:, place]
            return reference(
                position_ids=place,
                h=reference.get_partially_trainable_embedding(tokens),
                xattn_mask=cross_mask[:, :, place],
                full_text_row_masked_out_mask=row_mask[:, :, place],
                xattn_caches=caches,
                text_only_inference=text_only,
            )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    reference = meta.CrossAttentionTransformerText(
        ModelArgs(
            dim=TEXT["hidden_size"],
            n_layers=5,
            vision_num_cross_attention_layers=2,
            n_heads=TEXT["num_attention_heads"],
            n_kv_heads=TEXT["num_key_value_heads"],
            vocab_size=TEXT["vocab_size"],
            ffn_dim_multiplier=0.3,
            multiple_of=4,
            norm_eps=TEXT["rms_norm_eps"],
            rope_theta=TEXT["rope_theta"],
            max_seq_len=T,
        )
    )
    randomise(reference, 6)
    reference.setup_cache(B, torch.device("cpu"), torch.float32)
    folder = tmp_path_factory.mktemp("meta")
    meta_reference.save(folder, TEXT, meta_reference.text_tensors(reference))
    model, params = mj.MllamaForCausalLM.from_pretrained(folder)

    # Two images one after the other; one image; a sample without.
    spans = [[[2, 5], [5, -1]], [[4, 12]], []]
    counts = [[2, 3], [1], []]
    states = normal(B, 2, TILES, PATCHES, TEXT["hidden_size"])
    masks = meta._pad_masks(spans, counts, T, TILES)
    mask = (masks.numpy() == 0).astype(np.int64)
    prepared = reference._get_xattn_mask(T, "cpu", torch.float32, torch.from_numpy(states), masks)
    tokens = RANDOM.integers(0, TEXT["vocab_size"] + 8, (B, T))
    return Decoder(reference, model, params, tokens, states, mask, prepared)


def test_decoder(decoder: Decoder):
    expected = decoder.expected(range(T))

    def run(model: mj.MllamaForCausalLM) -> jax.Array:
        return jax.jit(model.apply)(
            {"params": decoder.params},
            decoder.tokens,
            cross_attention_states=decoder.states.reshape(B, -1, TEXT["hidden_size"]),
            cross_attention_mask=decoder.mask,
        ).logits

    assert_close(run(decoder.model), expected)
    # transformers' treatment of tokens that see no image is another.
    leaking = run(decoder.model.clone(hf_masked_rows=True))
    assert all(relative_difference(leaking[b, 0], expected[b, 0]) > 0.05 for b in range(B))


def test_row_mask_given_by_hand(decoder: Decoder):
    """Of two tokens that may see a picture, it takes the attention and the feed-forward branch."""
    row_mask = decoder.reference_masks[1].clone()
    row_mask[0, 0, 7], row_mask[1, 0, 4] = 0, 0
    ours = jax.jit(decoder.model.apply)(
        {"params": decoder.params},
        decoder.tokens,
        cross_attention_states=decoder.states.reshape(B, -1, TEXT["hidden_size"]),
        cross_attention_mask=decoder.mask,
        full_text_row_masked_out_mask=row_mask.numpy(),
    ).logits
    assert_close(ours, decoder.expected(range(T), row_mask=row_mask))
    assert relative_difference(ours, decoder.expected(range(T))) > 0.05


def test_decoder_with_cache(decoder: Decoder):
    expected = [decoder.expected(range(PROMPT))]
    expected += [decoder.expected(range(t, t + 1)) for t in range(PROMPT, T)]
    run = jax.jit(decoder.model.apply)
    output = run(
        {"params": decoder.params},
        decoder.tokens[:, :PROMPT],
        cross_attention_states=decoder.states.reshape(B, -1, TEXT["hidden_size"]),
        cross_attention_mask=decoder.mask[:, :PROMPT],
        past_key_values=decoder.model.init_cache(B, T, 2 * TILES * PATCHES),
    )
    assert_close(output.logits, expected[0], "prompt")
    for t in range(PROMPT, T):
        output = run(
            {"params": decoder.params},
            decoder.tokens[:, t : t + 1],
            cross_attention_mask=decoder.mask[:, t : t + 1],
            past_key_values=output.past_key_values,
        )
        assert_close(output.logits, expected[1 + t - PROMPT], f"token {t}")


def test_text_only(decoder: Decoder):
    expected = decoder.expected(range(T), text_only=True)
    assert_close(
        jax.jit(decoder.model.apply)({"params": decoder.params}, decoder.tokens).logits, expected
    )


@pytest.mark.parametrize("is_scaled", [False, True])
def test_rotary_table_of_the_released_models(is_scaled: bool):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = MllamaTextConfig(rope_scaling=scaling if is_scaled else None)
    expected = meta.precompute_freqs_cis(128, 2048, 500_000.0, is_scaled)[:1000]
    cos, sin = rotary_table(jnp.arange(1000)[None], inverse_frequencies(config))
    assert_close(cos[0, :, 0], expected.real)
    assert_close(sin[0, :, 0], expected.imag)

"""A small model in which nothing is switched off, and inputs for it, without any reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mllama_jax as mj

CONFIG = mj.MllamaConfig(
    vision_config={
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "num_attention_heads": 2,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 60,
        "image_size": 12,
        "patch_size": 4,
        "max_num_tiles": 3,
        "supported_aspect_ratios": [[1, 1], [1, 2], [3, 1]],
    },
    text_config={
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 38,
        "num_hidden_layers": 6,
        "cross_attention_layers": [1, 4],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 100.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    image_token_index=61,
)
NUM_TILES, NUM_PATCHES = 3, 10
TILE = (3, 12, 12)


def random_params(model: Any, seed: int = 0) -> dict[str, Any]:
    """Parameters far from zero, and from one where that would switch nothing."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, shape = jax.tree_util.keystr(path), leaf.shape
        values = random.normal(size=shape).astype(np.float32)
        if "gate" in name and "gate_proj" not in name:
            values = np.sign(values) * (0.6 + 0.4 * np.abs(values))
        elif "scale" in name:
            values = 1 + 0.3 * values
        elif "kernel" in name:
            axes = {"o_proj": slice(-3, -1), "patch": slice(0, -1)}
            axes |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), slice(-3, -2))
            inputs = next((shape[axes[part]] for part in axes if part in name), shape[-2:-1])
            values = values / np.sqrt(np.prod(inputs))
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.param_shapes())


def make_inputs(
    images: list[list[tuple[int, int]]], lengths: list[int], side: str = "right", seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs of a batch; a sample's values are the same whatever stands beside it.

    Args:
      images: for each sample, (place of the image token, aspect-ratio id) of its images.
      lengths: for each sample, its tokens.
      side: of the padding.
      seed: sample b is drawn from ``seed + b``.
    """
    B, T, M = len(lengths), max(lengths), max(map(len, images))
    counts = (1, 1, 2, 3)
    inputs = {
        "input_ids": np.zeros((B, T), np.int32),
        "attention_mask": np.zeros((B, T), np.int32),
        "pixel_values": np.zeros((B, M, NUM_TILES, *TILE), np.float32),
        "aspect_ratio_ids": np.zeros((B, M), np.int32),
        "aspect_ratio_mask": np.zeros((B, M, NUM_TILES), np.int32),
        "cross_attention_mask": np.zeros((B, T, M, NUM_TILES), np.int32),
    }
    inputs["aspect_ratio_mask"][..., 0] = 1
    for b, (places, length) in enumerate(zip(images, lengths, strict=True)):
        random = np.random.default_rng(seed + b)
        first = T - length if side == "left" else 0
        inputs["input_ids"][b, first : first + length] = random.integers(3, 61, length)
        inputs["attention_mask"][b, first : first + length] = 1
        for m, (place, ratio) in enumerate(places):
            end = first + places[m + 1][0] if m + 1 < len(places) else first + length
            inputs["input_ids"][b, first + place] = 61
            inputs["aspect_ratio_ids"][b, m] = ratio
            inputs["aspect_ratio_mask"][b, m, : counts[ratio]] = 1
            inputs["pixel_values"][b, m, : counts[ratio]] = random.normal(
                size=(counts[ratio], *TILE)
            )
            inputs["cross_attention_mask"][b, first + place : end, m, : counts[ratio]] = 1
    return inputs if M else {k: inputs[k] for k in ("input_ids", "attention_mask")}

"""transformers' Mllama with small random weights, and inputs for it.

All dimensions of a configuration differ from each other, so that no transposition goes unnoticed,
and no weight is near the value that would switch its part off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers.models.mllama.configuration_mllama import MllamaConfig
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

import mllama_jax as mj
from mllama_jax.outputs import CausalLMOutputWithPast

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that a few tokens reach the wavelengths that the scaling changes.
    "original_max_position_embeddings": 24,
}

# 17 patches a tile, like 448 and 560 pixels one more than a multiple of 8; 22 pixels are not a
# multiple of the patch. The intermediate states are in no order.
APERIODIC: dict[str, Any] = {
    "image_token_index": 97,
    "text_config": {
        "vocab_size": 97,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_hidden_layers": 7,
        "cross_attention_layers": [1, 2, 5],
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_theta": 50.0,
        "rope_scaling": LLAMA3_ROPE,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 35,
        "intermediate_size": 52,
        "num_hidden_layers": 5,
        "num_global_layers": 3,
        "num_attention_heads": 7,
        "intermediate_layers_indices": [3, 0, 4],
        "vision_output_dim": 140,
        "image_size": 22,
        "patch_size": 5,
        "norm_eps": 1e-3,
    },
}
# 26 patches a tile, two tiles an image, one channel.
PERIODIC: dict[str, Any] = {
    "image_token_index": 53,
    "text_config": {
        "vocab_size": 53,
        "hidden_size": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 22,
        "num_hidden_layers": 6,
        "cross_attention_layers": [1, 4],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_theta": 80.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 18,
        "hidden_act": "quick_gelu",
        "num_channels": 1,
        "intermediate_size": 14,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "num_attention_heads": 3,
        "intermediate_layers_indices": [1, 2],
        "vision_output_dim": 54,
        "image_size": 20,
        "patch_size": 4,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
}

Batch = dict[str, np.ndarray]


def build(config: dict[str, Any], seed: int) -> MllamaForConditionalGeneration:
    """The reference model in evaluation mode, every weight random."""
    model = MllamaForConditionalGeneration._from_config(
        MllamaConfig(**config), attn_implementation="eager"
    )
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew, at a size at which a mistake shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if "norm" in name or "ln_" in name:
            value = 0.3 * normal(shape) + (0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            value = 0.3 * normal(shape)
        elif shape == (1,):  # a gate
            value = (0.6 + 0.8 * torch.rand(shape, generator=generator)) * normal(shape).sign()
        elif "embed" in name and "patch" not in name:
            value = normal(shape)
        else:
            value = 1.3 * normal(shape) * shape[1:].numel() ** -0.5
        parameter.data = value


def make_batch(
    config: dict[str, Any],
    images: list[list[int]],
    lengths: list[int],
    padding_side: str,
    seed: int,
) -> Batch:
    """Inputs of a mixed batch.

    Args:
      config: one of this file's.
      images: for each sample, the places of its image tokens in the unpadded text.
      lengths: for each sample, its tokens.
      padding_side: "left" or "right".
      seed: of pixels, aspect ratios and tokens.
    """
    random = np.random.default_rng(seed)
    vision, text = config["vision_config"], config["text_config"]
    ratios = vision.get("supported_aspect_ratios") or [
        *([1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1])
    ]
    num_tiles, size = vision.get("max_num_tiles", 4), vision["image_size"]
    B, T, M = len(lengths), max(lengths), max(map(len, images))
    tile = (vision.get("num_channels", 3), size, size)
    batch = {
        "input_ids": np.full((B, T), text["pad_token_id"], np.int64),
        "attention_mask": np.zeros((B, T), np.int64),
        "pixel_values": np.zeros((B, M, num_tiles, *tile), np.float32),
        "aspect_ratio_ids": np.zeros((B, M), np.int64),
        "aspect_ratio_mask": np.zeros((B, M, num_tiles), np.int64),
        "cross_attention_mask": np.zeros((B, T, M, num_tiles), np.int64),
        "labels": np.full((B, T), -100, np.int64),
    }
    batch["aspect_ratio_mask"][:, :, 0] = 1  # also of images that are missing
    for b, (places, length) in enumerate(zip(images, lengths, strict=True)):
        first = T - length if padding_side == "left" else 0
        tokens = slice(first, first + length)
        ids = random.integers(3, text["vocab_size"], length)
        ids[places] = config["image_token_index"]
        batch["input_ids"][b, tokens] = ids
        batch["attention_mask"][b, tokens] = 1
        # Neither the first token nor the image tokens are predicted.
        labels = np.where(ids < text["vocab_size"], ids, -100)
        labels[0] = -100
        batch["labels"][b, tokens] = labels
        for m, place in enumerate(places):
            ratio = random.integers(len(ratios))
            count = ratios[ratio][0] * ratios[ratio][1]
            end = T if m + 1 == len(places) else first + places[m + 1]
            batch["aspect_ratio_ids"][b, m] = ratio + 1
            batch["aspect_ratio_mask"][b, m, :count] = 1
            batch["pixel_values"][b, m, :count] = random.normal(size=(count, *tile))
            batch["cross_attention_mask"][b, first + place : end, m, :count] = 1
    if M == 0:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return batch


def to_torch(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in batch.items()}


@dataclass(frozen=True)
class Pair:
    """A reference, the folder it was saved to, and our model loaded from there."""

    config: dict[str, Any]
    reference: MllamaForConditionalGeneration
    folder: Path
    model: mj.MllamaForConditionalGeneration
    params: dict[str, Any]

    @property
    def text_config(self) -> mj.MllamaTextConfig:
        return self.model.config.text_config

    @property
    def vision_config(self) -> mj.MllamaVisionConfig:
        return self.model.config.vision_config

    def decoder_layer(self, index: int) -> tuple[torch.nn.Module, Any]:
        """The reference's decoder layer and our parameters of the same."""
        unit, block = divmod(index, self.text_config.unit_length)
        layers = self.params["language_model"]["model"]["layers"]
        ours = jax.tree.map(lambda leaf: leaf[unit], layers[f"block_{block}"])
        return self.reference.model.language_model.layers[index], ours

    @cached_property
    def forward(self) -> Callable[[Any, Batch], CausalLMOutputWithPast]:
        """Our model with everything that it can return."""

        def run(params: Any, batch: Batch) -> CausalLMOutputWithPast:
            return self.model.apply(
                {"params": params},
                **batch,
                use_cache=True,
                output_hidden_states=True,
                output_attentions=True,
            )

        return jax.jit(run)

    @cached_property
    def loss_and_gradients(self) -> Callable[[Any, Batch], Any]:
        """((loss, logits), gradients) of our model, without the attention weights."""

        def loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            output = self.model.apply({"params": params}, **batch, use_cache=False)
            return output.loss, output.logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))


def make_pair(config: dict[str, Any], seed: int, folder: Path) -> Pair:
    """Builds the reference, saves it to ``folder`` and loads it from there as ours."""
    reference = build(config, seed)
    reference.save_pretrained(folder)
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(folder, hf_masked_rows=True)
    return Pair(config, reference, folder, model, params)

"""Floating-point operations that the model's formula asks for, whatever a program makes of them.

A product of an (a, b) and a (b, c) matrix is 2·a·b·c operations. Counted are the products with
weights and those of attention, as is usual for model-FLOPs utilisation (MFU): norms, activations,
embeddings, the loss and the optimizer are left out (together under 1 %), and so is what
rematerialisation computes again. Causal self-attention counts the pairs that it allows; the vision
encoder counts padding, which takes part in attention.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mllama_jax.configs import MllamaConfig, MllamaTextConfig

_PATCH_MULTIPLE = 8  # patches of a tile are padded to one


@dataclass(frozen=True)
class PartFlops:
    """One part's operations: in products with weights, and inside attention."""

    projections: int
    attention: int = 0

    @property
    def total(self) -> int:
        return self.projections + self.attention

    def times(self, projections: int, attention: int) -> "PartFlops":
        return PartFlops(projections * self.projections, attention * self.attention)


Parts = dict[str, PartFlops]


def vision_flops(config: MllamaConfig, images: int) -> Parts:
    """Of encoder and projector for so many images; each costs the same, whatever its tiles."""
    vision = config.vision_config
    width, tiles = vision.hidden_size, vision.max_num_tiles
    length = encoded_length(config)
    patches = tiles * (vision.num_patches - 1)
    embedding = 2 * patches * vision.patch_size**2 * vision.num_channels * width
    weights = 4 * width * width + 2 * width * vision.intermediate_size
    layers = vision.num_hidden_layers + vision.num_global_layers
    projector = vision.vision_output_dim * config.text_config.hidden_size
    return {
        "vision encoder": PartFlops(
            images * (embedding + layers * 2 * length * weights),
            images * layers * _attention(width, length * length),
        ),
        "projector": PartFlops(2 * images * image_length(config) * projector),
    }


def decoder_flops(
    config: MllamaConfig,
    batch: int,
    length: int,
    images: int,
    *,
    past: int = 0,
    new_images: bool = True,
    logits: int | None = None,
) -> Parts:
    """Of the decoder with its head, for ``batch`` samples of ``length`` new tokens each.

    Args:
        images: of a sample, which all of its tokens attend to.
        past: cached tokens that the new ones attend to, too.
        new_images: their keys and values are computed, not read from a cache.
        logits: tokens of a sample that the head is computed for; all if None.
    """
    text = config.text_config
    hidden, q_width = text.hidden_size, text.num_attention_heads * text.head_dim
    kv_width = text.num_key_value_heads * text.head_dim
    num_self, num_cross = decoder_layers(text, images)
    image_tokens = images * image_length(config)
    tokens = batch * length
    pairs = length * past + length * (length + 1) // 2
    head = batch * (length if logits is None else logits)
    of_images = 2 * batch * image_tokens * hidden * 2 * kv_width if new_images else 0
    return {
        "decoder self-attention": PartFlops(
            num_self * 2 * tokens * hidden * (2 * q_width + 2 * kv_width),
            num_self * batch * _attention(q_width, pairs),
        ),
        "decoder cross-attention": PartFlops(
            num_cross * 2 * tokens * hidden * 2 * q_width,
            num_cross * batch * _attention(q_width, length * image_tokens),
        ),
        "image keys and values": PartFlops(num_cross * of_images),
        "decoder MLPs": PartFlops(
            (num_self + num_cross) * 2 * tokens * 3 * hidden * text.intermediate_size
        ),
        "head": PartFlops(2 * head * hidden * text.vocab_size),
    }


def image_length(config: MllamaConfig) -> int:
    """Tokens that the decoder has of an image."""
    return config.vision_config.max_num_tiles * config.vision_config.num_patches


def encoded_length(config: MllamaConfig) -> int:
    """Patches of an image in the encoder's layers, with those that pad each tile."""
    vision = config.vision_config
    patches = -(-vision.num_patches // _PATCH_MULTIPLE) * _PATCH_MULTIPLE
    return vision.max_num_tiles * patches


def total(parts: Mapping[str, PartFlops]) -> float:
    return math.fsum(flops.total for flops in parts.values())


def decoder_layers(text: MllamaTextConfig, images: int) -> tuple[int, int]:
    """Self- and cross-attention layers that run; without images the latter don't."""
    num_cross = len(text.cross_attention_layers)
    return text.num_hidden_layers - num_cross, num_cross if images else 0


def _attention(width: int, pairs: int) -> int:
    """Scores and weighted sum over all heads; ``width`` is heads × head dimension."""
    return 4 * width * pairs

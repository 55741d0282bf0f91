"""Floating-point operations of a planned job's step."""

from mllama_jax.configs import MllamaConfig
from mllama_jax.flops import (
    PartFlops,
    Parts,
    decoder_flops,
    decoder_layers,
    image_length,
    vision_flops,
)
from mllama_jax.plan.job import Job

BEFORE_DECODER = ("vision encoder", "projector", "image keys and values")
"""Parts that see nothing but pictures."""


def job_flops(job: Job, config: MllamaConfig) -> Parts:
    """Of a step of a job (`mllama_jax.plan.job.resolved`) on all devices together, by part.

    A step is an update, a prefill or an encoding of a batch, or one new token of each row at the
    cache's last slot.
    """
    batch, length, images = job.batch or 1, job.length or 0, job.images
    if job.task == "vision":
        return vision_flops(config, batch)
    if job.task == "prefill":
        return decoder_flops(config, batch, length, images, logits=1)
    if job.task == "decode":
        return decoder_flops(config, batch, 1, images, past=length - 1, new_images=False)
    forward = vision_flops(config, batch * images) | decoder_flops(config, batch, length, images)
    if job.task == "lora":
        image_tokens = images * image_length(config)
        adapters = adapter_flops(config, job.rank, batch * length, batch * image_tokens)
        return lora_flops(forward, adapters)
    return {part: flops.times(3, 3) for part, flops in forward.items()}


def lora_flops(forward: Parts, adapters: int) -> Parts:
    """Of a step that trains adapters of the decoder alone.

    The decoder's weights need no gradient, so their products' backward pass is one product where
    it is two in full training; what lies before the decoder has no backward pass.
    """
    parts = {
        part: flops if part in BEFORE_DECODER else flops.times(2, 3)
        for part, flops in forward.items()
    }
    return {**parts, "adapters": PartFlops(3 * adapters)}


def adapter_flops(config: MllamaConfig, rank: int, tokens: int, image_tokens: int) -> int:
    """Forward, of adapters on every projection of the decoder's layers."""
    text = config.text_config
    hidden, mlp = text.hidden_size, text.intermediate_size
    q_width = text.num_attention_heads * text.head_dim
    kv = hidden + text.num_key_value_heads * text.head_dim
    common = 2 * (hidden + q_width) + 3 * (hidden + mlp)  # q, o and the MLP
    num_self, num_cross = decoder_layers(text, image_tokens)
    of_text = tokens * (num_self * (common + 2 * kv) + num_cross * common)
    return 2 * rank * (of_text + image_tokens * num_cross * 2 * kv)

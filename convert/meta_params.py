"""Meta's params.json and our configuration, made of each other.

Most of the encoder is not in params.json but fixed in Meta's code.

Source: llama-models 0.3.0, llama3/args.py: ModelArgs; llama3/multimodal/model.py:
CrossAttentionTransformerVision, VisionEncoder, FeedForward, _init_fusion_schedule.
"""

import math
from collections.abc import Mapping
from typing import Any

from mllama_jax.configs import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama_jax.convert.errors import CheckpointError

RELEASED_WIDTH = 1280
"""The encoder's hidden size in the released models."""

_REQUIRED = (
    *("dim", "n_layers", "n_heads", "vocab_size", "vision_chunk_size"),
    "vision_num_cross_attention_layers",
)
_SCALED_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# (ffn_dim_multiplier, multiple_of): Meta's defaults, and what it released models with.
_FEED_FORWARD_SIZES = ((None, 256), (1.3, 1024), (1.3, 4096))
_INSTRUCT_IMAGE_SIZE = 560
_PAD_TOKEN = 128004


def config_of(params: Mapping[str, Any], vision_width: int = RELEASED_WIDTH) -> MllamaConfig:
    """The configuration that params.json stands for.

    What it does not say is as the released models have it: the special tokens, for instance, are
    the instruct models' if the image size is theirs, 560.

    Args:
        vision_width: the encoder's hidden size, which the tensors tell.

    Raises:
        CheckpointError: not a Llama 3.2 Vision model, or a quantised one.
        ValueError: unusable values.
    """
    params = _flat(params)
    missing = [name for name in _REQUIRED if name not in params]
    if missing:
        raise CheckpointError(
            f"params.json lacks {', '.join(missing)}: not a Llama 3.2 Vision model"
        )
    counts = {name: params[name] for name in _REQUIRED}
    counts["multiple_of"] = params.get("multiple_of", 256)
    wrong = [
        f"{name}={count!r}"
        for name, count in counts.items()
        if type(count) is not int or count <= 0
    ]
    if wrong:
        raise CheckpointError(f"params.json: {', '.join(wrong)}: expected positive integers")
    multiplier = params.get("ffn_dim_multiplier")
    if not (multiplier is None or (type(multiplier) in (int, float) and multiplier > 0)):
        raise CheckpointError(
            f"params.json: ffn_dim_multiplier={multiplier!r}: expected a positive number or null"
        )
    dim, image_size, n_layers = params["dim"], params["vision_chunk_size"], params["n_layers"]
    schedule = fusion_schedule(n_layers, params["vision_num_cross_attention_layers"])
    text = MllamaTextConfig(
        vocab_size=params["vocab_size"],
        hidden_size=dim,
        num_hidden_layers=n_layers + len(schedule),
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        intermediate_size=_feed_forward_size(dim, multiplier, counts["multiple_of"]),
        rope_theta=params.get("rope_theta", 500_000.0),
        rope_scaling=_SCALED_ROPE if params.get("use_scaled_rope") else None,
        rms_norm_eps=params.get("norm_eps", 1e-5),
        # A cross-attention layer runs before the self-attention layer that it is fused with.
        cross_attention_layers=tuple(layer + i for i, layer in enumerate(schedule)),
        eos_token_id=(128001, 128008, 128009) if image_size == _INSTRUCT_IMAGE_SIZE else 128001,
        # transformers refuses padding that the vocabulary lacks.
        pad_token_id=_PAD_TOKEN if params["vocab_size"] > _PAD_TOKEN else None,
    )
    vision = MllamaVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        vision_output_dim=6 * vision_width,
        image_size=image_size,
        max_num_tiles=params.get("vision_max_num_chunks", 4),
    )
    return MllamaConfig(vision, text, image_token_index=text.vocab_size)


def params_of(config: MllamaConfig) -> dict[str, Any]:
    """The params.json of a configuration; `config_of` tells whether it says everything."""
    text, vision = config.text_config, config.vision_config
    multiplier, multiple_of = _feed_forward_factors(text.hidden_size, text.intermediate_size)
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers - len(text.cross_attention_layers),
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        **({} if multiplier is None else {"ffn_dim_multiplier": multiplier}),
        "multiple_of": multiple_of,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": (text.rope_scaling or {}).get("rope_type") == "llama3",
        "vision_chunk_size": vision.image_size,
        "vision_max_num_chunks": vision.max_num_tiles,
        "vision_num_cross_attention_layers": len(text.cross_attention_layers),
    }


def fusion_schedule(num_layers: int, num_cross: int) -> list[int]:
    """The self-attention layers that have a cross-attention layer before them: every k-th from the
    last one back."""
    step = math.ceil(num_layers / num_cross)
    return list(range(num_layers - 1, -1, -step))[:num_cross][::-1]


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Without the nesting that some files have; refuses quantised models."""
    if isinstance(params.get("model"), Mapping):
        params = params["model"]
    for name, kind in (("quantization_args", "quantised"), ("lora_args", "LoRA")):
        if params.get(name) is not None:
            raise CheckpointError(f"params.json has {name}: a {kind} checkpoint, which is not read")
    try:
        layers = params["vision_model"]["cross_attention_adapter"]["num_layers"]
    except (KeyError, TypeError):
        return dict(params)
    return {**params, "vision_num_cross_attention_layers": layers}


def _feed_forward_size(dim: int, multiplier: float | None, multiple_of: int) -> int:
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * math.ceil(size / multiple_of)


def _feed_forward_factors(dim: int, size: int) -> tuple[float | None, int]:
    """ffn_dim_multiplier and multiple_of that make a size."""
    for multiplier, multiple_of in _FEED_FORWARD_SIZES:
        if _feed_forward_size(dim, multiplier, multiple_of) == size:
            return multiplier, multiple_of
    # Half a unit more than the size, which is rounded down.
    return (size + 0.5) / int(2 * (4 * dim) / 3), 1

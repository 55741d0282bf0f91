"""Which shapes are planned for: the released models by name, any other by its configuration."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jax

from mllama_jax.configs import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama_jax.model import MllamaForConditionalGeneration

_ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_VISION = MllamaVisionConfig(image_size=560)

RELEASED: Mapping[str, MllamaConfig] = {
    "11b": MllamaConfig(_VISION, MllamaTextConfig(rope_scaling=_ROPE_SCALING)),
    "90b": MllamaConfig(
        _VISION,
        MllamaTextConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=100,
            num_attention_heads=64,
            cross_attention_layers=tuple(range(3, 100, 5)),
            rope_scaling=_ROPE_SCALING,
        ),
    ),
}
"""Llama 3.2 Vision Instruct, with pictures of 560 pixels a tile."""
_RELEASED_ID = re.compile(r"(?:^|/)Llama-3\.2-(11B|90B)-Vision(?:-Instruct)?$")


def find_config(model: str) -> MllamaConfig:
    """The configuration of a released model or of a folder with a config.json.

    Args:
        model: "11b", "90b", an id such as "meta-llama/Llama-3.2-11B-Vision-Instruct" (nothing is
            fetched), or a folder.

    Raises:
        ValueError: it is neither; or the file holds unusable values.
    """
    released = _RELEASED_ID.search(model.rstrip("/"))
    name = released.group(1).lower() if released and not Path(model).exists() else model.lower()
    if name in RELEASED:
        return RELEASED[name]
    try:
        return MllamaConfig.from_pretrained(model)
    except FileNotFoundError as error:
        raise ValueError(
            f"model {model!r} is neither one of {', '.join(RELEASED)} nor a folder with a "
            "config.json"
        ) from error


@cache
def num_parameters(config: MllamaConfig) -> int:
    """Of the whole model."""
    shapes = MllamaForConditionalGeneration(config).param_shapes()
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

"""What the tensors of a checkpoint are to the model, whatever they are called there."""

import re
from collections.abc import Mapping

from mllama_jax.configs import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.table import (
    LAYOUTS,
    Component,
    Config,
    row_of,
    spelled,
    tensors,
    text_config,
)

PARTS = (
    "vision encoder",
    "projector",
    "embeddings",
    "self-attention layers",
    "cross-attention layers",
    "final norm and head",
    "not of the model",
)
"""Into which an inspection divides a checkpoint."""

RELEASED: Mapping[str, MllamaTextConfig] = {
    "11B": MllamaTextConfig(),
    "90B": MllamaTextConfig(
        hidden_size=8192,
        num_hidden_layers=100,
        num_attention_heads=64,
        intermediate_size=28672,
        cross_attention_layers=tuple(range(3, 100, 5)),
    ),
}
"""The decoders of the released models; their vision encoders are the same."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def hub_name(stored: str) -> str | None:
    """The name in the Hub layout of a tensor that has one in any layout; None if it has none."""
    row = row_of(stored)
    if row is None:
        return None
    layer = _LAYER.search(stored)
    return row.hub.format(i=layer[1]) if layer else row.hub


def hub_names(source: Source) -> dict[str, str]:
    """Stored name -> name in the Hub layout, of the tensors that have one."""
    found = {name: hub_name(name) for name in source.tensors}
    return {name: hub for name, hub in found.items() if hub is not None}


def layout_of(names: Mapping[str, str]) -> str | None:
    """Which of `LAYOUTS` stored names follow; None if no single one.

    Args:
        names: what `hub_names` returns.
    """
    for layout in LAYOUTS:
        if all(spelled(hub, layout) == stored for stored, hub in names.items()):
            return layout
    return None


def part_of(hub: str | None, config: Config) -> str:
    """The one of `PARTS` that a tensor belongs to."""
    if hub is None:
        return "not of the model"
    if hub.startswith("vision_model."):
        return "vision encoder"
    if hub.startswith("multi_modal_projector."):
        return "projector"
    if ".embed_tokens." in hub:
        return "embeddings"
    layer = _LAYER.search(hub)
    if layer is None:
        return "final norm and head"
    is_cross = int(layer[1]) in text_config(config).cross_attention_layers
    return "cross-attention layers" if is_cross else "self-attention layers"


def released_as(
    shapes: Mapping[str, tuple[int, ...]], component: Component, image_size: int
) -> tuple[str, ...]:
    """The released models that have exactly these tensors.

    Args:
        shapes: Hub name -> shape.
        image_size: released models have the same shapes but for it.
    """
    found = []
    for name, text in RELEASED.items():
        config = MllamaConfig(MllamaVisionConfig(image_size=image_size), text)
        expected = tensors(config, component)
        if {tensor.hub: tensor.hub_shape for tensor in expected} == shapes:
            found.append(name)
    return tuple(found)

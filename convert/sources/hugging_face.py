"""Hugging Face folders: config.json and weights in safetensors or PyTorch's files."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.sources.carried import carried_files, unused_tensors
from mllama_jax.convert.sources.quantised import refuse_quantised
from mllama_jax.convert.sources.shards import find_weights
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.table import COMPONENTS, Component


def open_hugging_face(folder: epath.Path) -> Source:
    """Opens a folder that transformers saved, or one that has the form of it.

    Raises:
        FileNotFoundError: config.json or the weights are absent.
        CheckpointError: damaged weights, or quantised ones.
        ValueError: config.json is not the configuration of such a model.
    """
    values = read_config(folder)
    weights = find_weights(folder)
    refuse_quantised(values, weights.tensors, folder)
    component = component_of(values, weights.tensors)
    return Source(
        path=folder,
        format=f"Hugging Face, {weights.kind.title}",
        component=component,
        config=COMPONENTS[component].config.from_pretrained(folder),
        tensors=weights.tensors,
        files=weights.files,
        carried=carried_files(folder),
        unused=unused_tensors(folder),
    )


def read_config(folder: epath.Path) -> dict[str, Any]:
    """config.json as it stands, checked for no more than being one."""
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face config.json")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def component_of(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Component:
    """Which part of the model a configuration and its tensors are."""
    model_type = config.get("model_type")
    if model_type == "mllama_vision_model":
        return "vision_model"
    if model_type == "mllama_text_model":
        # The configuration is the same with and without a head.
        return "language_model" if any("lm_head" in name for name in tensors) else "text_model"
    return "model"

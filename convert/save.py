"""From a parameter tree to a Hugging Face folder in the Hub layout."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from mllama_jax.convert.blocks import copy_blocks
from mllama_jax.convert.load import PARAMETER_DTYPES
from mllama_jax.convert.mismatch import describe
from mllama_jax.convert.table import (
    COMPONENTS,
    Component,
    Config,
    Path,
    Tensor,
    tensors,
    text_config,
    vision_config,
)
from mllama_jax.convert.writer import PendingTensor, write_folder


def save_params(
    params: Mapping[str, Any],
    config: Config,
    folder: str | os.PathLike,
    component: Component,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a component as a folder that Hugging Face transformers loads as it is.

    Values are written bit for bit in the dtype that they have. A whole model gets the Hub layout's
    names; a part gets the names and the config.json that transformers gives it when it saves it
    alone. Host memory holds one tensor at a time. See `write_folder` for what a killed save leaves;
    a checkpoint that lies in the folder is replaced, other files stay.

    Args:
        params: the component's parameter tree (arrays of float32, bfloat16 or float16).
        config: the component's configuration, or that of a whole model.
        folder: made if absent.
        max_shard_size: bytes, or a string such as `"5GB"`; several files get an index.

    Raises:
        ValueError: the tree lacks leaves, has others, or has them in another shape or dtype (all
            named in one message); `max_shard_size` is not a size.
    """
    expected = tensors(config, component)
    leaves = flax.traverse_util.flatten_dict(params)
    _check(leaves, expected, component)
    json_files = {"config.json": _config_json(config, component, leaves)}
    pending = [_pending(tensor, leaves[tensor.path]) for tensor in expected]
    write_folder(folder, pending, json_files, max_shard_size=max_shard_size)


def _pending(tensor: Tensor, leaf: Any) -> PendingTensor:
    def values() -> np.ndarray:
        ours = np.asarray(leaf if tensor.index is None else leaf[tensor.index])
        hub = tensor.to_hub(ours)
        if hub.flags.c_contiguous:
            return hub
        contiguous = np.empty(hub.shape, hub.dtype)
        copy_blocks(contiguous, hub)
        return contiguous

    return PendingTensor(tensor.saved, np.dtype(leaf.dtype), tensor.hub_shape, values)


def _check(leaves: Mapping[Path, Any], expected: tuple[Tensor, ...], component: Component) -> None:
    shapes = {tensor.path: tensor.leaf_shape for tensor in expected}
    name = "/".join
    present = [path for path in shapes if path in leaves]
    problems = describe(
        missing=[name(path) for path in shapes if path not in leaves],
        unexpected=[name(path) for path in leaves if path not in shapes],
        misshaped=[
            (name(path), tuple(leaves[path].shape), shapes[path])
            for path in present
            if tuple(leaves[path].shape) != shapes[path]
        ],
        other=[
            (name(path), f"dtype {leaves[path].dtype}, expected {_names(PARAMETER_DTYPES)}")
            for path in present
            if leaves[path].dtype not in PARAMETER_DTYPES
        ],
    )
    if problems:
        architecture = COMPONENTS[component].architecture
        raise ValueError(
            f"these are not the parameters of {architecture} with this configuration:\n{problems}"
        )


def _config_json(
    config: Config, component: Component, leaves: Mapping[Path, Any]
) -> dict[str, Any]:
    """The component's own config.json, with what transformers adds when it saves a model."""
    own: Config
    if component == "model":
        own = config
    elif component == "vision_model":
        own = vision_config(config)
    else:
        own = text_config(config)
    sizes: Counter[str] = Counter()
    for leaf in leaves.values():
        sizes[str(leaf.dtype)] += leaf.size
    values = own.to_dict()
    for part in (values, values.get("text_config", {}), values.get("vision_config", {})):
        # What a loaded checkpoint said about its own dtype; the name is `dtype` in version 5.
        part.pop("dtype", None)
        part.pop("torch_dtype", None)
        if "rope_scaling" in part and part["rope_scaling"] is None:
            # The same, and transformers' decoder can't be built from null.
            part["rope_scaling"] = {"rope_type": "default"}
    return {
        **values,
        "architectures": [COMPONENTS[component].architecture],
        "torch_dtype": sizes.most_common(1)[0][0],
    }


def _names(dtypes: tuple[np.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))

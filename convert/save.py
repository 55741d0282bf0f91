"""From a parameter tree to a Hugging Face folder in the Hub layout."""

import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath

from mllama_jax.convert.companions import config_json, json_bytes
from mllama_jax.convert.lazy import Region, whole
from mllama_jax.convert.matching import PARAMETER_DTYPES
from mllama_jax.convert.mismatch import describe
from mllama_jax.convert.pipeline import write_at_once
from mllama_jax.convert.table import COMPONENTS, Component, Config, Path, Tensor, tensors
from mllama_jax.convert.targets.hugging_face import HuggingFaceTarget
from mllama_jax.convert.targets.target import Output


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
    alone. Host memory holds a few tensors at a time. Killed at any moment, the folder holds the
    earlier checkpoint, the new one, or none that can be loaded; other files stay.

    Args:
        params: the component's parameter tree (arrays of float32, bfloat16 or float16).
        config: the component's configuration, or that of a whole model.
        folder: local or cloud; made if absent.
        max_shard_size: bytes, or a string such as `"5GB"`; several files get an index.

    Raises:
        ValueError: the tree lacks leaves, has others, or has them in another shape or dtype (all
            named in one message), or they lie partly on other processes' devices;
            `max_shard_size` is not a size.
    """
    expected = tensors(config, component)
    leaves = flax.traverse_util.flatten_dict(params)
    _check(leaves, expected, component)
    outputs = [_output(tensor, leaves[tensor.path]) for tensor in expected]
    target = HuggingFaceTarget(folder, outputs, max_shard_size=max_shard_size)
    sizes = [(np.dtype(leaf.dtype), leaf.size) for leaf in leaves.values()]
    files = {"config.json": json_bytes(config_json(config, component, sizes))}
    write_at_once(target, epath.Path(folder), files)


def _output(tensor: Tensor, leaf: Any) -> Output:
    values = tensor.to_hub(_Entry(leaf, tensor.index))
    # One block: an array on a device is fetched once.
    blocks = (whole(values.shape),)
    return Output(tensor.saved, tensor.saved, values, np.dtype(leaf.dtype), blocks)


class _Entry:
    """One entry of a stacked leaf, or a leaf that is not stacked, fetched when it is read."""

    def __init__(self, leaf: Any, index: int | None):
        self._leaf, self._index = leaf, index
        self.shape = tuple(leaf.shape) if index is None else tuple(leaf.shape[1:])
        self.dtype = np.dtype(leaf.dtype)

    def read(self, region: Region) -> np.ndarray:
        entry = self._leaf if self._index is None else self._leaf[self._index]
        return np.asarray(entry)[region]


def _check(leaves: Mapping[Path, Any], expected: tuple[Tensor, ...], component: Component) -> None:
    shapes = {tensor.path: tensor.leaf_shape for tensor in expected}
    name = "/".join
    present = [path for path in shapes if path in leaves]
    allowed = ", ".join(map(str, PARAMETER_DTYPES))
    problems = describe(
        missing=[name(path) for path in shapes if path not in leaves],
        unexpected=[name(path) for path in leaves if path not in shapes],
        misshaped=[
            (name(path), tuple(leaves[path].shape), shapes[path])
            for path in present
            if tuple(leaves[path].shape) != shapes[path]
        ],
        other=[
            (name(path), f"dtype {leaves[path].dtype}, expected {allowed}")
            for path in present
            if leaves[path].dtype not in PARAMETER_DTYPES
        ],
    )
    if problems:
        architecture = COMPONENTS[component].architecture
        raise ValueError(
            f"these are not the parameters of {architecture} with this configuration:\n{problems}"
        )
    distant = [
        name(path)
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    if distant:
        raise ValueError(
            f"{distant[0]} and {len(distant) - 1} others lie partly on other processes' devices; "
            "save them as an Orbax checkpoint, and convert that with `mllama-jax convert`"
        )

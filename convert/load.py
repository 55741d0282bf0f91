"""From a checkpoint of any format to a parameter tree on its devices, leaf by leaf."""

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from mllama_jax.attention import check_attention_devices
from mllama_jax.convert.lazy import LazyTensor, Region, extent, resolved, whole
from mllama_jax.convert.leaves import Leaf, make_leaf
from mllama_jax.convert.matching import PARAMETER_DTYPES, match
from mllama_jax.convert.quantising import QuantisedLeaf
from mllama_jax.convert.sources import Source, open_source
from mllama_jax.convert.table import (
    Component,
    Config,
    Path,
    Tensor,
    part_config,
    tensors,
)
from mllama_jax.generation.config import FILE_NAME as GENERATION_CONFIG
from mllama_jax.generation.config import GenerationConfig
from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.quantisation import Quantisation, check_quantisation, is_quantised
from mllama_jax.sharding import param_shardings, parse_mesh

# Up to this many bytes of earlier leaves may be on their way to devices while the next is read.
_UNDER_WAY_BYTES = 2**29

Model = TypeVar("Model", bound=PretrainedModule)


def load_pretrained(
    model_cls: type[Model],
    path: str | os.PathLike,
    *,
    dtype: Any = "float32",
    param_dtype: Any = None,
    mesh: Mesh | str | None = None,
    quantise: Quantisation | None = None,
    revision: str | None = None,
    **fields: Any,
) -> tuple[Model, Params]:
    """A model and its parameters out of a checkpoint of any format that `open_source` takes.

    Args:
        model_cls: a model class; its `component` is one of `COMPONENTS`. A part (text or vision)
            is also taken out of a whole model's checkpoint; the tensors of the other part are not
            read.
        path: a folder, or a hub id (owner/name); see `open_source`.
        dtype: float32, bfloat16 or float16 (a name or a dtype), in which the model computes.
        param_dtype: the dtype of the parameters; None means `dtype`.
        mesh: the devices that the parameters and the computation are split over, as
            `mllama_jax.sharding` says, or its written form (`parse_mesh`); None puts the
            parameters on the default device.
        quantise: how the kernels of the decoder's layers are stored (`mllama_jax.quantisation`).
        revision: branch, tag or commit of a hub id.
        **fields: further fields of the model, such as `hf_masked_rows` and `attention`.

    Raises:
        FileNotFoundError, CheckpointError: as `open_source` and `load_params`.
        ValueError: a dtype is not one of the three, or config.json is invalid; `quantise` is
            given and the component has no decoder; the attention's kind is not for these devices
            or this dtype.
    """
    check_quantisation(quantise)
    if quantise is not None and model_cls.component == "vision_model":
        raise ValueError(
            f"quantise={quantise!r}: {model_cls.__name__} has no decoder layers, and only their "
            "weights are quantised"
        )
    dtype = parameter_dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else parameter_dtype("param_dtype", param_dtype)
    if isinstance(mesh, str):
        mesh = parse_mesh(mesh)
    check_attention_devices(fields.get("attention", model_cls.attention), dtype, mesh)
    source = open_source(path, revision=revision)
    component = model_cls.component
    config = part_config(source.config, component)
    # The classes that generate keep the checkpoint's settings for it.
    if hasattr(model_cls, "generation_config"):
        for file in source.carried:
            if file.name == GENERATION_CONFIG:
                fields.setdefault(
                    "generation_config", GenerationConfig.from_pretrained(file.parent)
                )
    fields |= {"dtype": dtype, "param_dtype": param_dtype, "mesh": mesh, "quantise": quantise}
    model = model_cls(config=config, **fields)
    shardings = None if mesh is None else param_shardings(model, mesh)
    return model, load_params(
        source,
        config,
        component,
        param_dtype=param_dtype,
        shardings=shardings,
        quantise=quantise,
    )


def parameter_dtype(name: str, dtype: Any) -> np.dtype:
    """The dtype that an argument names; `name` is the argument, for the error."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in PARAMETER_DTYPES:
        names = ", ".join(str(known) for known in PARAMETER_DTYPES)
        raise ValueError(f"{name}={dtype!r}: expected one of {names}")
    return found


def load_params(
    source: Source | str | os.PathLike,
    config: Config,
    component: Component,
    *,
    param_dtype: Any = None,
    shardings: Mapping[str, Any] | None = None,
    quantise: Quantisation | None = None,
) -> Params:
    """The parameters of a component, out of a checkpoint of any format.

    Every process reads, for each leaf in turn, the regions that its own devices hold (each region
    once, however many of them hold it), casts them and puts them there. Besides the devices'
    memory, a host's holds the local part of one leaf, or of several small ones, and a few blocks.

    Args:
        source: what `open_source` returns, or what it takes. It may hold more than the component;
            tensors that the table gives to other parts are neither read nor checked.
        config: the component's configuration, or that of a whole model.
        param_dtype: cast to float32, bfloat16 or float16; None keeps each leaf as it is stored
            (the widest dtype of its layers, should they differ).
        shardings: a tree like the result's, of `jax.sharding.Sharding`; None is the default device.
        quantise: kernels of the decoder's layers are quantised, and get a neighbour "scale". They
            are made of the values that are stored, not of those cast to `param_dtype`, and are the
            same however they are split; a process reads all inputs of the outputs that it holds.

    Returns:
        A plain nested dict of jax arrays, the tree that the component's `init_params` describes.

    Raises:
        FileNotFoundError: the folder or its weights are absent.
        CheckpointError: damaged files, or tensors that are missing, unexpected, of another shape,
            stored twice or not of a floating-point dtype: all of them in one message, with the
            nearest names; values that float16 can't hold.
        ValueError: `shardings` is not a tree like the result's; `quantise` can't be done with the
            sizes of these kernels.
    """
    check_quantisation(quantise)
    dtype = None if param_dtype is None else parameter_dtype("param_dtype", param_dtype)
    if not isinstance(source, Source):
        source = open_source(source)
    expected = tensors(config, component)
    matched = match(source, expected, component)
    leaves = _make_leaves(expected, matched, dtype, quantise)
    placed = _places(leaves, shardings)
    params: dict[Path, jax.Array] = {}
    under_way: deque[tuple[jax.Array, int]] = deque()
    for path, leaf in leaves.items():
        made = _arrays_of(path, leaf)
        regions = [_local_regions(array, placed[array.path]) for array in made]
        num_bytes = sum(
            math.prod(extent(region)) * array.dtype.itemsize
            for array, local in zip(made, regions, strict=True)
            for region in local
        )
        # The next leaf is read while devices still take the ones before, if they are small.
        while under_way and num_bytes + sum(size for _, size in under_way) > _UNDER_WAY_BYTES:
            jax.block_until_ready(under_way.popleft()[0])
        params |= _read(leaf, made, regions, placed)
        under_way.append((params[path], num_bytes))
    return jax.block_until_ready(flax.traverse_util.unflatten_dict(params))


@dataclass(frozen=True)
class _Array:
    """An array of the parameter tree."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype


def _arrays_of(path: Path, leaf: Leaf | QuantisedLeaf) -> list[_Array]:
    """What a leaf becomes."""
    arrays = [_Array(path, leaf.shape, leaf.dtype)]
    if isinstance(leaf, QuantisedLeaf):
        arrays.append(_Array((*path[:-1], "scale"), leaf.scale_shape, np.dtype(np.float32)))
    return arrays


def _make_leaves(
    expected: Sequence[Tensor],
    matched: Mapping[str, tuple[str, LazyTensor]],
    dtype: np.dtype | None,
    quantise: Quantisation | None,
) -> dict[Path, Leaf | QuantisedLeaf]:
    by_leaf: dict[Path, list[Tensor]] = {}
    for tensor in expected:
        by_leaf.setdefault(tensor.path, []).append(tensor)
    leaves: dict[Path, Leaf | QuantisedLeaf] = {}
    problems = []
    for path, parts in by_leaf.items():
        leaves[path] = leaf = make_leaf(parts, matched, dtype)
        if quantise is None or not is_quantised(path):
            continue
        leaves[path] = QuantisedLeaf(leaf, quantise)
        try:
            _arrays_of(path, leaves[path])
        except ValueError as error:
            problems.append(f"  {'/'.join(path)}: {error}")
    if problems:
        raise ValueError("\n".join(["weights that can't be quantised:", *problems]))
    return leaves


def _places(
    leaves: Mapping[Path, Leaf | QuantisedLeaf], shardings: Mapping[str, Any] | None
) -> dict[Path, Sharding | None]:
    """Where each array of the tree goes; None is the default device."""
    paths = [array.path for path, leaf in leaves.items() for array in _arrays_of(path, leaf)]
    if shardings is None:
        return dict.fromkeys(paths)
    placed = flax.traverse_util.flatten_dict(shardings)
    if placed.keys() != set(paths):
        odd = sorted("/".join(path) for path in placed.keys() ^ set(paths))
        raise ValueError(
            f"shardings: not a tree like the parameters'; they differ in {len(odd)} leaves, the "
            f"first is {odd[0]}"
        )
    return placed


def _local_regions(array: _Array, sharding: Sharding | None) -> list[Region]:
    """What this process's devices hold of an array, each region once."""
    if sharding is None:
        return [whole(array.shape)]
    indices = sharding.addressable_devices_indices_map(array.shape).values()
    regions = [resolved(index or (), array.shape) for index in indices]
    return list({_key(region): region for region in regions}.values())


def _read(
    leaf: Leaf | QuantisedLeaf,
    made: Sequence[_Array],
    regions: Sequence[list[Region]],
    placed: Mapping[Path, Sharding | None],
) -> dict[Path, jax.Array]:
    """Reads a leaf, and leaves it to the devices."""
    values = leaf.read(*regions) if isinstance(leaf, QuantisedLeaf) else [leaf.read(*regions)]
    return {
        array.path: _placed(array, local, held, placed[array.path])
        for array, local, held in zip(made, regions, values, strict=True)
    }


def _placed(
    array: _Array, regions: list[Region], values: list[np.ndarray], sharding: Sharding | None
) -> jax.Array:
    if sharding is None:
        return jax.device_put(values[0])
    held = dict(zip(map(_key, regions), values, strict=True))
    return jax.make_array_from_callback(
        array.shape,
        sharding,
        lambda index: held[_key(resolved(index or (), array.shape))],
        dtype=array.dtype,
    )


def _key(region: Region) -> tuple[tuple[int, int], ...]:
    return tuple((axis.start, axis.stop) for axis in region)

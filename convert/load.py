"""From a checkpoint folder to a parameter tree, one tensor at a time."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mllama_jax.convert.blocks import copy_blocks
from mllama_jax.convert.mismatch import describe
from mllama_jax.convert.reader import CheckpointError, StoredTensor, read_headers
from mllama_jax.convert.table import (
    COMPONENTS,
    Component,
    Config,
    Path,
    Tensor,
    row_of,
    spelled,
    spellings,
    tensors,
)
from mllama_jax.generation.config import FILE_NAME as GENERATION_CONFIG
from mllama_jax.generation.config import GenerationConfig
from mllama_jax.hub import local_folder
from mllama_jax.pretrained import Params, PretrainedModule

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""What loading a model needs of a hub repository."""

PARAMETER_DTYPES = tuple(map(np.dtype, (np.float32, jnp.bfloat16, np.float16)))
"""dtypes that parameters may have, in files and in memory."""


def load_pretrained(
    model_cls: type[PretrainedModule],
    path: str | os.PathLike,
    *,
    dtype: Any = "float32",
    param_dtype: Any = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    **fields: Any,
) -> tuple[PretrainedModule, Params]:
    """A model and its parameters out of a Hugging Face folder or a hub repository.

    Args:
        model_cls: a model class; its `component` is one of `COMPONENTS`. A part (text or vision)
            is also taken out of a whole model's checkpoint; the tensors of the other part are not
            read.
        path: a folder, or a hub id (owner/name); see `mllama_jax.hub.local_folder`.
        dtype: float32, bfloat16 or float16 (a name or a dtype), in which the model computes.
        param_dtype: the dtype of the parameters; None means `dtype`.
        mesh: must be None: parameters are placed on the default device.
        revision: branch, tag or commit of a hub id.
        **fields: further fields of the model, such as `hf_masked_rows` and `attention`.

    Raises:
        NotImplementedError: `mesh` was given.
        FileNotFoundError, CheckpointError: as `local_folder` and `load_params`.
        ValueError: a dtype is not one of the three, or config.json is invalid.
    """
    if mesh is not None:
        raise NotImplementedError(
            "mesh: loading straight into a mesh is not available yet. Load with mesh=None, then "
            "place the parameters with jax.device_put(params, shardings)."
        )
    dtype = parameter_dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else parameter_dtype("param_dtype", param_dtype)
    folder = local_folder(path, allow_patterns=CHECKPOINT_FILES, revision=revision)
    component = model_cls.component
    config = COMPONENTS[component].config.from_pretrained(folder)
    # The classes that generate keep the checkpoint's settings for it.
    if hasattr(model_cls, "generation_config") and (folder / GENERATION_CONFIG).exists():
        fields.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
    model = model_cls(config=config, dtype=dtype, param_dtype=param_dtype, **fields)
    return model, load_params(folder, config, component, param_dtype=param_dtype)


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
    folder: str | os.PathLike,
    config: Config,
    component: Component,
    *,
    param_dtype: Any = None,
) -> Params:
    """The parameters of a component, read from a folder of safetensors.

    Reads tensor by tensor into the stacked leaves, casts on the way, and puts each leaf on the
    default device when it is complete: besides the tree itself, memory holds one leaf and what is
    mapped of one tensor.

    Args:
        folder: a local or cloud folder, in any of `table.LAYOUTS`. It may hold more than the
            component; tensors that the table gives to other parts are neither read nor checked.
        config: the component's configuration, or that of a whole model.
        param_dtype: cast to float32, bfloat16 or float16; None keeps each leaf as it is stored
            (the widest dtype of its layers, should they differ).

    Returns:
        A plain nested dict of jax arrays, the tree that the component's `init_params` describes.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        CheckpointError: damaged files (see `read_headers`), or tensors that are missing,
            unexpected, of another shape, stored twice or not of a floating-point dtype: all of
            them in one message, with the nearest names; values that float16 can't hold.
    """
    dtype = None if param_dtype is None else parameter_dtype("param_dtype", param_dtype)
    expected = tensors(config, component)
    stored = _match(read_headers(folder), expected, component, os.fspath(folder))
    by_leaf: dict[Path, list[Tensor]] = {}
    for tensor in expected:
        by_leaf.setdefault(tensor.path, []).append(tensor)
    leaves = {
        # Waiting keeps the host's copies of earlier leaves from piling up.
        path: jax.block_until_ready(jax.device_put(_read_leaf(parts, stored, dtype)))
        for path, parts in by_leaf.items()
    }
    return flax.traverse_util.unflatten_dict(leaves)


def _read_leaf(
    parts: Sequence[Tensor], stored: Mapping[str, StoredTensor], dtype: np.dtype | None
) -> np.ndarray:
    """One leaf of our tree, filled layer by layer."""
    dtypes = {stored[part.hub].dtype for part in parts}
    leaf = np.empty(parts[0].leaf_shape, dtype or _widest(dtypes))
    for part in parts:
        target = leaf if part.index is None else leaf[part.index]
        tensor = stored[part.hub]
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            copy_blocks(target, part.to_ours(tensor.read()))
        if leaf.dtype == np.float16 != tensor.dtype and not np.isfinite(target).all():
            raise CheckpointError(
                f"{tensor.name}: holds values beyond float16's largest, 65504; "
                "load it as bfloat16 or float32"
            )
    return leaf


def _widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    first, *others = dtypes
    for other in others:
        first = jnp.promote_types(first, other)
    return np.dtype(first)


def _match(
    found: Mapping[str, StoredTensor],
    expected: Sequence[Tensor],
    component: Component,
    folder: str,
) -> dict[str, StoredTensor]:
    """Hub name -> stored tensor; raises if a component and a folder do not agree entirely."""
    architecture = COMPONENTS[component].architecture
    matched: dict[str, StoredTensor] = {}
    missing, misshaped, other = [], [], []
    used: set[str] = set()
    layouts: Counter[str] = Counter()
    for tensor in expected:
        names = {name: layout for name, layout in spellings(tensor.hub).items() if name in found}
        used.update(names)
        layouts.update(names.values())
        if not names:
            missing.append(tensor.hub)
            continue
        name, *copies = names
        first = matched[tensor.hub] = found[name]
        if copies:
            other.append((name, f"also stored as {', '.join(copies)}"))
        if first.shape != tensor.hub_shape:
            misshaped.append((name, first.shape, tensor.hub_shape))
        if first.dtype not in PARAMETER_DTYPES:
            wanted = ", ".join(str(dtype) for dtype in PARAMETER_DTYPES)
            other.append((name, f"dtype {first.dtype}, expected {wanted} (quantised?)"))
    if not matched:
        raise CheckpointError(
            f"{folder} holds no tensor of {architecture}; found {_some(found)}, "
            f"expected {_some([tensor.hub for tensor in expected])}"
        )
    # Missing names are spelled as the folder's own are.
    layout = layouts.most_common(1)[0][0]
    missing = [spelled(hub, layout) for hub in missing]
    unexpected = [name for name in found if name not in used and _may_be_of(component, name)]
    problems = describe(missing=missing, unexpected=unexpected, misshaped=misshaped, other=other)
    if problems:
        raise CheckpointError(
            f"{folder} does not hold {architecture} with this configuration:\n{problems}"
        )
    return matched


def _may_be_of(component: Component, name: str) -> bool:
    """Whether a stored name is not one that the table gives to another part of the model."""
    row = row_of(name)
    return row is None or row.hub.startswith(COMPONENTS[component].hub)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

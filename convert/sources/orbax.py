"""Orbax checkpoints: our own, bare parameters that Orbax saved, and those of a training run.

The arrays are read with TensorStore, region by region; Orbax's own functions give whole leaves.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from mllama_jax.cloud import is_cloud
from mllama_jax.convert.journal import JOURNAL_NAME
from mllama_jax.convert.lazy import LazyTensor, Region
from mllama_jax.convert.mismatch import describe
from mllama_jax.convert.sources.carried import carried_files, unused_tensors
from mllama_jax.convert.sources.source import CheckpointError, Source
from mllama_jax.convert.table import COMPONENTS, ROWS, Component, Tensor, tensors
from mllama_jax.convert.table import Path as LeafPath

TREE_FILE = "_METADATA"
"""Orbax's description of a tree of arrays, in the folder that holds them."""
CHECKPOINT_FILES = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt")
"""What Orbax writes beside the folder of a tree."""
STEPS = "checkpoints"
"""The folder of a training run's checkpoints, named by their steps."""

_PARAMS = "params"
_UNFINISHED = (".orbax-checkpoint-tmp", ".incomplete")
_CONFIG_LEVELS = 4
# A row of our own chunks, of several tensors.
_CHUNK_CACHE_BYTES = 2**27
_NODE_CACHE_BYTES = 2**26
_ARRAYS = ("jax.Array", "np.ndarray")


def open_orbax(folder: epath.Path) -> Source:
    """Opens an Orbax checkpoint, or the newest of a training run; a state's parameters only.

    config.json is looked for in the checkpoint's folder and up to three folders above its arrays.

    Args:
        folder: a checkpoint as Orbax's functions or `convert` write it, the folder of its arrays, a
            folder of checkpoints named by their steps, or a run's folder with these in
            `checkpoints`.

    Raises:
        FileNotFoundError: there is no checkpoint, or no config.json.
        CheckpointError: an unfinished or damaged checkpoint; leaves that are missing, unexpected
            or misshaped, all in one message.
        ValueError: an unusable config.json.
    """
    tree = _find_tree(folder)
    component = _component(tree)
    config_folder = _config_folder(tree.folder)
    config = COMPONENTS[component].config.from_pretrained(config_folder)
    expected = tensors(config, component)
    arrays = _open_arrays(tree)
    _check(tree, arrays, expected, component, config_folder)
    return Source(
        path=tree.checkpoint,
        format="Orbax, training state" if tree.is_state else "Orbax",
        component=component,
        config=config,
        tensors=_in_hub_layout(arrays, expected),
        files=_weight_files(tree.folder),
        carried=tuple(
            file for file in carried_files(config_folder) if file.name not in CHECKPOINT_FILES
        ),
        notes=("a training state: only its parameters are looked at",) if tree.is_state else (),
        unused=unused_tensors(config_folder),
    )


@dataclass(frozen=True)
class _Tree:
    """A folder of arrays.

    Attributes:
        checkpoint: the checkpoint that it is of: its folder, or the one above.
        folder: where they are.
        paths: our leaf -> its path in the stored tree, in the stored order.
        is_state: whether more than parameters is stored.
        metadata: what else Orbax says of the tree.
    """

    checkpoint: epath.Path
    folder: epath.Path
    paths: Mapping[LeafPath, LeafPath]
    is_state: bool
    metadata: Mapping[str, Any]


def _find_tree(folder: epath.Path) -> _Tree:
    """The tree that holds parameters, in a folder of any of the kinds that `open_orbax` takes."""
    _refuse_unfinished(folder)
    if (folder / TREE_FILE).exists():
        return _read_tree(folder, folder)
    names = sorted(path.name for path in folder.iterdir())
    trees = [
        _read_tree(folder, folder / name) for name in names if (folder / name / TREE_FILE).exists()
    ]
    models = [tree for tree in trees if _overlap(tree)] or trees
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds several trees of arrays: "
            f"{', '.join(tree.folder.name for tree in models)}; give the folder of one of them"
        )
    if models:
        return models[0]
    steps = [name for name in names if name.isdecimal()]
    if steps:
        return _find_tree(folder / max(steps, key=int))
    if STEPS in names:
        return _find_tree(folder / STEPS)
    unfinished = [name for name in names if any(mark in name for mark in _UNFINISHED)]
    raise FileNotFoundError(
        f"{folder}: no Orbax checkpoint, which has a folder with {TREE_FILE}"
        + (f"; only unfinished ones: {', '.join(unfinished)}" if unfinished else "")
    )


def _refuse_unfinished(folder: epath.Path) -> None:
    if any(mark in folder.name for mark in _UNFINISHED):
        raise CheckpointError(
            f"{folder} is an unfinished checkpoint: the process that wrote it was stopped"
        )
    # With a config.json, what lies there is whole: the result, or what it is to replace.
    if (folder / JOURNAL_NAME).exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} is an unfinished conversion; run the same command again to finish it"
        )


def _read_tree(checkpoint: epath.Path, folder: epath.Path) -> _Tree:
    file = folder / TREE_FILE
    try:
        metadata = json.loads(file.read_text())
        stored = [
            tuple(str(key["key"]) for key in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in _ARRAYS
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error
    params = {path[1:]: path for path in stored if path[0] == _PARAMS}
    paths = params or {path: path for path in stored}
    return _Tree(checkpoint, folder, paths, bool(params), metadata)


def _component(tree: _Tree) -> Component:
    """The part of the model whose tree begins with the names that this one begins with."""
    overlap = _overlap(tree)
    if not overlap:
        found = sorted({path[0] for path in tree.paths})[:5]
        raise CheckpointError(
            f"{tree.folder} holds no parameters of a Llama 3.2 Vision model, nor a state with "
            f"{_PARAMS}; the tree has {', '.join(found) or 'no arrays'}"
        )
    return max(overlap, key=lambda component: len(overlap[component]))


def _overlap(tree: _Tree) -> dict[Component, set[str]]:
    """Component -> the first names of its paths that the tree has, if any."""
    found = {path[0] for path in tree.paths}
    overlap = {
        component: found
        & {
            row.ours.removeprefix(part.ours).split("/")[0]
            for row in ROWS
            if row.ours.startswith(part.ours)
        }
        for component, part in COMPONENTS.items()
    }
    return {component: names for component, names in overlap.items() if names}


def _config_folder(tree: epath.Path) -> epath.Path:
    looked_in = [tree, *tree.parents][:_CONFIG_LEVELS]
    for folder in looked_in:
        if (folder / "config.json").exists():
            return folder
    place = tree.parent / "config.json"
    raise FileNotFoundError(
        f"{place}: no such file. An Orbax checkpoint holds arrays alone: put the model's "
        "config.json there (that of the Hugging Face folder that it was made from), and tokenizer "
        "and processor files beside it"
    )


def _open_arrays(tree: _Tree) -> dict[LeafPath, "_Array"]:
    """Opened twice: how much memory is needed for reading shows in how they are stored.

    Neighbouring regions may lie in one chunk, and nothing less than a chunk can be read. Ours are
    small, but Orbax itself makes a chunk of all that a device holds of a leaf, with all layers.
    """
    chunks = [array.chunk_bytes for array in _opened(tree, cache_bytes=0).values()]
    return _opened(tree, max(_CHUNK_CACHE_BYTES, *(2 * size for size in chunks)))


def _opened(tree: _Tree, cache_bytes: int) -> dict[LeafPath, "_Array"]:
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            "cache_pool#nodes": {"total_bytes_limit": _NODE_CACHE_BYTES},
        }
    )
    opening = {
        path: ts.open(_spec(tree, stored), context=context, open=True, read=True)
        for path, stored in tree.paths.items()
    }
    arrays, damaged = {}, []
    for path, future in opening.items():
        name = "/".join(path)
        try:
            arrays[path] = _Array(future.result(), tree.folder, name)
        except (ValueError, RuntimeError, OSError) as error:
            damaged.append(f"{name}: {_reason(error)}")
    if damaged:
        raise CheckpointError(
            f"{tree.folder} is damaged: {len(damaged)} of {len(opening)} leaves can't be opened; "
            f"the first is {damaged[0]}"
        )
    return arrays


def _spec(tree: _Tree, stored: LeafPath) -> dict[str, Any]:
    """What TensorStore opens."""
    name = ".".join(stored) + "/"
    store: dict[str, Any]
    if tree.metadata.get("use_ocdbt", True):
        base = key_value_store(tree.folder)
        store = {"driver": "ocdbt", "base": base, "path": name, "cache_pool": "cache_pool#nodes"}
    else:
        store = key_value_store(tree.folder / name)
    return {
        "driver": "zarr3" if tree.metadata.get("use_zarr3", False) else "zarr",
        "kvstore": store,
        # A chunk that is absent is an error, unless chunks of zeros were left out.
        "fill_missing_data_reads": not tree.metadata.get(
            "store_array_data_equal_to_fill_value", False
        ),
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
    }


def key_value_store(folder: epath.Path) -> dict[str, Any]:
    """How TensorStore is told of a folder: a local one, or one of gs:// or s3://."""
    path = os.fspath(folder)
    scheme, separator, rest = path.partition("://")
    if not separator:
        return {"driver": "file", "path": f"{os.path.abspath(path)}/"}
    drivers = {"gs": "gcs", "s3": "s3"}
    if scheme not in drivers:
        raise ValueError(f"{path}: Orbax checkpoints are read from local folders, gs:// and s3://")
    bucket, _, inside = rest.partition("/")
    return {"driver": drivers[scheme], "bucket": bucket, "path": f"{inside}/"}


@contextmanager
def operating_system_error() -> Iterator[None]:
    """Makes an OSError of what TensorStore reports of one, such as a full disk."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), _reason(error)) from error


class _Array:
    """A leaf, or one layer of it, as it is stored."""

    def __init__(self, array: ts.TensorStore, folder: epath.Path, name: str):
        self._array, self._folder, self._name = array, folder, name
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype.numpy_dtype

    @property
    def chunk_bytes(self) -> int:
        shape = self._array.chunk_layout.read_chunk.shape or ()
        # None is a size that is not known.
        return math.prod(size or 1 for size in shape) * self.dtype.itemsize

    def layer(self, index: int) -> "_Array":
        return _Array(self._array[index], self._folder, f"{self._name}[{index}]")

    def read(self, region: Region) -> np.ndarray:
        try:
            return self._array[region].read().result()
        except (ValueError, RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{self._folder} is damaged: {self._name} can't be read: {_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    """TensorStore's message without the specification and the source lines that it ends with."""
    return str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]


_OF_TRAINING = (
    "\nA training run's checkpoints hold only what it trains; all parameters are in the folder "
    "model/ that it writes at its end"
)


def _check(
    tree: _Tree,
    arrays: Mapping[LeafPath, _Array],
    expected: Sequence[Tensor],
    component: Component,
    config_folder: epath.Path,
) -> None:
    shapes = {tensor.path: tensor.leaf_shape for tensor in expected}
    name = "/".join
    problems = describe(
        missing=[name(path) for path in shapes if path not in arrays],
        unexpected=[name(path) for path in arrays if path not in shapes],
        misshaped=[
            (name(path), arrays[path].shape, shape)
            for path, shape in shapes.items()
            if path in arrays and arrays[path].shape != shape
        ],
    )
    if problems:
        raise CheckpointError(
            f"{tree.folder} does not hold {COMPONENTS[component].architecture} with the "
            f"configuration in {config_folder}:\n{problems}"
            + (_OF_TRAINING if tree.is_state and not set(shapes) <= set(arrays) else "")
        )


def _in_hub_layout(
    arrays: Mapping[LeafPath, _Array], expected: Sequence[Tensor]
) -> dict[str, LazyTensor]:
    """Hub name -> tensor, leaf by leaf in the stored order."""
    by_leaf: dict[LeafPath, list[Tensor]] = {path: [] for path in arrays}
    for tensor in expected:
        by_leaf[tensor.path].append(tensor)
    found: dict[str, LazyTensor] = {}
    for path, parts in by_leaf.items():
        for tensor in parts:
            array = arrays[path] if tensor.index is None else arrays[path].layer(tensor.index)
            found[tensor.hub] = tensor.to_hub(array)
    return found


def _weight_files(tree: epath.Path) -> tuple[epath.Path, ...]:
    """All files of a tree, the oldest first: in that order their contents were written."""
    found: list[epath.Path] = []
    folders = [tree]
    for folder in folders:
        for path in folder.iterdir():
            (folders if path.is_dir() else found).append(path)
    return tuple(sorted(found, key=lambda file: (_written_at(file), os.fspath(file))))


def _written_at(file: epath.Path) -> float:
    # epath's own time of a local file is in whole seconds.
    return file.stat().mtime if is_cloud(file) else os.stat(file).st_mtime_ns / 1e9

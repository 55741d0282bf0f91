"""Orbax checkpoints: zarr arrays in an OCDBT store, and Orbax's own small files.

The arrays are written with TensorStore, as Orbax does, but block by block: Orbax's own functions
want a whole leaf in memory, and a leaf holds a tensor of all layers.
"""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from mllama_jax.convert.lazy import LazyTensor, Region
from mllama_jax.convert.leaves import widest
from mllama_jax.convert.regrouped import groups
from mllama_jax.convert.sources.orbax import TREE_FILE, key_value_store, operating_system_error
from mllama_jax.convert.table import Path as LeafPath
from mllama_jax.convert.table import Tensor
from mllama_jax.convert.targets.folders import (
    finish_folder,
    flush_folder,
    remove_unfinished,
    unfinished,
)
from mllama_jax.convert.targets.target import Output, row_blocks

STATE = "state"
"""The folder of the arrays; Orbax's default name for a tree that was saved alone."""

_CHUNK_BYTES = 2**21
_NODE_CACHE_BYTES = 2**26
_BYTES_AT_ONCE = 2**27
_BEING_WRITTEN = ".__lock"
_MANIFEST = "manifest.ocdbt"
_FLUSHED = "flushed.json"


class OrbaxTarget:
    """An Orbax checkpoint of the parameter tree in the making.

    Args:
        folder: a local folder; made if absent.
        expected: the tensors of the component.
        matched: Hub name -> (stored name, tensor).
        dtype_of: Hub name -> the dtype asked for. A leaf that is given several gets the widest.
        order: stored names in the order in which reading is sequential.
    """

    ordered = False

    def __init__(
        self,
        folder: str | os.PathLike,
        expected: Sequence[Tensor],
        matched: Mapping[str, tuple[str, LazyTensor]],
        dtype_of: Callable[[str], np.dtype],
        order: Sequence[str],
    ):
        self._folder = epath.Path(folder)
        dtypes: dict[LeafPath, set[np.dtype]] = {}
        for tensor in expected:
            dtypes.setdefault(tensor.path, set()).add(dtype_of(tensor.hub))
        self._leaves = {
            tensor.path: _Leaf(
                tensor.leaf_shape, tensor.index is not None, widest(dtypes[tensor.path])
            )
            for tensor in expected
        }
        self._places: dict[str, tuple[LeafPath, int | None]] = {}
        self._arrays: dict[LeafPath, ts.TensorStore] = {}
        self._flushed: set[Path] = set()
        # TensorStore gathers what comes together into one file: the more is on its way, the fewer.
        self._writes: deque[tuple[ts.Future[None], int]] = deque()
        self._adding = threading.Lock()
        place = {name: number for number, name in enumerate(order)}
        by_reading = sorted(expected, key=lambda tensor: place.get(matched[tensor.hub][0], 0))
        self.outputs = tuple(self._output(tensor, *matched[tensor.hub]) for tensor in by_reading)

    def _output(self, tensor: Tensor, stored: str, values: LazyTensor) -> Output:
        leaf = self._leaves[tensor.path]
        name = "/".join(tensor.path) + ("" if tensor.index is None else f"[{tensor.index}]")
        self._places[name] = tensor.path, tensor.index
        view = tensor.to_ours(values)
        chunk = leaf.chunk[1:] if leaf.stacked else leaf.chunk
        axis = _outermost_stored(tensor.axes)
        blocks = row_blocks(view.shape, leaf.dtype, axis=axis, multiple=chunk[axis])
        return Output(name, stored, view, leaf.dtype, blocks)

    def start(self, done: Collection[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not done:
            remove_unfinished(self._folder)
        state = self._state
        if done and not (state / _MANIFEST).exists():
            raise FileNotFoundError(
                f"{state}: what an earlier process wrote is gone; convert with --overwrite "
                "(overwrite=True) to begin anew"
            )
        state.mkdir(exist_ok=True)
        _back_to_flushed(state)
        # Chunks are not kept: each is written once. Nodes say where they are.
        context = ts.Context(
            {
                "file_io_sync": False,
                "cache_pool": {"total_bytes_limit": 0},
                "cache_pool#nodes": {"total_bytes_limit": _NODE_CACHE_BYTES},
            }
        )
        opening = {
            path: ts.open(leaf.spec(state, path), context=context, open=True, create=True)
            for path, leaf in self._leaves.items()
        }
        with operating_system_error():
            self._arrays = {path: future.result() for path, future in opening.items()}

    def write(self, output: Output, region: Region, values: np.ndarray) -> None:
        path, index = self._places[output.name]
        place: tuple[slice | int, ...] = region if index is None else (index, *region)
        with operating_system_error():
            target = self._arrays[path][place]
            write = target.write(values, can_reference_source_data_indefinitely=True)
            self._add(write.commit, values.nbytes)

    def _add(self, write: "ts.Future[None]", num_bytes: int) -> None:
        """Notes a write, and waits for old ones if too much is on its way."""
        with self._adding:
            self._writes.append((write, num_bytes))
            excess = sum(size for _, size in self._writes) - _BYTES_AT_ONCE
            old = []
            for earlier, size in self._writes:
                if excess > 0:
                    old.append(earlier)
                    excess -= size
        for earlier in old:
            earlier.result()
        # Only now: who flushes meanwhile has to wait for these as well.
        with self._adding:
            while self._writes and self._writes[0][0].done():
                self._writes.popleft()[0].result()

    def _wait(self) -> None:
        """Returns when all that was handed to TensorStore is written."""
        with self._adding:
            writes = list(self._writes)
        with operating_system_error():
            for write, _ in writes:
                write.result()

    def flush(self) -> None:
        self._wait()
        state = self._state
        # The manifest first: all that it refers to is there, and is flushed before it is noted as
        # what to go back to. One that other threads write meanwhile may refer to more.
        manifest = (state / _MANIFEST).read_bytes()
        data = _data_files(state)
        for file in sorted(data - self._flushed):
            _sync(file)
        self._flushed |= data
        flush_folder(epath.Path(state / "d"))
        record = {"manifest": manifest.hex(), "data": sorted(file.name for file in data)}
        _write_synced(state / _FLUSHED, json.dumps(record).encode())

    def close(self) -> None:
        # Whatever is on its way comes to its end; who wanted to know of errors has flushed.
        for write, _ in self._writes:
            write.exception()
        self._writes.clear()
        self._arrays = {}

    def sha256(self) -> dict[str, str]:
        # Every chunk has a checksum of its own, which every reader checks.
        return {}

    def finish(self, files: Mapping[str, bytes]) -> None:
        self._wait()
        self.close()
        state = self._state
        _sync(state / _MANIFEST)
        (state / _FLUSHED).unlink(missing_ok=True)
        _write_synced(state / TREE_FILE, json.dumps(_tree_metadata(self._leaves)).encode())
        finish_folder(self._folder, {**_checkpoint_files(self._folder), **files})

    @property
    def _state(self) -> Path:
        return Path(unfinished(self._folder, STATE))


def _back_to_flushed(state: Path) -> None:
    """Leaves what the last flush made durable: after a crash of the machine the rest may be gone.

    Without a note of a flush nothing was written, or all was flushed for the last time.
    """
    for left_over in state.rglob(f"*{_BEING_WRITTEN}"):
        left_over.unlink()
    if not (state / _FLUSHED).exists():
        return
    record = json.loads((state / _FLUSHED).read_text())
    _write_synced(state / _MANIFEST, bytes.fromhex(record["manifest"]))
    for file in _data_files(state):
        if file.name not in record["data"]:
            file.unlink()


def _data_files(state: Path) -> set[Path]:
    """The store's files of values and of nodes; each is written once."""
    return {file for file in (state / "d").glob("*") if file.suffix != _BEING_WRITTEN}


def _write_synced(file: Path, contents: bytes) -> None:
    """Replaces a file at once by one that is on disk."""
    new = file.with_name(f"{file.name}{_BEING_WRITTEN}")
    new.write_bytes(contents)
    _sync(new)
    new.replace(file)
    flush_folder(epath.Path(file.parent))


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


class _Leaf:
    """How a leaf of the tree is stored."""

    def __init__(self, shape: tuple[int, ...], stacked: bool, dtype: np.dtype):
        self.shape, self.stacked, self.dtype = shape, stacked, dtype
        inner = shape[1:] if stacked else shape
        self.chunk = ((1,) if stacked else ()) + _chunk(inner, dtype.itemsize)

    def spec(self, state: Path, path: LeafPath) -> dict[str, Any]:
        """What TensorStore opens or makes."""
        return {
            "driver": "zarr3",
            "kvstore": {
                "driver": "ocdbt",
                "base": key_value_store(epath.Path(state)),
                "path": ".".join(path) + "/",
                "cache_pool": "cache_pool#nodes",
            },
            "metadata": {
                "shape": list(self.shape),
                "data_type": str(self.dtype),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
                "fill_value": 0.0,
            },
            # Zeros are data, too: what is absent is an error, not a zero.
            "store_data_equal_to_fill_value": True,
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }


def _chunk(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Halves the axes in turn, the least divided first, until a chunk is small.

    A device that holds a part of a matrix, whichever axis it is split on, then reads little more
    than that part. An odd length is halved as well, up to one: the embedding's rows are 8 times an
    odd number, and chunks that are high make blocks large.
    """
    chunk = list(shape)
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        axis = max(range(len(chunk)), key=lambda axis: (chunk[axis] / shape[axis], chunk[axis]))
        chunk[axis] = -(-chunk[axis] // 2)
    return tuple(chunk)


def _outermost_stored(axes: str) -> int:
    """The axis of ours along which whole rows of the stored tensor lie one after the other."""
    source, target = axes.split(" -> ")
    outermost = groups(source)[0][0]
    return next(axis for axis, group in enumerate(groups(target)) if outermost in group)


def _tree_metadata(paths: Iterable[LeafPath]) -> dict[str, Any]:
    """Orbax's description of the tree."""
    entries = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {
                # As jax.Array, Orbax would want to know devices where no target is given.
                "value_type": "np.ndarray",
                "skip_deserialize": False,
            },
        }
        for path in paths
    }
    return {
        "tree_metadata": entries,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _checkpoint_files(folder: epath.Path) -> dict[str, bytes]:
    """Orbax's description of the checkpoint, by file name."""
    now = time.time_ns()
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    metadata = {
        "item_handlers": {STATE: handler},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    return {
        "_CHECKPOINT_METADATA": json.dumps(metadata).encode(),
        "orbax.checkpoint": b"",
        "commit_success.txt": f"Checkpoint commit was successful to {folder}".encode(),
    }

"""Writing a folder of safetensors that is, at every moment, whole or visibly not there."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from mllama_jax.convert.reader import DTYPES, INDEX_NAME, SINGLE_NAME

_CONFIG_NAME = "config.json"
_UNFINISHED = ".incomplete"
_OUR_FILES = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors lays out a file from wide dtypes to narrow ones, in this order, then by name.
_DTYPE_ORDER = ("F32", "BF16", "F16")
_UNITS = {"B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to write; `values` makes it when its turn comes, so that one is held at a time."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def num_bytes(size: int | str) -> int:
    """`"5GB"` -> 5,000,000,000; `"2GiB"` -> 2**31; a number is taken as bytes.

    Raises:
        ValueError: not a positive number with a unit from B to TB or TiB.
    """
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", str(size))
        if isinstance(size, str)
        else None
    )
    count = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else size
    if not isinstance(count, int) or count <= 0:
        raise ValueError(f"max_shard_size={size!r}: expected bytes, or a string such as '5GB'")
    return count


def write_folder(
    folder: str | os.PathLike,
    tensors: Sequence[PendingTensor],
    json_files: Mapping[str, Mapping[str, Any]],
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes tensors, index and JSON files as a Hugging Face folder.

    Everything is written and flushed to disk under names ending in `.incomplete` first. Only then
    do the weights, index and config.json of an earlier save go, and the new files get their names,
    config.json last. Killed at any moment, the folder holds the earlier checkpoint, the new one, or
    none that can be loaded; what was left over is removed by the next save. Other files stay.

    Args:
        folder: made if absent.
        tensors: split into shards in this order.
        json_files: name -> contents, `config.json` among them.
        max_shard_size: as `num_bytes` takes it; a larger tensor gets a shard of its own.
    """
    folder = epath.Path(folder)
    shards = _shards(tensors, num_bytes(max_shard_size))
    if len(shards) > 1:
        json_files = {INDEX_NAME: _index(shards), **json_files}
    # config.json is what makes a folder a model, so it comes last.
    names = sorted([*shards, *json_files], key=lambda name: name == _CONFIG_NAME)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    try:
        for name in names:
            with _unfinished(folder, name).open("wb") as stream:
                if name in shards:
                    write_safetensors(stream, shards[name])
                else:
                    stream.write(_json(json_files[name]))
                _flush(stream)
    except BaseException:
        _remove_unfinished(folder)
        raise
    _remove_earlier(folder)
    for name in names:
        if name == _CONFIG_NAME:
            _flush_folder(folder)
        _unfinished(folder, name).replace(folder / name)
    _flush_folder(folder)


def write_safetensors(stream: BinaryIO, tensors: Iterable[PendingTensor]) -> None:
    """Writes one safetensors file, byte for byte as the safetensors library would.

    The library wants all tensors of a file in memory at once; this holds one at a time.

    Raises:
        ValueError: a tensor's values are not of the dtype and shape announced.
    """
    ordered = sorted(tensors, key=lambda t: (_DTYPE_ORDER.index(_DTYPE_NAMES[t.dtype]), t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for tensor in ordered:
        values = tensor.values()
        if values.dtype != tensor.dtype or values.shape != tensor.shape:
            raise ValueError(
                f"{tensor.name}: found {values.dtype}{list(values.shape)}, "
                f"expected {tensor.dtype}{list(tensor.shape)}"
            )
        # reshape(-1): a view as bytes needs an axis.
        stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _shards(tensors: Sequence[PendingTensor], limit: int) -> dict[str, list[PendingTensor]]:
    """File name -> its tensors."""
    groups: list[list[PendingTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _index(shards: Mapping[str, Sequence[PendingTensor]]) -> dict[str, Any]:
    tensors = [tensor for group in shards.values() for tensor in group]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.num_bytes for tensor in tensors),
        },
        "weight_map": {tensor.name: file for file, group in shards.items() for tensor in group},
    }


def _json(contents: Mapping[str, Any]) -> bytes:
    return (json.dumps(contents, indent=2, sort_keys=True) + "\n").encode()


def _unfinished(folder: epath.Path, name: str) -> epath.Path:
    return folder / f".{name}{_UNFINISHED}"


def _remove_unfinished(folder: epath.Path) -> None:
    for file in list(folder.iterdir()):
        if file.name.startswith(".") and file.name.endswith(_UNFINISHED):
            file.unlink(missing_ok=True)


def _remove_earlier(folder: epath.Path) -> None:
    """Removes an earlier checkpoint, config.json first: without it nothing loads what remains."""
    earlier = [file for file in folder.iterdir() if _OUR_FILES.fullmatch(file.name)]
    for file in sorted(earlier, key=lambda file: file.name != _CONFIG_NAME):
        file.unlink(missing_ok=True)
        if file.name == _CONFIG_NAME:
            _flush_folder(folder)
    _flush_folder(folder)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    # Cloud streams have no file descriptor; closing them is what completes the object.
    with suppress(OSError, AttributeError):
        os.fsync(stream.fileno())


def _flush_folder(folder: epath.Path) -> None:
    """Makes renames and removals last through a power failure, where the file system can."""
    with suppress(OSError):
        handle = os.open(os.fspath(folder), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

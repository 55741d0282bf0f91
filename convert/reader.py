"""Reading a Hugging Face folder of safetensors, one tensor at a time."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
"""safetensors' names of dtypes."""

# What safetensors itself refuses; a larger number is not the length of a header.
_MAX_HEADER_BYTES = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that can't be read as what it is meant to be; all reasons in one message."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `num_bytes` bytes, row by row, from `offset` of `file` on."""

    name: str
    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def read(self) -> np.ndarray:
        """The values, read-only.

        A local file is mapped into memory: only what is looked at is read, and the mapping ends
        with the array.
        """
        if self.num_bytes == 0:
            return np.empty(self.shape, self.dtype)
        file = os.fspath(self.file)
        if "://" in file:
            with self.file.open("rb") as stream:
                stream.seek(self.offset)
                data = np.frombuffer(stream.read(self.num_bytes), np.uint8)
        else:
            data = np.memmap(file, np.uint8, "r", self.offset, (self.num_bytes,)).view(np.ndarray)
        return data.view(self.dtype).reshape(self.shape)


def read_headers(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """Name -> place of every tensor in a folder; no tensor is read.

    The files are those that `model.safetensors.index.json` names; without it `model.safetensors`;
    without that every `*.safetensors`.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        CheckpointError: an index that names absent files or tensors, or leaves out tensors;
            truncated or damaged files; a tensor that two files hold. All of it in one message.
    """
    folder = epath.Path(folder)
    problems: list[str] = []
    files, weight_map = _files(folder, problems)
    held: dict[str, list[StoredTensor]] = {}
    unreadable: set[str] = set()
    for file in files:
        try:
            found = read_file_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            unreadable.add(file.name)
            continue
        for tensor in found:
            held.setdefault(tensor.name, []).append(tensor)
    problems += [
        f"{name}: held by {' and '.join(tensor.file.name for tensor in copies)}; expected one file"
        for name, copies in held.items()
        if len(copies) > 1
    ]
    if weight_map is not None:
        problems += _index_problems(held, weight_map, unreadable | _absent(folder, weight_map))
    if problems:
        raise CheckpointError(
            f"{os.fspath(folder)} can't be read:\n" + "\n".join(f"  {p}" for p in problems)
        )
    return {name: copies[0] for name, copies in held.items()}


def _files(
    folder: epath.Path, problems: list[str]
) -> tuple[list[epath.Path], dict[str, str] | None]:
    """The files to read, and the index's map from tensor to file name if there is an index."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        weight_map = _read_index(index, problems)
        if SINGLE_NAME not in weight_map.values() and single.exists():
            problems.append(
                f"{SINGLE_NAME} lies beside {INDEX_NAME}, which does not name it: two checkpoints "
                "in one folder; remove the one that is not meant"
            )
        absent = _absent(folder, weight_map)
        problems += [f"{name}: named by {INDEX_NAME}, but absent" for name in sorted(absent)]
        return [folder / name for name in sorted({*weight_map.values()} - absent)], weight_map
    if single.exists():
        return [single], None
    files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("."))
    if not files:
        beside = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{os.fspath(folder)}: no {SINGLE_NAME}, {INDEX_NAME} or other *.safetensors; found "
            + (", ".join(beside[:12]) + (", …" if len(beside) > 12 else "") or "nothing")
        )
    return files, None


def _absent(folder: epath.Path, weight_map: Mapping[str, str]) -> set[str]:
    return {name for name in set(weight_map.values()) if not (folder / name).exists()}


def _read_index(index: epath.Path, problems: list[str]) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        # A name with a folder in it could lead out of the checkpoint.
        plain = all(
            isinstance(file, str) and file.endswith(".safetensors") and "/" not in file
            for file in weight_map.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(
            f"{index.name}: expected JSON with a weight_map from tensor to file: {error!r}"
        )
        return {}
    if not plain:
        problems.append(f"{index.name}: weight_map may only name *.safetensors of the same folder")
        return {}
    return weight_map


def _index_problems(
    held: Mapping[str, list[StoredTensor]], weight_map: Mapping[str, str], unread: set[str]
) -> Iterator[str]:
    """Where an index and the files that could be read disagree."""
    for name, file in weight_map.items():
        holders = [tensor.file.name for tensor in held.get(name, ())]
        if file not in unread and file not in holders:
            instead = f"; {' and '.join(holders)} does" if holders else ""
            yield f"{name}: {INDEX_NAME} puts it in {file}, which does not hold it{instead}"
    for name, copies in held.items():
        if name not in weight_map:
            yield f"{name}: held by {copies[0].file.name}, but {INDEX_NAME} does not name it"


def read_file_header(file: epath.Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        CheckpointError: the file is truncated, or its header is not a valid safetensors header.
    """
    size = file.stat().length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else 0
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file.name}: not a safetensors file, or truncated: {size} bytes"
                + (f", but the header alone claims {length}" if size >= 8 else "")
            )
        header = stream.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_no_duplicates)
        entries.pop("__metadata__", None)
        tensors = [_entry(file, name, entry, 8 + length) for name, entry in entries.items()]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: damaged header: {error!r}") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"{file.name}: damaged header: {tensor.name} begins at byte {tensor.offset}; "
                f"expected {end}, where the tensor before it ends"
            )
        end += tensor.num_bytes
    if end != size:
        state = "truncated" if size < end else "too long"
        raise CheckpointError(f"{file.name}: {state}: {size} bytes, its header says {end}")
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"listed twice: {', '.join(twice)}")
    return values


def _entry(file: epath.Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file.name}: {name} has dtype {entry['dtype']!r}; expected one of {', '.join(DTYPES)}"
        )
    dtype = DTYPES[entry["dtype"]]
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: shape {shape}, data_offsets {(begin, end)}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{file.name}: damaged header: {name} of shape {shape} and dtype {entry['dtype']} "
            f"takes {num_bytes} bytes, but {end - begin} are set aside"
        )
    return StoredTensor(name, file, dtype, shape, data_start + begin, num_bytes)

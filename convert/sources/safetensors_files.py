"""safetensors files: which tensor lies where, and its values by regions."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mllama_jax.cloud import is_cloud, open_binary, read_range
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import Region, extent

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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `num_bytes` bytes, row by row, from `offset` of `file` on."""

    name: str
    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def read(self, region: Region) -> np.ndarray:
        """The values of a region.

        Whole rows are read in one piece. Parts of rows are looked up in a mapping of a local file,
        which ends with the array; from a cloud file the rows that they are part of are fetched, in
        one request.
        """
        if self.num_bytes == 0:
            return np.empty(self.shape, self.dtype)[region]
        if not region:
            return self._rows(0, 1).reshape(())
        rows, *others = region
        partial = extent(region[1:]) != self.shape[1:]
        if partial and not is_cloud(self.file):
            data = np.memmap(self.file, np.uint8, "r", self.offset, (self.num_bytes,))
            return data.view(np.ndarray).view(self.dtype).reshape(self.shape)[region]
        return self._rows(rows.start, rows.stop)[(slice(None), *others)]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Entries of the first axis."""
        shape = self.shape or (1,)
        row_bytes = self.num_bytes // shape[0]
        data = _read(self.file, self.offset + start * row_bytes, (stop - start) * row_bytes)
        if data.size != (stop - start) * row_bytes:
            raise CheckpointError(f"{self.file}: ended within {self.name}; it was cut short")
        return data.view(self.dtype).reshape(stop - start, *shape[1:])


def _read(file: epath.Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes from a place in a file on; fewer if it ends before."""
    if is_cloud(file):
        return np.frombuffer(read_range(file, offset, offset + size), np.uint8)
    data = np.empty(size, np.uint8)
    with open(file, "rb", buffering=0) as stream:
        stream.seek(offset)
        filled = 0
        while filled < data.size:
            # One call gives 2 GiB at most.
            count = stream.readinto(data[filled:].data)
            if not count:
                break
            filled += count
    return data[:filled]


def read_file_header(file: epath.Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        CheckpointError: the file is truncated, or its header is not a valid safetensors header.
    """
    size = file.stat().length
    with open_binary(file) as stream:
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else 0
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file.name}: not a safetensors file, or truncated: {size} bytes"
                + (f", but the header alone claims {length}" if size >= 8 else "")
            )
        header = stream.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_no_duplicates)
        _check_metadata(entries.pop("__metadata__", {}))
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


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__: expected strings by name, found {metadata!r:.100}")


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
    if not isinstance(entry["shape"], list) or not isinstance(entry["data_offsets"], list):
        raise TypeError(f"{name}: shape and data_offsets must be lists")
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: shape {shape}, data_offsets {(begin, end)}")
    if math.prod(max(size, 1) for size in shape) > 2**56:
        raise ValueError(f"{name}: shape {shape} is larger than anything")
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{file.name}: damaged header: {name} of shape {shape} and dtype {entry['dtype']} "
            f"takes {num_bytes} bytes, but {end - begin} are set aside"
        )
    return StoredTensor(name, file, dtype, shape, data_start + begin, num_bytes)

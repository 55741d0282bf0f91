"""PyTorch's files (`.pth`, `.bin`): which tensor lies where, and its values by regions.

Such a file is an uncompressed zip: `data.pkl`, a pickle of the state dict, and one `data/N` for
each storage, the flat values that one or more tensors view. PyTorch itself is not needed.
"""

import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from mllama_jax.cloud import is_cloud, open_binary
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import LazyTensor, Region, extent
from mllama_jax.convert.sources.safetensors_files import StoredTensor
from mllama_jax.convert.sources.torch_pickle import DTYPES, Storage, View, read_pickle

# A state dict takes about 300 bytes a tensor.
_MAX_PICKLE_BYTES = 2**25
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


def read_torch_headers(file: epath.Path) -> dict[str, LazyTensor]:
    """Name -> tensor of a file that `torch.save` wrote, in the file's order; no values are read.

    The file must hold one state dict: a mapping from names to tensors and nothing else. Tensors
    may share a storage and lie in it with any strides.

    Raises:
        CheckpointError: the file is damaged, truncated, compressed, big-endian, of PyTorch's format
            before 1.6, or holds more than tensors, such as a pickle that tries to run code.
    """
    with open_binary(file) as stream:
        archive = _Archive.open(file, stream)
        entries = read_pickle(archive.pickle, file.name)
        return {name: _tensor(archive, name, entry) for name, entry in entries.items()}


@dataclass(frozen=True)
class _Archive:
    """An open zip file; names are those within its one folder."""

    file: epath.Path
    stream: BinaryIO
    size: int
    pickle: bytes
    records: Mapping[str, zipfile.ZipInfo]

    @classmethod
    def open(cls, file: epath.Path, stream: BinaryIO) -> "_Archive":
        size = file.stat().length
        try:
            archive = zipfile.ZipFile(stream)
            infos = archive.infolist()
        except Exception as error:  # zipfile raises a dozen kinds for damaged directories
            raise CheckpointError(f"{file.name}: {_not_a_zip(stream, size)}") from error
        pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{file.name}: a zip file with {len(pickles)} data.pkl; expected 1, as torch.save "
                "writes"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        records = {info.filename.removeprefix(prefix): info for info in infos}
        if len(records) != len(infos):
            raise CheckpointError(f"{file.name}: damaged: its directory lists a name twice")
        order = _small_record(file, archive, records, "byteorder", 16)
        if order not in (None, b"little"):
            raise CheckpointError(
                f"{file.name}: byte order {order!r}; expected b'little': save it again on a "
                "little-endian machine"
            )
        data = _small_record(file, archive, records, "data.pkl", _MAX_PICKLE_BYTES)
        assert data is not None
        return cls(file, stream, size, data, records)

    def locate(self, key: str) -> tuple[int, int]:
        """Where a storage's bytes begin, and how many there are."""
        info = self.records.get(f"data/{key}")
        if info is None:
            raise CheckpointError(f"{self.file.name}: damaged: data/{key} is absent")
        _check_stored(self.file, info)
        header = b""
        if info.header_offset >= 0:
            self.stream.seek(info.header_offset)
            header = self.stream.read(_LOCAL_HEADER.size)
        if len(header) == _LOCAL_HEADER.size:
            mark, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            name = self.stream.read(name_bytes)
            begin = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if (
                mark == b"PK\x03\x04"
                and name == info.orig_filename.encode()
                and begin + info.file_size <= self.size
            ):
                return begin, info.file_size
        raise CheckpointError(
            f"{self.file.name}: damaged: {info.filename} does not lie where the directory says"
        )


def _small_record(
    file: epath.Path,
    archive: zipfile.ZipFile,
    records: Mapping[str, zipfile.ZipInfo],
    name: str,
    limit: int,
) -> bytes | None:
    """A record's contents, checked against its checksum; None if it is absent."""
    if name not in records:
        return None
    info = records[name]
    _check_stored(file, info)
    if info.file_size > limit:
        raise CheckpointError(
            f"{file.name}: {info.filename} takes {info.file_size} bytes; expected at most {limit}"
        )
    try:
        return archive.read(info)
    except Exception as error:  # as above
        raise CheckpointError(f"{file.name}: damaged: {info.filename}: {error}") from error


def _check_stored(file: epath.Path, info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise CheckpointError(
            f"{file.name}: {info.filename} is compressed; expected a file as torch.save writes it"
        )


def _not_a_zip(stream: BinaryIO, size: int) -> str:
    """What a file is that can't be opened as a zip file."""
    stream.seek(0)
    begin = stream.read(512)
    if begin.startswith(_LEGACY_MAGIC) or begin[257:262] == b"ustar":
        return (
            "in PyTorch's format before 1.6, which is not read; save it again: "
            "torch.save(torch.load(file, weights_only=True), file)"
        )
    if begin.startswith(b"PK\x03\x04"):
        return f"a zip file that was cut short or damaged: {size} bytes, no directory at the end"
    return f"{size} bytes, not a file that torch.save wrote"


@dataclass(frozen=True)
class _StridedTensor:
    """A tensor that lies in a storage with gaps, or in another order than its axes.

    Attributes:
        storage: all values of the storage, (n,).
        offset: of the tensor's first value.
        strides: in values.
    """

    storage: StoredTensor
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def read(self, region: Region) -> np.ndarray:
        shape = extent(region)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        first = self.offset + sum(
            axis.start * stride for axis, stride in zip(region, self.strides, strict=True)
        )
        values = self._values(first, first + _span(shape, self.strides))
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)

    def _values(self, start: int, stop: int) -> np.ndarray:
        """A piece of the storage; a local file is mapped, as most of it may lie in gaps."""
        if is_cloud(self.storage.file):
            return self.storage.read((slice(start, stop),))
        offset = self.storage.offset + start * self.dtype.itemsize
        num_bytes = (stop - start) * self.dtype.itemsize
        data = np.memmap(self.storage.file, np.uint8, "r", offset, (num_bytes,))
        return data.view(np.ndarray).view(self.dtype)


def _tensor(archive: _Archive, name: str, view: View) -> LazyTensor:
    """Where a tensor lies, checked against the storage that it views."""

    def check(condition: bool, problem: str) -> None:
        if not condition:
            raise CheckpointError(f"{archive.file.name}: damaged: {name}: {problem}")

    storage, shape, strides = view.storage, view.shape, view.strides
    check(isinstance(storage, Storage) and view.dtype in DTYPES, "not a view of a storage")
    check(isinstance(storage.key, str), "its storage has no name")
    check(_are_counts(shape) and _are_counts(strides), f"shape {shape!r}, strides {strides!r}")
    check(
        len(shape) == len(strides) <= 32 and _are_counts((view.offset, storage.size)),
        f"shape {shape}, strides {strides}, offset {view.offset!r}, storage of {storage.size!r}",
    )
    dtype = DTYPES[view.dtype]
    stored_as = np.dtype(np.uint8) if storage.dtype is None else DTYPES[storage.dtype]
    begin, num_bytes = archive.locate(storage.key)
    check(
        num_bytes == storage.size * stored_as.itemsize,
        f"its storage of {storage.size} {stored_as} is {num_bytes} bytes long",
    )
    needed = 0 if 0 in shape else view.offset + _span(shape, strides)
    check(
        needed * dtype.itemsize <= num_bytes,
        f"shape {shape} with strides {strides} from {view.offset} on reaches beyond its storage "
        f"of {num_bytes // dtype.itemsize} values",
    )
    size = math.prod(shape)
    if size == 0 or _is_contiguous(shape, strides):
        offset = begin + view.offset * dtype.itemsize
        return StoredTensor(name, archive.file, dtype, shape, offset, size * dtype.itemsize)
    flat = StoredTensor(name, archive.file, dtype, (needed,), begin, needed * dtype.itemsize)
    return _StridedTensor(flat, view.offset, shape, strides)


def _are_counts(values: Any) -> bool:
    """Whether these are numbers such as sizes are, which a machine can count."""
    return type(values) is tuple and all(
        type(value) is int and 0 <= value < 2**48 for value in values
    )


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Values from the first to the last of a tensor, which is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True

"""The bytes of PyTorch's files around the values of the tensors, known before any value is.

A file is laid out as `torch.save` does it: an uncompressed zip with a pickle of the state dict, and
a record for each tensor that begins at a multiple of 64 bytes. Checksums stand behind the records,
so that the file can be written from its first byte to its last. PyTorch itself is not needed.
"""

import math
import pickle
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(np.float32): b"FloatStorage",
    np.dtype(np.float16): b"HalfStorage",
    np.dtype(ml_dtypes.bfloat16): b"BFloat16Storage",
}
_ALIGNMENT = 64
# Names are UTF-8; sizes and checksum follow the data.
_FLAGS = 0x0808
_VERSION = 45
# 1 January 1980: the same checkpoint gives the same bytes at any time.
_DATE = 0x21
_32_BITS = 2**32 - 1


@dataclass(frozen=True)
class Record:
    """One file of the zip.

    Attributes:
        name: with the folder.
        start: where its header begins.
        header: what stands before its data.
        num_bytes: of its data.
    """

    name: bytes
    start: int
    header: bytes
    num_bytes: int

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.start + len(self.header) + self.num_bytes + len(self.trailer(0))

    def trailer(self, checksum: int) -> bytes:
        """What stands behind its data."""
        sizes = "<4sLQQ" if self.num_bytes > _32_BITS else "<4sLLL"
        return struct.pack(sizes, b"PK\x07\x08", checksum, self.num_bytes, self.num_bytes)


@dataclass(frozen=True)
class Layout:
    """A whole file.

    Attributes:
        preamble: everything before the first tensor's record.
        records: of the tensors, one behind the other.
    """

    preamble: bytes
    records: tuple[Record, ...]
    _first: tuple[tuple[Record, int], ...]

    def ending(self, checksums: Sequence[int]) -> bytes:
        """Everything behind the last tensor's record, given the CRC-32 of each tensor."""
        start = self.records[-1].end if self.records else len(self.preamble)
        version, checksum, data = _small_record(self._folder + b"version", b"3\n", start)
        entries = [
            *self._first,
            *zip(self.records, checksums, strict=True),
            (version, checksum),
        ]
        directory = b"".join(_directory_entry(record, checksum) for record, checksum in entries)
        return data + directory + _directory_end(len(entries), len(directory), version.end)

    @property
    def _folder(self) -> bytes:
        return self._first[0][0].name.removesuffix(b"data.pkl")


def lay_out(folder: str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Layout:
    """The layout of a state dict.

    Args:
        folder: the zip's; torch takes the file's name without its ending.
        tensors: name -> shape and dtype: float32, float16 or bfloat16.
    """
    prefix = folder.encode() + b"/"
    preamble = b""
    first = []
    contents = {b"data.pkl": _pickle(tensors), b"byteorder": b"little"}
    for name, content in contents.items():
        record, checksum, data = _small_record(prefix + name, content, len(preamble))
        first.append((record, checksum))
        preamble += data
    records: list[Record] = []
    start = len(preamble)
    for key, (shape, dtype) in enumerate(tensors.values()):
        name = prefix + b"data/%d" % key
        record = Record(name, start, _header(name, start), math.prod(shape) * dtype.itemsize)
        records.append(record)
        start = record.end
    return Layout(preamble, tuple(records), tuple(first))


def _pickle(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """An OrderedDict of tensors, each the whole of a storage of its own."""
    entries = b"".join(
        _value(name) + _tensor(str(key), shape, dtype)
        for key, (name, (shape, dtype)) in enumerate(tensors.items())
    )
    return pickle.PROTO + b"\x02" + _EMPTY_ORDERED_DICT + b"(" + entries + b"u."


_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _tensor(key: str, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    size = math.prod(shape)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = (
        b"("
        + _value("storage")
        + b"ctorch\n%s\n" % _STORAGES[dtype]
        + _value(key)
        + _value("cpu")
        + _value(size)
        + b"tQ"
    )
    arguments = (
        storage + _value(0) + _value(shape) + _value(strides) + _value(False) + _EMPTY_ORDERED_DICT
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _value(value: object) -> bytes:
    """A number, string or tuple as part of a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def _small_record(name: bytes, data: bytes, start: int) -> tuple[Record, int, bytes]:
    """A record, its checksum, and all of its bytes."""
    record = Record(name, start, _header(name, start), len(data))
    checksum = zlib.crc32(data)
    return record, checksum, record.header + data + record.trailer(checksum)


def _header(name: bytes, start: int) -> bytes:
    """A record's header, filled up so that its data is aligned."""
    fields = struct.Struct("<4sHHHHHLLLHH")
    filling = -(start + fields.size + len(name) + 4) % _ALIGNMENT
    extra = b"FB" + struct.pack("<H", filling) + b"Z" * filling
    header = fields.pack(
        *(b"PK\x03\x04", _VERSION, _FLAGS, 0, 0, _DATE, 0, 0, 0, len(name), len(extra))
    )
    return header + name + extra


def _directory_entry(record: Record, checksum: int) -> bytes:
    size, start = record.num_bytes, record.start
    wide = b""
    if size > _32_BITS:
        wide += struct.pack("<QQ", size, size)
        size = _32_BITS
    if start >= _32_BITS:
        wide += struct.pack("<Q", start)
        start = _32_BITS
    extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
    return (
        struct.pack(
            "<4sHHHHHHLLLHHHHHLL",
            *(b"PK\x01\x02", _VERSION, _VERSION, _FLAGS, 0, 0, _DATE, checksum, size, size),
            *(len(record.name), len(extra), 0, 0, 0, 0, start),
        )
        + record.name
        + extra
    )


def _directory_end(count: int, num_bytes: int, start: int) -> bytes:
    end = b""
    if start >= _32_BITS:
        end += struct.pack(
            "<4sQHHLLQQQQ",
            *(b"PK\x06\x06", 44, _VERSION, _VERSION, 0, 0, count, count, num_bytes, start),
        )
        end += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + num_bytes, 1)
        start = _32_BITS
    return end + struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, count, count, num_bytes, start, 0)

"""Hugging Face folders: safetensors in shards, an index, config.json."""

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from mllama_jax.convert.companions import json_bytes
from mllama_jax.convert.lazy import Region
from mllama_jax.convert.sources.safetensors_files import DTYPES
from mllama_jax.convert.sources.shards import INDEX_NAME, SINGLE_NAME
from mllama_jax.convert.targets.folders import finish_folder, remove_unfinished, unfinished
from mllama_jax.convert.targets.target import Output

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors lays out a file from wide dtypes to narrow ones, in this order, then by name.
_DTYPE_ORDER = ("F32", "BF16", "F16")
_UNITS = {"B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}


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


@dataclass(frozen=True)
class _Shard:
    """One file: its header, and its tensors in the order of their data."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]


class HuggingFaceTarget:
    """A folder of safetensors in the making, written from its first byte to its last.

    A file is byte for byte what the safetensors library would write; that library wants all of a
    file's tensors in memory at once, this one block at a time.

    Args:
        folder: local or cloud; made if absent.
        outputs: split into shards in this order; their names are the tensors'.
        max_shard_size: as `num_bytes` takes it; a larger tensor gets a shard of its own.
    """

    ordered = True

    def __init__(
        self,
        folder: str | os.PathLike,
        outputs: Sequence[Output],
        *,
        max_shard_size: int | str = "5GB",
    ):
        self._folder = epath.Path(folder)
        self._shards = _shards(outputs, num_bytes(max_shard_size))
        self._index = _index(self._shards) if len(self._shards) > 1 else None
        self._shard_of = {output.name: shard for shard in self._shards for output in shard.outputs}
        self._hashes: dict[str, Any] = {}
        self._open: tuple[_Shard, BinaryIO] | None = None
        self._changing = threading.Lock()
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        self.outputs = tuple(output for shard in self._shards for output in shard.outputs)

    def start(self, done: Collection[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not done:
            remove_unfinished(self._folder)
        for shard in self._shards:
            kept = [output for output in shard.outputs if output.name in done]
            if kept:
                self._reopen(shard, sum(output.num_bytes for output in kept))

    def write(self, output: Output, region: Region, values: np.ndarray) -> None:
        shard = self._shard_of[output.name]
        if self._open is None or self._open[0] is not shard:
            self.close()
            self._begin(shard)
        # reshape(-1): a view as bytes needs an axis.
        data = values.reshape(-1).view(np.uint8)
        if self._hashing is not None:
            self._hashing.result()
        # Beside writing: each takes about as long as the other.
        self._hashing = self._hasher.submit(self._hashes[shard.name].update, data)
        self._stream.write(data)

    def flush(self) -> None:
        with self._changing:
            if self._open is None:
                return
            self._stream.flush()
            try:
                # A handle of its own: another thread may close the file meanwhile.
                handle = os.dup(self._stream.fileno())
            except (OSError, AttributeError):
                return  # cloud streams have none; closing them is what completes the object
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        self.flush()
        with self._changing:
            if self._open is not None:
                self._stream.close()
                self._open = None

    def sha256(self) -> dict[str, str]:
        if self._hashing is not None:
            self._hashing.result()
        return {shard.name: self._hashes[shard.name].hexdigest() for shard in self._shards}

    def finish(self, files: Mapping[str, bytes]) -> None:
        self.close()
        if self._index is not None:
            files = {INDEX_NAME: json_bytes(self._index), **files}
        finish_folder(self._folder, files)

    @property
    def _stream(self) -> BinaryIO:
        assert self._open is not None
        return self._open[1]

    def _begin(self, shard: _Shard) -> None:
        """Opens a new file and writes its header."""
        stream = unfinished(self._folder, shard.name).open("wb")
        stream.write(shard.header)
        with self._changing:
            self._open = shard, stream
        self._hashes[shard.name] = hashlib.sha256(shard.header)

    def _reopen(self, shard: _Shard, data_bytes: int) -> None:
        """Goes on in a file of which so much data is good."""
        self.close()
        stream = open(unfinished(self._folder, shard.name), "r+b")  # noqa: SIM115
        left = len(shard.header) + data_bytes
        if stream.seek(0, os.SEEK_END) < left:
            raise OSError(f"{stream.name}: shorter than an earlier process left it")
        stream.truncate(left)
        stream.seek(0)
        found = self._hashes[shard.name] = hashlib.sha256()
        while left:
            data = stream.read(min(left, 2**22))
            found.update(data)
            left -= len(data)
        self._open = shard, stream


def _shards(outputs: Sequence[Output], limit: int) -> list[_Shard]:
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.num_bytes
    if len(groups) == 1:
        return [_shard(SINGLE_NAME, groups[0])]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def _shard(name: str, outputs: Sequence[Output]) -> _Shard:
    ordered = sorted(outputs, key=lambda o: (_DTYPE_ORDER.index(_DTYPE_NAMES[o.dtype]), o.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in ordered:
        begin, end = end, end + output.num_bytes
        header[output.name] = {
            "dtype": _DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _Shard(name, len(text).to_bytes(8, "little") + text, tuple(ordered))


def _index(shards: Sequence[_Shard]) -> dict[str, Any]:
    outputs = [output for shard in shards for output in shard.outputs]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(output.shape) for output in outputs),
            "total_size": sum(output.num_bytes for output in outputs),
        },
        "weight_map": {output.name: shard.name for shard in shards for output in shard.outputs},
    }

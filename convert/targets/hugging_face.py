"""Hugging Face folders: safetensors in shards, an index, config.json."""

import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from mllama_jax.convert.companions import json_bytes
from mllama_jax.convert.lazy import Region
from mllama_jax.convert.sources.safetensors_files import DTYPES
from mllama_jax.convert.sources.shards import INDEX_NAME, SINGLE_NAME
from mllama_jax.convert.targets.folders import finish_folder, remove_unfinished, unfinished
from mllama_jax.convert.targets.streamed_file import StreamedFile
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
        self._files = {
            shard.name: StreamedFile(unfinished(self._folder, shard.name)) for shard in self._shards
        }
        self._current: _Shard | None = None
        self.outputs = tuple(output for shard in self._shards for output in shard.outputs)

    def start(self, done: Collection[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not done:
            remove_unfinished(self._folder)
        for shard in self._shards:
            kept = [output for output in shard.outputs if output.name in done]
            if kept:
                self.close()
                self._current, file = shard, self._files[shard.name]
                good = len(shard.header) + sum(output.num_bytes for output in kept)
                file.reopen(good)
                for _ in file.read_again(good):
                    pass

    def write(self, output: Output, region: Region, values: np.ndarray) -> None:
        shard = self._shard_of[output.name]
        if self._current is not shard:
            self.close()
            self._files[shard.name].begin()
            self._files[shard.name].append(shard.header)
            self._current = shard
        # reshape(-1): a view as bytes needs an axis.
        self._files[shard.name].append(values.reshape(-1).view(np.uint8).data)

    def flush(self) -> None:
        shard = self._current
        if shard is not None:
            self._files[shard.name].flush()

    def close(self) -> None:
        if self._current is not None:
            self._files[self._current.name].close()
            self._current = None

    def sha256(self) -> dict[str, str]:
        return {name: file.sha256() for name, file in self._files.items()}

    def finish(self, files: Mapping[str, bytes]) -> None:
        self.close()
        if self._index is not None:
            files = {INDEX_NAME: json_bytes(self._index), **files}
        finish_folder(self._folder, files)


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

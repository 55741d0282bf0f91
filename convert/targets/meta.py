"""Meta's layout: one consolidated.00.pth with the names of Meta's own classes, and params.json."""

import dataclasses
import os
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from mllama_jax.configs import MllamaConfig
from mllama_jax.convert.companions import json_bytes
from mllama_jax.convert.lazy import LazyTensor, Region, along, read_whole
from mllama_jax.convert.meta_params import config_of, params_of
from mllama_jax.convert.meta_table import meta_tensors, to_meta
from mllama_jax.convert.targets.folders import finish_folder, remove_unfinished, unfinished
from mllama_jax.convert.targets.streamed_file import StreamedFile
from mllama_jax.convert.targets.target import Output, row_blocks
from mllama_jax.convert.targets.torch_zip import lay_out
from mllama_jax.convert.tile_grids import places_of_cells

WEIGHTS_NAME = "consolidated.00.pth"
PARAMS_NAME = "params.json"

# Fields that change no value which a model computes from given tokens and pixels.
_FREE_FIELDS = {
    *("extra", "initializer_range", "use_cache", "dropout", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def params_json(config: MllamaConfig) -> bytes:
    """The contents of params.json."""
    return json_bytes(params_of(config))


def check_lossless(tensors: Mapping[str, tuple[str, LazyTensor]], config: Any) -> None:
    """Refuses a model that Meta's layout can't hold exactly. Reads the tables of tiles.

    Args:
        tensors: Hub name -> stored name and tensor.
        config: the component's; only a whole model has a layout of Meta's.

    Raises:
        ValueError: fields that Meta's code has fixed otherwise; aspect ratios with different values
            for one place in the grid of tiles; values for tiles that do not exist. All of them.
    """
    problems = _config_problems(config)
    if not problems:
        for tensor in meta_tensors(config):
            if tensor.change == "tiles":
                problems += _table_problems(*tensors[tensor.hub], config)
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            "Meta's layout can't hold this model:\n" + "\n".join(f"  {p}" for p in problems)
        )


def _config_problems(config: Any) -> list[str]:
    if not isinstance(config, MllamaConfig):
        return [f"{type(config).__name__}: only whole models have a layout of Meta's"]
    if not config.text_config.cross_attention_layers:
        return ["cross_attention_layers=(): expected at least one layer"]
    width = config.vision_config.hidden_size
    try:
        back = config_of(params_of(config), width)
    except ValueError as error:
        return [str(error)]
    return [
        f"{part}.{name}={value!r}: Meta's code has {expected!r}"
        for part, found, fixed in (
            ("vision_config", config.vision_config, back.vision_config),
            ("text_config", config.text_config, back.text_config),
            ("config", config, back),
        )
        for name, value, expected in _differences(found, fixed)
    ]


def _differences(found: Any, fixed: Any) -> list[tuple[str, Any, Any]]:
    """Fields that matter and differ: name, both values."""
    differences = []
    for field in dataclasses.fields(found):
        value, expected = getattr(found, field.name), getattr(fixed, field.name)
        if field.name == "rope_scaling":
            value, expected = (
                None if (scaling or {}).get("rope_type", "default") == "default" else dict(scaling)
                for scaling in (value, expected)
            )
        if field.name in _FREE_FIELDS or dataclasses.is_dataclass(value) or value == expected:
            continue
        differences.append((field.name, value, expected))
    return differences


def _table_problems(name: str, table: LazyTensor, config: MllamaConfig) -> list[str]:
    """What one grid of tiles can't hold of a table by aspect-ratio ids."""
    vision = config.vision_config
    size = table.shape[1] // vision.max_num_tiles
    rows, tiles = range(table.shape[0]), range(vision.max_num_tiles)
    places = places_of_cells(vision)
    problems = []

    def entry(ratio_id: int, tile: int) -> bytes:
        row = along(table, 0, ratio_id, ratio_id + 1)
        return read_whole(along(row, 1, tile * size, (tile + 1) * size)).tobytes()

    for first, *others in places.values():
        differing = [place for place in others if entry(*place) != entry(*first)]
        if differing:
            problems.append(
                f"{name}: (aspect-ratio id, tile) {', '.join(map(str, differing))} differ from "
                f"{first}; Meta has one value for these"
            )
    used = {place for several in places.values() for place in several}
    nonzero = [
        (ratio_id, tile)
        for ratio_id in rows
        for tile in tiles
        if (ratio_id, tile) not in used and any(entry(ratio_id, tile))
    ]
    if nonzero:
        problems.append(
            f"{name}: (aspect-ratio id, tile) {', '.join(map(str, nonzero))} are tiles that do not "
            "exist, but not zero"
        )
    return problems


class MetaTarget:
    """A folder of Meta's layout in the making, written from its first byte to its last.

    The names are those that llama-models loads strictly. The file is not sharded: Meta's loader
    cuts it for as many processes as there are.

    Args:
        tensors: Hub name -> stored name and tensor, of a whole model; see `check_lossless`.
        config: the whole model's.
        folder: local or cloud; made if absent.
        dtype_of: the dtype in which a Hub tensor is written.
        unused: as `Source.unused`; entries that are absent become zeros.

    Raises:
        ValueError: Meta's layout can't hold a model of this configuration.
    """

    ordered = True

    def __init__(
        self,
        tensors: Mapping[str, tuple[str, LazyTensor]],
        config: Any,
        folder: str | os.PathLike,
        dtype_of: Callable[[str], np.dtype],
        *,
        unused: Mapping[str, LazyTensor] | None = None,
    ):
        _refuse(_config_problems(config))
        self._folder = epath.Path(folder)
        self._params = params_json(config)
        views = to_meta(config, {hub: lazy for hub, (_, lazy) in tensors.items()}, unused or {})
        outputs = []
        for tensor in meta_tensors(config):
            dtype = dtype_of(tensor.hub)
            whole_heads = config.text_config.head_dim if tensor.change == "rope" else 1
            blocks = row_blocks(tensor.shape, dtype, multiple=whole_heads)
            source, _ = tensors[tensor.hub]
            outputs.append(Output(tensor.meta, source, views[tensor.meta], dtype, blocks))
        self.outputs = tuple(outputs)
        self._layout = lay_out(
            WEIGHTS_NAME.removesuffix(".pth"),
            {output.name: (output.shape, output.dtype) for output in outputs},
        )
        self._file = StreamedFile(unfinished(self._folder, WEIGHTS_NAME))
        # Of whole tensors, and of the one that is being written: None between two of them.
        self._checksums: list[int] = []
        self._checksum: int | None = None
        self._left = 0

    def start(self, done: Collection[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not done:
            remove_unfinished(self._folder)
        self._checksums, self._checksum = [], None
        kept = sum(output.name in done for output in self.outputs)
        if kept:
            self._reopen(kept)
        else:
            self._file.begin()
            self._file.append(self._layout.preamble)
        self._end_if_whole()

    def write(self, output: Output, region: Region, values: np.ndarray) -> None:
        record = self._layout.records[len(self._checksums)]
        if self._checksum is None:
            self._file.append(record.header)
            self._checksum, self._left = 0, record.num_bytes
        # reshape(-1): a view as bytes needs an axis.
        data = values.reshape(-1).view(np.uint8).data
        self._file.append(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._left -= data.nbytes
        if self._left == 0:
            self._file.append(record.trailer(self._checksum))
            self._checksums.append(self._checksum)
            self._checksum = None
            self._end_if_whole()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def sha256(self) -> dict[str, str]:
        return {WEIGHTS_NAME: self._file.sha256()}

    def finish(self, files: Mapping[str, bytes]) -> None:
        self.close()
        finish_folder(self._folder, {**files, PARAMS_NAME: self._params})

    def _end_if_whole(self) -> None:
        if len(self._checksums) == len(self.outputs):
            self._file.append(self._layout.ending(self._checksums))

    def _reopen(self, kept: int) -> None:
        """Goes on in a file of which so many tensors are good."""
        records = self._layout.records[:kept]
        self._file.reopen(records[-1].end)
        self._read_again(len(self._layout.preamble))
        for record in records:
            self._read_again(len(record.header))
            self._checksums.append(self._read_again(record.num_bytes))
            self._read_again(len(record.trailer(0)))

    def _read_again(self, num_bytes: int) -> int:
        """Takes up the next bytes of an earlier process; returns their CRC-32."""
        checksum = 0
        for data in self._file.read_again(num_bytes):
            checksum = zlib.crc32(data, checksum)
        return checksum

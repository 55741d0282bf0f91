"""Meta's original release: params.json and consolidated*.pth, seen in the Hub's layout."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from mllama_jax.configs import MllamaConfig
from mllama_jax.convert import meta_table
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import Concatenated, LazyTensor, Region, along, read_whole
from mllama_jax.convert.meta_params import RELEASED_WIDTH, config_of
from mllama_jax.convert.meta_table import MetaTensor, meta_tensors
from mllama_jax.convert.mismatch import Misshaped, describe
from mllama_jax.convert.sources.carried import carried_files
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.sources.torch_files import read_torch_headers

Tensors = dict[str, LazyTensor]

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_SINGLE = "consolidated.pth"
_CLASS_EMBEDDING = "vision_model.vision_encoder.class_embedding"
_EMBEDDINGS = ("text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight")
# Made anew from params.json by every implementation.
_IGNORED = ("text_model.rope.freqs",)

# Meta published its text layers under the names of its own classes and under those of the fused
# kernels that it trained with. A fused matrix holds its parts one after the other, in each shard.
_LAYER = re.compile(r"(text_model\.(?:cross_attention_)?layers\.\d+\.)(.+)")
_RENAMED = {
    "attention.wqkv.layer_norm_weight": "attention_norm.weight",
    "attention.wq.layer_norm_weight": "attention_norm.weight",
    "attention.inner_attention.q_norm.weight": "attention.q_norm.weight",
    "attention.inner_attention.k_norm.weight": "attention.k_norm.weight",
    "feed_forward.mlp.layer_norm_weight": "ffn_norm.weight",
    "feed_forward.mlp.fc2_weight": "feed_forward.w2.weight",
}
_FUSED = {
    "attention.wqkv.weight": ("attention.wq", "attention.wk", "attention.wv"),
    "attention.wkv.weight": ("attention.wk", "attention.wv"),
    "feed_forward.mlp.fc1_weight": ("feed_forward.w1", "feed_forward.w3"),
}
_GATES = ("gate_attn", "gate_ffwd")


def open_meta(folder: epath.Path) -> Source:
    """Opens a folder of Meta's release; no values are read.

    Raises:
        FileNotFoundError: params.json, the weights or one of their shards is absent.
        CheckpointError: damaged files; tensors that are missing, unexpected or of another shape
            than params.json asks for, all of them in one message.
        ValueError: params.json holds unusable values.
    """
    params = _read_params(folder)
    files = _shard_files(folder)
    stored = _read_shards(folder, files)
    first = stored[0].get(_CLASS_EMBEDDING)
    width = first.shape[0] if first is not None and first.shape else RELEASED_WIDTH
    try:
        config = config_of(params, width)
    except ValueError as error:
        raise type(error)(f"{folder}: {error}") from error
    merged = _merge(folder, files, stored, config)
    tensors = meta_table.to_hub(config, merged)
    places = {name: place for place, name in enumerate(merged)}
    order: dict[str, int] = {}
    for tensor in meta_tensors(config):
        order.setdefault(tensor.hub, places[tensor.meta])
    return Source(
        path=folder,
        format="Meta" if len(files) == 1 else f"Meta, {len(files)} tensor-parallel shards",
        component="model",
        config=config,
        tensors={name: tensors[name] for name in sorted(tensors, key=order.__getitem__)},
        files=tuple(files),
        carried=carried_files(folder),
        notes=(
            "params.json names no special tokens; they are those of the released models with this "
            "image size",
        ),
        unused=meta_table.unused_tiles(config, merged),
    )


def _read_params(folder: epath.Path) -> dict[str, Any]:
    file = folder / "params.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; it comes with Meta's consolidated*.pth")
    try:
        params = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(params).__name__}")
    return params


def _shard_files(folder: epath.Path) -> list[epath.Path]:
    """The weight files, by the number of the shard."""
    shards = {
        int(found[1]): file
        for file in folder.glob("consolidated*.pth")
        if (found := _SHARD.fullmatch(file.name))
    }
    single = folder / _SINGLE
    if single.exists() and shards:
        raise CheckpointError(
            f"{folder}: {_SINGLE} lies beside {shards[min(shards)].name}: two checkpoints in one "
            "folder; remove the one that is not meant"
        )
    if single.exists():
        return [single]
    if not shards:
        raise FileNotFoundError(f"{folder}: no {_SINGLE} or consolidated.00.pth")
    absent = sorted(set(range(max(shards) + 1)) - set(shards))
    if absent:
        raise FileNotFoundError(
            f"{folder}: {max(shards) + 1} shards, but "
            f"{', '.join(f'consolidated.{number:02d}.pth' for number in absent)} are absent"
        )
    return [shards[number] for number in sorted(shards)]


def _read_shards(folder: epath.Path, files: Sequence[epath.Path]) -> list[Tensors]:
    shards, problems = [], []
    for file in files:
        try:
            shards.append(read_torch_headers(file))
        except CheckpointError as error:
            problems.append(f"  {error}")
    if problems:
        raise CheckpointError("\n".join([f"{folder} can't be read:", *problems]))
    return shards


@dataclass
class _Problems:
    """What is wrong, for `mismatch.describe`."""

    missing: list[str] = field(default_factory=list)
    misshaped: list[Misshaped] = field(default_factory=list)
    other: list[tuple[str, str]] = field(default_factory=list)


def _merge(
    folder: epath.Path, files: Sequence[epath.Path], stored: Sequence[Tensors], config: MllamaConfig
) -> Tensors:
    """Every tensor of Meta's layout, of all shards together, in the first file's order."""
    problems = _Problems()
    shards = [
        _unfused(tensors, config, file.name, problems)
        for file, tensors in zip(files, stored, strict=True)
    ]
    expected = {tensor.meta: tensor for tensor in meta_tensors(config)}
    found: Tensors = {}
    for name, tensor in expected.items():
        absent = [file.name for file, shard in zip(files, shards, strict=True) if name not in shard]
        if len(absent) == len(files):
            problems.missing.append(name)
        elif absent:
            problems.other.append((name, f"absent from {', '.join(absent)}"))
        else:
            found[name] = _joined(tensor, [shard[name] for shard in shards], problems)
    tokens, image_tokens = (found.get(name) for name in _EMBEDDINGS)
    if tokens is not None and image_tokens is not None and tokens.dtype != image_tokens.dtype:
        problems.other.append(
            (_EMBEDDINGS[1], f"dtype {image_tokens.dtype}, but {_EMBEDDINGS[0]} has {tokens.dtype}")
        )
    names = dict.fromkeys(name for shard in shards for name in shard)
    message = describe(
        missing=problems.missing,
        unexpected=[name for name in names if name not in expected],
        misshaped=problems.misshaped,
        other=list(dict.fromkeys(problems.other)),
    )
    if message:
        raise CheckpointError(f"{folder} does not hold what its params.json describes:\n{message}")
    return {name: found[name] for name in names}


def _unfused(
    stored: Mapping[str, LazyTensor], config: MllamaConfig, file: str, problems: _Problems
) -> Tensors:
    """One shard's tensors under the names of Meta's classes."""
    found: Tensors = {}
    for name, tensor in stored.items():
        for new, part in _parts(name, tensor, config, problems):
            if new in found:
                problems.other.append((name, f"{file} also holds {new} by another name"))
            found[new] = part
    return found


def _parts(
    name: str, tensor: LazyTensor, config: MllamaConfig, problems: _Problems
) -> Iterator[tuple[str, LazyTensor]]:
    layer = _LAYER.fullmatch(name)
    if layer is None:
        if name not in _IGNORED:
            yield name, tensor
        return
    prefix, rest = layer.groups()
    if rest in _GATES and tensor.shape != (1,):
        yield name, _SingleValue(name, tensor)
    elif rest in _FUSED:
        text = config.text_config
        groups = text.num_attention_heads // text.num_key_value_heads
        shares = (groups, 1, 1) if len(_FUSED[rest]) == 3 else (1, 1)
        rows = tensor.shape[0] if tensor.shape else 0
        unit, left = divmod(rows, sum(shares))
        if left or not unit:
            problems.other.append(
                (name, f"shape {tensor.shape} does not divide in the ratio {shares}")
            )
        start = 0
        for part, share in zip(_FUSED[rest], shares, strict=True):
            if unit:
                yield f"{prefix}{part}.weight", along(tensor, 0, start, start + share * unit)
            start += share * unit
    else:
        yield prefix + _RENAMED.get(rest, rest), tensor


def _joined(tensor: MetaTensor, parts: Sequence[LazyTensor], problems: _Problems) -> LazyTensor:
    """The whole of a tensor that lies in shards."""
    name, first = tensor.meta, parts[0]
    dtypes = sorted({str(part.dtype) for part in parts})
    if len(dtypes) > 1:
        problems.other.append((name, f"dtypes {' and '.join(dtypes)} in different shards"))
    if any(part.shape != first.shape for part in parts):
        shapes = ", ".join(str(part.shape) for part in parts)
        problems.other.append((name, f"shards of different shapes: {shapes}"))
        return first
    joined = first
    if len(parts) > 1:
        # Meta's own resharding leaves some tensors whole in every shard that its models split.
        if tensor.split is None or first.shape == tensor.shape:
            joined = _Repeated(name, tuple(parts))
        elif tensor.split < len(first.shape):
            joined = Concatenated(tuple(parts), tensor.split)
    if joined.shape != tensor.shape:
        problems.misshaped.append((name, joined.shape, tensor.shape))
    return joined


@dataclass(frozen=True)
class _Repeated:
    """A tensor that every shard holds; reading it checks that all of them agree."""

    name: str
    parts: tuple[LazyTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, region: Region) -> np.ndarray:
        values = self.parts[0].read(region)
        for number, part in enumerate(self.parts[1:], 1):
            if part.read(region).tobytes() != values.tobytes():
                raise CheckpointError(
                    f"{self.name}: the values in shard {number} are not those in shard 0; expected "
                    "the same in all: shards of different checkpoints?"
                )
        return values


@dataclass(frozen=True)
class _SingleValue:
    """The value of a gate that is stored with more axes, or once for every channel."""

    name: str
    base: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, region: Region) -> np.ndarray:
        values = read_whole(self.base).reshape(-1)
        if not values.size or values.tobytes() != values[:1].tobytes() * values.size:
            raise CheckpointError(f"{self.name}: a gate of different values; expected one")
        return values[:1][region]

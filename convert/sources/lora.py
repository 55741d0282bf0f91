"""LoRA adapters that PEFT saved, merged into their base block by block.

A merged weight is `W + scale · (B A)`, computed in float32 and rounded once to W's dtype. That is
what PEFT's `merge_and_unload()` computes: to the last bit or two of float32; and, for a base in
bfloat16 or float16, to that one rounding (the two may fall to different sides of a tie). Only where
PEFT rounds twice (adapters of embeddings and convolutions, for which it rounds the product first)
do results differ by a unit in the last place more often.

Source: peft 0.18.1, tuners/lora/layer.py.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from etils import epath

from mllama_jax.convert.blocks import copy_cast
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import Cast, LazyTensor, Region, extent, read_whole, whole
from mllama_jax.convert.matching import PARAMETER_DTYPES
from mllama_jax.convert.mismatch import Misshaped, describe, without_layer
from mllama_jax.convert.mismatch import merged as merged_names
from mllama_jax.convert.regrouped import Regrouped
from mllama_jax.convert.sources.carried import carried_files
from mllama_jax.convert.sources.lora_config import CONFIG_NAME, LoraConfig, read_lora_config
from mllama_jax.convert.sources.safetensors_files import read_file_header
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.sources.torch_files import read_torch_headers
from mllama_jax.convert.table import spellings, tensors
from mllama_jax.hub import commit_of

SAFETENSORS_NAME = "adapter_model.safetensors"
TORCH_NAME = "adapter_model.bin"

# Rows of the product of B and A that are computed together. The grid is the tensor's and not the
# region's: how a matrix product is summed may depend on its shape, and a value must not depend on
# what else is read with it.
_STRIP_ROWS = 128

_PREFIX = "base_model.model."
# In a state dict, the adapter's name ("default") follows lora_A; PEFT leaves it out of files.
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?:"
    r"(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
# What PEFT wraps modules in.
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)(?=\.)")

_PROCESSOR_PREFIXES = (
    *("added_tokens", "chat_template", "preprocessor_config", "processor_config"),
    *("special_tokens", "tokenizer"),
)


def adapter_base(folder: epath.Path) -> str | None:
    """The model that an adapter says it was trained on: a hub id, or a path of that machine.

    Raises:
        FileNotFoundError, CheckpointError: as `open_lora`, as far as its configuration goes.
    """
    return read_lora_config(folder).base


def adapter_base_revision(folder: epath.Path) -> str | None:
    """The branch, tag or commit of the base that an adapter was trained on, if it says so."""
    return read_lora_config(folder).base_revision


def open_lora(folder: epath.Path, base: Source) -> Source:
    """A base with an adapter merged into it; no values are read.

    The adapter's names may follow another layout than the base's. Modules that it holds as a whole
    (modules_to_save, trained biases) take the place of the base's, in the base's dtype. Files of
    the processor and tokenizer that lie beside the adapter replace the base's of the same name.

    Args:
        folder: adapter_config.json, and adapter_model.safetensors or adapter_model.bin.

    Raises:
        FileNotFoundError: one of the files is absent.
        CheckpointError: damaged files; a kind of adapter that can't be merged exactly; tensors
            without a counterpart in the base or in the adapter, of another shape or rank, or of no
            floating-point dtype: all of them in one message, with the nearest names.
    """
    config = read_lora_config(folder)
    file = _weights_file(folder)
    adapter = _Adapter.sorted_out(_read_headers(file))
    names = _stored_names(base)
    merged, problems = dict(base.tensors), _Problems()
    for name, tensor in adapter.whole.items():
        _replace(name, tensor, names, merged, problems)
    for module, pair in adapter.pairs.items():
        _merge(module, pair, config, names, merged, problems)
    problems.other += [
        (module, "named by modules_to_save, but the adapter holds nothing of it")
        for module in config.modules_to_save
        if any(f"{module}." in name for name in names)
        and not any(f"{module}." in name for name in adapter.whole)
    ]
    if not adapter.whole and not adapter.pairs and not adapter.other:
        raise CheckpointError(f"{file}: holds no tensors")
    problems.other += [(name, problem) for name, problem in adapter.other]
    lines = describe(misshaped=problems.misshaped, other=problems.other)
    if lines:
        raise CheckpointError(f"{file} does not fit its base, {base.path}:\n{lines}")
    own = {f.name: f for f in carried_files(folder) if f.name.startswith(_PROCESSOR_PREFIXES)}
    carried = {f.name: f for f in base.carried} | own
    return dataclasses.replace(
        base,
        path=folder,
        format=f"LoRA adapter on {base.format}",
        tensors=merged,
        files=(*base.files, folder / CONFIG_NAME, file),
        carried=tuple(carried[name] for name in sorted(carried)),
        revision=commit_of(folder),
        notes=(*base.notes, *_notes(base, config, adapter, own)),
    )


def _weights_file(folder: epath.Path) -> epath.Path:
    for name in (SAFETENSORS_NAME, TORCH_NAME):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder}: no {SAFETENSORS_NAME} or {TORCH_NAME} beside {CONFIG_NAME}")


def _read_headers(file: epath.Path) -> Mapping[str, LazyTensor]:
    if file.name == TORCH_NAME:
        return read_torch_headers(file)
    return {tensor.name: tensor for tensor in read_file_header(file)}


@dataclass
class _Pair:
    """A and B of one module, by these letters, with their names in the file."""

    kind: Literal["linear", "embedding"]
    sides: dict[str, tuple[str, LazyTensor]]


@dataclass
class _Adapter:
    """An adapter's tensors by what they are for; names are without PEFT's prefix and wrappers."""

    pairs: dict[str, _Pair]
    whole: dict[str, LazyTensor]
    other: list[tuple[str, str]]

    @classmethod
    def sorted_out(cls, found: Mapping[str, LazyTensor]) -> "_Adapter":
        adapter = cls({}, {}, [])
        for stored, tensor in found.items():
            name = stored.removeprefix(_PREFIX)
            if tensor.dtype not in PARAMETER_DTYPES:
                wanted = ", ".join(map(str, PARAMETER_DTYPES))
                adapter.other.append((name, f"dtype {tensor.dtype}, expected {wanted}"))
            elif low_rank := _LOW_RANK.fullmatch(name):
                adapter._add(low_rank, name, tensor)
            else:
                adapter.whole[_WRAPPER.sub("", name)] = tensor
        return adapter

    def _add(self, low_rank: re.Match, name: str, tensor: LazyTensor) -> None:
        kind: Literal["linear", "embedding"] = "linear" if low_rank["linear"] else "embedding"
        pair = self.pairs.setdefault(_WRAPPER.sub("", low_rank["module"]), _Pair(kind, {}))
        side = low_rank[kind]
        if side in pair.sides or pair.kind != kind:
            self.other.append(
                (name, f"a second adapter, beside {next(iter(pair.sides.values()))[0]}")
            )
        else:
            pair.sides[side] = name, tensor


class _Problems:
    """What is wrong with an adapter's tensors, for `mismatch.describe`."""

    def __init__(self) -> None:
        self.misshaped: list[Misshaped] = []
        self.other: list[tuple[str, str]] = []


def _stored_names(base: Source) -> dict[str, str]:
    """Every name under which an adapter may know a tensor of the base -> the base's own."""
    found: dict[str, str] = {}
    for tensor in tensors(base.config, base.component):
        names = spellings(tensor.hub)
        stored = next((name for name in names if name in base.tensors), None)
        if stored is not None:
            found |= dict.fromkeys(names, stored)
    return found


def _replace(
    name: str,
    tensor: LazyTensor,
    names: Mapping[str, str],
    merged: dict[str, LazyTensor],
    problems: _Problems,
) -> None:
    """A tensor that the adapter holds as a whole, in place of the base's."""
    if name not in names:
        problems.other.append((name, _no_counterpart(name, names)))
        return
    held = merged[names[name]]
    if held.shape != tensor.shape:
        problems.misshaped.append((name, tensor.shape, held.shape))
        return
    merged[names[name]] = tensor if tensor.dtype == held.dtype else Cast(tensor, held.dtype)


def _merge(
    module: str,
    pair: _Pair,
    config: LoraConfig,
    names: Mapping[str, str],
    merged: dict[str, LazyTensor],
    problems: _Problems,
) -> None:
    """A weight of the base with the product of B and A added."""
    weight = f"{module}.weight"
    if weight not in names:
        problems.other.append((weight, _no_counterpart(weight, names)))
        return
    if len(pair.sides) == 1:
        ((side, (name, _)),) = pair.sides.items()
        problems.other.append((name, f"has no lora_{'B' if side == 'A' else 'A'} beside it"))
        return
    stored = names[weight]
    held, rank = merged[stored], config.rank_of(module)
    faults = [
        (name, tensor.shape, expected)
        for (name, tensor), expected in zip(
            (pair.sides["A"], pair.sides["B"]), _shapes(pair.kind, held.shape, rank), strict=True
        )
        if tensor.shape != expected
    ]
    problems.misshaped += faults
    if not faults:
        (_, a), (_, b) = pair.sides["A"], pair.sides["B"]
        if pair.kind == "embedding":
            b, a = _transposed(a), _transposed(b)
        merged[stored] = Merged(stored, held, b, a, config.scale_of(module))


def _shapes(
    kind: Literal["linear", "embedding"], weight: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B, given the weight's. A convolution's B is one of size 1."""
    if kind == "embedding":
        return (rank, *weight[:1]), (*weight[1:], rank)
    return (rank, *weight[1:]), (*weight[:1], rank, *(1,) * (len(weight) - 2))


def _transposed(matrix: LazyTensor) -> LazyTensor:
    rows, columns = matrix.shape
    return Regrouped(matrix, "a b -> b a", (("a", rows), ("b", columns)))


def _no_counterpart(name: str, names: Mapping[str, str]) -> str:
    """Names of layers are compared without their numbers, so that many become one line."""
    candidates = list(dict.fromkeys(map(without_layer, names)))
    nearest = difflib.get_close_matches(without_layer(name), candidates, n=1, cutoff=0.6)
    return "the base has no such tensor" + (f" (nearest: {nearest[0]})" if nearest else "")


@dataclass(frozen=True)
class Merged:
    """`base + scale · (left @ right)`, computed in float32 for the region that is read.

    Attributes:
        name: the tensor's, for errors.
        base: (rows, …).
        left: (rows, rank), or with further axes of one entry.
        right: (rank, …), with the base's axes but the first.
        scale: of the product.
    """

    name: str
    base: LazyTensor
    left: LazyTensor
    right: LazyTensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, region: Region) -> np.ndarray:
        """Raises CheckpointError if float16 can't hold a value."""
        rows, *others = region
        values = self.base.read(region).astype(np.float32)
        # Values that are not finite are reported where they are looked for.
        with np.errstate(all="ignore"):
            for start, product in self._strips(rows):
                first = max(start, rows.start)
                last = min(start + len(product), rows.stop)
                wanted = (slice(first - start, last - start), *others)
                values[first - rows.start : last - rows.start] += product[wanted]
        if self.dtype == np.float32:
            return values
        result = np.empty(extent(region), self.dtype)
        copy_cast(result, values, self.name)
        return result

    def _strips(self, rows: slice) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of the scaled product that cover these, each strip with the row it begins at."""
        rank = self.right.shape[0]
        right = read_whole(self.right).astype(np.float32).reshape(rank, -1)
        for start in range(rows.start // _STRIP_ROWS * _STRIP_ROWS, rows.stop, _STRIP_ROWS):
            strip = slice(start, min(start + _STRIP_ROWS, self.shape[0]))
            left = self.left.read((strip, *whole(self.left.shape[1:]))).astype(np.float32)
            product = np.ascontiguousarray(left.reshape(-1, rank)) @ np.ascontiguousarray(right)
            yield start, (product * self.scale).reshape(-1, *self.shape[1:])


def _notes(
    base: Source, config: LoraConfig, adapter: _Adapter, own: Mapping[str, epath.Path]
) -> Iterator[str]:
    """What was merged into what."""
    at = f" at {base.revision}" if base.revision else ""
    scales = sorted({config.scale_of(module) for module in adapter.pairs})
    yield f"the adapter is merged into {base.path}{at}"
    if adapter.pairs:
        scale = ", ".join(f"{scale:g}" for scale in scales)
        yield f"{len(adapter.pairs)} weights have low-rank updates (scale {scale})"
    if adapter.whole:
        names = ", ".join(merged_names(adapter.whole))
        yield f"{len(adapter.whole)} tensors are the adapter's own: {names}"
    if own:
        yield f"from the adapter's folder, not the base's: {', '.join(own)}"

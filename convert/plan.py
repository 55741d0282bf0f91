"""What a conversion will do: everything about it but the values."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from mllama_jax.convert import companions
from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.load import parameter_dtype
from mllama_jax.convert.matching import match
from mllama_jax.convert.sources import Source, open_source
from mllama_jax.convert.sources.carried import processor_files
from mllama_jax.convert.table import Component, Config, Tensor, part_config, tensors
from mllama_jax.convert.targets.hugging_face import HuggingFaceTarget
from mllama_jax.convert.targets.target import Output, Target, row_blocks

Format = Literal["orbax", "hf", "meta"]
Matched = Mapping[str, tuple[str, LazyTensor]]

PARTS = ("vision_model", "multi_modal_projector", "language_model")
"""Parts of a whole model that may have dtypes of their own: how Hub names begin."""


@dataclass(frozen=True)
class Plan:
    """A conversion of which everything is known but the values.

    Attributes:
        source: what is read.
        folder: where the result goes.
        to: the result's format.
        component: the part of the model that is converted.
        config: that part's configuration.
        target: the result in the making.
        options: what was asked for, for provenance.
        processor: files that replace the source's processor and tokenizer.
        overwrite: replace a checkpoint, or an unfinished conversion, that the folder holds.
    """

    source: Source
    folder: Path
    to: Format
    component: Component
    config: Config
    target: Target
    options: Mapping[str, Any]
    processor: tuple[epath.Path, ...] = ()
    overwrite: bool = False

    @property
    def outputs(self) -> Sequence[Output]:
        return self.target.outputs

    @property
    def total_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a conversion to go on where another process stopped."""
        files = {}
        for file in self.source.files:
            stat = file.stat()
            files[self.source.label(file)] = [stat.length, stat.mtime]
        listing = json.dumps(
            [(o.name, o.source, list(o.shape), str(o.dtype)) for o in self.outputs]
        )
        values = {
            "tool": companions.tool(),
            "source": {"path": str(self.source.path), "files": files},
            "options": dict(self.options),
            "outputs": hashlib.sha256(listing.encode()).hexdigest(),
        }
        return json.loads(json.dumps(values))  # as a journal gives it back


def plan_conversion(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    to: Format | None = None,
    dtype: str | None = None,
    dtypes: Mapping[str, str] | None = None,
    text_only: bool = False,
    base: str | os.PathLike | None = None,
    processor: str | os.PathLike | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Plan:
    """What a conversion would do; writes nothing, and reads headers only.

    For Meta's layout the tables of tile embeddings are read, too: it can't hold all that they may.

    Args:
        src: a folder or hub id of any format that `open_source` takes.
        dst: the result's folder, a local one.
        to: "orbax" (sharded, for JAX), "hf" (Hugging Face, Hub layout) or "meta"; None is "hf" for
            an Orbax checkpoint and "orbax" for any other.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        dtypes: the same for parts of the model, by the names in `PARTS`; goes before `dtype`.
        text_only: only the language model, as a checkpoint of `MllamaForCausalLM`.
        base: for a LoRA adapter, the model that it is merged into; None is the one that it names.
        processor: a folder or hub id whose processor, tokenizer and template files go along instead
            of the source's.
        revision: branch, tag or commit of a hub id.
        max_shard_size: of Hugging Face's files: bytes, or a string such as "5GB".
        overwrite: replace a checkpoint, or an unfinished conversion, that `dst` holds.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `open_source`; tensors that don't fit the
            configuration; options that don't fit each other or the source; a format that can't
            hold this checkpoint exactly.
    """
    source = open_source(src, revision=revision, base=base)
    folder = _result_folder(source, dst)
    if to is None:
        to = "hf" if source.format.startswith("Orbax") else "orbax"
    component = _component(source, text_only)
    config = part_config(source.config, component)
    expected = tensors(config, component)
    matched = match(source, expected, component)
    chosen = _chosen_dtypes(dtype, dtypes or {}, matched)
    kept = () if processor is None else processor_files(processor)
    options = {
        "to": to,
        "dtypes": {part: str(chosen[part]) for part in PARTS if chosen[part] is not None},
        "text_only": text_only,
        "base": None if base is None else os.fspath(base),
        "processor": None if processor is None else os.fspath(processor),
        "max_shard_size": max_shard_size,
    }

    def dtype_of(hub: str) -> np.dtype:
        return chosen[hub.split(".")[0]] or matched[hub][1].dtype

    target = _target(to, source, folder, config, expected, matched, dtype_of, max_shard_size)
    return Plan(source, folder, to, component, config, target, options, kept, overwrite)


def _target(
    to: Format,
    source: Source,
    folder: Path,
    config: Config,
    expected: Sequence[Tensor],
    matched: Matched,
    dtype_of: Callable[[str], np.dtype],
    max_shard_size: int | str,
) -> Target:
    if to == "hf":
        outputs = [
            Output(tensor.saved, *matched[tensor.hub], dtype_of(tensor.hub), blocks)
            for tensor in expected
            for blocks in [row_blocks(tensor.hub_shape, dtype_of(tensor.hub))]
        ]
        return HuggingFaceTarget(folder, outputs, max_shard_size=max_shard_size)
    if to == "orbax":
        from mllama_jax.convert.targets.orbax import OrbaxTarget

        return OrbaxTarget(folder, expected, matched, dtype_of, tuple(source.tensors))
    if to == "meta":
        from mllama_jax.convert.targets.meta import MetaTarget, check_lossless

        check_lossless(matched, config)
        return MetaTarget(matched, config, folder, dtype_of, unused=source.unused)
    raise ValueError(f"to={to!r}: expected orbax, hf or meta")


def _component(source: Source, text_only: bool) -> Component:
    if not text_only or source.component in ("language_model", "text_model"):
        return source.component
    if source.component == "vision_model":
        raise ValueError(f"{source.path} is a vision encoder alone; text_only leaves nothing of it")
    return "language_model"


def _chosen_dtypes(
    dtype: str | None, dtypes: Mapping[str, str], hub_names: Collection[str]
) -> dict[str, np.dtype | None]:
    """Part -> the dtype asked for, or None to keep what the source has."""
    for part in dtypes:
        if part not in PARTS:
            raise ValueError(f"dtypes: {part!r} is no part; expected {', '.join(PARTS)}")
        if not any(tensor.startswith(f"{part}.") for tensor in hub_names):
            raise ValueError(f"dtypes: the result has no {part}")
    everything = None if dtype is None else parameter_dtype("dtype", dtype)
    return {
        part: parameter_dtype(f"dtypes[{part!r}]", dtypes[part]) if part in dtypes else everything
        for part in PARTS
    }


def _result_folder(source: Source, dst: str | os.PathLike) -> Path:
    """The folder to write, which must not touch the source."""
    # pathlib, and so a command line's paths, make gs:/ of gs://.
    if any(part.endswith(":") for part in Path(dst).parts[:1]):
        raise ValueError(
            f"{os.fspath(dst)}: the result's folder must be a local one; copy it when it is whole"
        )
    folder = Path(dst).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder, or nothing yet")
    read = {source.path, *(file.parent for file in source.files)}
    for origin in sorted(os.fspath(path) for path in read):
        if "://" not in origin and _overlap(Path(origin).resolve(), folder.resolve()):
            raise ValueError(
                f"{folder}: the source, {origin}, is not to be touched; give a folder beside it"
            )
    return folder


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents

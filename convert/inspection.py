"""What a checkpoint is, how large, of which dtypes, and what is odd about it."""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mllama_jax.configs import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama_jax.convert.companions import PROVENANCE
from mllama_jax.convert.lazy import num_bytes
from mllama_jax.convert.oddities import (
    Oddity,
    expected_hashes,
    hash_oddities,
    header_oddities,
    value_oddities,
)
from mllama_jax.convert.parts import PARTS, hub_names, layout_of, part_of, released_as
from mllama_jax.convert.sources import Source, open_source
from mllama_jax.convert.table import COMPONENTS, Config
from mllama_jax.convert.values import Values, blocks_of, in_threads, values_of


@dataclass(frozen=True)
class Part:
    """One of `parts.PARTS`, or all of them.

    Attributes:
        dtypes: dtype -> bytes.
    """

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds.

    Attributes:
        path: the folder.
        format: of the files.
        layout: of the tensors' names, one of `table.LAYOUTS`; None if mixed, or if the format has
            names of its own.
        component: the part of the model that it holds; "model" if it is whole.
        architecture: the class that loads it.
        released_as: the released models with exactly these tensors and shapes.
        revision: the hub's commit, if it came from there.
        dimensions: layers, widths, image size and vocabulary.
        parts: those that it has, in the order of data flow.
        total: all of them together.
        files: weight file -> bytes.
        provenance: what the converter that wrote it noted; None if there is no such file.
        notes: what a user should know.
        oddities: what a user may have to do something about.
        values_read: False if only headers were looked at, and no number.
    """

    path: str
    format: str
    layout: str | None
    component: str
    architecture: str
    released_as: tuple[str, ...]
    revision: str | None
    dimensions: Mapping[str, Any]
    parts: tuple[Part, ...]
    total: Part
    files: Mapping[str, int]
    provenance: Mapping[str, Any] | None
    notes: tuple[str, ...]
    oddities: tuple[Oddity, ...]
    values_read: bool

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries, lists, texts and numbers."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def inspect(
    source: Source | str | os.PathLike,
    *,
    revision: str | None = None,
    base: str | os.PathLike | None = None,
    values: bool = True,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Inspection:
    """Looks through a checkpoint of any format; what is wrong with it is listed, not raised.

    Args:
        source: what `open_source` returns, or what it takes.
        revision, base: see `open_source`.
        values: look at every number, and at the hashes of files that came with one; otherwise
            only at names, shapes, dtypes and files.
        workers: threads; None is one for each processor, at most 8.
        progress: told of bytes as they are read; `bytes_to_read` is their sum.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `open_source`: it can't be read at all.
    """
    if not isinstance(source, Source):
        source = open_source(source, revision=revision, base=base)
    provenance, oddities = _provenance(source)
    oddities += header_oddities(source)
    if values:
        count = progress or (lambda _: None)
        oddities += value_oddities(source, read_values(source, workers, count))
        oddities += hash_oddities(expected_hashes(source, provenance), workers, count)
    hubs = hub_names(source)
    shapes = {hub: source.tensors[name].shape for name, hub in hubs.items()}
    complete = len(shapes) == len(source.tensors)
    image_size = _image_size(source.config)
    parts = _parts(source, hubs)
    return Inspection(
        path=os.fspath(source.path),
        format=source.format,
        layout=layout_of(hubs) if source.format.startswith("Hugging Face") else None,
        component=source.component,
        architecture=COMPONENTS[source.component].architecture,
        released_as=released_as(shapes, source.component, image_size) if complete else (),
        revision=source.revision,
        dimensions=_dimensions(source.config),
        parts=parts,
        total=_total(parts),
        files={file.name: file.stat().length for file in source.files},
        provenance=provenance,
        notes=source.notes,
        oddities=tuple(oddities),
        values_read=values,
    )


def bytes_to_read(source: Source) -> int:
    """How much `inspect` reads when it looks at values."""
    provenance, _ = _provenance(source)
    hashed = expected_hashes(source, provenance)
    return sum(num_bytes(tensor) for tensor in source.tensors.values()) + sum(
        file.stat().length for file in {expected.file for expected in hashed}
    )


def read_values(
    source: Source, workers: int | None, progress: Callable[[int], None]
) -> dict[str, Values]:
    """Stored name -> what kind of numbers the tensor holds; a few blocks in memory at a time."""

    def look(job: tuple[str, Any]) -> tuple[str, Values]:
        name, region = job
        block = source.tensors[name].read(region)
        found = values_of(block)
        progress(block.nbytes)
        return name, found

    jobs = [(name, region) for name, t in source.tensors.items() for region in blocks_of(t)]
    found = dict.fromkeys(source.tensors, Values())
    for name, values in in_threads(look, jobs, workers):
        found[name] += values
    return found


def _provenance(source: Source) -> tuple[dict[str, Any] | None, list[Oddity]]:
    file = source.path / PROVENANCE
    if not file.exists():
        return None, []
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found {type(found).__name__}")
    except ValueError as error:
        return None, [Oddity("provenance", f"{PROVENANCE} can't be read: {error}")]
    return found, []


def _parts(source: Source, hubs: Mapping[str, str]) -> tuple[Part, ...]:
    members: dict[str, list[Any]] = {part: [] for part in PARTS}
    for name, tensor in source.tensors.items():
        members[part_of(hubs.get(name), source.config)].append(tensor)
    found = []
    for part, tensors in members.items():
        dtypes: Counter[str] = Counter()
        for tensor in tensors:
            dtypes[str(tensor.dtype)] += num_bytes(tensor)
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        found.append(Part(part, len(tensors), parameters, dtypes.total(), dict(dtypes)))
    return tuple(part for part in found if part.tensors)


def _total(parts: tuple[Part, ...]) -> Part:
    dtypes: Counter[str] = Counter()
    for part in parts:
        dtypes.update(part.dtypes)
    tensors, parameters = sum(p.tensors for p in parts), sum(p.parameters for p in parts)
    return Part("total", tensors, parameters, dtypes.total(), dict(dtypes))


def _configs(config: Config) -> tuple[MllamaVisionConfig | None, MllamaTextConfig | None]:
    if isinstance(config, MllamaConfig):
        return config.vision_config, config.text_config
    if isinstance(config, MllamaVisionConfig):
        return config, None
    return None, config


def _image_size(config: Config) -> int:
    vision, _ = _configs(config)
    return vision.image_size if vision is not None else MllamaVisionConfig.image_size


def _dimensions(config: Config) -> dict[str, Any]:
    vision, text = _configs(config)
    found: dict[str, Any] = {}
    if vision is not None:
        found |= {
            "image size": vision.image_size,
            "tiles": vision.max_num_tiles,
            "vision layers": vision.num_hidden_layers,
            "vision global layers": vision.num_global_layers,
            "vision width": vision.hidden_size,
        }
    if text is not None:
        cross = len(text.cross_attention_layers)
        found |= {
            "self-attention layers": text.num_hidden_layers - cross,
            "cross-attention layers": cross,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "key-value heads": text.num_key_value_heads,
            "vocabulary": text.vocab_size,
        }
    return found

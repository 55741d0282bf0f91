"""The files of a result that are not weights: configuration, what is carried along, provenance."""

import datetime
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from mllama_jax.convert.lazy import read_whole
from mllama_jax.convert.sources.carried import UNUSED_NAME
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.table import COMPONENTS, MAPPING_VERSION, Component, Config, part_config
from mllama_jax.generation.config import FILE_NAME as GENERATION_CONFIG

PROVENANCE = "provenance.json"
# Of no use without the vision encoder.
_VISION_FILES = ("preprocessor_config.json", "processor_config.json")


def json_bytes(contents: Mapping[str, Any]) -> bytes:
    """As transformers writes its JSON files."""
    return (json.dumps(contents, indent=2, sort_keys=True) + "\n").encode()


def config_json(
    config: Config, component: Component, leaves: Iterable[tuple[np.dtype, int]]
) -> dict[str, Any]:
    """The component's own config.json, with what transformers adds when it saves a model.

    Args:
        config: the component's configuration, or that of a whole model.
        leaves: dtype and number of values of each tensor; the most frequent dtype is named.
    """
    sizes: Counter[str] = Counter()
    for dtype, size in leaves:
        sizes[str(dtype)] += size
    values = part_config(config, component).to_dict()
    for part in (values, values.get("text_config", {}), values.get("vision_config", {})):
        # What a loaded checkpoint said about its own dtype; the name is `dtype` in version 5.
        part.pop("dtype", None)
        part.pop("torch_dtype", None)
        if "rope_scaling" in part and part["rope_scaling"] is None:
            # The same, and transformers' decoder can't be built from null.
            part["rope_scaling"] = {"rope_type": "default"}
    return {
        **values,
        "architectures": [COMPONENTS[component].architecture],
        "torch_dtype": sizes.most_common(1)[0][0],
    }


def carried(
    source: Source, component: Component, processor: Iterable[epath.Path] = ()
) -> dict[str, bytes]:
    """Name -> contents of the files that go along; `processor`'s files before the source's."""
    files = {file.name: file for file in (*source.carried, *processor)}
    if component != "model":
        files = {name: file for name, file in files.items() if name not in _VISION_FILES}
    if component == "vision_model":
        files = {}
    found = {name: file.read_bytes() for name, file in files.items()}
    if source.unused and component in ("model", "vision_model"):
        values = {name: read_whole(tensor) for name, tensor in source.unused.items()}
        found[UNUSED_NAME] = safetensors.numpy.save(values)
    if component in ("model", "language_model"):
        found.setdefault(GENERATION_CONFIG, json_bytes(_generation_config(source.config)))
    return found


def carried_to_meta(source: Source) -> dict[str, bytes]:
    """Name -> contents of the files that go along into a folder of Meta's layout."""
    return {
        file.name: file.read_bytes()
        for file in source.carried
        if file.suffix in (".model", ".md") or file.name.startswith("LICENSE")
    }


def _generation_config(config: Config) -> dict[str, Any]:
    """What a checkpoint that says nothing about generation gets: its special tokens."""
    text = part_config(config, "language_model").to_dict()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: text[name] for name in names if text.get(name) is not None}


def tool() -> dict[str, Any]:
    """What made a result."""
    return {
        "name": "mllama_jax",
        "version": importlib.metadata.version("mllama-jax"),
        "mapping_version": MAPPING_VERSION,
    }


def provenance(
    source: Source,
    source_hashes: Mapping[str, str],
    result_hashes: Mapping[str, str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Where a result came from and how it was made, for `provenance.json`."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "tool": tool(),
        "created": now.isoformat(timespec="seconds"),
        "source": {
            "path": str(source.path),
            "format": source.format,
            "revision": source.revision,
            "files": {
                source.label(file): {
                    "bytes": file.stat().length,
                    "sha256": source_hashes[source.label(file)],
                }
                for file in source.files
            },
        },
        "options": dict(options),
        "files": {name: {"sha256": digest} for name, digest in result_hashes.items()},
    }

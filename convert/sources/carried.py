"""The files of a checkpoint that are not weights and go along when it is converted."""

import os
from fnmatch import fnmatchcase

from etils import epath

from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.sources.safetensors_files import read_file_header
from mllama_jax.hub import local_folder

UNUSED_NAME = "meta_unused.safetensors"
"""Holds what Meta's layout has and the Hub layout has no place for, so that it is not lost."""

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.md", "*.model", "LICENSE*")
# Written anew, or about the weights.
_NOT_CARRIED = ("config.json", "provenance.json", "params.json", "adapter_config.json")
_MAX_BYTES = 2**28


def carried_files(folder: epath.Path) -> tuple[epath.Path, ...]:
    """Processor, tokenizer, template, generation settings, licence and model card."""
    found = {
        file.name: file
        for file in folder.iterdir()
        if any(fnmatchcase(file.name, pattern) for pattern in _PATTERNS)
        and not file.name.startswith(".")
        and file.name not in _NOT_CARRIED
        and not file.name.endswith(".index.json")
        and file.is_file()
        and file.stat().length <= _MAX_BYTES
    }
    return tuple(found[name] for name in sorted(found))


def processor_files(path: str | os.PathLike) -> tuple[epath.Path, ...]:
    """The carried files of a folder or hub repository that is only to lend its processor.

    Raises:
        FileNotFoundError: as `local_folder`; or it holds no tokenizer.
    """
    folder = local_folder(path, allow_patterns=_PATTERNS)
    found = [
        file
        for file in carried_files(folder)
        if file.suffix in (".json", ".jinja", ".txt", ".model")
        and file.name != "generation_config.json"
    ]
    if not any(file.name == "tokenizer.json" for file in found):
        raise FileNotFoundError(f"{folder}: no tokenizer.json; it lends no processor")
    return tuple(found)


def unused_tensors(folder: epath.Path) -> dict[str, LazyTensor]:
    """What an earlier conversion of Meta's layout left beside the weights."""
    file = folder / UNUSED_NAME
    if not file.exists():
        return {}
    return {tensor.name: tensor for tensor in read_file_header(file)}

"""Checkpoints of any format, opened for reading: one file a format."""

import dataclasses
import os
from collections.abc import Sequence

from etils import epath

from mllama_jax.convert.journal import JOURNAL_NAME
from mllama_jax.convert.sources.hugging_face import open_hugging_face
from mllama_jax.convert.sources.source import CheckpointError, Source
from mllama_jax.hub import checkpoint_folder, commit_of

__all__ = ["CheckpointError", "Source", "open_source"]

_ORBAX_MARKS = (
    "orbax.checkpoint",
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "commit_success.txt",
    "checkpoints",
)


def open_source(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    base: str | os.PathLike | None = None,
) -> Source:
    """Opens a checkpoint of any format that is read; no values are read.

    Args:
        path: a local or cloud folder, or a hub id (owner/name): a Hugging Face folder, Meta's
            release (params.json and consolidated*.pth), an Orbax checkpoint with its config.json, a
            training run's folder, or a LoRA adapter of PEFT.
        revision: branch, tag or commit of a hub id.
        base: the model that an adapter is for; None takes the one that the adapter names.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it lacks files.
        CheckpointError: damaged or quantised weights, or a folder of no known format.
        ValueError: an unusable configuration; `base` was given for what is no adapter.
    """
    folder = checkpoint_folder(path, revision=revision)
    if (folder / "adapter_config.json").exists():
        return _open_adapter(folder, base)
    if base is not None:
        raise ValueError(f"base was given, but {os.fspath(folder)} is no LoRA adapter")
    source = _open_folder(folder)
    return dataclasses.replace(source, revision=commit_of(folder) or revision)


def _open_folder(folder: epath.Path) -> Source:
    names = sorted(file.name for file in folder.iterdir())
    # With one of these, what lies there is whole: the result, or what it is to replace.
    if JOURNAL_NAME in names and not {"config.json", "params.json"} & {*names}:
        raise CheckpointError(
            f"{os.fspath(folder)} is an unfinished conversion; run the same command again to "
            "finish it"
        )
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        from mllama_jax.convert.sources.meta import open_meta

        return open_meta(folder)
    if _looks_like_orbax(names):
        from mllama_jax.convert.sources.orbax import open_orbax

        return open_orbax(folder)
    return open_hugging_face(folder)


def _looks_like_orbax(names: Sequence[str]) -> bool:
    """Whether a folder is a checkpoint, a folder of checkpoints by step, or a training run."""
    return any(name in _ORBAX_MARKS or name.isdigit() for name in names)


def _open_adapter(folder: epath.Path, base: str | os.PathLike | None) -> Source:
    from mllama_jax.convert.sources.lora import adapter_base, adapter_base_revision, open_lora

    if base is not None:
        return open_lora(folder, open_source(base))
    named = adapter_base(folder)
    if named is None:
        raise ValueError(f"{os.fspath(folder)}: a LoRA adapter that names no base; give base")
    try:
        opened = open_source(named, revision=adapter_base_revision(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{os.fspath(folder)} is a LoRA adapter for {named!r}, which can't be found; give its "
            f"base (--base, base=…): {error}"
        ) from error
    return open_lora(folder, opened)

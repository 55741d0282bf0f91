"""A checkpoint that was opened for reading, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from etils import epath

from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.table import Component, Config

__all__ = ["CheckpointError", "Source"]


@dataclass(frozen=True)
class Source:
    """A checkpoint of which names, shapes and dtypes are known, but no values have been read.

    Attributes:
        path: the folder.
        format: what it is, for people: "Hugging Face safetensors", "Meta", "Orbax", …
        component: the part of the model that it holds; "model" if it is whole.
        config: the configuration of that part.
        tensors: stored name -> tensor, in the order in which reading is sequential. Names are those
            of the Hub layout or of another of `table.LAYOUTS`; formats with other names and axes
            are presented in the Hub layout.
        files: the files that hold weights, for provenance.
        carried: files that go along with the weights (processor, tokenizer, template, …).
        revision: the hub's commit, if the checkpoint came from there.
        notes: what a user should know about this checkpoint, a sentence each.
        unused: name -> values that the Hub layout has no place for, and that no computation uses.
    """

    path: epath.Path
    format: str
    component: Component
    config: Config
    tensors: Mapping[str, LazyTensor]
    files: tuple[epath.Path, ...]
    carried: tuple[epath.Path, ...] = ()
    revision: str | None = None
    notes: tuple[str, ...] = ()
    unused: Mapping[str, LazyTensor] = field(default_factory=dict)

    def label(self, file: epath.Path) -> str:
        """What a file is called: its path within the checkpoint, or its whole path."""
        try:
            return file.relative_to(self.path).as_posix()
        except ValueError:
            return file.as_posix()

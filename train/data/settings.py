"""What can be said about the training data: the section ``data`` of a run's configuration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from mllama_jax.train.data.formats import FORMATS

_FORMATS = ("auto", *FORMATS)
_LOSS_ON = ("assistant", "all")


@dataclass(frozen=True)
class SourceConfig:
    """A part of the training data."""

    path: str = MISSING
    """A file (.jsonl, .parquet, .arrow, .array_record), the folder of a saved Hugging Face data
    set, or a pattern such as data/part-*.parquet. Relative paths of pictures start at its
    folder."""
    format: str = "auto"
    """messages (OpenAI), llava (ShareGPT) or vqa (question and answer); auto tells by the keys."""
    weight: float | None = None
    """Share of the examples that come from here, of any sum; null in all sources takes every
    conversation equally often."""


@dataclass(frozen=True)
class DataConfig:
    """Conversations with their pictures."""

    train: str | None = None
    """Conversations to learn from: `path` of a source of its own."""
    held_out: str | None = None
    """As `train`, for measuring answers; never trained on."""
    held_out_format: str = "auto"
    """Of `held_out`, as in a source."""
    batch_size: int = 8
    """Conversations a step, of all processes together."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Lengths in tokens that batches are padded to: one compiled program for each that occurs."""
    packing: bool = False
    """Several conversations in each row of the longest of `lengths`, each learned as if it were
    alone; `batch_size` then counts rows."""
    max_images: int = 8
    """Pictures that a packed row may have; the fused kernels of TPUs take 32 tiles, 8 pictures of
    4."""
    threads: int = 2
    """Threads that prepare examples ahead of the model."""
    date_string: str = "26 Jul 2024"
    """Today's date for chat templates that tell it. The real one would make every day's run
    another."""
    format: str = "auto"
    """Of `train`, as in a source."""
    sources: list[SourceConfig] = field(default_factory=list)
    """In place of `train`: several sources, mixed."""
    loss_on: str = "assistant"
    """assistant: only the assistant's answers are learned; all: every token but pictures."""
    max_bad_records: int = 0
    """Conversations that may turn out unusable before the run ends; each is left out and named."""
    cache: str = "~/.cache/mllama_jax"
    """Folder on this machine for copies of data that can't be read in place: Parquet, buckets."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """What is trained on, however it was written."""
        return tuple(self.sources) or (SourceConfig(self.train or "", self.format),)


def data_problems(config: DataConfig) -> Iterator[str]:
    """What is wrong with the settings, each a line with its key."""
    if bool(config.train) == bool(config.sources):
        yield (
            f"data.train={config.train!r} and {len(config.sources)} data.sources: expected a path "
            "in data.train, or several in data.sources"
        )
    if config.loss_on not in _LOSS_ON:
        yield f"data.loss_on={config.loss_on!r}: expected {' or '.join(_LOSS_ON)}"
    if config.max_images < 1:
        yield f"data.max_images={config.max_images!r}: expected a number above 0"
    named = {"data.format": config.format, "data.held_out_format": config.held_out_format}
    for index, source in enumerate(config.sources):
        at = f"data.sources[{index}]"
        named[f"{at}.format"] = source.format
        if source.weight is not None and not 0 < source.weight < math.inf:
            yield f"{at}.weight={source.weight!r}: expected a finite number above 0"
    for key, value in named.items():
        if value not in _FORMATS:
            yield f"{key}={value!r}: expected {' or '.join(_FORMATS)}"
    weights = [source.weight is None for source in config.sources]
    if any(weights) and not all(weights):
        yield (
            f"data.sources[{weights.index(True)}].weight=None: others have a weight; expected one "
            "for each source, or none at all"
        )

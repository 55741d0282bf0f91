"""Everything a training run can be told."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mllama_jax.train.data.settings import DataConfig, data_problems
from mllama_jax.train.log_settings import LoggingConfig, logging_problems
from mllama_jax.train.settings import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainedConfig,
    model_problems,
    recipe_problems,
)


class ConfigError(ValueError):
    """The configuration of a run can't be used; the message lists everything that is wrong."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a stopped run goes on from."""

    every: int = 500
    """Steps between two checkpoints; the last step is always kept."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: int | None = None
    """Checkpoints of every so many steps stay, too; null for none of these."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Generated answers to the held-out questions, compared word for word, and their loss."""

    every: int = 0
    """Steps between two evaluations; 0 means only after the last step."""
    batch_size: int = 16
    max_new_tokens: int = 32
    limit: int | None = None
    """Conversations used, taken evenly from the whole file; None takes all."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    output: str = MISSING
    """Folder of the run: checkpoints/, metrics.jsonl, config.yaml and, at the end, model/ and
    summary.html."""
    steps: int = MISSING
    seed: int = 0
    """Decides the order of the examples."""
    mesh: str | None = None
    """How the devices of all processes are divided, such as fsdp=8,tensor=2; null uses one device.
    The batch is split over data and fsdp."""
    log_every: int = 10
    """Steps between two progress lines; metrics.jsonl gets every step."""
    model: ModelConfig = field(default_factory=ModelConfig)
    trained: TrainedConfig = field(default_factory=TrainedConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        problems = list(_range_problems(self))
        if problems:
            raise ConfigError("The configuration can't be used:\n  " + "\n  ".join(problems))

    @property
    def recipe(self) -> Recipe:
        """What decides what a step does."""
        return Recipe(self.steps, self.optimizer, self.trained, self.lora)


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _range_problems(config: TrainConfig) -> Iterator[str]:
    values = flatten(dataclasses.asdict(config))
    missing = [key for key, value in values.items() if value == MISSING]
    if missing:
        yield from (f"{key}: required but not given" for key in missing)
        return
    positive = (
        *("steps", "log_every", "data.batch_size", "data.threads", "checkpoint.every"),
        *("checkpoint.keep", "evaluation.batch_size", "evaluation.max_new_tokens"),
    )
    not_negative = ("evaluation.every", "seed", "data.max_bad_records")
    for key in positive:
        if not values[key] > 0:
            yield f"{key}={values[key]!r}: expected a number above 0"
    for key in not_negative:
        if not values[key] >= 0:
            yield f"{key}={values[key]!r}: expected 0 or more"
    if values["seed"] >= 2**32:
        yield f"seed={values['seed']!r}: expected a number below 2**32"
    yield from model_problems(config.model)
    yield from recipe_problems(config.recipe)
    microbatches = config.optimizer.microbatches
    if microbatches > 0 and config.data.batch_size % microbatches:
        yield (
            f"optimizer.microbatches={microbatches}: expected a divisor of data.batch_size="
            f"{config.data.batch_size}"
        )
    yield from data_problems(config.data)
    yield from logging_problems(config.logging)
    if not config.data.held_out:
        for key in ("evaluation.every", "logging.samples"):
            if values[key] > 0:
                yield f"{key}={values[key]!r}: needs questions to ask; give data.held_out"
    lengths = values["data.lengths"]
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        yield f"data.lengths={lengths!r}: expected rising positive lengths, such as [64, 128]"
    for key, meaning in (("evaluation.limit", "all"), ("checkpoint.keep_every", "none of these")):
        if values[key] is not None and values[key] < 1:
            yield f"{key}={values[key]!r}: expected a number above 0, or null for {meaning}"

"""Everything a training run can be told: dataclasses, read from YAML and `key=value` words."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import omegaconf
from etils import epath
from omegaconf import MISSING, OmegaConf

from mllama_jax.attention import ATTENTION_KINDS
from mllama_jax.execution import REMAT_POLICIES

_DTYPES = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": _DTYPES,
    "model.param_dtype": _DTYPES,
    "model.attention": ATTENTION_KINDS,
    "model.remat": tuple(REMAT_POLICIES),
}
_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    int | None: "a whole number or null",
    str | None: "text or null",
    tuple[int, ...]: "a list of whole numbers",
    tuple[str, ...]: "a list of texts",
}


class ConfigError(ValueError):
    """The configuration of a run can't be used; the message lists everything that is wrong."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that training starts from."""

    path: str = MISSING
    """Hugging Face folder (or hub id) with configuration, weights, tokenizer and processor."""
    dtype: str = "float32"
    """What the model computes in."""
    param_dtype: str = "float32"
    """What the parameters, and with them the optimizer's moments, are kept in."""
    attention: str = "xla"
    remat: str = "none"
    """What the backward pass recomputes instead of keeping it: none, dots (all but the products
    with weights), attention (all but attention's results), full (all but each layer's input)."""
    images_at_once: int | None = None
    """Pictures that a device encodes at a time; null for all of its share of a batch."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, trained instead of the parameters themselves, which stay frozen."""

    rank: int = 0
    """Of the adapters; 0 trains all parameters instead."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("language_model/*_proj",)
    """Projections with an adapter: patterns of their paths, with *. The default is every
    projection of the decoder, of self- and of cross-attention layers."""


@dataclass(frozen=True)
class DataConfig:
    """Conversations, one a line, with their pictures."""

    train: str = MISSING
    """JSONL file; picture paths in it are relative to the file."""
    held_out: str | None = None
    """JSONL file of the same form, for measuring answers; never trained on."""
    batch_size: int = 8
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Lengths in tokens that batches are padded to: one compiled program for each that occurs."""
    threads: int = 2
    """Threads that prepare examples ahead of the model."""
    date_string: str = "26 Jul 2024"
    """Today's date for chat templates that tell it. The real one would make every day's run
    another."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay. Only projection kernels are decayed."""

    learning_rate: float = 1e-5
    """The peak, reached after the warm-up."""
    warmup_steps: int = 0
    final_fraction: float = 0.1
    """The last step's learning rate, as a fraction of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it; .inf leaves all as they are."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a stopped run goes on from."""

    every: int = 500
    """Steps between two checkpoints; the last step is always kept."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Generated answers to the held-out questions, compared word for word."""

    every: int = 0
    """Steps between two evaluations; 0 means only after the last step."""
    batch_size: int = 16
    max_new_tokens: int = 32
    limit: int | None = None
    """Questions asked, taken evenly from the whole file; None asks all."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    output: str = MISSING
    """Folder of the run: checkpoints/, metrics.jsonl, config.yaml and, at the end, model/."""
    steps: int = MISSING
    seed: int = 0
    """Decides the order of the examples."""
    mesh: str | None = None
    """How the devices of all processes are divided, such as fsdp=8,tensor=2; null uses one device.
    The batch is split over data and fsdp."""
    log_every: int = 10
    """Steps between two progress lines; metrics.jsonl gets every step."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        problems = list(_range_problems(self))
        if problems:
            raise ConfigError("The configuration can't be used:\n  " + "\n  ".join(problems))


def load_config(file: epath.PathLike, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a run's YAML file and applies `key=value` words on top of it.

    Paths in the result are as written, so relative ones count from the working directory.

    Args:
        file: YAML with the fields of `TrainConfig`, nested as it is.
        overrides: such as `optimizer.learning_rate=2e-3` or `data.lengths=[64,128]`.

    Raises:
        ConfigError: unknown keys (with the nearest known one), values of the wrong type or out
            of range, required keys left out. Problems of one kind come together.
        FileNotFoundError: there is no such file.
    """
    file = epath.Path(file)
    if not file.exists():
        raise FileNotFoundError(f"There is no configuration file {str(file)!r}.")
    sources = [(str(file), _parse_yaml(file)), *((word, _parse_word(word)) for word in overrides)]
    problems = [
        f"{source}: {problem}"
        for source, values in sources
        for problem in _key_problems(TrainConfig, values)
    ]
    if problems:
        raise ConfigError("The configuration can't be read:\n  " + "\n  ".join(problems))
    config, problems = _merged(sources)
    if problems:
        raise ConfigError("The configuration can't be read:\n  " + "\n  ".join(problems))
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{file}: required but not given: {', '.join(missing)}")
        return cast(TrainConfig, OmegaConf.to_object(config))
    except omegaconf.errors.OmegaConfBaseException as error:  # an interpolation, ${...}
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{file}: {error.full_key}: {reason}") from error


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(before: str, after: TrainConfig) -> list[str]:
    """`key: old -> new` for each setting in which a saved YAML text and a configuration differ."""
    texts = (before, to_yaml(after))
    parsed = (_mapping(OmegaConf.create(text), "the saved configuration") for text in texts)
    old, new = map(_flatten, parsed)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _parse_yaml(file: epath.Path) -> Mapping:
    try:
        values = OmegaConf.create(file.read_text())
    except Exception as error:  # the YAML library's and OmegaConf's errors share no base class
        raise ConfigError(f"{file}: not readable as YAML: {error}") from error
    return _mapping(values, str(file))


def _parse_word(word: str) -> Mapping:
    if "=" not in word:
        raise ConfigError(f"{word!r}: expected key=value, such as optimizer.learning_rate=2e-3")
    try:
        return _mapping(OmegaConf.from_dotlist([word]), word)
    except Exception as error:  # as above: the value is read as YAML
        raise ConfigError(f"{word!r}: the value is not readable as YAML: {error}") from error


def _mapping(values: omegaconf.DictConfig | omegaconf.ListConfig, source: str) -> Mapping:
    plain = OmegaConf.to_container(values)
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{source}: expected `key: value` lines, found a list")
    return plain


def _merged(sources: Sequence[tuple[str, Mapping]]) -> tuple[Any, list[str]]:
    """The sources' values, later ones on top, and what is wrong with those of another type."""
    types = dict(_known(TrainConfig))
    config, problems = OmegaConf.structured(TrainConfig), []
    for source, values in sources:
        for key, value in _flatten(values).items():
            nested = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            try:
                config = OmegaConf.merge(config, nested)
            except (omegaconf.errors.OmegaConfBaseException, TypeError):
                problems.append(f"{source}: {key} is {value!r}; expected {_TYPE_NAMES[types[key]]}")
    return config, problems


def _flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _known(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, sections among them, with its type."""
    for item in dataclasses.fields(schema):
        yield prefix + item.name, item.type
        if _is_section(item.type):
            yield from _known(item.type, f"{prefix}{item.name}.")


def _is_section(kind: object) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _key_problems(schema: type, values: Mapping, prefix: str = "") -> Iterator[str]:
    fields = {item.name: item.type for item in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            yield f"unknown key {f'{prefix}{key}'!r}{_suggestion(f'{prefix}{key}')}"
        elif not _is_section(kind := fields[key]):
            if isinstance(value, Mapping):
                yield f"{prefix}{key} is {value!r}; expected {_TYPE_NAMES[kind]}"
        elif isinstance(value, Mapping):
            yield from _key_problems(kind, value, f"{prefix}{key}.")
        else:
            inside = ", ".join(item.name for item in dataclasses.fields(kind))
            yield f"{prefix}{key} is {value!r}; expected a section with any of {inside}"


def _suggestion(key: str) -> str:
    known = [name for name, _ in _known(TrainConfig)]
    # A right name in the wrong place is told from a misspelt one.
    same_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    found = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not found:
        by_name = {name.rpartition(".")[2]: name for name in known}
        names = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1)
        found = [by_name[name] for name in names]
    return f"; did you mean {' or '.join(repr(name) for name in found)}?" if found else ""


def _range_problems(config: TrainConfig) -> Iterator[str]:
    values = _flatten(dataclasses.asdict(config))
    missing = [key for key, value in values.items() if value == MISSING]
    if missing:
        yield from (f"{key}: required but not given" for key in missing)
        return
    positive = (
        *("steps", "log_every", "data.batch_size", "data.threads", "checkpoint.every"),
        *("checkpoint.keep", "evaluation.batch_size", "evaluation.max_new_tokens"),
        *("optimizer.learning_rate", "optimizer.eps", "optimizer.max_grad_norm"),
    )
    not_negative = ("optimizer.warmup_steps", "optimizer.weight_decay", "evaluation.every", "seed")
    for key in positive:
        if not values[key] > 0:
            yield f"{key}={values[key]!r}: expected a number above 0"
    for key in ("optimizer.learning_rate", "optimizer.eps", "optimizer.weight_decay"):
        if values[key] == math.inf:
            yield f"{key}={values[key]!r}: expected a finite number"
    for key in not_negative:
        if not values[key] >= 0:
            yield f"{key}={values[key]!r}: expected 0 or more"
    if values["seed"] >= 2**32:
        yield f"seed={values['seed']!r}: expected a number below 2**32"
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            yield f"{key}={values[key]!r}: expected {' or '.join(choices)}"
    for key in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= values[key] < 1:
            yield f"{key}={values[key]!r}: expected at least 0 and below 1"
    if not 0 <= values["optimizer.final_fraction"] <= 1:
        yield f"optimizer.final_fraction={values['optimizer.final_fraction']!r}: expected 0 to 1"
    if values["optimizer.warmup_steps"] >= values["steps"]:
        yield (
            f"optimizer.warmup_steps={values['optimizer.warmup_steps']!r}: "
            f"expected fewer than steps={values['steps']!r}"
        )
    lengths = values["data.lengths"]
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        yield f"data.lengths={lengths!r}: expected rising positive lengths, such as [64, 128]"
    for key in ("evaluation.limit", "model.images_at_once"):
        if values[key] is not None and values[key] < 1:
            yield f"{key}={values[key]!r}: expected a number above 0, or null for all"
    if values["lora.rank"] < 0:
        yield f"lora.rank={values['lora.rank']!r}: expected a number above 0, or 0 for no adapters"
    if values["lora.rank"] and not values["lora.targets"]:
        yield "lora.targets=(): expected patterns of the projections that get an adapter"

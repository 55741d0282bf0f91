"""A run's configuration as text: YAML, with `key=value` words on top of it, and back."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast, get_args, get_origin

import omegaconf
from etils import epath
from omegaconf import OmegaConf

from mllama_jax.train.config import ConfigError, TrainConfig, flatten
from mllama_jax.train.data.settings import SourceConfig

_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    int | None: "a whole number or null",
    float | None: "a number or null",
    str | None: "text or null",
    tuple[int, ...]: "a list of whole numbers",
    tuple[str, ...]: "a list of texts",
    list[SourceConfig]: "a list of {path: …, format: …, weight: …}",
}


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
    return from_yaml(file.read_text(), str(file), overrides)


def from_yaml(
    text: str, where: str = "the configuration", overrides: Sequence[str] = ()
) -> TrainConfig:
    """As `load_config`, of a text that is there; ``where`` is what messages call it."""
    sources = [
        (where, _parse_yaml(text, where)),
        *((word, _parse_word(word)) for word in overrides),
    ]
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
        if not (config.data.train or config.data.sources):
            missing = ["data.train", *missing]
        if missing:
            raise ConfigError(f"{where}: required but not given: {', '.join(missing)}")
        return cast(TrainConfig, OmegaConf.to_object(config))
    except omegaconf.errors.OmegaConfBaseException as error:  # an interpolation, ${...}
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {error.full_key}: {reason}") from error


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(before: str, after: TrainConfig) -> list[str]:
    """`key: old -> new` for each setting in which a saved YAML text and a configuration differ."""
    texts = (before, to_yaml(after))
    parsed = (_mapping(OmegaConf.create(text), "the saved configuration") for text in texts)
    old, new = map(flatten, parsed)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _parse_yaml(text: str, where: str) -> Mapping:
    try:
        values = OmegaConf.create(text)
    except Exception as error:  # the YAML library's and OmegaConf's errors share no base class
        raise ConfigError(f"{where}: not readable as YAML: {error}") from error
    return _mapping(values, where)


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
        for key, value in flatten(values).items():
            nested = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            try:
                config = OmegaConf.merge(config, nested)
            except (omegaconf.errors.OmegaConfBaseException, TypeError):
                problems.append(f"{source}: {key} is {value!r}; expected {_TYPE_NAMES[types[key]]}")
    return config, problems


def _known(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, sections among them, with its type."""
    for item in dataclasses.fields(schema):
        yield prefix + item.name, item.type
        if _is_section(item.type):
            yield from _known(item.type, f"{prefix}{item.name}.")
        elif section := _section_of(item.type):
            yield from _known(section, f"{prefix}{item.name}[].")


def _is_section(kind: object) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _section_of(kind: object) -> type | None:
    """What a list of sections holds; None for anything else."""
    inside = get_args(kind)
    return inside[0] if get_origin(kind) is list and _is_section(inside[0]) else None


def _key_problems(schema: type, values: Mapping, prefix: str = "") -> Iterator[str]:
    fields = {item.name: item.type for item in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            yield f"unknown key {f'{prefix}{key}'!r}{_suggestion(f'{prefix}{key}')}"
        elif (section := _section_of(fields[key])) and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _key_problems(section, item, f"{prefix}{key}[{index}].")
        elif not _is_section(kind := fields[key]):
            if isinstance(value, Mapping):
                yield f"{prefix}{key} is {value!r}; expected {_TYPE_NAMES[kind]}"
        elif isinstance(value, Mapping):
            yield from _key_problems(kind, value, f"{prefix}{key}.")
        else:
            inside = ", ".join(item.name for item in dataclasses.fields(kind))
            yield f"{prefix}{key} is {value!r}; expected a section with any of {inside}"


def _suggestion(key: str) -> str:
    key = re.sub(r"\[\d+\]", "[]", key)
    known = [name for name, _ in _known(TrainConfig)]
    # A right name in the wrong place is told from a misspelt one.
    same_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    # A name that each component has, too, is meant for all of them.
    depth = min((name.count(".") for name in same_name), default=0)
    same_name = [name for name in same_name if name.count(".") == depth]
    found = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not found:
        by_name = {name.rpartition(".")[2]: name for name in known}
        names = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1)
        found = [by_name[name] for name in names]
    return f"; did you mean {' or '.join(repr(name) for name in found)}?" if found else ""

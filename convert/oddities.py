"""What can be wrong with a checkpoint that can be read: one function for each kind of trouble."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from etils import epath

from mllama_jax.cloud import pieces
from mllama_jax.configs import MllamaConfig
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.matching import match
from mllama_jax.convert.mismatch import merged, without_layer
from mllama_jax.convert.parts import hub_names, layout_of
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.table import Config, tensors, text_config
from mllama_jax.convert.values import Values, in_threads
from mllama_jax.hub import published_sha256

_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
Number = TypeVar("Number", int, float)
_FOR_TEXT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_FOR_IMAGES = ("preprocessor_config.json",)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Oddity:
    """Something that a user should look at.

    Attributes:
        kind: a word for scripts: "tensors", "layout", "dtypes", "torch_dtype", "vocabulary",
            "files", "provenance", "nan", "infinity", "zero", "gates", "float16" or "hash".
        text: for people; may have several lines.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class ExpectedHash:
    """A file's SHA-256 as someone noted it."""

    file: epath.Path
    sha256: str
    said_by: str


def header_oddities(source: Source) -> list[Oddity]:
    """What names, shapes, dtypes and the presence of files tell."""
    checks = (_tensors, _layout, _vocabulary, _mixed_dtypes, _torch_dtype, _missing_files)
    return [oddity for check in checks for oddity in check(source)]


def _tensors(source: Source) -> Iterator[Oddity]:
    try:
        match(source, tensors(source.config, source.component), source.component)
    except CheckpointError as error:
        yield Oddity("tensors", str(error))


def _layout(source: Source) -> Iterator[Oddity]:
    if layout_of(hub_names(source)) is None:
        yield Oddity("layout", "the tensors' names follow several layouts; expected one")


def _vocabulary(source: Source) -> Iterator[Oddity]:
    """Rows of the tables of tokens: the usual mistake is to leave out those of the image token."""
    if source.component == "vision_model":
        return
    text = text_config(source.config)
    wanted = {
        "language_model.model.embed_tokens.weight": text.num_embeddings,
        "language_model.lm_head.weight": text.vocab_size,
    }
    for name, hub in hub_names(source).items():
        rows = next(iter(source.tensors[name].shape), 0)
        if hub in wanted and rows != wanted[hub]:
            extra = text.num_embeddings - text.vocab_size
            yield Oddity(
                "vocabulary",
                f"{name} has {rows} rows, expected {wanted[hub]}: with a vocabulary of "
                f"{text.vocab_size} there are {text.num_embeddings} embeddings (the last {extra} "
                f"are the image token's and unused ones) and {text.vocab_size} rows of the head",
            )


def _mixed_dtypes(source: Source) -> Iterator[Oddity]:
    for part, by_dtype in _names_by_dtype(source).items():
        if len(by_dtype) > 1:
            usual = max(by_dtype, key=lambda dtype: len(by_dtype[dtype]))
            others = {dtype: names for dtype, names in by_dtype.items() if dtype != usual}
            lines = [
                f"  {dtype}: {name}" for dtype, names in others.items() for name in merged(names)
            ]
            yield Oddity("dtypes", f"{part} is {usual}, but for\n" + "\n".join(lines))


def _names_by_dtype(source: Source) -> dict[str, dict[str, list[str]]]:
    """Part of the model -> dtype -> stored names."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, hub in hub_names(source).items():
        by_dtype = found.setdefault(hub.split(".")[0], {})
        by_dtype.setdefault(str(source.tensors[name].dtype), []).append(name)
    return found


def _torch_dtype(source: Source) -> Iterator[Oddity]:
    """A configuration that names a dtype that none of its tensors has."""
    found = {part: set(by_dtype) for part, by_dtype in _names_by_dtype(source).items()}
    for section, config, parts in _sections(source.config):
        held = set().union(*(found.get(part, ()) for part in parts))
        # Version 5 of transformers calls it dtype.
        for field in ("torch_dtype", "dtype"):
            stated = config.extra.get(field)
            if stated is not None and held and stated not in held:
                yield Oddity(
                    "torch_dtype",
                    f"config.json says {section}{field} {stated!r}, but the tensors are "
                    f"{' and '.join(sorted(held))}",
                )


def _sections(config: Config) -> list[tuple[str, Config, tuple[str, ...]]]:
    """(name, configuration, parts of the model that it is about)."""
    everything = ("vision_model", "multi_modal_projector", "language_model")
    if not isinstance(config, MllamaConfig):
        return [("", config, everything)]
    return [
        ("", config, everything),
        ("vision_config.", config.vision_config, ("vision_model",)),
        ("text_config.", config.text_config, ("language_model",)),
    ]


def _missing_files(source: Source) -> Iterator[Oddity]:
    """Files without which the weights can't be used as transformers or we would use them."""
    if source.component not in ("model", "language_model"):
        return
    present = {file.name for file in source.carried}
    wanted = _FOR_TEXT + (_FOR_IMAGES if source.component == "model" else ())
    missing = [name for name in wanted if name not in present]
    if missing:
        yield Oddity(
            "files",
            f"no {', '.join(missing)}: give the folder of a processor with --processor when "
            "converting",
        )
    if "tokenizer_config.json" in present and not _has_template(source.carried):
        yield Oddity(
            "files",
            "no chat template (chat_template.jinja, chat_template.json or a field of "
            "tokenizer_config.json): usual for base models, a mistake for instruct models",
        )


def _has_template(files: Sequence[epath.Path]) -> bool:
    by_name = {file.name: file for file in files}
    if any(name in by_name for name in _TEMPLATES):
        return True
    try:
        return "chat_template" in json.loads(by_name["tokenizer_config.json"].read_text())
    except ValueError:
        return False


def value_oddities(source: Source, values: Mapping[str, Values]) -> list[Oddity]:
    """What the numbers tell.

    Args:
        values: stored name -> what it holds.
    """
    nans = {name: found.nans for name, found in values.items() if found.nans}
    infinities = {name: found.infinities for name, found in values.items() if found.infinities}
    too_large = {
        name: found.largest for name, found in values.items() if found.largest > _LARGEST_FLOAT16
    }
    zero = [name for name, found in values.items() if found.all_zero and _size(source, name)]
    gates = [name for name in zero if name.endswith(("gate", "gate_attn", "gate_ffn"))]
    zero = [name for name in zero if name not in gates and not name.endswith(".bias")]
    found = (
        _listed("nan", "NaN", _counted(source, nans)),
        _listed("infinity", "infinite", _counted(source, infinities)),
        _listed(
            "float16",
            f"beyond float16's largest, {_LARGEST_FLOAT16:.0f} (use bfloat16 or float32)",
            [f"{line}: up to {max(large):.6g}" for line, large in _by_line(too_large)],
        ),
        _listed("zero", "nothing but zeros", [f"  {name}" for name in merged(zero)]),
        _gates(gates),
    )
    return [oddity for oddity in found if oddity is not None]


def _counted(source: Source, counts: Mapping[str, int]) -> list[str]:
    sizes = {name: _size(source, name) for name in counts}
    return [
        f"{line}: {sum(found)} of {sum(of)} values"
        for (line, found), (_, of) in zip(_by_line(counts), _by_line(sizes), strict=True)
    ]


def _by_line(numbers: Mapping[str, Number]) -> list[tuple[str, list[Number]]]:
    """Names of the same tensor in several layers as one indented line, with their numbers."""
    groups: dict[str, list[str]] = {}
    for name in numbers:
        groups.setdefault(without_layer(name), []).append(name)
    return [
        (f"  {merged(names)[0]}", [numbers[name] for name in names]) for names in groups.values()
    ]


def _size(source: Source, name: str) -> int:
    return int(np.prod(source.tensors[name].shape, dtype=np.int64))


def _listed(kind: str, title: str, lines: Sequence[str]) -> Oddity | None:
    return Oddity(kind, "\n".join([f"{title}:", *lines])) if lines else None


def _gates(names: Sequence[str]) -> Oddity | None:
    if not names:
        return None
    title = "gates of zero, which switch off what they gate"
    if any("cross_attn" in name for name in names):
        title += " (in cross-attention layers: pictures change nothing there, as before training)"
    return _listed("gates", title, [f"  {name}" for name in merged(names)])


def expected_hashes(source: Source, provenance: Mapping[str, Any] | None) -> list[ExpectedHash]:
    """The SHA-256 of weight files as the hub, or the converter that wrote them, noted them."""
    noted = (provenance or {}).get("files")
    found = []
    for file in source.files:
        published = published_sha256(file)
        if published is not None:
            found.append(ExpectedHash(file, published, "the hub"))
        own = noted.get(file.name) if isinstance(noted, Mapping) else None
        if isinstance(own, Mapping) and "sha256" in own:
            found.append(ExpectedHash(file, own["sha256"], "provenance.json"))
    return found


def hash_oddities(
    expected: Sequence[ExpectedHash], workers: int | None, progress: Callable[[int], None]
) -> list[Oddity]:
    """The files that are not what someone noted."""

    def digest(file: epath.Path) -> str:
        found = hashlib.sha256()
        for data in pieces(file):
            found.update(data)
            progress(len(data))
        return found.hexdigest()

    files = list(dict.fromkeys(item.file for item in expected))
    digests = dict(zip(files, in_threads(digest, files, workers), strict=True))
    return [
        Oddity(
            "hash",
            f"{item.file.name}: its SHA-256 is {digests[item.file]}, but {item.said_by} says "
            f"{item.sha256}: changed or damaged since",
        )
        for item in expected
        if digests[item.file] != item.sha256
    ]

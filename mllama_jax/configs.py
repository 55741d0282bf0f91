"""Model configurations: Hugging Face's fields, defaults and ``config.json``, as frozen dataclasses.

The dataclasses are hashable, so a module that holds one can be a static argument of ``jax.jit``.
Fields that this package does not use are kept in ``extra`` and written back unchanged.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeGuard

from etils import epath
from flax.core import FrozenDict

RopeFormat = Literal["rope_scaling", "rope_parameters"]

EXTRA_EMBEDDING_ROWS = 8
"""Embedding rows beyond the vocabulary; the first one is the image token. They have no logit."""

_DEFAULT_ASPECT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({key: _freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _are_layers(value: Any, count: int) -> bool:
    """Whether ``value`` holds different indices of ``count`` layers."""
    return (
        isinstance(value, tuple)
        and all(isinstance(i, int) and 0 <= i < count for i in value)
        and len(set(value)) == len(value)
    )


def _are_aspect_ratios(value: Any, max_num_tiles: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all(isinstance(ratio, tuple) and len(ratio) == 2 for ratio in value)
        and all(_is_count(h) and _is_count(w) and h * w <= max_num_tiles for h, w in value)
    )


class _Problems:
    """Collects what is wrong with a configuration, so that all of it is reported at once."""

    def __init__(self, config: object):
        self._name = type(config).__name__
        self._found: list[str] = []

    def check(self, condition: bool, field_name: str, value: Any, expected: str) -> None:
        if not condition:
            self._found.append(f"{field_name}={value!r}: expected {expected}")

    def positive_integers(self, config: object, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            self.check(_is_count(value), name, value, "a positive integer")

    def positive_numbers(self, config: object, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            self.check(_is_positive(value), name, value, "a positive number")

    def raise_if_any(self) -> None:
        if self._found:
            raise ValueError(f"invalid {self._name}: " + "; ".join(self._found))


@dataclass(frozen=True)
class _Config:
    """Reading and writing that the three configurations share."""

    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    model_type: ClassVar[str]
    _section: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _freeze(getattr(self, item.name)))
        self._validate()

    def _validate(self) -> None:
        raise NotImplementedError

    @classmethod
    def _read_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Renames what other generations of ``config.json`` call differently."""
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the configuration from the contents of a Hugging Face ``config.json``.

        Raises:
          ValueError: a field has an unusable value; all such fields are named.
        """
        found_type = values.get("model_type", cls.model_type)
        if found_type != cls.model_type:
            raise ValueError(f"model_type is {found_type!r}, expected {cls.model_type!r}")
        values = cls._read_fields({k: v for k, v in values.items() if k != "model_type"})
        names = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        known = {key: value for key, value in values.items() if key in names}
        extra = {key: value for key, value in values.items() if key not in names}
        return cls(**known, extra=extra)

    def to_dict(self, rope_format: RopeFormat = "rope_scaling") -> dict[str, Any]:
        """The contents of a Hugging Face ``config.json``.

        Args:
          rope_format: ``"rope_scaling"`` writes ``rope_theta`` and ``rope_scaling``, which every
            version of transformers reads; ``"rope_parameters"`` writes the newer single field.
        """
        del rope_format
        own = {
            item.name: _thaw(getattr(self, item.name))
            for item in dataclasses.fields(self)
            if item.name != "extra"
        }
        return {**_thaw(self.extra), **own, "model_type": self.model_type}

    @classmethod
    def from_pretrained(cls, path: epath.PathLike) -> Self:
        """Reads ``config.json`` from a folder (or the file itself).

        A part's configuration (text or vision) is also taken out of a full model's file.

        Raises:
          FileNotFoundError: there is no ``config.json``.
          ValueError: it is not JSON, is of another model type, or holds unusable values.
        """
        file = epath.Path(path)
        if file.is_dir():
            file = file / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face config.json")
        try:
            values = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
        if cls._section is not None and values.get("model_type") == MllamaConfig.model_type:
            values = values.get(cls._section, {})
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save_pretrained(
        self, folder: epath.PathLike, rope_format: RopeFormat = "rope_scaling"
    ) -> None:
        """Writes ``config.json`` into ``folder`` (made if absent); see `to_dict`."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(rope_format), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n")


@dataclass(frozen=True)
class MllamaVisionConfig(_Config):
    """The vision encoder's shape; the defaults are Llama 3.2 Vision's (11B and 90B, 448 px base).

    ``max_num_tiles`` other than 4 needs ``supported_aspect_ratios``, as (tiles high, tiles wide).

    Raises:
      ValueError: a field has an unusable value; all such fields are named.
    """

    hidden_size: int = 1280
    hidden_act: str = "gelu"
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    num_attention_heads: int = 16
    num_channels: int = 3
    intermediate_size: int = 5120
    vision_output_dim: int = 7680
    image_size: int = 448
    patch_size: int = 14
    norm_eps: float = 1e-5
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    supported_aspect_ratios: tuple[tuple[int, int], ...] = _DEFAULT_ASPECT_RATIOS
    initializer_range: float = 0.02

    model_type: ClassVar[str] = "mllama_vision_model"
    _section: ClassVar[str | None] = "vision_config"

    def __post_init__(self) -> None:
        defaults = type(self)
        for name in ("intermediate_layers_indices", "supported_aspect_ratios"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(defaults, name))
        super().__post_init__()

    @classmethod
    def _read_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        if "attention_heads" in values:
            values["num_attention_heads"] = values.pop("attention_heads")
        return values

    def to_dict(self, rope_format: RopeFormat = "rope_scaling") -> dict[str, Any]:
        values = super().to_dict(rope_format)
        values["attention_heads"] = values.pop("num_attention_heads")
        return values

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches(self) -> int:
        """Patches of one tile, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def max_aspect_ratio_id(self) -> int:
        """The largest aspect-ratio id; ids are 1-based, 0 means "no image"."""
        return len(self.supported_aspect_ratios)

    def _validate(self) -> None:
        problems = _Problems(self)
        problems.positive_integers(
            self,
            *("hidden_size", "num_hidden_layers", "num_global_layers", "num_attention_heads"),
            *("num_channels", "intermediate_size", "image_size", "patch_size", "max_num_tiles"),
        )
        problems.raise_if_any()
        problems.check(
            self.hidden_size % self.num_attention_heads == 0,
            *("hidden_size", self.hidden_size),
            f"a multiple of num_attention_heads={self.num_attention_heads}",
        )
        problems.check(
            self.image_size >= self.patch_size,
            *("image_size", self.image_size),
            f"at least patch_size={self.patch_size}",
        )
        taps = self.intermediate_layers_indices
        problems.check(
            _are_layers(taps, self.num_hidden_layers),
            *("intermediate_layers_indices", taps),
            f"different layers from 0 to num_hidden_layers-1={self.num_hidden_layers - 1}",
        )
        output_dim = self.hidden_size * (len(taps) + 1) if isinstance(taps, tuple) else None
        problems.check(
            output_dim is None or self.vision_output_dim == output_dim,
            *("vision_output_dim", self.vision_output_dim),
            f"hidden_size * (len(intermediate_layers_indices) + 1) = {output_dim}",
        )
        ratios = self.supported_aspect_ratios
        problems.check(
            _are_aspect_ratios(ratios, self.max_num_tiles)
            and (self.max_num_tiles == 4 or ratios != _DEFAULT_ASPECT_RATIOS),
            *("supported_aspect_ratios", ratios),
            f"(tiles high, tiles wide) pairs of at most max_num_tiles={self.max_num_tiles} tiles; "
            "they must be given when max_num_tiles is not 4",
        )
        problems.positive_numbers(self, "norm_eps")
        problems.check(
            self.hidden_act in _ACTIVATIONS,
            *("hidden_act", self.hidden_act),
            f"one of {', '.join(_ACTIVATIONS)}",
        )
        problems.raise_if_any()


@dataclass(frozen=True)
class MllamaTextConfig(_Config):
    """The decoder's shape; the defaults are Llama 3.2 Vision 11B's.

    ``rope_scaling`` of None is plain RoPE; a mapping has ``rope_type`` "default", "linear" or
    "llama3" and that type's fields. ``dropout`` is kept for round trips; it is never applied.

    Raises:
      ValueError: a field has an unusable value; all such fields are named.
    """

    vocab_size: int = 128256
    hidden_size: int = 4096
    hidden_act: str = "silu"
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    intermediate_size: int = 14336
    rope_theta: float = 500_000.0
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    dropout: float = 0.0
    bos_token_id: int = 128000
    eos_token_id: int | tuple[int, ...] = 128001
    pad_token_id: int | None = 128004

    model_type: ClassVar[str] = "mllama_text_model"
    _section: ClassVar[str | None] = "text_config"

    def __post_init__(self) -> None:
        if self.cross_attention_layers is None:
            object.__setattr__(self, "cross_attention_layers", type(self).cross_attention_layers)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if isinstance(self.rope_scaling, Mapping) and "type" in self.rope_scaling:
            scaling = {"rope_type": self.rope_scaling["type"], **self.rope_scaling}
            scaling.pop("type")
            object.__setattr__(self, "rope_scaling", scaling)
        super().__post_init__()

    @classmethod
    def _read_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        parameters = values.pop("rope_parameters", None)
        if parameters is None:
            return values
        parameters = dict(parameters)
        values.setdefault("rope_theta", parameters.pop("rope_theta", cls.rope_theta))
        if not values.get("rope_scaling") and parameters.get("rope_type") != "default":
            values["rope_scaling"] = parameters or None
        return values

    def to_dict(self, rope_format: RopeFormat = "rope_scaling") -> dict[str, Any]:
        values = super().to_dict(rope_format)
        if rope_format == "rope_parameters":
            scaling = values.pop("rope_scaling") or {"rope_type": "default"}
            values["rope_parameters"] = {"rope_theta": values.pop("rope_theta"), **scaling}
        return values

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table: the vocabulary and the image token's extra rows."""
        return self.vocab_size + EXTRA_EMBEDDING_ROWS

    def is_cross_attention_layer(self, layer: int) -> bool:
        return layer in self.cross_attention_layers

    @property
    def unit_length(self) -> int:
        """Decoder layers in the shortest pattern of self and cross layers that fills the decoder.

        5 for the released models (self, self, self, cross, self); all layers where none repeats.
        """
        pattern = [self.is_cross_attention_layer(i) for i in range(self.num_hidden_layers)]
        return next(
            length
            for length in range(1, self.num_hidden_layers + 1)
            if self.num_hidden_layers % length == 0
            and pattern == pattern[:length] * (self.num_hidden_layers // length)
        )

    @property
    def num_units(self) -> int:
        return self.num_hidden_layers // self.unit_length

    def _validate(self) -> None:
        problems = _Problems(self)
        problems.positive_integers(
            self,
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "intermediate_size", "max_position_embeddings"),
        )
        problems.raise_if_any()
        problems.check(
            self.hidden_size % self.num_attention_heads == 0 and self.head_dim % 2 == 0,
            *("hidden_size", self.hidden_size),
            f"num_attention_heads={self.num_attention_heads} times an even head dimension",
        )
        problems.check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            *("num_attention_heads", self.num_attention_heads),
            f"a multiple of num_key_value_heads={self.num_key_value_heads}",
        )
        layers = self.cross_attention_layers
        problems.check(
            _are_layers(layers, self.num_hidden_layers),
            *("cross_attention_layers", layers),
            f"different layers from 0 to num_hidden_layers-1={self.num_hidden_layers - 1}",
        )
        problems.check(
            not self.tie_word_embeddings,
            *("tie_word_embeddings", self.tie_word_embeddings),
            "False: the embedding table has 8 rows more than the head",
        )
        problems.positive_numbers(self, "rope_theta", "rms_norm_eps")
        problems.check(
            self.hidden_act in _ACTIVATIONS,
            *("hidden_act", self.hidden_act),
            f"one of {', '.join(_ACTIVATIONS)}",
        )
        self._check_rope(problems)
        problems.raise_if_any()

    def _check_rope(self, problems: _Problems) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        if not isinstance(scaling, Mapping):
            problems.check(False, "rope_scaling", scaling, "a mapping or None")
            return
        kind = scaling.get("rope_type", "default")
        problems.check(
            kind in _ROPE_FIELDS,
            *("rope_scaling['rope_type']", kind),
            f"one of {', '.join(_ROPE_FIELDS)}",
        )
        for name in _ROPE_FIELDS.get(kind, ()):
            value = scaling.get(name)
            problems.check(
                _is_positive(value),
                *(f"rope_scaling[{name!r}]", value),
                f"a positive number (rope_type {kind!r} needs it)",
            )
        low, high = (scaling.get(f"{name}_freq_factor") for name in ("low", "high"))
        if kind == "llama3" and _is_positive(low) and _is_positive(high):
            problems.check(
                high > low,
                *("rope_scaling['high_freq_factor']", high),
                f"more than low_freq_factor={low}",
            )


@dataclass(frozen=True)
class MllamaConfig(_Config):
    """The whole model's shape: a vision and a text configuration; the defaults are the 11B model.

    The parts may be given as configurations, as mappings, or as None for the defaults.

    Raises:
      ValueError: a field has an unusable value; all such fields are named.
    """

    vision_config: MllamaVisionConfig = None  # type: ignore[assignment]
    text_config: MllamaTextConfig = None  # type: ignore[assignment]
    image_token_index: int = 128256

    model_type: ClassVar[str] = "mllama"

    def __post_init__(self) -> None:
        parts: dict[str, type[MllamaVisionConfig] | type[MllamaTextConfig]] = {
            "vision_config": MllamaVisionConfig,
            "text_config": MllamaTextConfig,
        }
        for name, part in parts.items():
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, part())
            elif isinstance(value, Mapping):
                object.__setattr__(self, name, part.from_dict(value))
        super().__post_init__()

    @classmethod
    def _read_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        if "image_token_id" in values:
            values["image_token_index"] = values.pop("image_token_id")
        return values

    @property
    def image_token_id(self) -> int:
        """Another name of ``image_token_index``."""
        return self.image_token_index

    def to_dict(self, rope_format: RopeFormat = "rope_scaling") -> dict[str, Any]:
        values = super().to_dict(rope_format)
        values["vision_config"] = self.vision_config.to_dict(rope_format)
        values["text_config"] = self.text_config.to_dict(rope_format)
        return values

    def _validate(self) -> None:
        problems = _Problems(self)
        problems.check(
            isinstance(self.vision_config, MllamaVisionConfig),
            *("vision_config", self.vision_config, "MllamaVisionConfig, a mapping or None"),
        )
        problems.check(
            isinstance(self.text_config, MllamaTextConfig),
            *("text_config", self.text_config, "MllamaTextConfig, a mapping or None"),
        )
        problems.raise_if_any()
        rows = self.text_config.num_embeddings
        problems.check(
            isinstance(self.image_token_index, int) and 0 <= self.image_token_index < rows,
            *("image_token_index", self.image_token_index),
            f"a row of the embedding table, 0 to {rows - 1}",
        )
        problems.raise_if_any()

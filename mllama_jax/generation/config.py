"""When generation stops and how tokens are chosen: Hugging Face's ``generation_config.json``."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from etils import epath

from mllama_jax.configs import MllamaConfig, MllamaTextConfig, _freeze, _Problems, _thaw

__all__ = ["GenerationConfig", "check_options"]

FILE_NAME = "generation_config.json"

DEFAULT_MAX_LENGTH = 20
"""A max_length of this value counts as not given: 20 tokens more than the prompt, at most."""

_UNSUPPORTED = {
    "assistant_early_exit": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "max_time": None,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "suppress_tokens": None,
    "token_healing": False,
    "typical_p": 1.0,
    "watermarking_config": None,
}
"""Hugging Face's fields that change the answer and aren't implemented, with the neutral value."""


@dataclass(frozen=True)
class GenerationConfig:
    """Limits, stopping and sampling of `generate`, with the defaults of transformers 4.54.1.

    Attributes:
        max_length: columns of the result, prompt included; see `DEFAULT_MAX_LENGTH`.
        max_new_tokens: the longest answer in tokens; wins over ``max_length``.
        min_new_tokens: no end token is chosen before this many new tokens.
        do_sample: draw tokens; otherwise the most likely one is taken.
        temperature: divides the logits before the draw; positive.
        top_k: the draw is among this many most likely tokens; 0 or None for all.
        top_p: the draw is among the most likely tokens that add up to this probability, (0, 1].
        min_p: the draw is among tokens at least this likely relative to the most likely, [0, 1].
        bos_token_id: kept for round trips.
        eos_token_id: the token that ends an answer, or several of them.
        pad_token_id: fills the result after the end; the first end token if None.
        stop_strings: texts that end an answer once they stand in it.
        extra: other fields of the file, written back unchanged.

    Raises:
        ValueError: a field has an unusable value; all such fields are named.
    """

    max_length: int | None = DEFAULT_MAX_LENGTH
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: str | tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _freeze(getattr(self, item.name)))
        self._validate()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, possibly none."""
        value = self.eos_token_id
        return () if value is None else value if isinstance(value, tuple) else (value,)

    @property
    def all_stop_strings(self) -> tuple[str, ...]:
        """All texts that end an answer, possibly none."""
        value = self.stop_strings
        return () if value is None else (value,) if isinstance(value, str) else value

    def replace(self, **changes: Any) -> Self:
        """A copy with other values; None switches off what may be None.

        Raises:
            TypeError: there is no field of that name.
            ValueError: a value is unusable.
        """
        check_options(changes)
        return dataclasses.replace(self, **changes)

    def unsupported(self) -> dict[str, Any]:
        """The fields of ``extra`` that ask for something that `generate` does not do."""
        return {
            name: _thaw(self.extra[name])
            for name, neutral in _UNSUPPORTED.items()
            if self.extra.get(name) is not None and self.extra[name] != neutral
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds it from the contents of a ``generation_config.json``."""
        names = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        known = {key: value for key, value in values.items() if key in names}
        extra = {key: value for key, value in values.items() if key not in names}
        return cls(**known, extra=extra)

    @classmethod
    def from_model_config(cls, config: MllamaConfig | MllamaTextConfig) -> Self:
        """The defaults for a model without ``generation_config.json``: its special tokens."""
        text = config.text_config if isinstance(config, MllamaConfig) else config
        return cls(
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``generation_config.json``: what differs from the defaults."""
        own = {
            item.name: _thaw(getattr(self, item.name))
            for item in dataclasses.fields(self)
            if item.name != "extra" and getattr(self, item.name) != item.default
        }
        return {**_thaw(self.extra), **own}

    @classmethod
    def from_pretrained(cls, path: epath.PathLike) -> Self:
        """Reads ``generation_config.json`` from a folder (or the file itself).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or holds unusable values.
        """
        file = epath.Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face {FILE_NAME}")
        try:
            values = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save_pretrained(self, folder: epath.PathLike) -> None:
        """Writes ``generation_config.json`` into ``folder`` (made if absent)."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (folder / FILE_NAME).write_text(text + "\n")

    def _validate(self) -> None:
        problems = _Problems(self)

        def whole(name: str, least: int) -> None:
            value = getattr(self, name)
            fits = value is None or (_is_integer(value) and value >= least)
            problems.check(fits, name, value, f"an integer of at least {least}, or None")

        def number(name: str, fits: bool, expected: str) -> None:
            problems.check(fits, name, getattr(self, name), expected)

        whole("max_length", 1)
        whole("max_new_tokens", 1)
        whole("min_new_tokens", 0)
        whole("top_k", 0)
        whole("bos_token_id", 0)
        number("do_sample", isinstance(self.do_sample, bool), "True or False")
        # Greedy checkpoints are published with temperature 0; only a draw would divide by it.
        number(
            "temperature",
            self.temperature is None
            or (_is_number(self.temperature) and self.temperature > 0)
            or (self.temperature == 0 and not self.do_sample),
            "a positive number; for the most likely token at each step use do_sample=False",
        )
        number(
            "top_p",
            self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
            "a number greater than 0 and at most 1 (1 keeps all tokens)",
        )
        number(
            "min_p",
            self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p <= 1),
            "a number from 0 (keeps all tokens) to 1",
        )
        problems.check(
            all(_is_integer(token) and token >= 0 for token in self.eos_token_ids),
            *("eos_token_id", self.eos_token_id, "a token id, several of them, or None"),
        )
        problems.check(
            self.pad_token_id is None or _is_integer(self.pad_token_id),
            *("pad_token_id", self.pad_token_id, "a token id or None"),
        )
        problems.check(
            all(isinstance(text, str) and text for text in self.all_stop_strings),
            *("stop_strings", self.stop_strings, "a text that isn't empty, several, or None"),
        )
        problems.raise_if_any()


def check_options(names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Checks that all names are fields of `GenerationConfig`.

    Args:
        names: found.
        others: further names that may have been meant.

    Raises:
        TypeError: there are no fields of some names; with what may have been meant.
    """
    fields = [item.name for item in dataclasses.fields(GenerationConfig)]
    unknown = []
    for name in sorted(set(names) - set(fields)):
        close = difflib.get_close_matches(name, [*fields, *others], n=1)
        unknown.append(repr(name) + (f" (did you mean {close[0]!r}?)" if close else ""))
    if unknown:
        raise TypeError(
            f"no such option: {', '.join(unknown)}; there are: "
            + ", ".join(name for name in fields if name != "extra")
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

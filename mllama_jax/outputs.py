"""What the models return, with Hugging Face's field names."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import flax.struct

from mllama_jax.cache import LegacyCache, MllamaCache
from mllama_jax.shapes import Array


class _Output:
    """Access by field name or by position among the fields that are not None."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order (what ``return_dict=False`` returns)."""
        values = (getattr(self, item.name) for item in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


@flax.struct.dataclass
class BaseModelOutput(_Output):
    """Of the vision encoder.

    ``last_hidden_state`` is (B, M, L, P, vision_output_dim). ``hidden_states`` holds the
    intermediate layers' states that enter it, then the global layers' inputs and their final
    state, each (B*M, E, hidden). ``attentions`` holds each layer's weights, local layers first.
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@flax.struct.dataclass
class BaseModelOutputWithPast(_Output):
    """Of the decoder without its head.

    ``last_hidden_state`` is (B, T, D). ``hidden_states`` holds each layer's input and the
    normalised final state. ``attentions`` holds (B, N, T, keys) for each layer that ran.
    """

    last_hidden_state: Array
    past_key_values: MllamaCache | LegacyCache | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@flax.struct.dataclass
class CausalLMOutputWithPast(_Output):
    """Of the language model: ``logits`` (B, T or num_logits_to_keep, vocabulary), float32.

    ``loss`` is the mean cross-entropy (float32 scalar) over the labels that are not -100.
    """

    loss: Array | None = None
    logits: Array | None = None
    past_key_values: MllamaCache | LegacyCache | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None

"""Answers in the form of JSON: which tokens may come next, computed on the host by llguidance."""

import json
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mllama_jax.batch.requests import RequestError
from mllama_jax.processing.tokenizer import MllamaTokenizer

__all__ = ["Guide", "GuideFactory"]

_FIELD = "response_format"
_SCHEMA = "response_format.json_schema.schema"
_KEPT_GRAMMARS = 256
_PROBE = '{"a": [1, "é 中"]}\n'


class Guide:
    """What one answer may still become. Made by `GuideFactory.guide`."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self) -> np.ndarray:
        """The tokens that may come next: uint32 (ceil(W / 32),), a bit a token, lowest bit first.

        Once the answer is complete, end tokens may come; once it is finished, nothing else.

        Raises:
            RequestError: the library gave up on this schema.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
        self._check()
        mask = packed[: -(-self._vocab_size // 32)].astype(np.uint32)
        # The tokenizer may have more tokens than there are logits: the image token.
        mask[-1] &= np.uint32(0xFFFFFFFF >> (-self._vocab_size % 32))
        return mask

    def accept(self, token_id: int) -> None:
        """Takes in the next token of the answer.

        Raises:
            RequestError: the token isn't one that `mask` allows, or the library gave up.
        """
        accepted = self._matcher.consume_token(token_id)
        self._check()
        if not accepted:
            raise RequestError(f"the answer can't go on with token {token_id}", status_code=500)

    @property
    def is_finished(self) -> bool:
        """Whether only an end token can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().splitlines()[0]
            raise RequestError(
                f"{_FIELD}: the answer could not be kept to its form: {reason}",
                status_code=500,
                field=_FIELD,
            )


class GuideFactory:
    """Makes the guides of one model; llguidance is loaded, within a second, for the first of them.

    Args:
        tokenizer: of byte-level tokens, as Llama's.
        vocab_size: W, the width of the logits.
        eos_token_ids: the model's end tokens; each may end a complete answer.
    """

    def __init__(self, tokenizer: MllamaTokenizer, vocab_size: int, eos_token_ids: Collection[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled = lru_cache(_KEPT_GRAMMARS)(self._compile)

    def guide(self, response_format: Mapping[str, Any]) -> Guide:
        """A guide at the start of an answer. The same form is compiled once.

        Args:
            response_format: ``{"type": "json_object"}``, or ``{"type": "json_schema",
                "json_schema": {"schema": …}}``. The schema always holds, whatever ``strict`` says.

        Raises:
            RequestError: it has another form, or the schema is one that can't be kept to;
                llguidance is not installed, or can't spell this tokenizer's tokens.
        """
        schema = json.dumps(_schema(response_format))
        return Guide(self._compiled(schema).deep_copy(), self._vocab_size)

    def _compile(self, schema: str) -> Any:
        library = _llguidance()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise _unusable(str(error)) from error
        matcher = library.LLMatcher(self._tokens, grammar)
        if matcher.is_error():
            raise _unusable(matcher.get_error())
        return matcher

    @cached_property
    def _tokens(self) -> Any:
        """The tokenizer as llguidance has it."""
        size = max(self._vocab_size, *(id + 1 for id in self._tokenizer.get_vocab().values()))
        try:
            tokens = _llguidance().LLTokenizer(
                self._tokenizer.backend.to_str(), n_vocab=size, eos_token=self._eos_token_ids
            )
        except ValueError as error:
            raise _unreadable(str(error)) from error
        spelled = tokens.decode_bytes(self._tokenizer.encode(_PROBE, add_special_tokens=False))
        if spelled != _PROBE.encode():
            raise _unreadable(f"{_PROBE!r} comes back as {spelled!r}")
        return tokens


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = response_format.get("type")
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise RequestError(
            f"{_FIELD}.type is {kind!r}; expected 'json_object' or 'json_schema'.", field=_FIELD
        )
    holder = response_format.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping):
        raise RequestError(
            f"{_SCHEMA} is {schema!r}; expected an object, a JSON schema.", field=_FIELD
        )
    return schema


def _unusable(reason: str) -> RequestError:
    return RequestError(f"{_SCHEMA} can't be kept to: {reason}", field=_FIELD)


def _unreadable(reason: str) -> RequestError:
    return RequestError(
        f"{_FIELD} needs a tokenizer of byte-level tokens, which this model's isn't: {reason}",
        field=_FIELD,
    )


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            f"{_FIELD} needs llguidance, which is not installed: pip install 'mllama-jax[guided]'",
            status_code=500,
            field=_FIELD,
        ) from error
    return llguidance

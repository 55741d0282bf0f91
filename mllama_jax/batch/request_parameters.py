"""The parameters of a request's body: how each is read, and which of the others change nothing."""

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mllama_jax.batch.request_json import Problems, short

__all__ = ["CHAT", "COMPLETION", "check_others", "read_parameters"]

MAX_INTEGER = 2**31 - 1
MAX_CHOICES = 128
MAX_LOGPROBS = 20

GREEDY_TEMPERATURE = 1e-5
"""Below this a temperature counts as 0, as in vLLM: logits divided by it would overflow."""

_MOST_TEMPERATURE = 100.0
_LONGEST_NAME = 40


# --- readers: a value as it is stored, or ValueError with what was expected -----------------------


def _integer(least: int, most: int = MAX_INTEGER) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"an integer from {least} to {most}")
        return value

    return read


def _number(least: float, most: float, expected: str | None = None) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if (
            type(value) not in (int, float)
            or not math.isfinite(value)
            or not least <= value <= most
        ):
            raise ValueError(expected or f"a number from {least:g} to {most:g}")
        return float(value)

    return read


def _temperature(value: Any) -> float:
    number = _number(0, _MOST_TEMPERATURE)(value)
    return 0.0 if number < GREEDY_TEMPERATURE else number


def _top_k(value: Any) -> int:
    if type(value) is not int or not -1 <= value <= MAX_INTEGER:
        raise ValueError("a positive integer, or 0 or -1 for all tokens")
    return max(value, 0)


def _seed(value: Any) -> int:
    """A seed of 32 bits; larger and negative ones are hashed, so they differ as they did."""
    if type(value) is not int or not -(2**63) <= value < 2**64:
        raise ValueError("an integer of at most 64 bits")
    if 0 <= value < 2**32:
        return value
    digest = hashlib.blake2b(str(value).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise ValueError("a text that isn't empty, or a list of such texts")
    return tuple(dict.fromkeys(texts))


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(_is_token_id(token) for token in value):
        raise ValueError("a list of token ids")
    return tuple(dict.fromkeys(value))


def _some_token_ids(value: Any) -> tuple[int, ...]:
    tokens = _token_ids(value) if isinstance(value, list) else ()
    if not tokens:
        raise ValueError("a list of at least one token id")
    return tokens


def _logit_bias(value: Any) -> dict[int, float]:
    expected = ValueError('an object such as {"1734": -100}: token ids as keys, numbers to ±100')
    if not isinstance(value, dict):
        raise expected
    number, bias = _number(-100, 100), {}
    for key, item in value.items():
        # Digits of other scripts, signs and spaces are integers to Python, too.
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INTEGER):
            raise expected
        try:
            bias[int(key)] = number(item)
        except ValueError:
            raise expected from None
    if len(bias) < len(value):
        raise ValueError("an object with each token id once")
    return bias


def _response_format(value: Any) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise ValueError('an object of type "text", "json_object" or "json_schema"')
    schema = value.get("json_schema")
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise ValueError(
            '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}} with a JSON schema '
            "as an object"
        )
    return dict(value)


_BOTH: dict[str, Callable[[Any], Any]] = {
    "max_tokens": _integer(0),
    "max_completion_tokens": _integer(0),
    "min_tokens": _integer(0),
    "temperature": _temperature,
    "top_p": _number(1e-6, 1, "a number greater than 0 and at most 1 (1 keeps all tokens)"),
    "top_k": _top_k,
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "seed": _seed,
    "stop": _texts,
    "stop_token_ids": _token_ids,
    "ignore_eos": _boolean,
    "include_stop_str_in_output": _boolean,
    "n": _integer(1, MAX_CHOICES),
    "best_of": _integer(1, MAX_CHOICES),
    "logit_bias": _logit_bias,
    "bad_words": _texts,
    "allowed_token_ids": _some_token_ids,
    "response_format": _response_format,
}

CHAT = {
    **_BOTH,
    "logprobs": _boolean,
    "top_logprobs": _integer(0, MAX_LOGPROBS),
    "add_generation_prompt": _boolean,
    "continue_final_message": _boolean,
}
"""The parameters of ``/v1/chat/completions``, each with its reader."""

COMPLETION = {**_BOTH, "logprobs": _integer(0, MAX_LOGPROBS), "echo": _boolean}
"""The parameters of ``/v1/completions``."""


def read_parameters(
    body: Mapping[str, Any], readers: Mapping[str, Callable[[Any], Any]], problems: Problems
) -> dict[str, Any]:
    """The values that a body gives; null is not given."""
    given = {}
    for name, read in readers.items():
        value = body.get(name)
        if value is None:
            continue
        try:
            given[name] = read(value)
        except ValueError as expected:
            problems.add(name, f"found {short(value)}, expected {expected}")
    return given


# --- all other names ------------------------------------------------------------------------------

_WITHOUT_EFFECT = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls", "stream_options", "include_reasoning"),
        *("spaces_between_special_tokens", "request_id", "cache_salt", "priority"),
        *("guided_decoding_backend", "model"),
    )
)
"""They change no answer, whatever they hold."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "skip_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "documents": ([],),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
}
"""These are accepted with a value that changes nothing."""

_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {"echo": (False,), "add_special_tokens": (False,)}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "top_logprobs": (0,),
}

_ADVICE = {
    "stream": "a batch has no one to stream to; leave it out",
    "tools": "calls of tools are not supported",
    "tool_choice": "calls of tools are not supported",
    "functions": "calls of functions are not supported",
    "function_call": "calls of functions are not supported",
    "use_beam_search": "there is no beam search",
    "best_of": "it may only equal n",
    "suffix": "the model only continues text",
    "prompt_logprobs": "use echo and logprobs of /v1/completions",
    "skip_special_tokens": "special tokens are always left out of the text",
    "chat_template": "the checkpoint's own chat template is used",
    "max_new_tokens": "did you mean 'max_tokens'?",
    "max_length": "did you mean 'max_tokens'?",
    "max_output_tokens": "did you mean 'max_tokens'?",
    "min_new_tokens": "did you mean 'min_tokens'?",
    "stop_sequences": "did you mean 'stop'?",
    "stop_strings": "did you mean 'stop'?",
    "eos_token_id": "did you mean 'stop_token_ids'?",
    "num_return_sequences": "did you mean 'n'?",
    "do_sample": "did you mean 'temperature'? 0 takes the most likely token",
    "structured_outputs": "did you mean 'response_format'?",
    "guided_json": "did you mean 'response_format'?",
    "guided_regex": "only 'response_format' restricts what is written",
    "guided_choice": "only 'response_format' restricts what is written",
    "guided_grammar": "only 'response_format' restricts what is written",
}

_CHAT_ADVICE = {
    "prompt": "it belongs to /v1/completions; a chat has messages",
    "images": "pictures of a chat are parts of its messages",
    "echo": "it belongs to /v1/completions",
    "system": "write a message with the role system",
}
_COMPLETION_ADVICE = {
    "messages": "they belong to /v1/chat/completions; a completion has a prompt",
    "top_logprobs": "in /v1/completions write logprobs: 5, say",
    "add_special_tokens": "give the prompt as token ids if it must not begin with BOS",
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message"), "it belongs to /v1/chat/completions"
    ),
}


def check_others(
    body: Mapping[str, Any], known: Iterable[str], chat: bool, found: Problems
) -> None:
    """Refuses, by name, what would change the answer and isn't done.

    Args:
        body: of the request.
        known: names that are read elsewhere.
        chat: whether it is a chat.
        found: gets the problems.
    """
    known = set(known)
    neutral = _NEUTRAL | (_CHAT_NEUTRAL if chat else _COMPLETION_NEUTRAL)
    advice = _ADVICE | (_CHAT_ADVICE if chat else _COMPLETION_ADVICE)
    others = (name for name in body if name not in known and name not in _WITHOUT_EFFECT)
    for name in others:
        value = body[name]
        if value is None or any(
            type(value) is type(same) and value == same for same in neutral.get(name, ())
        ):
            continue
        hint = advice.get(name) or _meant(name, known)
        what = f"{short(value)} is not supported" if name in neutral else "there is no such option"
        if name in advice and name not in neutral:
            what = "not supported"
        found.add(short(name).strip("'"), f"{what}; {hint}" if hint else what)


def _meant(name: str, known: Iterable[str]) -> str | None:
    # Comparing takes the square of the length.
    close = difflib.get_close_matches(name[:_LONGEST_NAME], sorted(known), n=1)
    return f"did you mean {close[0]!r}?" if close else None

"""Answers and errors as lines of a results file, in the form that OpenAI and vLLM give them."""

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import decoders

from mllama_jax.batch.answers import Answer, Choice, TokenLogprob
from mllama_jax.batch.prepare import PreparedRequest
from mllama_jax.batch.requests import RequestError
from mllama_jax.processing.tokenizer import MllamaTokenizer

__all__ = ["error_line", "response_line", "token_bytes", "token_text"]

Line = dict[str, Any]

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's value."""


def response_line(
    answer: Answer, *, model_name: str, tokenizer: MllamaTokenizer, created: int
) -> Line:
    """The line of a request that was answered.

    Args:
        answer: of a chat, which becomes a ``chat.completion``, or of a completion, which becomes a
            ``text_completion``.
        model_name: what the line names as its model.
        tokenizer: for the texts of tokens in ``logprobs``.
        created: seconds since 1970.

    Returns:
        What JSON can hold. Ids depend on ``custom_id`` alone, so a job that is run again writes
        the same ones.
    """
    request = answer.prepared.request
    chat = request.kind == "chat"
    choice_of = _chat_choice if chat else _text_choice
    prompt_tokens = len(answer.prepared.input_ids)
    completion_tokens = sum(len(choice.token_ids) for choice in answer.choices)
    body = {
        "id": _id("chatcmpl-" if chat else "cmpl-", request.custom_id),
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model_name,
        "choices": [choice_of(answer, choice, tokenizer) for choice in answer.choices],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return _line(request.custom_id, 200, body, None)


def error_line(custom_id: str | None, error: RequestError) -> Line:
    """The line of a request that could not be answered.

    ``error`` is not null, which readers of vLLM's files look at; ``response`` has the status code
    and the error as its body, which readers of OpenAI's files look at.

    Args:
        custom_id: the request's; None if it has none.
        error: why.
    """
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    details = {"message": str(error), "type": kind, "param": error.field, "code": kind}
    # Lines without an id differ in their message, which names the line.
    name = custom_id if custom_id is not None else f"\0{error}"
    return _line(custom_id, error.status_code, {"error": details}, details, name=name)


def _line(
    custom_id: str | None, status: int, body: Line, error: Line | None, name: str | None = None
) -> Line:
    name = custom_id if name is None else name
    return {
        "id": _id("batch_req_", name),
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": _id("req_", name), "body": body},
        "error": error,
    }


def _id(kind: str, name: str | None) -> str:
    digest = hashlib.blake2b(str(name).encode(errors="surrogatepass"), digest_size=12)
    return kind + digest.hexdigest()


# --- choices --------------------------------------------------------------------------------------


def _chat_choice(answer: Answer, choice: Choice, tokenizer: MllamaTokenizer) -> Line:
    logprobs = None
    if choice.logprobs is not None:
        content = [_chat_logprob(entry, tokenizer) for entry in choice.logprobs]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _chat_logprob(entry: TokenLogprob, tokenizer: MllamaTokenizer) -> Line:
    top = [_token_entry(token, logprob, tokenizer) for token, logprob in entry.top]
    return _token_entry(entry.token_id, entry.logprob, tokenizer) | {"top_logprobs": top}


def _token_entry(token_id: int, logprob: float, tokenizer: MllamaTokenizer) -> Line:
    data = token_bytes(tokenizer, token_id)
    return {"token": token_text(data), "logprob": _finite(logprob), "bytes": list(data)}


def _text_choice(answer: Answer, choice: Choice, tokenizer: MllamaTokenizer) -> Line:
    echo = answer.prepared.request.options.echo
    text = (_prompt_text(answer.prepared, tokenizer) if echo else "") + choice.text
    logprobs = None
    if choice.logprobs is not None:
        token_ids: list[int] = []
        entries: list[TokenLogprob | None] = []
        if echo and answer.prompt_logprobs is not None:
            token_ids += answer.prepared.input_ids.tolist()
            entries += answer.prompt_logprobs
        before = 0 if token_ids or not echo else len(text) - len(choice.text)
        token_ids += choice.token_ids
        entries += choice.logprobs
        logprobs = _text_logprobs(token_ids, entries, text, before, tokenizer)
    return {
        "index": choice.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _prompt_text(prepared: PreparedRequest, tokenizer: MllamaTokenizer) -> str:
    prompt = prepared.request.prompt
    return prompt if isinstance(prompt, str) else tokenizer.decode(prepared.input_ids)


def _text_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    text: str,
    start: int,
    tokenizer: MllamaTokenizer,
) -> Line:
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry is None:  # The first token of a prompt follows nothing.
            tops.append(None)
            continue
        # As in OpenAI's API and vLLM the token itself is always among them.
        pairs = dict([*entry.top, (entry.token_id, entry.logprob)])
        tops.append(
            {token_text(token_bytes(tokenizer, i)): _finite(value) for i, value in pairs.items()}
        )
    return {
        "tokens": [token_text(token_bytes(tokenizer, token_id)) for token_id in token_ids],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": tops,
        "text_offset": list(_offsets(token_ids, text, start, tokenizer)),
    }


def _offsets(
    token_ids: Sequence[int], text: str, start: int, tokenizer: MllamaTokenizer
) -> Iterator[int]:
    """Where in ``text`` each token begins; a character of several tokens begins with the first."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    special = set(_added_tokens(tokenizer))
    for token_id in token_ids:
        yield min(start, len(text))
        data = token_bytes(tokenizer, token_id)
        # Special tokens stand in a prompt's text, but not in an answer's.
        if token_id not in special or text.startswith(data.decode(), start):
            start += len(decoder.decode(data))


def _finite(logprob: float) -> float:
    return max(float(logprob), _LEAST_LOGPROB)


# --- tokens ---------------------------------------------------------------------------------------


def token_bytes(tokenizer: MllamaTokenizer, token_id: int) -> bytes:
    """The bytes of a token: of characters that are split among tokens, its own part."""
    added = _added_tokens(tokenizer).get(token_id)
    if added is not None:
        return added.encode()
    token = tokenizer.backend.id_to_token(token_id)
    if token is None:  # An output that the vocabulary has no token for.
        return b""
    if not isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return tokenizer.backend.decode([token_id], skip_special_tokens=False).encode()
    return b"".join(_BYTE_OF.get(character, character.encode()) for character in token)


def token_text(data: bytes) -> str:
    r"""A token as text; one that is only a part of a character as ``bytes:\xe2\x82``.

    Tokens of different bytes stay different, which as keys of an object they must.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@lru_cache(maxsize=4)
def _added_tokens(tokenizer: MllamaTokenizer) -> dict[int, str]:
    """The special and added tokens by id: their spelling is their text."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token_id: str(token) for token_id, token in added.items()}


def _byte_alphabet() -> dict[str, bytes]:
    """The character by which byte-level tokenizers write each byte in their vocabulary.

    Source: the byte-to-unicode table of GPT-2's tokenizer: printable characters of Latin-1 stand
    for themselves, all other bytes for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

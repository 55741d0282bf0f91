"""Requests: one line of a batch file, checked and put into one form."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mllama_jax.batch.request_json import (
    MAX_LINE_BYTES,
    Problems,
    is_unicode,
    read_record,
    short,
)
from mllama_jax.batch.request_messages import read_messages
from mllama_jax.batch.request_parameters import CHAT, COMPLETION, check_others, read_parameters
from mllama_jax.generation.config import GenerationConfig

__all__ = [
    "MAX_LINE_BYTES",
    "Request",
    "RequestError",
    "SamplingOptions",
    "default_options",
    "parse_line",
    "parse_record",
]

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"

COMPLETION_MAX_TOKENS = 16
"""The longest answer to a completion that gives no ``max_tokens``, as in OpenAI's API and vLLM."""

_LONGEST_ID = 1024


class RequestError(ValueError):
    """A request that can't be answered; it becomes an error line of the results.

    Attributes:
        status_code: as HTTP has it: 400 for what the request says, 500 for what went wrong here.
        field: the parameter at fault, if it is one.
        custom_id: the request's, if it has a usable one.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int = 400,
        field: str | None = None,
        custom_id: str | None = None,
    ):
        super().__init__(message)
        self.status_code = status_code
        self.field = field
        self.custom_id = custom_id


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of an answer are chosen, and when it ends.

    Attributes:
        max_tokens: the longest answer; 0 only with ``echo``. An error if there is no room for it.
        default_max_tokens: the same where ``max_tokens`` is None, and as many as fit if these are
            fewer; None: as many as fit.
        min_tokens: no end token and no stop string before so many new tokens.
        temperature: divides the logits before the draw; 0 takes the most likely token.
        top_p: the draw is among the most likely tokens that add up to this probability, (0, 1].
        top_k: the draw is among so many most likely tokens; 0: all.
        min_p: the draw is among tokens at least this likely relative to the most likely, [0, 1].
        presence_penalty: taken from the logit of a token that stands in the answer, [-2, 2].
        frequency_penalty: the same for each time that it stands there, [-2, 2].
        repetition_penalty: divides the positive logits of tokens that stand in prompt or answer,
            and multiplies the negative ones; 1: none.
        seed: of the draw; the same seed gives the same text. None: drawn.
        stop: texts that end an answer.
        stop_token_ids: tokens that end it.
        ignore_eos: go on behind the model's end tokens.
        include_stop_str_in_output: leave the stop string at the end of the text.
        n: answers to the request.
        logprobs: None: none; k: of each token and of the k most likely ones in its place.
        logit_bias: added to the logits of tokens, by id.
        bad_words: texts that must not come up.
        allowed_token_ids: no others may be chosen.
        echo: the prompt comes first in the text; completions only.
        response_format: ``{"type": "json_object"}`` or ``{"type": "json_schema", …}``.
    """

    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    n: int = 1
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    echo: bool = False
    response_format: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """What to answer.

    Attributes:
        custom_id: the request's name in its file; answers carry it.
        kind: of the address: chat completions or completions.
        messages: of a chat; image parts are ``{"type": "image", "image": source}``, unread.
        prompt: of a completion: text, or token ids.
        images: sources of the pictures of a completion.
        model: what the request asks for.
        options: how to choose tokens.
        add_generation_prompt: the chat ends with the header of the assistant's answer.
        continue_final_message: the answer goes on with the chat's last message.

    A source is a text from the file (path, ``file:`` or ``data:`` URL, address), which
    `PictureSources` confines. Code may also give what `load_image` takes: a Pillow image, an array,
    bytes or a `pathlib.Path`, which are not confined.
    """

    custom_id: str
    kind: Literal["chat", "completion"]
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    images: tuple[Any, ...] = ()
    model: str | None = None
    options: SamplingOptions = field(default_factory=SamplingOptions)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def default_options(config: GenerationConfig) -> SamplingOptions:
    """What holds for requests that don't say otherwise, from a ``generation_config.json``.

    As in vLLM, values equal to transformers' defaults count as not given: the file must say
    ``top_k`` itself, and not 50. Unlike in vLLM, ``do_sample`` false means temperature 0.
    """
    given = config.to_dict()
    options: dict[str, Any] = {"stop": config.all_stop_strings}
    if config.do_sample:
        names = ("temperature", "top_p", "top_k", "min_p")
        options |= {name: given[name] for name in names if given.get(name) is not None}
    else:
        options["temperature"] = 0.0
    renamed = {
        "default_max_tokens": config.max_new_tokens,
        "min_tokens": config.min_new_tokens,
        "repetition_penalty": config.extra.get("repetition_penalty"),
    }
    options |= {name: value for name, value in renamed.items() if value is not None}
    return SamplingOptions(**options)


def parse_line(
    line: str | bytes, *, number: int, defaults: SamplingOptions | None = None
) -> Request:
    """The request of one line of a batch file, as OpenAI and ``vllm run-batch`` have it.

    Args:
        line: a JSON object with ``custom_id``, ``method``, ``url`` and ``body``; in the body null
            means not given. Seeds outside 32 bits are hashed into them.
        number: of the line, for errors.
        defaults: what holds where the line says nothing, see `default_options`.

    Raises:
        RequestError: the line is malformed, or asks for what isn't done; all problems are named.
            It carries the ``custom_id`` if the line has a usable one.
    """
    problems = Problems()
    try:
        record = read_record(line, problems)
    except ValueError as error:
        raise RequestError(f"line {number}: {error}") from None
    return _parse(record, problems, f"line {number}: ", defaults)


def parse_record(record: Mapping[str, Any], *, defaults: SamplingOptions | None = None) -> Request:
    """The same as `parse_line` for an object that has been read already."""
    return _parse(record, Problems(), "", defaults)


def _parse(
    record: Mapping[str, Any], problems: Problems, where: str, defaults: SamplingOptions | None
) -> Request:
    custom_id = _custom_id(record, problems)
    chat = _is_chat(record, problems)
    body = record.get("body")
    if not isinstance(body, dict):
        problems.add("body", f"found {short(body)}, expected an object with the parameters")
        body = None
    for name in record:
        if name in COMPLETION or name in CHAT or name in ("messages", "prompt", "model", "images"):
            problems.add(name, 'it belongs into "body"')
    request = None
    if body is not None and chat is not None:
        options = defaults or SamplingOptions()
        request = _chat(body, options, problems) if chat else _completion(body, options, problems)
    if request is None or problems:
        field = next((name for name, _ in problems.found if name), None)
        raise RequestError(f"{where}{problems}", field=field, custom_id=custom_id)
    assert custom_id is not None
    return dataclasses.replace(request, custom_id=custom_id)


def _custom_id(record: Mapping[str, Any], problems: Problems) -> str | None:
    value = record.get("custom_id")
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_ID and is_unicode(value):
        return value
    problems.add(
        "custom_id",
        f"found {short(value)}, expected a text of 1 to {_LONGEST_ID} characters, no other line's",
    )
    return None


def _is_chat(record: Mapping[str, Any], problems: Problems) -> bool | None:
    if record.get("method") != "POST":
        problems.add("method", f"found {short(record.get('method'))}, expected 'POST'")
    url = record.get("url")
    if url in (CHAT_URL, COMPLETION_URL):
        return url == CHAT_URL
    problems.add("url", f"found {short(url)}, expected {CHAT_URL!r} or {COMPLETION_URL!r}")
    return None


def _chat(body: dict[str, Any], defaults: SamplingOptions, problems: Problems) -> Request:
    check_others(body, (*CHAT, "messages"), True, problems)
    given = read_parameters(body, CHAT, problems)
    goes_on = given.pop("continue_final_message", False)
    begins = given.pop("add_generation_prompt", not goes_on)
    if goes_on and begins:
        problems.add(
            "continue_final_message", "it excludes add_generation_prompt, which begins an answer"
        )
    top = given.pop("top_logprobs", 0)
    wanted = given.pop("logprobs", False)
    if top and not wanted:
        problems.add("top_logprobs", 'it needs "logprobs": true')
    if wanted:
        given["logprobs"] = top
    return Request(
        custom_id="",
        kind="chat",
        messages=read_messages(body.get("messages"), problems),
        model=_model(body, problems),
        options=_options(given, defaults, problems),
        add_generation_prompt=begins,
        continue_final_message=goes_on,
    )


def _completion(body: dict[str, Any], defaults: SamplingOptions, problems: Problems) -> Request:
    check_others(body, (*COMPLETION, "prompt", "images"), False, problems)
    given = read_parameters(body, COMPLETION, problems)
    if defaults.default_max_tokens is None:
        defaults = dataclasses.replace(defaults, default_max_tokens=COMPLETION_MAX_TOKENS)
    images = body.get("images") or []
    if not isinstance(images, list) or not all(isinstance(s, str) and s for s in images):
        problems.add("images", f"found {short(images)}, expected a list of paths or URLs")
        images = []
    return Request(
        custom_id="",
        kind="completion",
        prompt=_prompt(body.get("prompt"), problems),
        images=tuple(images),
        model=_model(body, problems),
        options=_options(given, defaults, problems),
    )


def _prompt(value: Any, problems: Problems) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(type(token) is int and 0 <= token < 2**31 for token in value):
            return tuple(value)
        if all(isinstance(item, str | list) for item in value):
            problems.add("prompt", f"found {len(value)} prompts; give each a line of its own")
            return ""
    problems.add("prompt", f"found {short(value)}, expected a text or a list of token ids")
    return ""


def _model(body: Mapping[str, Any], problems: Problems) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        problems.add("model", f"found {short(model)}, expected a name")
    return model


def _options(
    given: dict[str, Any], defaults: SamplingOptions, problems: Problems
) -> SamplingOptions:
    """The options that ``given`` makes of ``defaults``."""
    longest = given.pop("max_completion_tokens", None)
    if longest is not None and given.setdefault("max_tokens", longest) != longest:
        problems.add(
            "max_completion_tokens",
            f"found {longest} beside max_tokens: {given['max_tokens']}; give one of them",
        )
    n = given.get("n", defaults.n)
    best_of = given.pop("best_of", n)
    if best_of != n:
        problems.add("best_of", f"found {best_of}, and n is {n}; they must be equal")
    if "max_tokens" in given or defaults.max_tokens is not None:
        given["default_max_tokens"] = None
    options = dataclasses.replace(defaults, **given)
    if options.max_tokens == 0 and not options.echo:
        problems.add("max_tokens", "found 0, expected at least 1 (0 only with echo)")
    most = options.default_max_tokens if options.max_tokens is None else options.max_tokens
    if most is not None and options.min_tokens > most:
        if "min_tokens" in given:
            problems.add("min_tokens", f"found {options.min_tokens}, and max_tokens is {most}")
        options = dataclasses.replace(options, min_tokens=most)
    return options

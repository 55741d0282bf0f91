"""What comes out of the engine for each request."""

from dataclasses import dataclass
from typing import Literal

from mllama_jax.batch.prepare import PreparedRequest
from mllama_jax.batch.requests import RequestError

__all__ = ["Answer", "Choice", "Failure", "Timings", "TokenLogprob"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, as the model gave it before any sampling option.

    Attributes:
        token_id: the token that stands in the text.
        logprob: its natural logarithm of the probability.
        top: the most likely tokens in its place with theirs, most likely first; as many as asked.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """One answer to a request.

    Attributes:
        index: from 0 to the request's ``n - 1``.
        token_ids: new tokens, with the end token where there is one.
        text: of these tokens, without special tokens and without the stop string.
        finish_reason: "stop" (an end token, a stop token or a stop string) or "length".
        stop_reason: the stop string or the stop token; None for the model's own end tokens.
        logprobs: of each of ``token_ids``, if asked for.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds that a request spent.

    Attributes:
        waiting: from its preparation to a slot.
        first_token: from its preparation to the first token that the host has seen.
        total: from its preparation to its end.
    """

    waiting: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Answer:
    """A request that was answered.

    Attributes:
        prepared: the request with its tokens and pictures.
        choices: ``n`` of them, by index.
        prompt_logprobs: of each prompt token (None for the first), where ``echo`` and ``logprobs``
            ask for them.
        timings: where the time went.
    """

    prepared: PreparedRequest
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    timings: Timings


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered."""

    custom_id: str
    error: RequestError

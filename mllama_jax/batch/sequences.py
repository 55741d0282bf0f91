"""One answer while it grows, as the host sees it."""

import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mllama_jax.batch.answers import Choice, TokenLogprob
from mllama_jax.batch.guided import Guide
from mllama_jax.batch.prepare import PreparedRequest
from mllama_jax.batch.programs import Logprobs
from mllama_jax.batch.requests import SamplingOptions
from mllama_jax.batch.rules import RowRules
from mllama_jax.generation.streaming import TextStream
from mllama_jax.shapes import Array

__all__ = ["Job", "Sequence", "token_logprob"]


@dataclass
class Job:
    """A request while its answers grow.

    Attributes:
        prepared: what is asked.
        since: when it was ready, `time.monotonic`.
        choices: the answers that are complete, by index.
        prompt_logprobs: of the chunks of the prompt, still on the device, with their lengths.
        logits: behind the prompt, on the device, for answers that share it; None before, or if
            there is only one answer.
        started, first_token: seconds after ``since``.
    """

    prepared: PreparedRequest
    since: float = field(default_factory=time.monotonic)
    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Logprobs, int]] = field(default_factory=list)
    logits: Array | None = None
    started: float = 0.0
    first_token: float = 0.0

    @property
    def options(self) -> SamplingOptions:
        return self.prepared.request.options

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.options.echo and self.options.logprobs is not None

    def begin(self, index: int) -> None:
        """An answer has its slot, and the pictures lie there; when all have, these can go."""
        self.started = self.started or self.seconds()
        if index + 1 == self.options.n:
            self.prepared = self.prepared.without_pixels()

    def seconds(self) -> float:
        """Since it was ready."""
        return time.monotonic() - self.since

    def all_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Of each token of the prompt but the first, if asked for."""
        if not self.wants_prompt_logprobs:
            return None
        assert self.options.logprobs is not None
        ids = self.prepared.input_ids.tolist()
        found: list[TokenLogprob | None] = [None]
        for logprobs, length in jax.device_get(self.prompt_logprobs):
            for column, token in enumerate(ids[len(found) : len(found) + length]):
                found.append(token_logprob(token, logprobs, (0, column), self.options.logprobs))
        return tuple(found)


def token_logprob(
    token: int, logprobs: Logprobs, where: tuple[int, int], num_top: int
) -> TokenLogprob:
    """One token's entry of what the device gave, with the ``num_top`` most likely ones."""
    tops = zip(logprobs.top_ids[where].tolist(), logprobs.top[where].tolist(), strict=True)
    return TokenLogprob(token, float(logprobs.of_token[where]), tuple(tops)[:num_top])


class Sequence:
    """One of the answers to a request, in a slot.

    Attributes:
        job: its request.
        index: of the answer among the request's.
        limit: the most new tokens.
        rules: of the choice of its tokens, for the device.
        guide: holds it to a grammar; None if it is free.
        position: tokens of the prompt that were given to the device.
        is_done: whether nothing more is to come.
    """

    def __init__(
        self,
        job: Job,
        index: int,
        *,
        limit: int,
        rules: RowRules,
        end_tokens: frozenset[int],
        tokenizer: Any,
        guide: Guide | None,
    ):
        self.job = job
        self.index = index
        self.limit = limit
        self.rules = rules
        self.guide = guide
        self.position = 0
        self.is_done = False
        self._tokenizer = tokenizer
        self._options = job.options
        self._end_tokens = frozenset() if self._options.ignore_eos else end_tokens
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._stop_string: str | None = None
        self._text = ""
        self._stream = TextStream(tokenizer) if self._options.stop else None

    @property
    def is_filled(self) -> bool:
        """Whether the device has got all of the prompt."""
        return self.position == len(self.job.prepared.input_ids)

    def push(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Takes the next token; returns whether a stop string has ended the answer."""
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self.guide is not None and not self._is_end(token):
            self.guide.accept(token)
        if self._stream is None:
            return False
        known = len(self._text)
        if not self._is_end(token):
            self._text += self._stream.push(token)
        if len(self._tokens) <= self._options.min_tokens:
            return False
        self._stop_string = self._found(known)
        return self._stop_string is not None

    def _found(self, known: int) -> str | None:
        """The stop string that begins first among those that the newest text completes."""
        found = [
            (at, text)
            for text in self._options.stop
            if (at := self._text.find(text, max(0, known - len(text) + 1))) >= 0
        ]
        if not found:
            return None
        at, text = min(found)
        kept = at + len(text) if self._options.include_stop_str_in_output else at
        self._text = self._text[:kept]
        return text

    def _is_end(self, token: int) -> bool:
        return token in self._end_tokens or token in self._options.stop_token_ids

    def choice(self) -> Choice:
        """The answer, complete."""
        last = self._tokens[-1] if self._tokens else None
        stop_reason: str | int | None = self._stop_string
        ended = self._stop_string is not None
        if not ended and last is not None and self._is_end(last):
            ended = True
            stop_reason = None if last in self._end_tokens else last
        return Choice(
            index=self.index,
            token_ids=tuple(self._tokens),
            text=self._text if self._stop_string is not None else self._decoded(stop_reason),
            finish_reason="stop" if ended else "length",
            stop_reason=stop_reason,
            logprobs=None if self._options.logprobs is None else tuple(self._logprobs),
        )

    def _decoded(self, stop_reason: str | int | None) -> str:
        tokens = self._tokens
        if stop_reason is not None and not self._options.include_stop_str_in_output:
            tokens = tokens[:-1]
        text: str = self._tokenizer.decode(
            np.asarray(tokens, np.int64),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return text

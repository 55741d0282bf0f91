"""A request that is ready becomes the answers that wait for a slot."""

import zlib
from typing import Any

from mllama_jax.batch.guided import Guide, GuideFactory
from mllama_jax.batch.requests import RequestError
from mllama_jax.batch.rules import RowRules, bad_word_tokens, make_row_rules
from mllama_jax.batch.sequences import Job, Sequence

__all__ = ["Admission"]


class Admission:
    """Makes the answers of requests.

    Args:
        tokenizer: of the model.
        vocab_size: W, the width of the logits.
        end_tokens: the model's.
        max_length: the most tokens that a request may have, prompt and answer together.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, end_tokens: frozenset[int], max_length: int
    ):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._max_length = max_length
        self._guides = GuideFactory(tokenizer, vocab_size, sorted(end_tokens))

    def sequences(self, job: Job) -> list[Sequence]:
        """All answers to a request, none begun.

        Raises:
            RequestError: there is no room for an answer as long as was asked for; its form can't be
                kept to; more rules than there are places for.
        """
        limit = self._limit(job)
        return [self._sequence(job, index, limit) for index in range(job.options.n)]

    def _sequence(self, job: Job, index: int, limit: int) -> Sequence:
        guide = None
        if job.options.response_format is not None:
            guide = self._guides.guide(job.options.response_format)
        return Sequence(
            job,
            index,
            limit=limit,
            rules=self._rules(job, index, guide),
            end_tokens=self._end_tokens,
            tokenizer=self._tokenizer,
            guide=guide,
        )

    def _rules(self, job: Job, index: int, guide: Guide | None) -> RowRules:
        """How the device chooses the tokens of one of a request's answers."""
        return make_row_rules(
            job.options,
            self._vocab_size,
            choice=index,
            # So that a job that is carried on writes what it would have written.
            default_seed=zlib.crc32(job.prepared.request.custom_id.encode()),
            bad_words=bad_word_tokens(job.options.bad_words, self._tokenizer),
            guide_mask=None if guide is None else guide.mask(),
        )

    def _limit(self, job: Job) -> int:
        """The most new tokens."""
        prompt, options = len(job.prepared.input_ids), job.options
        # The last new token is never read, so it needs no room.
        room = self._max_length - prompt + 1
        if options.max_tokens is None:
            # Nobody has asked for so many.
            return min(room, options.default_max_tokens or room)
        if options.max_tokens > room:
            raise RequestError(
                f"the prompt has {prompt} tokens and max_tokens={options.max_tokens}: together "
                f"more than the {self._max_length} that a slot holds: ask for at most {room}, or "
                "run with a larger max_length",
                field="max_tokens",
            )
        return options.max_tokens

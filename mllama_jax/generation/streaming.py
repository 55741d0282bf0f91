"""Text of an answer while it grows: pieces for the reader, and the search for stop strings."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["Decoder", "Listener", "StopStringFinder", "TextStream"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What is needed of a tokenizer: ours and Hugging Face's have it."""

    def decode(
        self, token_ids: Any, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...


class TextStream:
    """Turns tokens into text piece by piece.

    The pieces add up to the text of all tokens, special ones left out, and no piece ends within a
    character: tokens are held back until their last character is complete.
    """

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # The last piece that was given out; new tokens are decoded in its company because some
        # decoders treat the first token of a text differently.
        self._given: slice = slice(0, 0)

    def push(self, token: int) -> str:
        """Takes the next token; returns what can be shown now, possibly nothing."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(_INCOMPLETE):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """The rest, after the last token; bytes that are no character show as U+FFFD."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        known = _text(self._tokenizer, self._ids[self._given])
        return _text(self._tokenizer, self._ids[self._given.start :])[len(known) :]

    def _give(self, text: str) -> str:
        if text:
            self._given = slice(self._given.stop, len(self._ids))
        return text


class StopStringFinder:
    """Finds the token that completes a stop string, in the prompt's text and the answer's.

    A stop string may begin in the prompt, may end inside a token, and may be the text of a special
    token; but the last token must be a part of it.

    Source: transformers 4.54.1, generation/stopping_criteria.py: StopStringCriteria. Unlike there,
    characters that are spread over several tokens are found too.
    """

    def __init__(self, tokenizer: Decoder, stop_strings: Sequence[str], prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        # No token that matters is farther from the end than the longest stop string has bytes.
        self._span = max(len(text.encode()) for text in stop_strings) + 1
        self._tail = list(prompt_ids)[-self._span :]

    def completes(self, token: int) -> bool:
        """Takes the next token of the answer; True if a stop string ends in it."""
        self._tail = [*self._tail, token][-self._span :]
        before = _text(self._tokenizer, self._tail[:-1], skip_special_tokens=False)
        before = before.rstrip(_INCOMPLETE)
        window = _text(self._tokenizer, self._tail, skip_special_tokens=False)
        return any(
            window.find(text, max(0, len(before) - len(text) + 1)) >= 0
            for text in self._stop_strings
        )


class Listener:
    """Follows the answers of a batch: streams their text, and ends rows at stop strings.

    Args:
        tokenizer: makes text of tokens; a processor stands for its tokenizer.
        stop_strings: possibly none.
        prompts: the tokens of each row's prompt, padding left out.
        streamer: called with (row, text) for each piece of text, or None.

    Attributes:
        lengths: (B,) int64, tokens of each row, as far as it is known.
        stopped: (B,) bool, rows that a stop string has ended.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: Sequence[str],
        prompts: Sequence[np.ndarray],
        streamer: Callable[[int, str], None] | None = None,
    ):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.lengths = np.zeros(len(prompts), np.int64)
        self.stopped = np.zeros(len(prompts), bool)
        self._streamer = streamer
        self._streams = [TextStream(tokenizer) for _ in prompts]
        self._finders = [
            StopStringFinder(tokenizer, stop_strings, prompt.tolist()) if stop_strings else None
            for prompt in prompts
        ]

    def hear(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Takes all tokens of the answers so far.

        Args:
            tokens: (B, n), of which the first ``lengths[row]`` are the row's own.
            lengths: (B,).

        Returns:
            (B,) bool, the rows that a stop string has ended.
        """
        for row, length in enumerate(lengths):
            pieces = []
            while self.lengths[row] < length and not self.stopped[row]:
                token = int(tokens[row, self.lengths[row]])
                self.lengths[row] += 1
                finder = self._finders[row]
                self.stopped[row] = finder is not None and finder.completes(token)
                if self._streamer is not None:
                    pieces.append(self._streams[row].push(token))
            self._give(row, "".join(pieces))
        return self.stopped.copy()

    def close(self) -> None:
        """Gives out what is still held back, after the last token."""
        for row, stream in enumerate(self._streams):
            self._give(row, stream.flush())

    def _give(self, row: int, text: str) -> None:
        if self._streamer is not None and text:
            self._streamer(row, text)


def _text(tokenizer: Decoder, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    # Cleaning up would change text that has been given out already.
    return tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )

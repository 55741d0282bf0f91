"""Special tokens that are meant literally: an invisible escape that survives inside a plain string.

A chat template glues what a user wrote and the tokens that structure a conversation into one
string, and from then on nobody can tell a user's `<|eot_id|>` from the template's. So the user's
text is escaped before it is rendered: a noncharacter (U+FDD0, which Unicode sets aside for a
program's internal use and which has no glyph) goes in after the first character of every special
token spelled there. The string stays a string, it prints the same, and no tokenizer takes
`<U+FDD0|eot_id|>` for a token. `MllamaTokenizer` takes the noncharacter out again after it has
split the string at the real special tokens, and encodes the rest as ordinary text.
"""

import re
from dataclasses import dataclass
from functools import cached_property

MARK = "\ufdd0"


@dataclass(frozen=True)
class SpecialTokenEscape:
    """Escapes and restores the spellings of `tokens` in text; `unescape(escape(t)) == t` always.

    Besides whole spellings, a beginning of one at the end of the text (trailing space aside) is
    escaped: otherwise two neighbouring pieces of text, `"<|ima"` and `"ge|>"`, would join into a
    token. Marks that a text brings along are doubled, so a text can't unescape itself.
    """

    tokens: tuple[str, ...]

    def escape(self, text: str) -> str:
        """`text` with a mark in every spelling of a special token.

        Raises:
            ValueError: a token of one character stands in the text; it has no inside to mark.
        """
        if self._first is None:
            return text
        end = len(text.rstrip())

        def mark(found: re.Match) -> str:
            start = found.start()
            marked = text[start + 1 : start + 2] == MARK
            whole = any(text[start : start + length] in self._spellings for length in self._lengths)
            # Anything longer than a token is no beginning of one (and slow to cut out).
            tail = text[start : start + self._lengths[-1] + len(text) - end]
            begun = len(tail) == len(text) - start and (
                tail in self._beginnings or text[start:end] in self._beginnings
            )
            if text[start] in self._spellings:
                raise ValueError(
                    f"The text {_shorten(text)!r} holds {text[start]!r}, which is a special token "
                    "of one character, and those can't be escaped. Take it out, or pass "
                    "allow_special_tokens=True if it is meant as the token."
                )
            return found[0] + MARK if marked or whole or begun else found[0]

        return self._first.sub(mark, text)

    def unescape(self, text: str) -> str:
        """`text` as it was before `escape`."""
        return text if self._escaped is None else self._escaped.sub("", text)

    def is_escaped(self, text: str) -> bool:
        """Whether `unescape` would change `text`."""
        return MARK in text and self._escaped is not None and bool(self._escaped.search(text))

    def restore_json(self, text: str) -> str:
        r"""The marks of escaped JSON text that was written in ASCII (`<\ufdd0|` for a mark)."""
        return text if self._escaped_json is None else self._escaped_json.sub(MARK, text)

    @cached_property
    def _spellings(self) -> frozenset[str]:
        return frozenset(self.tokens)

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(sorted({len(token) for token in self.tokens}))

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(token[:n] for token in self.tokens for n in range(1, len(token)))

    @cached_property
    def _first_class(self) -> str | None:
        """A regular expression for the characters that special tokens begin with."""
        firsts = sorted({token[0] for token in self.tokens})
        return "[" + "".join(map(re.escape, firsts)) + "]" if firsts else None

    @cached_property
    def _first(self) -> re.Pattern | None:
        return None if not self._first_class else re.compile(self._first_class)

    @cached_property
    def _escaped(self) -> re.Pattern | None:
        # Only the mark right behind the first character is ours; a second one was there before.
        return None if not self._first_class else re.compile(f"(?<={self._first_class}){MARK}")

    @cached_property
    def _escaped_json(self) -> re.Pattern | None:
        return None if not self._first_class else re.compile(rf"(?<={self._first_class})\\ufdd0")


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

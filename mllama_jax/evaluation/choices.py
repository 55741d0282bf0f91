"""Questions with given answers: how the choices are written, and which of them an answer means."""

import re
import string
from collections.abc import Sequence

__all__ = ["LETTERS", "chosen_letter", "written"]

LETTERS = string.ascii_uppercase

_AROUND = ",.!?;:'"
_SHORT_ANSWER = 5
"""In an answer of more words the text of a choice is looked for, too."""


def written(choices: Sequence[str]) -> str:
    """The choices as lines: ``A. …``, ``B. …``."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))


def chosen_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer means; None if it can't be told.

    Looked for, one after the other: letters in brackets, ``(B)``; letters that stand alone;
    letters with a full stop, ``B.``; in an answer of more than five words the text of a choice.
    Of several that are found the last one in the answer counts.

    Source: Yue et al. 2024, "MMMU", and its evaluation; letters with a full stop as in "MMMU-Pro".
    Unlike there, nothing is drawn at random where nothing is found.
    """
    answer = answer.strip()
    for sign in _AROUND:
        answer = answer.strip(sign)
    letter = f"([{LETTERS[: len(choices)]}])"
    for pattern in (rf"\({letter}\)", rf"(?<!\S){letter}(?!\S)", rf"(?<!\S){letter}\."):
        found = re.findall(pattern, answer)
        if found:
            return str(found[-1])
    if len(answer.split()) <= _SHORT_ANSWER:
        return None
    text = answer.lower()
    places = [text.rfind(choice.lower()) for choice in choices]
    return LETTERS[places.index(max(places))] if max(places) >= 0 else None

"""How good a short answer is, from 0 to 1, beside the answers that people gave."""

import re
from collections.abc import Callable, Sequence

from mllama_jax.evaluation.vqa_text import normalised

__all__ = ["FEWEST_FOR_VQA", "METRICS", "anls", "exact_match", "relaxed_accuracy", "vqa_accuracy"]

FEWEST_FOR_VQA = 4
"""With fewer answers none could agree with three others, and nothing would score 1."""

_ANLS_THRESHOLD = 0.5
_TOLERANCE = 0.05
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(%*)", re.ASCII | re.IGNORECASE)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference, both in VQA's spelling (`normalised`)."""
    return float(normalised(answer) in map(normalised, references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """How many of ten people say the same: as good as everyone if three do.

    min(people who agree / 3, 1), averaged over the sets of all people but one, in VQA's spelling.

    Source: Antol et al. 2015 and its evaluation, visualqa.org.

    Raises:
        ValueError: fewer references than `FEWEST_FOR_VQA`.
    """
    count = len(references)
    if count < FEWEST_FOR_VQA:
        raise ValueError(
            f"VQA accuracy needs the answers of ten people, or of at least {FEWEST_FOR_VQA}; "
            f"there are {count}"
        )
    agree = list(map(normalised, references)).count(normalised(answer))
    # Those who agree are left out once each, and then one fewer agrees.
    total = agree * min(agree - 1, 3) + (count - agree) * min(agree, 3)
    return total / (3 * count)


def anls(answer: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference, 0 where half or more differs.

    Case and the number of spaces do not count.

    Source: Biten et al. 2019, "Scene Text Visual Question Answering", eq. 1, with threshold 0.5 as
    in Mathew et al. 2021, "DocVQA".
    """
    said = _plain(answer)
    return max(_similarity(said, _plain(reference)) for reference in references)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if a number is within 5 % of a reference that is a number; other texts must be equal.

    12% is the number 0.12. What is more than a number, such as $5 or 1,000, is text. Case does not
    count. Zero must be met exactly.

    Source: Masry et al. 2022, "ChartQA", section 5.1, with percent signs as in Liu et al. 2023,
    "DePlot".
    """
    return float(any(_is_near(answer, reference) for reference in references))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}
"""By the names of ``--metric``: of an answer and its references."""


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    distance = _levenshtein(first, second)
    return 1 - distance / longest if distance < _ANLS_THRESHOLD * longest else float(not longest)


def _levenshtein(first: str, second: str) -> int:
    """The fewest characters to insert, delete or replace that make one text of the other."""
    if len(first) < len(second):
        first, second = second, first
    above = list(range(len(second) + 1))  # distances of a beginning of `first` to all of `second`
    for i, one in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
        above = row
    return above[-1]


def _is_near(answer: str, reference: str) -> bool:
    answer, reference = answer.strip(), reference.strip()
    found, expected = _number(answer), _number(reference)
    if found is None or expected is None:
        return answer.lower() == reference.lower()
    return found == expected or abs(found - expected) <= _TOLERANCE * abs(expected)


def _number(text: str) -> float | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    return float(match[1]) / 100 if match[2] else float(match[1])

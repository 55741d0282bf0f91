"""Questions about pictures of digits, and their answers, as conversations."""

from dataclasses import dataclass

import numpy as np

KINDS = ("which digit", "even or odd", "two pictures", "read two", "text only")


@dataclass(frozen=True)
class Picture:
    """A picture file and the digit it shows."""

    path: str
    digit: int


_WHICH = (
    "Which digit is this?",
    "What digit do you see?",
    "Read the digit in the picture.",
    "Which number is written here?",
    "Name the digit.",
)
_PARITY = (
    "Is this digit even or odd?",
    "Is the number in the picture odd or even?",
    "Even or odd?",
    "Tell me if the digit is odd or even.",
)
_LARGER = (
    "Which picture shows the larger digit?",
    "Which digit is larger, the first or the second?",
    "Where is the larger number, in the first or in the second picture?",
    "Compare the digits: which one is larger?",
)
_BOTH = (
    "Which digits are these?",
    "Read both digits in order.",
    "What are the two numbers?",
)


def which_digit(picture: Picture, rng: np.random.Generator) -> dict:
    """Asks which digit a picture shows."""
    answer = f"It is a {picture.digit}."
    return _record("which digit", [picture], _pick(rng, _WHICH), answer)


def even_or_odd(picture: Picture, rng: np.random.Generator) -> dict:
    """Asks whether a picture's digit is even or odd."""
    answer = f"It is {_parity(picture.digit)}."
    return _record("even or odd", [picture], _pick(rng, _PARITY), answer)


def two_pictures(first: Picture, second: Picture, rng: np.random.Generator) -> dict:
    """Asks which of two pictures shows the larger digit."""
    answer = _larger(first.digit, second.digit)
    return _record("two pictures", [first, second], _pick(rng, _LARGER), answer)


def read_two(first: Picture, second: Picture, rng: np.random.Generator) -> dict:
    """Asks for the digits of two pictures, in their order."""
    answer = f"{first.digit} and {second.digit}."
    return _record("read two", [first, second], _pick(rng, _BOTH), answer)


def text_only(rng: np.random.Generator) -> dict:
    """Asks for a sum, the larger of two numbers, or whether a number is even: no picture."""
    a, b = (int(number) for number in rng.integers(0, 10, size=2))
    form = rng.integers(3)
    if form == 0:
        question, answer = f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    elif form == 1:
        question, answer = f"Is {a} even or odd?", f"It is {_parity(a)}."
    else:
        question = f"The first number is {a}, the second is {b}. Which one is larger?"
        answer = _larger(a, b)
    return _record("text only", [], question, answer)


def _pick(rng: np.random.Generator, phrasings: tuple[str, ...]) -> str:
    return phrasings[rng.integers(len(phrasings))]


def _parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def _larger(first: int, second: int) -> str:
    if first == second:
        return "They are the same."
    return "The first." if first > second else "The second."


def _record(kind: str, pictures: list[Picture], question: str, answer: str) -> dict:
    content = [{"type": "image", "image": picture.path} for picture in pictures]
    content.append({"type": "text", "text": question})
    return {
        "kind": kind,
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ],
    }

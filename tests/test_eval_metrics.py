"""Metrics beside scores that were worked out by hand from their papers, and their properties."""

import itertools
import random
from collections.abc import Iterator
from statistics import mean

import pytest

from mllama_jax.evaluation.choices import chosen_letter, written
from mllama_jax.evaluation.metrics import (
    _levenshtein,
    anls,
    exact_match,
    relaxed_accuracy,
    vqa_accuracy,
)
from mllama_jax.evaluation.vqa_text import normalised

NORMALISED = {
    "Yes": "yes",
    "  yes \n": "yes",
    "Yes.": "yes",
    "yes!": "yes",
    "The red car": "red car",
    "a an the": "",
    "theatre": "theatre",
    "two": "2",
    "Ten": "10",
    "eleven": "eleven",
    "None": "0",
    "none of them": "0 of them",
    "3.5": "3.5",
    ".5": ".5",
    "It is a 2.": "it is 2",
    "U.S.A.": "usa",
    "1,000": "1000",
    "$1,000.": "$1000",
    "1,000-2,000": "10002000",
    "12%": "12%",
    "10:30": "10:30",
    "yes/no": "yes no",
    "yes / no": "yes no",
    "red,blue": "red blue",
    "red, blue": "red blue",
    "red\nblue": "red blue",
    "t-shirt": "t shirt",
    "(left)": "left",
    "dont": "don't",
    "Don't": "don't",
    "couldntve": "couldn't've",
    "shouldn'tve": "shouldn't've",
    "man's": "man's",
    "were": "were",
    "well": "well",
    "": "",
    ".": "",
    "?!": "",
    "ÉCOLE": "école",
    "日本": "日本",
    "a\u00a0b": "b",
}


@pytest.mark.parametrize(("text", "expected"), NORMALISED.items())
def test_spelling_of_vqa(text: str, expected: str):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The Dog.", ["dog"], 1),
        ("dogs", ["dog"], 0),
        ("two", ["cat", "2"], 1),
        ("$1000", ["$1,000"], 1),
        ("1000", ["$1,000"], 0),
        ("0.12", ["12%"], 0),
        ("", ["yes"], 0),
        ("the", [""], 1),
        ("Straße", ["straße"], 1),
    ],
)
def test_exact_match(answer: str, references: list[str], expected: float):
    assert exact_match(answer, references) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # Of ten sets of nine people, as many lack one who agrees as there are who agree.
    [
        (0, 0),
        (1, 9 / 10 * 1 / 3),
        (2, (8 * 2 / 3 + 2 * 1 / 3) / 10),
        (3, (7 + 3 * 2 / 3) / 10),
        (4, 1),
        (10, 1),
    ],
)
def test_vqa_accuracy_of_ten(agreeing: int, expected: float):
    others = [f"other {number}" for number in range(10 - agreeing)]
    people = ["A cat.", "cat", "the cat", "Cat", *["cat"] * 6][:agreeing] + others
    random.Random(agreeing).shuffle(people)
    assert vqa_accuracy("a cat", people) == pytest.approx(expected, abs=1e-15)


def test_vqa_accuracy_is_the_mean_over_all_but_one():
    for count in range(4, 12):
        for agreeing in range(count + 1):
            says_so = [True] * agreeing + [False] * (count - agreeing)
            of_others = [sum(says_so) - one for one in says_so]
            expected = mean(min(number / 3, 1) for number in of_others)
            people = ["yes" if one else "no" for one in says_so]
            assert vqa_accuracy("yes", people) == pytest.approx(expected, abs=1e-15)
    with pytest.raises(ValueError, match="at least 4; there are 3"):
        vqa_accuracy("yes", ["yes"] * 3)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("coffee", ["coffee"], 1),
        ("  COFFEE ", ["coffee"], 1),
        ("coffe", ["coffee"], 1 - 1 / 6),
        ("tea", ["coffee", "tee"], 1 - 1 / 3),
        ("abcd", ["abxy"], 0),  # half of it differs
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("$1,000", ["$1000"], 1 - 1 / 6),
        ("0.12", ["12%"], 0),
        ("12", ["12%"], 1 - 1 / 3),
        ("new  york\ncity", ["New York City"], 1),
        ("the cat", ["cat"], 0),  # articles count: 4 of 7
        ("", ["yes"], 0),
        ("", [""], 1),
        ("naive", ["naïve"], 1 - 1 / 5),
        ("日本", ["日本語"], 1 - 1 / 3),
    ],
)
def test_anls(answer: str, references: list[str], expected: float):
    assert anls(answer, references) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-105", "-100", 1),
        ("-100", "100", 0),
        ("+3", "3.", 1),
        ("1e2", "100", 1),
        ("1e999", "1e999", 1),
        ("12%", "0.12", 1),
        ("0.12", "12%", 1),
        ("12%", "12.5%", 1),
        ("12", "12%", 0),
        ("12 %", "0.12", 0),  # text
        ("$5", "5", 0),
        ("$5", "$5", 1),
        ("1,000", "1000", 0),
        ("1,000", "1,000", 1),
        ("0", "0.0", 1),
        ("0.001", "0", 0),
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        ("It is 100", "100", 0),
        ("nan", "NaN", 1),
        ("inf", "100", 0),
        ("١٠٠", "100", 0),
        ("", "100", 0),
        ("", "", 1),
        ("2010", "2009", 1),  # years are numbers, too
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, expected: float):
    assert relaxed_accuracy(answer, [reference]) == expected
    assert relaxed_accuracy(answer, ["no", reference]) == expected


CHOICES = ("Paris", "the red cat", "42", "cat")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        (" (C) ", "C"),
        ("(b)", None),
        ("B. the red cat", "B"),
        ("The answer is D", "D"),
        ("The answer is D.", "D"),
        ("A or (B)", "B"),  # brackets come first
        ("(A), no, (B)", "B"),
        ("Not A but C is right", "C"),
        ("It is C. Because A is wrong, or so I think", "A"),  # a letter alone, then one with a stop
        ("It is C. Because of that", "C"),
        ("E", None),
        ("ABC", None),
        ("A)", None),
        ("Paris", None),  # too short for the text of a choice
        ("I am sure that it is in Paris", "A"),
        ("I am sure that it shows THE RED dog, a CAT", "D"),
        ("I am sure that it shows THE RED CAT", "D"),  # "cat" begins last
        ("First I thought Paris but it says 42", "C"),
        ("I have not the faintest idea, sorry", None),
        ("", None),
        ("Vitamin B12 is in it, I am sure", None),
    ],
)
def test_letters_of_answers(answer: str, letter: str | None):
    assert chosen_letter(answer, CHOICES) == letter


def test_choices_are_understood_as_they_are_written():
    assert written(CHOICES) == "A. Paris\nB. the red cat\nC. 42\nD. cat"
    for line, letter in zip(written(CHOICES).splitlines(), "ABCD", strict=True):
        assert chosen_letter(line, CHOICES) == letter


def texts(seed: int, count: int) -> Iterator[str]:
    draw = random.Random(seed)
    pieces = [*"ab12 .,-'$%é\n", "the ", "two", "1,000", "dont", "(A)", " B "]
    for _ in range(count):
        yield "".join(draw.choices(pieces, k=draw.randrange(7)))


def test_what_holds_for_all_texts():
    for answer, other in itertools.pairwise(texts(1, 2000)):
        assert normalised(normalised(answer)) == normalised(answer)
        assert exact_match(answer, [other, answer]) == 1
        assert exact_match(answer, [other]) == exact_match(other, [answer])
        assert anls(answer, [answer]) == relaxed_accuracy(answer, [answer]) == 1
        score = anls(answer, [other])
        assert score == anls(other.upper(), [answer])
        assert score == 0 or 0.5 < score <= 1
        assert anls(answer, [other, "1,000 b"]) == max(score, anls(answer, ["1,000 b"]))
        assert chosen_letter(answer, ["x", "y"]) in (None, "A", "B")


def test_levenshtein_is_the_length_of_the_shortest_way():
    """Of all texts of up to three letters: distances along single edits, counted step by step."""
    words = ["".join(word) for n in range(4) for word in itertools.product("ab", repeat=n)]
    near = {
        word: {
            other
            for other in words
            if other != word
            and (
                any(word[:i] + word[i + 1 :] == other for i in range(len(word)))
                or any(other[:i] + other[i + 1 :] == word for i in range(len(other)))
                or (
                    len(word) == len(other)
                    and sum(x != y for x, y in zip(word, other, strict=True)) == 1
                )
            )
        }
        for word in words
    }
    for word in words:
        distances, edge = {word: 0}, {word}
        while edge:
            edge = set().union(*(near[one] for one in edge)) - distances.keys()
            distances |= dict.fromkeys(edge, 1 + max(distances.values()))
        assert {other: _levenshtein(word, other) for other in words} == distances

"""Short answers brought to one spelling, as the evaluation of VQA does before it compares them."""

import re
from collections.abc import Iterator

__all__ = ["normalised"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Of a decimal point the digits behind it are what counts.
_PERIOD = re.compile(r"\.(?!\d)")

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}

# Not those that are another word without the apostrophe: "we're", "she'll", "I'd" and others.
_CONTRACTIONS = """
    ain't aren't can't couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    isn't mightn't mightn't've mustn't needn't oughtn't shan't shouldn't shouldn't've wasn't
    weren't won't wouldn't wouldn't've could've might've must've not've should've would've
    he'd he'd've he's how'd how'll how's it'd it'd've it'll she'd've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've we'd've we've what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've ma'am o'clock 'twas
"""


def normalised(text: str) -> str:
    """A short answer, lower-case, without what different people write differently.

    Number words up to ten (and "none") become digits, articles and full stops go, contractions get
    the apostrophes that they lack, other punctuation gives way: to nothing where a space is beside
    it or the text has a number such as 1,000, else to a space. Apostrophes, colons, and signs of
    currency and per cent stay.

    Source: Antol et al. 2015, "VQA: Visual Question Answering", and the description of the
    evaluation on visualqa.org.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _PERIOD.sub("", _without_punctuation(text))
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_SPELT_OUT.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for sign in set(_PUNCTUATION).intersection(text):
        vanishes = has_comma_in_number or f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if vanishes else " ")
    return found


def _without_some_apostrophes(word: str) -> Iterator[str]:
    first, *others = word.split("'")
    found = {first}
    for part in others:
        found = {f"{start}{sign}{part}" for start in found for sign in ("", "'")}
    yield from found - {word}


_SPELT_OUT = {
    short: word for word in _CONTRACTIONS.split() for short in _without_some_apostrophes(word)
}

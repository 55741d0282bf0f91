"""Random text that is hard on tokenizers, and random pictures."""

import random

import numpy as np
from PIL import Image
from real_tokenizer import SPECIAL_TOKENS

PIECES = (
    "the ",
    "  quick\t",
    "Brown",
    "fox's ",
    "1234567",
    " 3.14",
    "\n\n",
    "\r\n ",
    "don't ",
    "naïve ",
    "cafe\u0301",
    "日本語",
    "👩‍👩‍👧",
    "🇨🇭 ",
    "\u200b",
    "\u00a0",
    " …",
    "<|",
    "|>",
    "<",
    "\\u0041",
    "{{ x }}",
    "<b>&amp;</b>",
    "\x00\x07",
    "é",
    "عربى ",
    "हिन्दी",
    "ẞ",
    "'LL ",
)
SPECIAL_PIECES = (*SPECIAL_TOKENS[:2], *SPECIAL_TOKENS[4:12], SPECIAL_TOKENS[-1])


def random_text(rng: random.Random, pieces: tuple[str, ...] = PIECES, most: int = 8) -> str:
    return "".join(rng.choices(pieces, k=rng.randrange(most + 1)))


def broken_tokens(rng: random.Random) -> tuple[str, ...]:
    """Special tokens, whole and cut in two."""
    tokens = rng.choices(SPECIAL_PIECES, k=6)
    cuts = [rng.randrange(1, len(token)) for token in tokens]
    halves = [
        half for token, cut in zip(tokens, cuts, strict=True) for half in (token[:cut], token[cut:])
    ]
    return (*tokens, *halves)


def random_picture(rng: random.Random) -> Image.Image:
    height, width = rng.randrange(1, 90), rng.randrange(1, 90)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))

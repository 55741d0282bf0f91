"""Texts that are packed into rows, and the same texts alone, for `tiny_model`."""

from typing import Any

import numpy as np
from tiny_model import NUM_TILES, TILE, make_inputs

Inputs = dict[str, np.ndarray]

TEXTS: list[tuple[list[tuple[int, int]], int]] = [
    ([(3, 2), (17, 3)], 40),
    ([], 23),
    ([(0, 1)], 30),
    ([], 23),
    ([(0, 3)], 30),
    ([], 23),
]
"""For each text the (place, aspect-ratio id) of its pictures, and its tokens."""
ROWS = [[0, 1, 2], [3, 4, 5]]
LENGTH = 128


def alone(number: int) -> Inputs:
    """A text as a batch of its own, without padding."""
    pictures, length = TEXTS[number]
    inputs = make_inputs([pictures], [length], seed=10 * number)
    ids = inputs["input_ids"]
    learned = (ids < 61) & (ids % 3 != 0)
    learned[:, 0] = ids[:, 0] < 61  # no text may predict the first token of the next one
    return {**inputs, "labels": np.where(learned, ids, -100)}


def packed() -> Inputs:
    """The same texts in two rows."""
    num_pictures = max(sum(len(TEXTS[number][0]) for number in row) for row in ROWS)
    shape, slots = (len(ROWS), LENGTH), (len(ROWS), num_pictures)
    batch = {
        "input_ids": np.zeros(shape, np.int32),
        "labels": np.full(shape, -100, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "pixel_values": np.zeros((*slots, NUM_TILES, *TILE), np.float32),
        "aspect_ratio_ids": np.zeros(slots, np.int32),
        "aspect_ratio_mask": np.zeros((*slots, NUM_TILES), np.int32),
        "cross_attention_mask": np.zeros((*shape, num_pictures, NUM_TILES), np.int32),
    }
    batch["aspect_ratio_mask"][..., 0] = 1
    for row, segment, tokens, pictures, number in places():
        text: Any = alone(number)
        batch["segment_ids"][row, tokens] = segment
        for name in ("input_ids", "labels"):
            batch[name][row, tokens] = text[name][0]
        if TEXTS[number][0]:
            for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                batch[name][row, pictures] = text[name][0]
            batch["cross_attention_mask"][row, tokens, pictures] = text["cross_attention_mask"][0]
    return batch


def places() -> list[tuple[int, int, slice, slice, int]]:
    """For each text its row, segment, tokens and pictures there, and its number."""
    found = []
    for row, numbers in enumerate(ROWS):
        start = picture = 0
        for segment, number in enumerate(numbers, start=1):
            pictures, length = TEXTS[number]
            tokens = slice(start, start + length)
            found.append((row, segment, tokens, slice(picture, picture + len(pictures)), number))
            start, picture = start + length, picture + len(pictures)
    return found

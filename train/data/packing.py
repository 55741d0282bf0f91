"""Which examples share a row: several short ones, up to the row's length and pictures."""

from collections.abc import Sequence

import numpy as np

from mllama_jax.train.data.examples import Example

Row = list[Example]


def pack(examples: Sequence[Example], length: int, max_images: int, multiple: int = 1) -> list[Row]:
    """Rows of at most ``length`` tokens and ``max_images`` pictures; every example is in one.

    They are evenly filled, with tokens and with pictures, and about as few as can be: first so many
    as all tokens and pictures would just fill, then ``multiple`` more whenever one example finds no
    room. The same examples in the same order give the same rows.

    Args:
        examples: at least one; none of them larger than a row.
        length, max_images: of a row.
        multiple: what the number of rows is a multiple of.
    """
    tokens = np.array([len(example.ids) for example in examples])
    images = np.array([example.num_images for example in examples])
    fewest = max(-(-tokens.sum() // length), -(-images.sum() // max_images))
    num_rows = int(-(-fewest // multiple)) * multiple
    while (row_of := _evenly(tokens, images, length, max_images, num_rows)) is None:
        num_rows += multiple
    rows: list[Row] = [[] for _ in range(num_rows)]
    for example, row in zip(examples, row_of, strict=True):
        rows[row].append(example)
    return rows


def _evenly(
    tokens: np.ndarray, images: np.ndarray, length: int, max_images: int, num_rows: int
) -> list[int] | None:
    """The row of each example; None if one finds no room.

    The largest comes first. What has pictures goes where the fewest are, anything else where the
    fewest tokens are.
    """
    row_of = [0] * len(tokens)
    used_tokens, used_images = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    sizes = np.maximum(tokens / length, images / max_images)
    for number in np.argsort(-sizes, kind="stable"):
        use = used_tokens + (length + 1) * used_images if images[number] else used_tokens
        has_room = (used_tokens + tokens[number] <= length) & (
            used_images + images[number] <= max_images
        )
        row = int(np.argmin(np.where(has_room, use, np.iinfo(np.int64).max)))
        if not has_room[row]:
            return None
        row_of[number] = row
        used_tokens[row] += tokens[number]
        used_images[row] += images[number]
    return row_of

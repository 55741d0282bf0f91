"""Which image belongs to which text, and which tokens may look at it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllama_jax.processing.image_loading import nest_images


def deal_images(images: Any, texts: Sequence[str], image_token: str) -> list[list[Any]]:
    """Each text's images.

    Args:
        images: None, one image, a flat list (dealt out in order), or a list for each text.
        texts: with `image_token` for each image.

    Raises:
        ValueError: the numbers don't match; every sample that is wrong is named.
    """
    wanted = [text.count(image_token) for text in texts]
    if images is None or (isinstance(images, list | tuple) and not images):
        flat: list[Any] = []
    else:
        samples = nest_images(images)
        if _is_nested(images):
            _check_counts(wanted, [len(sample) for sample in samples], image_token)
            return samples
        [flat] = samples
    if len(texts) == 1 or not flat:
        counts = [len(flat)] + [0] * (len(texts) - 1)
        _check_counts(wanted, counts, image_token)
    elif len(flat) != sum(wanted):
        raise ValueError(
            f"There are {len(flat)} images in a flat list, and the texts have {wanted} "
            f"{image_token}, {sum(wanted)} together. Pass an image for each, or a list of "
            "images for each text."
        )
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in wanted]


def _is_nested(images: Any) -> bool:
    """Whether a list has a list (or a stack) of images for each sample."""
    return isinstance(images, list | tuple) and all(
        isinstance(sample, list | tuple) or getattr(sample, "ndim", None) == 4 for sample in images
    )


def _check_counts(wanted: Sequence[int], found: Sequence[int], image_token: str) -> None:
    if len(wanted) != len(found):
        raise ValueError(
            f"There are {len(wanted)} texts and lists of images for {len(found)}; expected a list "
            "for each text, such as [[first, second], [third], []]."
        )
    wrong = [
        f"sample {i} has {tokens} {image_token} in its text and {images} images"
        for i, (tokens, images) in enumerate(zip(wanted, found, strict=True))
        if tokens != images
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}. Every image needs its {image_token}, and every {image_token} "
            "that is meant as an image its picture."
        )


def image_spans(input_ids: Sequence[int], image_token_id: int) -> list[tuple[int, int]]:
    """For each image token, the positions (from, up to and without) that attend to its image.

    A span begins at the image token and ends where the next image does; images that stand directly
    behind each other share the end of the last of them. The last span runs to the end of the ids,
    padding included.

    Source: transformers 4.54.1, processing_mllama.py: get_cross_attention_token_mask.
    """
    starts = [i for i, token in enumerate(input_ids) if token == image_token_id]
    spans: list[tuple[int, int]] = []
    end = following = len(input_ids)
    for start in reversed(starts):
        if following != start + 1:
            end = following
        spans.append((start, end))
        following = start
    return spans[::-1]


def cross_attention_mask(
    spans: Sequence[Sequence[tuple[int, int]]],
    num_tiles: Sequence[Sequence[int]],
    shape: tuple[int, int, int, int],
) -> np.ndarray:
    """1 where a token attends to a tile: (B, T, M, L) int64.

    Args:
        spans: for each sample, the span of each of its images.
        num_tiles: for each sample, the number of tiles of each of its images.
        shape: (B, T, M, L).

    Source: transformers 4.54.1, processing_mllama.py: convert_sparse_cross_attention_mask_to_dense.
    """
    mask_BTML = np.zeros(shape, np.int64)
    for sample, (sample_spans, sample_tiles) in enumerate(zip(spans, num_tiles, strict=True)):
        for image, ((start, end), tiles) in enumerate(zip(sample_spans, sample_tiles, strict=True)):
            mask_BTML[sample, start:end, image, :tiles] = 1
    return mask_BTML

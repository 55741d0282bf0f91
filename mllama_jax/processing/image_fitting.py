"""From loaded pictures to the tiles of a batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mllama_jax.processing.image_arrays import value_table
from mllama_jax.processing.image_loading import load_picture
from mllama_jax.processing.tiling import Arrangement, fit_to_canvas, optimal_canvas, write_tiles


class FittedImage(NamedTuple):
    """A picture at the size at which it goes onto its tiles."""

    pixels_HWC: np.ndarray
    """uint8, no larger than the arrangement's canvas."""
    unit_range: bool
    """Pixel value 255 stands for 1.0: it came as an array of fractions in [0, 1]."""
    arrangement: Arrangement
    where: str
    """What errors call it: "image 2 of sample 1"."""


def resize_to_tiles(
    image: Image.Image, *, tile_size: int, max_image_tiles: int, resample: int
) -> tuple[Image.Image, Arrangement]:
    """Resize a picture to fit the arrangement of tiles that suits it best."""
    width, height = image.size
    canvas = optimal_canvas(height, width, max_image_tiles, tile_size)
    new_height, new_width = fit_to_canvas(height, width, *canvas, tile_size)
    resized = image.resize((new_width, new_height), Image.Resampling(resample))
    return resized, (canvas[0] // tile_size, canvas[1] // tile_size)


def fit_images(
    samples: Sequence[Sequence[Any]],
    *,
    tile_size: int,
    max_image_tiles: int,
    resample: int,
    convert_rgb: bool,
    input_data_format: str | None,
) -> list[list[FittedImage]]:
    """Load and resize every image of every sample.

    Raises:
        ValueError, TypeError, OSError: as `load_picture` does, or one ValueError that lists all
            the images that can't be used; also if they differ in their number of channels.
    """
    fitted: list[list[FittedImage]] = [[] for _ in samples]
    problems: list[Exception] = []
    for i, sample in enumerate(samples):
        for j, source in enumerate(sample):
            where = f"image {j} of sample {i}"
            try:
                picture = load_picture(
                    source,
                    where=where,
                    convert_rgb=convert_rgb,
                    input_data_format=input_data_format,
                )
            except (ValueError, TypeError, OSError) as problem:
                problems.append(problem)
                continue
            resized, arrangement = resize_to_tiles(
                picture.image,
                tile_size=tile_size,
                max_image_tiles=max_image_tiles,
                resample=resample,
            )
            pixels_HWC = np.atleast_3d(np.asarray(resized))
            fitted[i].append(FittedImage(pixels_HWC, picture.unit_range, arrangement, where))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} images can't be used:{lines}")
    _check_channels(fitted)
    return fitted


def _check_channels(samples: Sequence[Sequence[FittedImage]]) -> None:
    images = [image for sample in samples for image in sample]
    for image in images:
        expected, found = (item.pixels_HWC.shape[2] for item in (images[0], image))
        if found != expected:
            raise ValueError(
                f"images of different numbers of channels: {images[0].where} has {expected}, "
                f"{image.where} has {found}; pass do_convert_rgb=True"
            )


def pack_images(
    samples: Sequence[Sequence[FittedImage]],
    *,
    tile_size: int,
    max_image_tiles: int,
    rescale_factor: float | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
) -> np.ndarray:
    """Pixel values float32 (B, M, L, C, tile, tile); zeros where there is no image or no tile.

    The last three arguments are those of `value_table`. C is 3 if there are no images at all.

    Raises:
        ValueError: not as many means or standard deviations as channels.
    """
    images = [image for sample in samples for image in sample]
    channels = images[0].pixels_HWC.shape[2] if images else 3
    tables = {
        unit_range: value_table(
            channels, rescale_factor=rescale_factor, mean=mean, std=std, unit_range=unit_range
        )
        for unit_range in {image.unit_range for image in images}
    }
    num_images = max(map(len, samples))
    shape = (len(samples), num_images, max_image_tiles, channels, tile_size, tile_size)
    out_BMLChw = np.zeros(shape, np.float32)
    for i, sample in enumerate(samples):
        for j, image in enumerate(sample):
            table = tables[image.unit_range]
            write_tiles(out_BMLChw[i, j], image.pixels_HWC, image.arrangement, table)
    return out_BMLChw

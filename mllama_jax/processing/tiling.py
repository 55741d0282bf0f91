"""How a picture is laid out on tiles: which arrangement, what size, which pixels in which tile.

Pure functions. Sizes and arrangements are (height, width) throughout; an arrangement counts tiles,
a size counts pixels. L is `max_image_tiles`, the tile slots of an image.
"""

import math
from collections.abc import Sequence

import numpy as np

Arrangement = tuple[int, int]


def supported_aspect_ratios(max_image_tiles: int) -> tuple[Arrangement, ...]:
    """Every arrangement `(tiles_h, tiles_w)` of at most `max_image_tiles` tiles, in id order.

    An image's aspect-ratio id is its arrangement's index here plus 1; 0 means "no image". Ids
    depend on `max_image_tiles`, so the processor's and the model's must agree. For 4:
    (1,1) (1,2) (1,3) (1,4) (2,1) (2,2) (3,1) (4,1).

    Source: transformers 4.54.1, image_processing_mllama.py: get_all_supported_aspect_ratios.
    """
    sides = range(1, max_image_tiles + 1)
    return tuple((h, w) for h in sides for w in sides if h * w <= max_image_tiles)


def optimal_canvas(
    image_height: int, image_width: int, max_image_tiles: int, tile_size: int
) -> tuple[int, int]:
    """The canvas (height, width in pixels, multiples of `tile_size`) that suits an image best.

    Among the canvases that hold the image at its size or larger, the one that enlarges it least;
    if there is none, the one that shrinks it least; of equals, the one with the smallest area.

    Source: transformers 4.54.1, image_processing_mllama.py: get_optimal_tiled_canvas.
    """

    def scale(canvas: tuple[int, int]) -> float:
        return min(canvas[0] / image_height, canvas[1] / image_width)

    canvases = [
        (tiles_h * tile_size, tiles_w * tile_size)
        for tiles_h, tiles_w in supported_aspect_ratios(max_image_tiles)
    ]
    enlarging = [canvas for canvas in canvases if scale(canvas) >= 1]
    best = min(map(scale, enlarging)) if enlarging else max(map(scale, canvases))
    equals = [canvas for canvas in canvases if scale(canvas) == best]
    return min(equals, key=lambda canvas: canvas[0] * canvas[1])


def fit_to_canvas(
    image_height: int, image_width: int, canvas_height: int, canvas_width: int, tile_size: int
) -> tuple[int, int]:
    """The size (height, width) to resize an image to before it is padded to its canvas.

    Keeps the aspect ratio up to rounding down. A picture smaller than a tile grows until one side
    is a tile long, one larger than the canvas shrinks into it, and no side falls below 1.

    Source: transformers 4.54.1, image_processing_mllama.py: get_image_size_fit_to_canvas.
    """
    target_height = min(max(image_height, tile_size), canvas_height)
    target_width = min(max(image_width, tile_size), canvas_width)
    scale_h = target_height / image_height
    scale_w = target_width / image_width
    if scale_w < scale_h:
        return min(max(math.floor(image_height * scale_w), 1), target_height), target_width
    return target_height, min(max(math.floor(image_width * scale_h), 1), target_width)


def split_to_tiles(image_CHW: np.ndarray, tiles_h: int, tiles_w: int) -> np.ndarray:
    """Cut a canvas (C, tiles_h * h, tiles_w * w) into tiles (tiles_h * tiles_w, C, h, w), by rows.

    Raises:
        ValueError: the canvas does not divide evenly into the arrangement.
    """
    channels, height, width = image_CHW.shape
    if height % tiles_h or width % tiles_w:
        raise ValueError(
            f"a canvas of {height} x {width} pixels does not divide into {tiles_h} x {tiles_w} "
            "tiles; pad it to a multiple of the tile size first"
        )
    h, w = height // tiles_h, width // tiles_w
    grid = image_CHW.reshape(channels, tiles_h, h, tiles_w, w)
    return np.ascontiguousarray(grid.transpose(1, 3, 0, 2, 4)).reshape(-1, channels, h, w)


def write_tiles(
    out_LChw: np.ndarray, pixels_HWC: np.ndarray, arrangement: Arrangement, table_C256: np.ndarray
) -> None:
    """Write an 8-bit picture into an image's tile slots, each value looked up in a table.

    The same as padding the picture with 0 to its canvas, mapping every value through its channel's
    row of `table_C256` (rescaling and normalisation) and `split_to_tiles`, in one pass: the tiles'
    padding becomes `table_C256[:, 0]`, and slots beyond the arrangement are left as they are.

    Args:
        out_LChw: float32 (L, C, tile, tile), written in place.
        pixels_HWC: uint8, no larger than the arrangement's canvas.
        arrangement: (tiles_h, tiles_w).
        table_C256: float32 (C, 256).
    """
    tile_size = out_LChw.shape[-1]
    tiles_h, tiles_w = arrangement
    for slot in range(tiles_h * tiles_w):
        top, left = (index * tile_size for index in divmod(slot, tiles_w))
        region_HWC = pixels_HWC[top : top + tile_size, left : left + tile_size]
        h, w = region_HWC.shape[:2]
        for channel, table in enumerate(table_C256):
            tile = out_LChw[slot, channel]
            # A byte never leaves the table; "clip" spares numpy the copy that "raise" makes.
            np.take(table, region_HWC[..., channel], out=tile[:h, :w], mode="clip")
            tile[h:] = table[0]
            tile[:h, w:] = table[0]


def aspect_ratio_ids(
    arrangements: Sequence[Sequence[Arrangement]], max_image_tiles: int
) -> np.ndarray:
    """Ids (B, M) int64 of each sample's images; 0 where a sample has fewer images than M.

    Raises:
        ValueError: an arrangement that `max_image_tiles` does not allow.
    """
    supported = supported_aspect_ratios(max_image_tiles)
    ids_BM = np.zeros((len(arrangements), max(map(len, arrangements))), np.int64)
    for i, sample in enumerate(arrangements):
        for j, arrangement in enumerate(sample):
            if tuple(arrangement) not in supported:
                raise ValueError(
                    f"image {j} of sample {i}: an arrangement of {arrangement} tiles is not "
                    f"supported with max_image_tiles={max_image_tiles}; expected one of {supported}"
                )
            ids_BM[i, j] = supported.index(tuple(arrangement)) + 1
    return ids_BM


def aspect_ratio_mask(
    arrangements: Sequence[Sequence[Arrangement]], max_image_tiles: int
) -> np.ndarray:
    """Mask (B, M, L) int64: 1 for a tile slot that holds a tile.

    The first slot is 1 even where there is no image, as the model was trained; whether there is
    one is told by its id.

    Source: transformers 4.54.1, image_processing_mllama.py: build_aspect_ratio_mask.
    """
    shape = (len(arrangements), max(map(len, arrangements)), max_image_tiles)
    mask_BML = np.zeros(shape, np.int64)
    mask_BML[:, :, 0] = 1
    for i, sample in enumerate(arrangements):
        for j, (tiles_h, tiles_w) in enumerate(sample):
            mask_BML[i, j, : tiles_h * tiles_w] = 1
    return mask_BML

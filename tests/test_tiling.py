"""Where the tiles of a picture lie: against transformers and against literal layouts."""

import numpy as np
import pytest
from transformers.models.mllama import image_processing_mllama as hf

from mllama_jax import MllamaVisionConfig
from mllama_jax.processing.tiling import (
    aspect_ratio_ids,
    aspect_ratio_mask,
    fit_to_canvas,
    optimal_canvas,
    split_to_tiles,
    supported_aspect_ratios,
    write_tiles,
)

TILE = 28
SIDES = (1, 2, 27, 28, 29, 41, 55, 56, 57, 83, 84, 85, 112, 113, 200, 1000, 9999999)


def test_arrangements_for_four_tiles_are_the_released_models():
    expected = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    assert supported_aspect_ratios(4) == expected
    assert MllamaVisionConfig().supported_aspect_ratios == expected


@pytest.mark.parametrize("max_image_tiles", range(1, 13))
def test_arrangements_are_in_the_reference_order(max_image_tiles):
    expected = tuple(hf.get_all_supported_aspect_ratios(max_image_tiles))
    assert supported_aspect_ratios(max_image_tiles) == expected


@pytest.mark.parametrize("max_image_tiles", range(1, 7))
def test_canvas_and_size_agree_with_the_reference(max_image_tiles):
    for height in SIDES:
        for width in SIDES:
            args = (height, width, max_image_tiles, TILE)
            canvas = optimal_canvas(*args)
            assert canvas == tuple(hf.get_optimal_tiled_canvas(*args)), args
            size = fit_to_canvas(height, width, *canvas, TILE)
            assert size == hf.get_image_size_fit_to_canvas(height, width, *canvas, TILE), args
            assert all(1 <= side <= limit for side, limit in zip(size, canvas, strict=True)), args


@pytest.mark.parametrize(
    ("image", "canvas", "size"),
    [
        ((300, 200), (448, 448), (448, 298)),  # grows until one side is a tile long
        ((448, 448), (448, 448), (448, 448)),
        ((448, 449), (448, 896), (448, 449)),  # fits two tiles as it is
        ((100, 900), (448, 1344), (100, 900)),  # the smaller of the canvases that hold it
        ((1000, 1000), (896, 896), (896, 896)),  # shrinks least on 2 x 2
        ((1, 9999999), (448, 1792), (1, 1792)),  # never 0 pixels high
        ((9999999, 1), (1792, 448), (1792, 1)),
    ],
)
def test_layouts_of_typical_pictures(image, canvas, size):
    assert optimal_canvas(*image, 4, 448) == canvas
    assert fit_to_canvas(*image, *canvas, 448) == size


def test_tiles_are_cut_row_by_row():
    canvas_CHW = np.arange(2 * 4 * 9).reshape(2, 4, 9)
    tiles = split_to_tiles(canvas_CHW, 2, 3)
    assert tiles.shape == (6, 2, 2, 3)
    np.testing.assert_array_equal(tiles[0], canvas_CHW[:, :2, :3])
    np.testing.assert_array_equal(tiles[2], canvas_CHW[:, :2, 6:])
    np.testing.assert_array_equal(tiles[3], canvas_CHW[:, 2:, :3])
    np.testing.assert_array_equal(tiles, hf.split_to_tiles(canvas_CHW, 2, 3))


def test_canvas_that_does_not_divide_into_tiles_is_refused():
    with pytest.raises(ValueError, match=r"5 x 9 pixels does not divide into 2 x 3"):
        split_to_tiles(np.zeros((3, 5, 9)), 2, 3)


@pytest.mark.parametrize("size", [(5, 7), (8, 12), (1, 12), (8, 1), (4, 4)])
def test_writing_tiles_is_padding_mapping_and_cutting(size):
    rng = np.random.default_rng(3)
    pixels_HWC = rng.integers(0, 256, (*size, 3), np.uint8)
    table = rng.normal(size=(3, 256)).astype(np.float32)
    out = np.full((8, 3, 4, 4), 7, np.float32)
    write_tiles(out, pixels_HWC, (2, 3), table)

    canvas_HWC = np.zeros((8, 12, 3), np.uint8)
    canvas_HWC[: size[0], : size[1]] = pixels_HWC
    values_CHW = np.stack([table[c][canvas_HWC[..., c]] for c in range(3)])
    np.testing.assert_array_equal(out[:6], split_to_tiles(values_CHW, 2, 3))
    np.testing.assert_array_equal(out[6:], 7)  # slots without a tile are left alone


def test_ids_and_mask_of_uneven_samples():
    arrangements = [[(1, 1), (2, 2)], [], [(4, 1)]]
    np.testing.assert_array_equal(aspect_ratio_ids(arrangements, 4), [[1, 6], [0, 0], [8, 0]])
    np.testing.assert_array_equal(
        aspect_ratio_mask(arrangements, 4),
        [
            [[1, 0, 0, 0], [1, 1, 1, 1]],
            [[1, 0, 0, 0], [1, 0, 0, 0]],
            [[1, 1, 1, 1], [1, 0, 0, 0]],
        ],
    )


def test_samples_without_any_image_have_empty_ids_and_mask():
    assert aspect_ratio_ids([[], []], 4).shape == (2, 0)
    assert aspect_ratio_mask([[], []], 4).shape == (2, 0, 4)


def test_arrangement_beyond_the_tiles_is_refused():
    with pytest.raises(ValueError, match=r"image 1 of sample 0.*\(2, 2\).*max_image_tiles=3"):
        aspect_ratio_ids([[(1, 1), (2, 2)]], 3)

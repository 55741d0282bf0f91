"""Meta's tables of tile embeddings and the Hub's, views of each other.

Meta's has an entry for each place in a grid of tiles, (tiles, tiles, P, D); an image of h x w tiles
takes the upper left corner. The Hub's lists, for each aspect-ratio id, that image's tiles by rows:
(ids, tiles * P * D), zeros where there is no tile and for id 0, "no image". So the Hub repeats
entries, and lacks those that no aspect ratio uses.
"""

from dataclasses import dataclass

import numpy as np

from mllama_jax.configs import MllamaVisionConfig
from mllama_jax.convert.lazy import Cast, Concatenated, LazyTensor, Region, along, extent
from mllama_jax.convert.regrouped import Regrouped


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, region: Region) -> np.ndarray:
        return np.zeros(extent(region), self.dtype)


def places_of_cells(config: MllamaVisionConfig) -> dict[int, list[tuple[int, int]]]:
    """Entry of the grid, counted by rows -> every (aspect-ratio id, tile) that repeats it."""
    places: dict[int, list[tuple[int, int]]] = {}
    for ratio_id, (height, width) in enumerate(config.supported_aspect_ratios, 1):
        for tile in range(height * width):
            cell = tile // width * config.max_num_tiles + tile % width
            places.setdefault(cell, []).append((ratio_id, tile))
    return places


def unused_cells(config: MllamaVisionConfig) -> list[int]:
    """Entries of the grid, counted by rows, that no aspect ratio uses."""
    used = places_of_cells(config)
    return [cell for cell in range(config.max_num_tiles**2) if cell not in used]


def unused(grid: LazyTensor, config: MllamaVisionConfig) -> LazyTensor:
    """The entries that no aspect ratio uses, by rows of the grid: 8 of 16 for 4 tiles.

    Returns:
        (entries, P * D)
    """
    flat = _flat(grid)
    return Concatenated(tuple(along(flat, 0, i, i + 1) for i in unused_cells(config)), 0)


def rows_of_grid(grid: LazyTensor, config: MllamaVisionConfig) -> LazyTensor:
    """The Hub's table, of Meta's."""
    flat = _flat(grid)
    cells = {place: i for i, places in places_of_cells(config).items() for place in places}
    zeros = Zeros((1, flat.shape[1]), grid.dtype)

    def entry(place: tuple[int, int]) -> LazyTensor:
        return along(flat, 0, cells[place], cells[place] + 1) if place in cells else zeros

    rows = [
        Concatenated(tuple(entry((ratio_id, tile)) for tile in range(config.max_num_tiles)), 1)
        for ratio_id in range(config.max_aspect_ratio_id + 1)
    ]
    return Concatenated(tuple(rows), 0)


def grid_of_rows(
    rows: LazyTensor, config: MllamaVisionConfig, unused: LazyTensor | None
) -> LazyTensor:
    """Meta's table, of the Hub's.

    Args:
        unused: what `unused` gave; None puts zeros there.
    """
    tiles, width = config.max_num_tiles, config.hidden_size
    size = rows.shape[1] // tiles
    places = places_of_cells(config)
    left_out = {cell: i for i, cell in enumerate(unused_cells(config))}
    if unused is None:
        unused = Zeros((len(left_out), size), rows.dtype)
    elif unused.shape != (len(left_out), size):
        raise ValueError(
            f"unused entries of a table of tiles: found shape {unused.shape}, expected "
            f"{(len(left_out), size)}"
        )
    elif unused.dtype != rows.dtype:
        unused = Cast(unused, rows.dtype)

    def entry(cell: int) -> LazyTensor:
        if cell in left_out:
            return along(unused, 0, left_out[cell], left_out[cell] + 1)
        ratio_id, tile = places[cell][0]
        return along(along(rows, 0, ratio_id, ratio_id + 1), 1, tile * size, (tile + 1) * size)

    flat = Concatenated(tuple(entry(cell) for cell in range(tiles**2)), 0)
    sizes = (("h", tiles), ("w", tiles), ("P", size // width), ("D", width))
    return Regrouped(flat, "(h w) (P D) -> h w P D", sizes)


def _flat(grid: LazyTensor) -> LazyTensor:
    """(tiles, tiles, P, D) as (tiles * tiles, P * D)."""
    return Regrouped(grid, "h w P D -> (h w) (P D)", tuple(zip("hwPD", grid.shape, strict=True)))

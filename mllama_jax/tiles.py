"""Which tiles of a picture exist, and computing those that don't only once.

A missing tile has no pixels, and no embedding that tells it from another missing one (in released
checkpoints; `missing_tiles_are_alike` says). All missing tiles of a picture then have the same
states in every layer: nothing attends to them but real tiles, and they attend to real tiles only.
One of them, counted as often as there are such tiles, gives the same results.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllama_jax.configs import MllamaVisionConfig
from mllama_jax.masks import PaddingPairMask
from mllama_jax.shapes import Array, Bool, Float, Int


def tiles_of_aspect_ratios(
    config: MllamaVisionConfig, aspect_ratio_ids: Int[Array, "B M"]
) -> Int[Array, "B M L"]:
    """The tiles that exist for each aspect-ratio id; by convention the first one for "no image"."""
    exists = np.arange(config.max_num_tiles) < _counts(config)[:, None]
    return jnp.asarray(exists, jnp.int32)[aspect_ratio_ids]


def padding_mask(
    tiles_BL: Int[Array, "B L"], num_patches: int, extra: int, num_tiles: int
) -> PaddingPairMask:
    """The vision encoder's mask over L tiles of ``num_patches + extra`` states.

    Args:
      tiles_BL: 0 for missing tiles.
      num_patches, extra: states of a tile, and what fills them up.
      num_tiles: tiles of a picture; the last of fewer stands for those that are left out.
    """
    B, L = tiles_BL.shape
    size = num_patches + extra
    real = (tiles_BL != 0)[:, :, None] & (jnp.arange(size) < num_patches)
    counts = None
    if num_tiles > L:
        of_last = jnp.where(tiles_BL[:, -1] == 0, 1.0 + num_tiles - L, 1.0)
        counts = jnp.ones((B, L, size)).at[:, -1].set(of_last[:, None]).reshape(B, -1)
    return PaddingPairMask(~real.reshape(B, -1), counts)


def computed_tiles(num_tiles: int, max_num_tiles: int) -> int:
    """How many tiles of a picture have to be computed: the real ones and a missing one."""
    return min(num_tiles + 1, max_num_tiles)


def with_all_tiles(x_BLPD: Float[Array, "B L P D"], num_tiles: int) -> Float[Array, "B M P D"]:
    """Repeats the last tile's states for the missing tiles that it stands for."""
    last = x_BLPD.shape[1] - 1
    return x_BLPD if last + 1 == num_tiles else x_BLPD[:, np.minimum(np.arange(num_tiles), last)]


def missing_tiles_are_alike(config: MllamaVisionConfig, vision_params: Mapping[str, Any]) -> bool:
    """Whether no embedding of these parameters of a vision model tells missing tiles apart."""
    names = (
        ("gated_positional_embedding", "tile_embedding"),
        ("pre_tile_positional_embedding", "embedding"),
        ("post_tile_positional_embedding", "embedding"),
    )
    return all(
        bool(_alike(config, vision_params[module][table], vision_params[module]["gate"]))
        for module, table in names
    )


@partial(jax.jit, static_argnames="config")
def _alike(config: MllamaVisionConfig, table: Array, gate: Array) -> Bool[Array, ""]:
    counts = _counts(config)
    first = np.minimum(counts, config.max_num_tiles - 1)
    same = (table == table[np.arange(len(counts)), first][:, None]).reshape(*table.shape[:2], -1)
    is_missing = np.arange(config.max_num_tiles) >= counts[:, None]
    return (same.all(-1) | ~is_missing).all() | (gate == 0).all()


def _counts(config: MllamaVisionConfig) -> np.ndarray:
    """Real tiles for each aspect-ratio id."""
    return np.array([1, *(h * w for h, w in config.supported_aspect_ratios)])

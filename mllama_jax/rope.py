"""Rotary position embedding (half-split layout), computed in float32."""

import math

import jax.numpy as jnp
import numpy as np

from mllama_jax.configs import MllamaTextConfig
from mllama_jax.shapes import Array, Float, Int


def inverse_frequencies(config: MllamaTextConfig) -> np.ndarray:
    """The rotation speed of each of the ``head_dim // 2`` feature pairs, radians a token, float32.

    ``rope_scaling`` "llama3" slows down the pairs whose wavelength exceeds the original context,
    leaves the fast ones alone and blends in between.

    Source: transformers 4.54.1, modeling_rope_utils.py: _compute_llama3_parameters.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    speeds = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return speeds
    if kind == "linear":
        return speeds / np.float32(scaling["factor"])
    original_length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original_length * speeds / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * speeds / scaling["factor"] + blend * speeds).astype(np.float32)


def rotary_table(
    position_ids_BT: Int[Array, "B T"], speeds: np.ndarray
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosine and sine of each position's angles, float32, broadcastable over heads."""
    angles = position_ids_BT.astype(jnp.float32)[:, :, None, None] * speeds
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    cos: Float[Array, "#B T 1 h"],
    sin: Float[Array, "#B T 1 h"],
) -> Float[Array, "B T N H"]:
    """Rotates feature pairs (i, i + H/2) of each head; the result keeps ``x``'s dtype."""
    x = x_BTNH.astype(jnp.float32)
    if x.shape[1] > 1:
        first, second = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    else:  # TPUs join the halves of one token in operations of their own, unless they lie like this
        halves = x.reshape(*x.shape[:-1], 2, -1)
        sin_of_halves = jnp.stack([-sin, sin], axis=-2)
        rotated = halves * cos[..., None, :] + halves[..., ::-1, :] * sin_of_halves
    return rotated.astype(x_BTNH.dtype).reshape(x_BTNH.shape)

"""Masks of rank one as extra features of queries and keys: kernels need not know them.

A product of two features that are both large takes a score so far down that its exponential
is exactly zero, yet stays finite in float32. Any other product is exactly zero, so that all other
scores keep their bits.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from mllama_jax.masks import PaddingPairMask
from mllama_jax.shapes import Array, Float


def _large(dtype: DTypeLike) -> float:
    """A power of two, exact in every dtype and finite in this one."""
    return 2.0**15 if dtype == jnp.float16 else 2.0**60


def with_padding_columns(
    q_BENH: Float[Array, "B E N H"],
    k_BEKH: Float[Array, "B E K H"],
    mask: PaddingPairMask,
    scale: float,
) -> tuple[Float[Array, "B E N h"], Float[Array, "B E K h"]]:
    """Queries and keys with the feature that forbids pairs of padding, and those of a bias.

    Args:
      scale: what the kernel multiplies scores by.
    """
    column_BE11 = jnp.where(mask.padding_BE, _large(q_BENH.dtype), 0.0)[:, :, None, None]
    q_BENH, k_BEKH = _append(q_BENH, column_BE11), _append(k_BEKH, -column_BE11)
    bias_BE = mask.bias()
    if bias_BE is not None:
        bias_BE11 = (bias_BE / scale)[:, :, None, None]
        # Two numbers of the keys' dtype: one alone would round a bfloat16 bias by a thousandth.
        high_BE11 = bias_BE11.astype(k_BEKH.dtype)
        for part in (high_BE11, bias_BE11 - high_BE11.astype(jnp.float32)):
            q_BENH, k_BEKH = _append(q_BENH, jnp.ones((1, 1, 1, 1))), _append(k_BEKH, part)
    return q_BENH, k_BEKH


def with_end_column(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], num_keys: int
) -> tuple[Float[Array, "B T N h"], Float[Array, "B S K h"]]:
    """Queries and keys with the feature that hides keys from index ``num_keys`` on."""
    hidden_S = jnp.arange(k_BSKH.shape[1]) >= num_keys
    column_S11 = jnp.where(hidden_S, -_large(k_BSKH.dtype), 0.0)[:, None, None]
    return _append(q_BTNH, jnp.ones((1, 1, 1))), _append(k_BSKH, column_S11)


def _append(x: Array, column: Array) -> Array:
    """What is chosen element by element is computed along with what makes or reads it."""
    size = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    return jnp.where(jnp.arange(size + 1) == size, column.astype(x.dtype), x)

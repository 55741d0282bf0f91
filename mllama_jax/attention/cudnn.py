"""Kind ``cudnn``: cuDNN's fused attention for NVIDIA GPUs, forward and backward.

The vision encoder's mask becomes a feature of queries and keys; no mask takes one call. For
other masks one block of queries is computed after the other, and only its rows of the mask exist.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mllama_jax.attention.columns import with_padding_columns
from mllama_jax.attention.on_mesh import check_platform, on_mesh
from mllama_jax.attention.xla import in_query_blocks
from mllama_jax.masks import Mask, PaddingPairMask
from mllama_jax.shapes import Array, Bool, Float

Implementation = Literal["cudnn", "xla"]

_DTYPES = (jnp.bfloat16, jnp.float16)


def check_dtype(dtype: DTypeLike) -> None:
    """Raises ValueError unless cuDNN computes in it."""
    if dtype not in _DTYPES:
        raise ValueError(
            f"attention='cudnn' takes bfloat16 and float16, not {jnp.dtype(dtype)}: choose "
            "dtype=bfloat16 or attention='xla'"
        )


def attend_cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """`mllama_jax.attention.attend` by cuDNN.

    On a mesh every device computes its own samples (axes data and fsdp) and heads (axis tensor).

    Raises:
      ValueError: the devices are not GPUs; or the dtype is neither bfloat16 nor float16.
    """
    check_platform("cudnn", mesh)
    check_dtype(q_BTNH.dtype)
    kernel = partial(attend_composed, implementation="cudnn")
    if mesh is None:
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask)
    return on_mesh(kernel, q_BTNH, k_BSKH, v_BSKH, mask, mesh)


def attend_composed(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
    implementation: Implementation,
) -> Float[Array, "B T N H"]:
    """Attention on one device from calls of `jax.nn.dot_product_attention`."""
    scale = q_BTNH.shape[3] ** -0.5
    kernel = partial(_attend_block, scale=scale, implementation=implementation)
    if mask is None:
        return kernel(q_BTNH, k_BSKH, v_BSKH, None)
    if isinstance(mask, PaddingPairMask):
        q_BTNH, k_BSKH = with_padding_columns(q_BTNH, k_BSKH, mask, scale)
        out = kernel(q_BTNH, k_BSKH, v_BSKH, None)
    else:
        out = in_query_blocks(kernel, q_BTNH, k_BSKH, v_BSKH, mask)
    # Where no key is allowed the kernel averages over all. What is zeroed here has no gradient.
    return jnp.where(mask.sees_a_key()[:, :, None, None], out, 0)


def _attend_block(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    allowed_BTS: Bool[Array, "#B T S"] | None,
    scale: float,
    implementation: Implementation,
) -> Array:
    T, H = q_BTNH.shape[1], v_BSKH.shape[3]
    # cuDNN wants head dims in multiples of 8 and, where there is a mask, even lengths.
    head_dim = -(-q_BTNH.shape[3] // 8) * 8
    even = 1 if allowed_BTS is None else 2
    q_BTNH, k_BSKH, v_BSKH = (
        _pad(x, 1, -(-x.shape[1] // even) * even, 3, head_dim) for x in (q_BTNH, k_BSKH, v_BSKH)
    )
    if allowed_BTS is not None:
        allowed_BTS = _pad(allowed_BTS, 1, q_BTNH.shape[1], 2, k_BSKH.shape[1])[:, None]
    out = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=allowed_BTS, scale=scale, implementation=implementation
    )
    return out[:, :T, :, :H]


def _pad(x: Array, axis: int, size: int, other_axis: int, other_size: int) -> Array:
    """Fills two axes up to a size with zeros."""
    missing = {axis: size - x.shape[axis], other_axis: other_size - x.shape[other_axis]}
    return jnp.pad(x, [(0, missing.get(i, 0)) for i in range(x.ndim)])

"""Kind ``xla``: blocks of queries, so that no more than a block of scores exists at a time.

Accelerators get large batched products; a CPU on its own gets `by_head`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllama_jax.attention.by_head import attend_by_head
from mllama_jax.attention.reference import scores
from mllama_jax.masks import Mask
from mllama_jax.shapes import Array, Bool, Float

_QUERY_BLOCK = 512
_MULTIPLE = 64
"""Blocks of whole tiles of an accelerator's memory."""

Kernel = Callable[[Array, Array, Array, Bool[Array, "#B T S"] | None], Array]


def attend_xla(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """`mllama_jax.attention.attend` in plain operations."""
    if mesh is not None:  # heads that devices share can't be taken one after the other
        return attend_batched(q_BTNH, k_BSKH, v_BSKH, mask)
    out: Array = jax.lax.platform_dependent(
        *(q_BTNH, k_BSKH, v_BSKH),
        cpu=partial(attend_by_head, mask=mask),
        default=partial(attend_batched, mask=mask),
    )
    return out


def attend_batched(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    """`mllama_jax.attention.attend` with all heads of a block of queries at a time."""
    attend_block = partial(_attend_block, bias_BS=None if mask is None else mask.bias())
    return in_query_blocks(attend_block, q_BTNH, k_BSKH, v_BSKH, mask)


def _attend_block(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    allowed_BTS: Bool[Array, "#B T S"] | None,
    bias_BS: Float[Array, "B S"] | None,
) -> Float[Array, "B T N H"]:
    """Divides by the softmax's sum after the product: S times fewer divisions."""
    B, T, N, H = q_BTNH.shape
    scores_BKGTS = scores(q_BTNH, k_BSKH, allowed_BTS, bias_BS)
    top = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
    exponentials = jnp.exp(scores_BKGTS - top)
    if allowed_BTS is not None:
        exponentials = jnp.where(allowed_BTS[:, None, None], exponentials, 0.0)
    total_BTKG1 = exponentials.sum(-1).transpose(0, 3, 1, 2)[..., None]
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        exponentials.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    out = out / jnp.where(total_BTKG1 == 0, 1.0, total_BTKG1)
    return out.reshape(B, T, N, H).astype(v_BSKH.dtype)


def in_query_blocks(
    attend_block: Kernel,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    """Runs ``attend_block(q, k, v, allowed)`` on one block of queries after the other.

    Only a block of the mask exists at a time, ``allowed`` (B or 1, queries, S).
    """
    B, T, N, H = q_BTNH.shape
    if T <= _QUERY_BLOCK:
        return attend_block(q_BTNH, k_BSKH, v_BSKH, None if mask is None else mask.rows(0, T))
    num_blocks = -(-T // _QUERY_BLOCK)
    size = -(-T // num_blocks)  # as even as they can be: the last repeats rows of the one before
    size += -size % _MULTIPLE

    # Rematerialised: the backward pass would otherwise keep every block's scores.
    @partial(jax.checkpoint, prevent_cse=False)
    def block(start: Array) -> Array:
        q_block = jax.lax.dynamic_slice_in_dim(q_BTNH, start, size, axis=1)
        allowed = None if mask is None else mask.rows(start, size)
        return attend_block(q_block, k_BSKH, v_BSKH, allowed)

    # The last block starts early enough to be full; the rows that it repeats are dropped.
    starts = jnp.minimum(jnp.arange(num_blocks) * size, T - size)
    blocks = jax.lax.map(block, starts)
    whole = blocks[:-1].swapaxes(0, 1).reshape(B, -1, N, H)
    rest = T - whole.shape[1]
    return jnp.concatenate([whole, blocks[-1][:, size - rest :]], axis=1)

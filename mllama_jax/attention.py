"""Scaled dot-product attention with grouped heads, in named kinds that give the same result.

========== =============================================================================
reference  scores, softmax and product at full size; also returns the weights
xla        blocks of queries, so that no more than a block of scores exists at a time
========== =============================================================================

A query that may attend to nothing gets exact zeros.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mllama_jax.masks import Mask
from mllama_jax.shapes import Array, Bool, Float

AttentionKind = Literal["reference", "xla"]
ATTENTION_KINDS: tuple[str, ...] = get_args(AttentionKind)

_QUERY_BLOCK = 512


def check_attention_kind(kind: str) -> None:
    """Raises ValueError unless ``kind`` names an implementation."""
    if kind not in ATTENTION_KINDS:
        raise ValueError(f"attention={kind!r}: expected one of {', '.join(ATTENTION_KINDS)}")


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
    kind: AttentionKind,
) -> Float[Array, "B T N H"]:
    """Attention of each query over the keys that its mask allows (all of them without a mask).

    Consecutive groups of ``N // K`` query heads share a key/value head. Scores and softmax are
    float32, the result has the values' dtype.
    """
    if kind == "reference":
        return attend_with_weights(q_BTNH, k_BSKH, v_BSKH, mask)[0]
    check_attention_kind(kind)
    length = q_BTNH.shape[1]
    if length <= _QUERY_BLOCK:
        allowed = None if mask is None else mask.rows(0, length)
        return _attend_block(q_BTNH, k_BSKH, v_BSKH, allowed)
    return _attend_in_blocks(q_BTNH, k_BSKH, v_BSKH, mask)


def attend_with_weights(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """`attend` by the textbook formula, with the attention weights beside the result."""
    B, T, N, H = q_BTNH.shape
    allowed = None if mask is None else mask.rows(0, T)
    scores_BKGTS = _scores(q_BTNH, k_BSKH, allowed)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if allowed is not None:
        weights_BKGTS = weights_BKGTS * allowed.any(-1)[:, None, None, :, None]
    weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out.reshape(B, T, N, H), weights_BKGTS.reshape(B, N, T, -1)


def _scores(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    allowed_BTS: Bool[Array, "#B T S"] | None,
) -> Float[Array, "B K G T S"]:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    ) * (H**-0.5)
    if allowed_BTS is None:
        return scores
    return jnp.where(allowed_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _attend_block(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    allowed_BTS: Bool[Array, "#B T S"] | None,
) -> Float[Array, "B T N H"]:
    """Divides by the softmax's sum after the product: S times fewer divisions."""
    B, T, N, H = q_BTNH.shape
    scores = _scores(q_BTNH, k_BSKH, allowed_BTS)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    exponentials = jnp.exp(scores - top)
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


def _attend_in_blocks(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    B, T, N, H = q_BTNH.shape
    num_blocks = -(-T // _QUERY_BLOCK)

    # Rematerialised: the backward pass would otherwise keep every block's scores.
    @partial(jax.checkpoint, prevent_cse=False)
    def block(start: Array) -> Array:
        q_block = jax.lax.dynamic_slice_in_dim(q_BTNH, start, _QUERY_BLOCK, axis=1)
        allowed = None if mask is None else mask.rows(start, _QUERY_BLOCK)
        return _attend_block(q_block, k_BSKH, v_BSKH, allowed)

    # The last block starts early enough to be full; the rows that it repeats are dropped.
    starts = jnp.minimum(jnp.arange(num_blocks) * _QUERY_BLOCK, T - _QUERY_BLOCK)
    blocks = jax.lax.map(block, starts)
    whole = blocks[:-1].swapaxes(0, 1).reshape(B, -1, N, H)
    rest = T - whole.shape[1]
    return jnp.concatenate([whole, blocks[-1][:, _QUERY_BLOCK - rest :]], axis=1)

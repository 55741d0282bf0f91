"""Attention for CPUs: one head after the other, in blocks whose scores stay in the cache."""

from functools import partial

import jax
import jax.numpy as jnp

from mllama_jax.masks import Mask
from mllama_jax.shapes import Array, Bool, Float

_SCORES = 2**18
"""Scores of a block: 1 MiB, which the passes of the softmax find in a core's own cache."""


def attend_by_head(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    """`mllama_jax.attention.attend` with one product of matrices at a time, in float32."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    num_blocks = -(-T // min(max(_SCORES // (G * S), 16), T))
    size = -(-T // num_blocks)  # as even as they can be: the last repeats rows of the one before
    q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).astype(jnp.float32) * H**-0.5
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3).astype(jnp.float32) for x in (k_BSKH, v_BSKH))
    bias_BS = None if mask is None else mask.bias()

    # Rematerialised: the backward pass would otherwise keep every block's scores.
    @partial(jax.checkpoint, prevent_cse=False)
    def block(start: Array) -> Array:
        q_block = jax.lax.dynamic_slice_in_dim(q_BKGTH, start, size, axis=3)
        allowed = None if mask is None else mask.rows(start, size)

        def head(i: Array) -> Array:
            b, h = i // K, i % K
            own = None if allowed is None else allowed[jnp.minimum(b, allowed.shape[0] - 1)]
            bias = None if bias_BS is None else bias_BS[b]
            return _attend_head(q_block[b, h], k_BKSH[b, h], v_BKSH[b, h], own, bias)

        out = jax.lax.map(head, jnp.arange(B * K))
        return out.reshape(B, N, size, H).astype(v_BSKH.dtype)

    starts = jnp.minimum(jnp.arange(num_blocks) * size, T - size)
    blocks = jax.lax.map(block, starts)
    whole = blocks[:-1].transpose(1, 0, 3, 2, 4).reshape(B, -1, N, H)
    rest = T - whole.shape[1]
    return jnp.concatenate([whole, blocks[-1].swapaxes(1, 2)[:, size - rest :]], axis=1)


def _attend_head(
    q_GTH: Float[Array, "G T H"],
    k_SH: Float[Array, "S H"],
    v_SH: Float[Array, "S H"],
    allowed_TS: Bool[Array, "T S"] | None,
    bias_S: Float[Array, "S"] | None,
) -> Float[Array, "G T H"]:
    G, T, H = q_GTH.shape
    scores_GTS = (q_GTH.reshape(G * T, H) @ k_SH.T).reshape(G, T, -1)
    if bias_S is not None:
        scores_GTS = scores_GTS + bias_S
    if allowed_TS is not None:
        scores_GTS = jnp.where(allowed_TS, scores_GTS, jnp.finfo(jnp.float32).min)
    top_GT1 = jax.lax.stop_gradient(scores_GTS.max(-1, keepdims=True))
    exponentials_GTS = jnp.exp(scores_GTS - top_GT1)
    product_GTH = (exponentials_GTS.reshape(G * T, -1) @ v_SH).reshape(G, T, H)
    out_GTH = product_GTH / exponentials_GTS.sum(-1, keepdims=True)
    if allowed_TS is not None:
        # Scores that are all the lowest are all the largest too.
        out_GTH = jnp.where(allowed_TS.any(-1)[:, None], out_GTH, 0.0)
    return out_GTH

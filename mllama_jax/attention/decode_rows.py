"""One new token over a long cache, in plain operations for CPUs: sample by sample, block by block.

Each sample costs what its own text so far costs: slots that are not in use are not read.
"""

import jax
import jax.numpy as jnp

from mllama_jax.shapes import Array

_BLOCK = 256
"""Slots that are read at a time; they lie in a processor's cache while they are worked on."""

Softmax = tuple[Array, Array, Array]
"""Softmax so far: the largest score, (K, G), the sum, (K, G), and the product, (K, G, H)."""


def attend_rows(
    K: int,
    scalars: tuple[Array, ...],
    q_BNH: Array,
    keys: Array,
    values: Array,
    allowed_B1S: Array,
    new: tuple[Array, Array] | None,
) -> Array:
    """`mllama_jax.attention.decode.attend_decode` on one device.

    Args:
      K: key/value heads to attend to.
      scalars: (1,) the layer, (B,) slots in use, (1,) the first of these heads.
    """
    (layer,), used_B, (head,) = scalars
    B, N, H = q_BNH.shape
    q_BKGH = q_BNH.reshape(B, K, N // K, H).astype(jnp.float32) * H**-0.5
    S = keys.shape[3]
    block = min(_BLOCK, S)

    def attend_row(row: Array, out_BKGH: Array) -> Array:
        q_KGH = q_BKGH[row]

        def add_block(j: Array, softmax: Softmax) -> Softmax:
            start = jnp.minimum(j * block, S - block)
            k_KSH, v_KSH = (
                jax.lax.dynamic_slice(stack, (layer, row, head, start, 0), (1, 1, K, block, H))
                for stack in (keys, values)
            )
            slots = start + jnp.arange(block)
            allowed = jax.lax.dynamic_slice(allowed_B1S, (row, 0, start), (1, 1, block))[0, 0]
            # The last block may begin in the one before.
            allowed = (allowed != 0) & (slots >= j * block) & (slots < used_B[row])
            return _added(softmax, q_KGH, k_KSH[0, 0], v_KSH[0, 0], allowed)

        num_blocks = (used_B[row] + block - 1) // block
        softmax = jax.lax.fori_loop(0, num_blocks, add_block, _own(q_KGH, row, head))
        _, total, product = softmax
        out = product / jnp.where(total == 0, 1.0, total)[..., None]
        return out_BKGH.at[row].set(out.astype(out_BKGH.dtype))

    def _own(q_KGH: Array, row: Array, head: Array) -> Softmax:
        """Of the token itself."""
        if new is None:
            lowest = jnp.finfo(jnp.float32).min
            nothing = jnp.zeros(q_KGH.shape[:2])
            return jnp.full_like(nothing, lowest), nothing, jnp.zeros_like(q_KGH)
        k_K1H, v_K1H = (
            jax.lax.dynamic_slice(x, (row, head, 0, 0), (1, K, 1, H))[0].astype(jnp.float32)
            for x in new
        )
        top = (q_KGH * k_K1H).sum(-1)
        return top, jnp.ones_like(top), jnp.broadcast_to(v_K1H, q_KGH.shape)

    out_BKGH = jax.lax.fori_loop(0, B, attend_row, jnp.zeros(q_BKGH.shape, values.dtype))
    return out_BKGH.reshape(B, N, H)


def _added(softmax: Softmax, q_KGH: Array, k_KSH: Array, v_KSH: Array, allowed_S: Array) -> Softmax:
    """The softmax with one more block of slots."""
    top, total, product = softmax
    scores = jnp.einsum(
        "KGH,KSH->KGS", q_KGH, k_KSH.astype(jnp.float32), preferred_element_type=jnp.float32
    )
    scores = jnp.where(allowed_S, scores, jnp.finfo(jnp.float32).min)
    new_top = jnp.maximum(top, scores.max(-1))
    exponentials = jnp.where(allowed_S, jnp.exp(scores - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    added = jnp.einsum("KGS,KSH->KGH", exponentials, v_KSH.astype(jnp.float32))
    return (
        new_top,
        total * shrink + exponentials.sum(-1),
        product * shrink[..., None] + added,
    )

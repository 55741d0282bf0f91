"""One new token over a long cache, in plain operations for CPUs: block by block of its slots.

Samples of about the same length are worked on several at a time, which keeps all cores busy; others
one by one, so that each costs what its own text so far costs.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mllama_jax.shapes import Array

_BLOCK = 128
"""Slots that are read at a time; they lie in a processor's cache while they are worked on."""

_BYTES_AT_ONCE = 2**19
"""Of keys, that are worth more than one core."""

_GAIN = 1.7
"""How many times faster slots are read then, by measurement with two cores."""

Softmax = tuple[Array, Array, Array]
"""Softmax so far: the largest score, (b, K, G), the sum, (b, K, G), the product, (b, K, G, H)."""


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
    B, S, H = q_BNH.shape[0], keys.shape[3], keys.shape[4]
    block_bytes = K * min(_BLOCK, S) * H * keys.dtype.itemsize
    rows = next((n for n in range(1, B) if B % n == 0 and n * block_bytes >= _BYTES_AT_ONCE), B)
    attend = partial(_attend, K, scalars, q_BNH, keys, values, allowed_B1S, new)
    if rows == 1:
        return attend(1)
    used_B = scalars[1]
    together = rows * used_B.reshape(-1, rows).max(axis=1).sum()
    return jax.lax.cond(together < _GAIN * used_B.sum(), lambda: attend(rows), lambda: attend(1))


def _attend(
    K: int,
    scalars: tuple[Array, ...],
    q_BNH: Array,
    keys: Array,
    values: Array,
    allowed_B1S: Array,
    new: tuple[Array, Array] | None,
    rows: int,
) -> Array:
    """So many samples at a time, each of which costs what the longest of them does."""
    (layer,), used_B, (head,) = scalars
    B, N, H = q_BNH.shape
    q_BKGH = q_BNH.reshape(B, K, N // K, H).astype(jnp.float32) * H**-0.5
    S = keys.shape[3]
    block = min(_BLOCK, S)

    def attend_some(number: Array, out_BKGH: Array) -> Array:
        row = number * rows
        q_bKGH, used_b = (jax.lax.dynamic_slice_in_dim(x, row, rows) for x in (q_BKGH, used_B))

        def add_block(j: Array, softmax: Softmax) -> Softmax:
            start = jnp.minimum(j * block, S - block)
            k_bKSH, v_bKSH = (
                jax.lax.dynamic_slice(stack, (layer, row, head, start, 0), (1, rows, K, block, H))
                for stack in (keys, values)
            )
            slots = start + jnp.arange(block)
            allowed_b1S = jax.lax.dynamic_slice(allowed_B1S, (row, 0, start), (rows, 1, block))
            # The last block may begin in the one before.
            in_use_bS = (slots >= j * block) & (slots < used_b[:, None])
            allowed_b1S = (allowed_b1S != 0) & in_use_bS[:, None]
            return _added(softmax, q_bKGH, k_bKSH[0], v_bKSH[0], allowed_b1S[:, None])

        num_blocks = (used_b.max() + block - 1) // block
        softmax = jax.lax.fori_loop(0, num_blocks, add_block, _own(q_bKGH, row))
        _, total, product = softmax
        out = product / jnp.where(total == 0, 1.0, total)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(out_BKGH, out.astype(out_BKGH.dtype), row, 0)

    def _own(q_bKGH: Array, row: Array) -> Softmax:
        """Of the tokens themselves."""
        if new is None:
            lowest = jnp.finfo(jnp.float32).min
            nothing = jnp.zeros(q_bKGH.shape[:3])
            return jnp.full_like(nothing, lowest), nothing, jnp.zeros_like(q_bKGH)
        k_bK1H, v_bK1H = (
            jax.lax.dynamic_slice(x, (row, head, 0, 0), (rows, K, 1, H)).astype(jnp.float32)
            for x in new
        )
        top = (q_bKGH * k_bK1H).sum(-1)
        return top, jnp.ones_like(top), jnp.broadcast_to(v_bK1H, q_bKGH.shape)

    out_BKGH = jnp.zeros(q_BKGH.shape, values.dtype)
    return jax.lax.fori_loop(0, B // rows, attend_some, out_BKGH).reshape(B, N, H)


def _added(
    softmax: Softmax, q_bKGH: Array, k_bKSH: Array, v_bKSH: Array, allowed_b11S: Array
) -> Softmax:
    """The softmax with one more block of slots."""
    top, total, product = softmax
    scores = jnp.einsum(
        "bKGH,bKSH->bKGS", q_bKGH, k_bKSH.astype(jnp.float32), preferred_element_type=jnp.float32
    )
    scores = jnp.where(allowed_b11S, scores, jnp.finfo(jnp.float32).min)
    new_top = jnp.maximum(top, scores.max(-1))
    exponentials = jnp.where(allowed_b11S, jnp.exp(scores - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    added = jnp.einsum("bKGS,bKSH->bKGH", exponentials, v_bKSH.astype(jnp.float32))
    return (
        new_top,
        total * shrink + exponentials.sum(-1),
        product * shrink[..., None] + added,
    )

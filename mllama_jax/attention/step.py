"""Attention of a few new tokens over a long cache, without a copy of the cache."""

import jax.numpy as jnp

from mllama_jax.shapes import Array, Bool, Float, Int

MAX_STEP = 16
"""Queries that `attend_step` is for; of more, the copy that it saves does not show."""


def attend_step(
    q_BTNH: Float[Array, "B T N H"],
    past_k_BKSH: Float[Array, "B K S H"],
    past_v_BKSH: Float[Array, "B K S H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    allowed_BTS: Bool[Array, "B T S"],
    start: Int[Array, ""] | Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    """`mllama_jax.attention.attend` over cached keys and over those of the new tokens themselves.

    Args:
      past_k_BKSH, past_v_BKSH: the cache of one layer; what stands in the slots from ``start`` on
        is not looked at. Samples may have a ``start`` each.
      k_BTKH, v_BTKH: of the new tokens, which belong in the slots from ``start`` on.
      allowed_BTS: which slots each token may attend to.
    """
    B, T, N, H = q_BTNH.shape
    K, S = past_k_BKSH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    start_B11 = jnp.reshape(start, (-1, 1, 1))
    own = jnp.broadcast_to(start_B11 + jnp.arange(T), (B, T, T))
    parts = (
        # Keys, values, their axes, and what of them may be attended to.
        (past_k_BKSH, past_v_BKSH, "BKSH", allowed_BTS & (jnp.arange(S) < start_B11)),
        (k_BTKH, v_BTKH, "BSKH", jnp.take_along_axis(allowed_BTS, own, axis=2)),
    )
    scores = [_scores(q_BTKGH, keys, axes, allowed) for keys, _, axes, allowed in parts]
    top = jnp.maximum(*(part.max(-1, keepdims=True) for part in scores))
    total, out = jnp.zeros(()), jnp.zeros(())
    for (_, values, axes, allowed), part in zip(parts, scores, strict=True):
        exponentials = jnp.where(allowed[:, None, None], jnp.exp(part - top), 0.0)
        total = total + exponentials.sum(-1)
        out = out + jnp.einsum(
            f"BKGTS,{axes}->BTKGH",
            exponentials.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
    total_BTKG1 = total.transpose(0, 3, 1, 2)[..., None]
    out = out / jnp.where(total_BTKG1 == 0, 1.0, total_BTKG1)
    return out.reshape(B, T, N, H).astype(v_BTKH.dtype)


def _scores(
    q_BTKGH: Float[Array, "B T K G H"], keys: Array, axes: str, allowed_BTS: Bool[Array, "B T S"]
) -> Float[Array, "B K G T S"]:
    scores = jnp.einsum(
        f"BTKGH,{axes}->BKGTS", q_BTKGH, keys, preferred_element_type=jnp.float32
    ) * (q_BTKGH.shape[-1] ** -0.5)
    return jnp.where(allowed_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)

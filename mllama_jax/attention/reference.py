"""Kind ``reference``: the textbook formula; scores and weights exist at full size."""

import jax
import jax.numpy as jnp

from mllama_jax.masks import Mask
from mllama_jax.shapes import Array, Bool, Float


def attend_with_weights(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """`attend` by the textbook formula, with the attention weights beside the result."""
    B, T, N, H = q_BTNH.shape
    allowed = None if mask is None else mask.rows(0, T)
    scores_BKGTS = scores(q_BTNH, k_BSKH, allowed, None if mask is None else mask.bias())
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if allowed is not None:
        weights_BKGTS = weights_BKGTS * allowed.any(-1)[:, None, None, :, None]
    weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out.reshape(B, T, N, H), weights_BKGTS.reshape(B, N, T, -1)


def scores(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    allowed_BTS: Bool[Array, "#B T S"] | None,
    bias_BS: Float[Array, "B S"] | None = None,
) -> Float[Array, "B K G T S"]:
    """Scaled scores in float32, and the keys' bias; forbidden ones are the lowest number."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    ) * (H**-0.5)
    if bias_BS is not None:
        scores = scores + bias_BS[:, None, None, None]
    if allowed_BTS is None:
        return scores
    return jnp.where(allowed_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)

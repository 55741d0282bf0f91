"""Language-modelling loss."""

import jax
import jax.numpy as jnp

from mllama_jax.shapes import Array, Float, Int

IGNORED_LABEL = -100


def cross_entropy(
    logits_BTW: Float[Array, "B T W"], labels_BT: Int[Array, "B T"], z_loss: float = 0.0
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of ``-log softmax(logits)[label]`` (float32) and the number of labels that count.

    Label t belongs to logit t: shift before the call (see `shift_labels`). Labels of -100 do not
    count; a label outside the vocabulary makes the sum NaN. For each that counts, ``z_loss *
    log(Z)**2`` is added, Z being the softmax's denominator: it keeps logits from drifting.
    """
    counted = labels_BT != IGNORED_LABEL
    logits_BTW = logits_BTW.astype(jnp.float32)
    # A sum instead of a look-up: it stays where a split vocabulary lies, and stores nothing.
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits_BTW.shape, 2)
    chosen = jnp.where(vocabulary == labels_BT[..., None], logits_BTW, 0.0).sum(-1)
    known = (labels_BT >= 0) & (labels_BT < logits_BTW.shape[-1])
    log_z = jax.nn.logsumexp(logits_BTW, axis=-1)
    losses = log_z - jnp.where(known, chosen, jnp.nan)
    if z_loss:
        losses += z_loss * jnp.square(log_z)
    return jnp.where(counted, losses, 0.0).sum(), counted.sum()


def shift_labels(
    labels_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Moves each label to the token that predicts it: one to the left, -100 at the end.

    With segments, no token predicts the first one of another text, nor padding (segment 0).
    """
    following = labels_BT[:, 1:]
    if segment_ids_BT is not None:
        segments = segment_ids_BT[:, 1:]
        is_text = (segments != 0) & (segments == segment_ids_BT[:, :-1])
        following = jnp.where(is_text, following, IGNORED_LABEL)
    return jnp.pad(following, ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)

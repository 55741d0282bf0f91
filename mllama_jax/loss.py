"""Language-modelling loss."""

import jax
import jax.numpy as jnp

from mllama_jax.shapes import Array, Float, Int

IGNORED_LABEL = -100


def cross_entropy(
    logits_BTW: Float[Array, "B T W"], labels_BT: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of ``-log softmax(logits)[label]`` (float32) and the number of labels that count.

    Label t belongs to logit t: shift before the call (see `shift_labels`). Labels of -100 do not
    count; a label outside the vocabulary makes the sum NaN.
    """
    counted = labels_BT != IGNORED_LABEL
    log_probabilities = jax.nn.log_softmax(logits_BTW.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(
        log_probabilities,
        jnp.where(counted, labels_BT, 0)[..., None],
        axis=-1,
        mode="fill",
        fill_value=jnp.nan,
    )[..., 0]
    return -jnp.where(counted, chosen, 0.0).sum(), counted.sum()


def shift_labels(labels_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Moves each label to the token that predicts it: one to the left, -100 at the end."""
    return jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)

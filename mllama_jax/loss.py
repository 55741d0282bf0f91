"""Language-modelling loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mllama_jax.loops import at_most
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


LossOfTokens = Callable[[Any, Float[Array, "S L D"], Int[Array, "S L"]], Float[Array, ""]]
"""From parameters, states of tokens and their labels to the sum of the tokens' losses."""


def loss_in_chunks(
    loss_of: LossOfTokens,
    params: Any,
    x_SND: Float[Array, "S N D"],
    labels_SN: Int[Array, "S N"],
    chunk: int,
) -> Float[Array, ""]:
    """``loss_of(params, x_SND, labels_SN)``, computed for a part of the tokens at a time.

    Tokens without a label (-100) must add nothing: they are put last, and chunks of nothing else
    are not computed. Where gradients are asked for, each chunk's are computed along with its loss,
    so that nothing is kept of it and nothing is computed twice; those of parameters are summed in
    float32.

    Args:
      loss_of: hashable, and the same function for the same computation; it holds no arrays.
      params: a tree of arrays.
      x_SND: states, of N tokens in each of S shards, of which each computes a part of a chunk.
      labels_SN: the label of each.
      chunk: so many tokens of a shard at a time.
    """
    order_SN = jnp.argsort(labels_SN == IGNORED_LABEL, axis=1, stable=True)
    labels_SN = jnp.take_along_axis(labels_SN, order_SN, axis=1)
    most = -(-x_SND.shape[1] // chunk)
    room = most * chunk - x_SND.shape[1]
    labels_SN = jnp.pad(labels_SN, ((0, 0), (0, room)), constant_values=IGNORED_LABEL)
    return _loss_in_chunks(loss_of, chunk, params, x_SND, labels_SN, order_SN)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_in_chunks(
    loss_of: LossOfTokens, chunk: int, params: Any, x_SND: Array, labels_SN: Array, order_SN: Array
) -> Array:
    def add(i: Array, total: Array) -> Array:
        return total + loss_of(params, _chunk_of(x_SMD, i, chunk), _chunk_of(labels_SN, i, chunk))

    x_SMD = _in_order(x_SND, order_SN, labels_SN.shape[1])
    return _for_labelled(labels_SN, chunk, add, jnp.zeros((), jnp.float32))


def _with_gradients(
    loss_of: LossOfTokens, chunk: int, params: Any, x_SND: Any, labels_SN: Any, order_SN: Any
) -> tuple[Array, Any]:
    """The loss, and the gradients of what gradients are asked for."""
    leaves, tree = jax.tree.flatten(params)
    learned = [leaf.value for leaf in leaves if leaf.perturbed]
    x_SND, labels_SN, order_SN = (given.value for given in (x_SND, labels_SN, order_SN))
    x_SMD = _in_order(x_SND, order_SN, labels_SN.shape[1])

    def loss(learned: list[Array], x_SLD: Array, labels_SL: Array) -> Array:
        values = iter(learned)
        held = [next(values) if leaf.perturbed else leaf.value for leaf in leaves]
        return loss_of(jax.tree.unflatten(tree, held), x_SLD, labels_SL)

    def add(i: Array, so_far: Any) -> Any:
        total, sums, dx_SMD = so_far
        x_SLD, labels_SL = (_chunk_of(of, i, chunk) for of in (x_SMD, labels_SN))
        found, (grads, dx_SLD) = jax.value_and_grad(loss, argnums=(0, 1))(learned, x_SLD, labels_SL)
        sums = [of + grad.astype(jnp.float32) for of, grad in zip(sums, grads, strict=True)]
        dx_SMD = jax.lax.dynamic_update_slice_in_dim(dx_SMD, dx_SLD, i * chunk, axis=1)
        return total + found, sums, dx_SMD

    zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in learned]
    start = (jnp.zeros((), jnp.float32), zeros, jnp.zeros_like(x_SMD))
    total, sums, dx_SMD = _for_labelled(labels_SN, chunk, add, start)
    place_SN = jnp.argsort(order_SN, axis=1)
    dx_SND = jnp.take_along_axis(dx_SMD, place_SN[..., None], axis=1)
    grads = iter([grad.astype(leaf.dtype) for grad, leaf in zip(sums, learned, strict=True)])
    found = [next(grads) if leaf.perturbed else None for leaf in leaves]
    return total, (jax.tree.unflatten(tree, found), dx_SND)


def _scaled(_: LossOfTokens, __: int, gradients: Any, by: Array) -> tuple[Any, Array, None, None]:
    params, x_SND = jax.tree.map(lambda grad: (by * grad).astype(grad.dtype), gradients)
    return params, x_SND, None, None


_loss_in_chunks.defvjp(_with_gradients, _scaled, symbolic_zeros=True)


def _in_order(x_SND: Array, order_SN: Array, length: int) -> Array:
    x_SND = jnp.take_along_axis(x_SND, order_SN[..., None], axis=1)
    return jnp.pad(x_SND, ((0, 0), (0, length - x_SND.shape[1]), (0, 0)))


def _chunk_of(x: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _for_labelled(labels_SN: Array, chunk: int, add: Callable[..., Any], start: Any) -> Any:
    """Runs ``add(i, so_far)`` for the chunks that have labels, which stand first."""
    counts_S = (labels_SN != IGNORED_LABEL).sum(1)
    with at_most(labels_SN.shape[1] // chunk):
        return jax.lax.fori_loop(0, -(-counts_S.max() // chunk), add, start)

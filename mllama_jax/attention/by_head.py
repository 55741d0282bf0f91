"""Attention for CPUs: one head after the other, in blocks whose scores stay in the cache.

The backward pass computes a block's scores again, from the logarithms of the softmax's sums, and
keeps nothing else of the forward pass but its arguments and result: what FlashAttention does, see
https://arxiv.org/abs/2205.14135.
"""

from functools import partial
from typing import Any

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
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32) * H**-0.5
    q_PGTH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B * K, N // K, T, H)
    k_PSH, v_PSH = (
        x.transpose(0, 2, 1, 3).reshape(B * K, S, H).astype(jnp.float32) for x in (k_BSKH, v_BSKH)
    )
    factors, tree = jax.tree.flatten(mask)
    out_PGTH = _attend(tree, q_PGTH, k_PSH, v_PSH, factors)
    return out_PGTH.reshape(B, N, T, H).swapaxes(1, 2).astype(v_BSKH.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tree: jax.tree_util.PyTreeDef, q_PGTH: Array, k_PSH: Array, v_PSH: Array, factors: list[Array]
) -> Array:
    """P are the key/value heads of all samples; ``factors`` of the mask make ``tree``."""
    return _forward(tree, q_PGTH, k_PSH, v_PSH, factors)[0]


def _forward(
    tree: jax.tree_util.PyTreeDef, q_PGTH: Array, k_PSH: Array, v_PSH: Array, factors: list[Array]
) -> tuple[Array, tuple[Any, ...]]:
    mask = _MaskOfHeads(jax.tree.unflatten(tree, factors), len(k_PSH))
    blocks = _Blocks(q_PGTH, k_PSH)

    def block(i: Array) -> tuple[Array, Array]:
        start = blocks.start(i)
        q_PGIH, allowed = blocks.of(q_PGTH, start), mask.rows(start, blocks.size)

        def head(p: Array) -> tuple[Array, Array]:
            scores_GIS = mask.scores(q_PGIH[p], k_PSH[p], allowed, p)
            top_GI1 = scores_GIS.max(-1, keepdims=True)
            exponentials_GIS = jnp.exp(scores_GIS - top_GI1)
            total_GI1 = exponentials_GIS.sum(-1, keepdims=True)
            out_GIH = _rows(exponentials_GIS, v_PSH[p]) / total_GI1
            log_sum_GI = (top_GI1 + jnp.log(total_GI1))[..., 0]
            if allowed is not None:
                # Scores that are all the lowest are all the largest too.
                sees_I = mask.of_head(allowed, p).any(-1)
                out_GIH = jnp.where(sees_I[:, None], out_GIH, 0.0)
                log_sum_GI = jnp.where(sees_I, log_sum_GI, jnp.inf)
            return out_GIH, log_sum_GI

        found: tuple[Array, Array] = jax.lax.map(head, jnp.arange(len(k_PSH)))
        return found

    out_PGTH, log_sum_PGT = map(blocks.joined, jax.lax.map(block, jnp.arange(blocks.number)))
    return out_PGTH, (q_PGTH, k_PSH, v_PSH, factors, out_PGTH, log_sum_PGT)


def _backward(
    tree: jax.tree_util.PyTreeDef, kept: tuple[Any, ...], dout_PGTH: Array
) -> tuple[Array, Array, Array, None]:
    q_PGTH, k_PSH, v_PSH, factors, out_PGTH, log_sum_PGT = kept
    mask = _MaskOfHeads(jax.tree.unflatten(tree, factors), len(k_PSH))
    blocks = _Blocks(q_PGTH, k_PSH)

    def block(sums: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        start = blocks.start(i)
        allowed = mask.rows(start, blocks.size)
        q_PGIH, log_sum_PGI = blocks.of(q_PGTH, start), blocks.of(log_sum_PGT, start)
        # What was in the block before counts there.
        dout_PGIH = jnp.where(blocks.is_new(i)[:, None], blocks.of(dout_PGTH, start), 0.0)
        along_PGI = (dout_PGIH * blocks.of(out_PGTH, start)).sum(-1)

        def head(sums: tuple[Array, Array], p: Array) -> tuple[tuple[Array, Array], Array]:
            dk_PSH, dv_PSH = sums
            scores_GIS = mask.scores(q_PGIH[p], k_PSH[p], allowed, p)
            weights_GIS = jnp.exp(scores_GIS - log_sum_PGI[p][..., None])
            dweights_GIS = _rows(dout_PGIH[p], v_PSH[p].T)
            dscores_GIS = weights_GIS * (dweights_GIS - along_PGI[p][..., None])
            dv_PSH = dv_PSH.at[p].add(_columns(weights_GIS, dout_PGIH[p]))
            dk_PSH = dk_PSH.at[p].add(_columns(dscores_GIS, q_PGIH[p]))
            return (dk_PSH, dv_PSH), _rows(dscores_GIS, k_PSH[p])

        return jax.lax.scan(head, sums, jnp.arange(len(k_PSH)))

    zeros = (jnp.zeros_like(k_PSH), jnp.zeros_like(v_PSH))
    (dk_PSH, dv_PSH), dq = jax.lax.scan(block, zeros, jnp.arange(blocks.number))
    return blocks.joined(dq), dk_PSH, dv_PSH, None


_attend.defvjp(_forward, _backward)


class _Blocks:
    """Queries in blocks of one size, as even as they can be.

    The last one starts early enough to be full: it repeats rows of the one before.
    """

    def __init__(self, q_PGTH: Array, k_PSH: Array) -> None:
        _, G, self.length, _ = q_PGTH.shape
        most = min(max(_SCORES // (G * k_PSH.shape[1]), 16), self.length)
        self.number = -(-self.length // most)
        self.size = -(-self.length // self.number)

    def start(self, i: Array) -> Array:
        return jnp.minimum(i * self.size, self.length - self.size)

    def is_new(self, i: Array) -> Bool[Array, "I"]:
        """Which rows of a block are not in the one before."""
        return self.start(i) + jnp.arange(self.size) >= i * self.size

    def of(self, x_PGT: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x_PGT, start, self.size, axis=2)

    def joined(self, blocks: Array) -> Array:
        """(blocks, P, G, rows, …) to (P, G, T, …)."""
        whole = jnp.moveaxis(blocks[:-1], 0, 2)
        whole = whole.reshape(*whole.shape[:2], -1, *whole.shape[4:])
        rest = self.length - whole.shape[2]
        return jnp.concatenate([whole, blocks[-1][:, :, self.size - rest :]], axis=2)


class _MaskOfHeads:
    """A mask, or none, of which a head asks for its sample's."""

    def __init__(self, mask: Mask | None, heads: int) -> None:
        self._mask, self._heads = mask, heads
        self._bias_BS = None if mask is None else mask.bias()

    def rows(self, start: Array, size: int) -> Bool[Array, "#B I S"] | None:
        return None if self._mask is None else self._mask.rows(start, size)

    def of_head(self, x: Array, p: Array) -> Array:
        """Of one for each sample, or one for all."""
        return x[p // (self._heads // len(x))]

    def scores(
        self, q_GIH: Array, k_SH: Array, allowed: Bool[Array, "#B I S"] | None, p: Array
    ) -> Float[Array, "G I S"]:
        scores_GIS = _rows(q_GIH, k_SH.T)
        if self._bias_BS is not None:
            scores_GIS = scores_GIS + self.of_head(self._bias_BS, p)
        if allowed is None:
            return scores_GIS
        return jnp.where(self.of_head(allowed, p), scores_GIS, jnp.finfo(jnp.float32).min)


def _rows(x_GIX: Array, y_XY: Array) -> Array:
    """x @ y as one product."""
    return (x_GIX.reshape(-1, x_GIX.shape[-1]) @ y_XY).reshape(*x_GIX.shape[:2], -1)


def _columns(x_GIX: Array, y_GIY: Array) -> Array:
    """The sum over all rows of both, (X, Y), as one product."""
    return x_GIX.reshape(-1, x_GIX.shape[-1]).T @ y_GIY.reshape(-1, y_GIY.shape[-1])

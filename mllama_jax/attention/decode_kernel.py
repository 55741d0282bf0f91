"""One new token over a long cache, by a kernel for TPUs that reads the cache where it lies.

It takes the stack of all layers and the layer's index, so that no layer is copied out of it, and
reads no slot beyond those in use: a step costs what the text so far costs, not what the cache
could hold.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mllama_jax.shapes import Array

_BLOCK = 2048
"""Slots that are read at a time: two blocks of keys and of values lie in fast memory."""
_LANES = 128


def attend_kernel(
    K: int,
    scalars: tuple[Array, ...],
    q_BNH: Array,
    keys: Array,
    values: Array,
    allowed_B1S: Array,
    new: tuple[Array, Array] | None,
    *,
    interpret: bool,
) -> Array:
    """`mllama_jax.attention.decode.attend_decode` on one device.

    Args:
      K: key/value heads to attend to.
      scalars: (1,) the layer, (B,) slots in use, (1,) the first of these heads.
    """
    B, N, H = q_BNH.shape
    S = keys.shape[3]
    G = N // K
    q_BKGH = q_BNH.reshape(B, K, G, H)
    block = min(_BLOCK, S)

    def last(b: Array, j: Array, used: Any) -> Array:
        """Block j, or the last one in use: a block that stays the same is not read again."""
        return jnp.minimum(j, jnp.maximum((used[b] + block - 1) // block - 1, 0))

    def of_cache(b: Array, k: Array, j: Array, layer: Any, used: Any, head: Any) -> tuple[Any, ...]:
        return layer[0], b, head[0] + k, last(b, j, used), 0

    def of_mask(b: Array, _k: Array, j: Array, _layer: Any, used: Any, _head: Any) -> Any:
        return b, 0, last(b, j, used)

    def of_query(b: Array, k: Array, *_: Any) -> tuple[Any, ...]:
        return b, k, 0, 0

    def of_new(b: Array, k: Array, _j: Array, _layer: Any, _used: Any, head: Any) -> Any:
        return b, head[0] + k, 0, 0

    cache_block = pl.BlockSpec((1, 1, 1, block, H), of_cache)
    head_block = pl.BlockSpec((1, 1, G, H), of_query)
    token_block = pl.BlockSpec((1, 1, 1, H), of_new)
    news = () if new is None else new
    out = pl.pallas_call(
        partial(_kernel, block=block, num_slots=S, scale=H**-0.5, with_new=new is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, pl.cdiv(S, block)),
            in_specs=[
                head_block,
                cache_block,
                cache_block,
                pl.BlockSpec((1, 1, block), of_mask),
                *[token_block for _ in news],
            ],
            out_specs=head_block,
            scratch_shapes=[
                pltpu.VMEM((G, _LANES), jnp.float32),
                pltpu.VMEM((G, _LANES), jnp.float32),
                pltpu.VMEM((G, H), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BKGH.shape, values.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, q_BKGH, keys, values, allowed_B1S, *news)
    return out.reshape(B, N, H)


def _kernel(
    _layer: Any,
    used_ref: Any,
    _head: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    allowed_ref: Any,
    *rest: Any,
    block: int,
    num_slots: int,
    scale: float,
    with_new: bool,
) -> None:
    """One block of slots of one head: softmax so far, its sum and its product with the values."""
    *news, out_ref, top_ref, total_ref, product_ref = rest
    used, step = used_ref[pl.program_id(0)], pl.program_id(2)
    q_GH = q_ref[0, 0]
    lowest = jnp.finfo(jnp.float32).min

    @pl.when(step == 0)
    def start() -> None:
        if with_new:
            k_1H, v_1H = (ref[0, 0].astype(jnp.float32) for ref in news)
            scores = (q_GH.astype(jnp.float32) * k_1H).sum(-1, keepdims=True) * scale
            top_ref[...] = jnp.broadcast_to(scores, top_ref.shape)
            total_ref[...] = jnp.ones_like(total_ref)
            product_ref[...] = jnp.broadcast_to(v_1H, product_ref.shape)
        else:
            top_ref[...] = jnp.full_like(top_ref, lowest)
            total_ref[...] = jnp.zeros_like(total_ref)
            product_ref[...] = jnp.zeros_like(product_ref)

    @pl.when(step * block < used)
    def add() -> None:
        v_SH = v_ref[0, 0, 0]
        scores = jax.lax.dot_general(
            q_GH, k_ref[0, 0, 0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        first = step * block
        slots = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        allowed = (slots < used) & (allowed_ref[0] != 0)
        if num_slots % block:  # what stands behind the last slot may be anything, even NaN
            rows = first + jax.lax.broadcasted_iota(jnp.int32, v_SH.shape, 0)
            v_SH = jnp.where(rows < num_slots, v_SH, jnp.zeros_like(v_SH))
        scores = jnp.where(allowed, scores * scale, lowest)
        top = top_ref[:, :1]
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        exponentials = jnp.where(allowed, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total_ref[:, :1] * shrink + exponentials.sum(-1, keepdims=True)
        product = jax.lax.dot_general(
            exponentials.astype(v_SH.dtype),
            v_SH,
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        product_ref[...] = product_ref[...] * shrink + product
        top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @pl.when(step == pl.num_programs(2) - 1)
    def finish() -> None:
        total = total_ref[:, :1]
        out = product_ref[...] / jnp.where(total == 0, 1.0, total)
        out_ref[0, 0] = out.astype(out_ref.dtype)

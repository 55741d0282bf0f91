"""One new token over a long cache, read where it lies.

The stack of all layers is given with the layer's index, so that no layer need be copied out of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mllama_jax.attention import AttentionKind
from mllama_jax.attention.decode_rows import attend_rows
from mllama_jax.attention.on_mesh import check_platform, head_axes, shared_head
from mllama_jax.attention.step import attend_step
from mllama_jax.attention.xla import attend_batched
from mllama_jax.masks import TileMask
from mllama_jax.shapes import Array, Float, Int
from mllama_jax.sharding import partition_spec


def attend_decode(
    q_BNH: Float[Array, "B N H"],
    keys: Float[Array, "layers B K S H"],
    values: Float[Array, "layers B K S H"],
    layer: Int[Array, ""],
    allowed_B1S: Int[Array, "B 1 S"],
    used: Int[Array, ""] | Int[Array, "B"],
    new: tuple[Float[Array, "B K 1 H"], Float[Array, "B K 1 H"]] | None,
    kind: AttentionKind,
    mesh: Mesh | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one token a sample over a layer of the cache, and over the token itself.

    Args:
      keys, values: of all layers.
      layer: the one to read.
      allowed_B1S: int32, 0 for the slots that a sample's token may not attend to.
      used: slots in use, of all samples or of each; those from here on are not read.
      new: key and value of the token itself, which it always attends to; None if there are none
        (cross-attention).
      kind: of attention; ``splash`` is a kernel for TPUs, all others are plain operations.
      mesh: samples are split over data and fsdp, heads over tensor.

    Returns:
      In the values' dtype; zeros for samples that may attend to nothing.

    Raises:
      ValueError: the kind is not for these devices.
    """
    check_platform(kind, mesh)
    (B, N, _), K = q_BNH.shape, keys.shape[2]
    layer, head = (jnp.asarray(x, jnp.int32).reshape(1) for x in (layer, 0))
    used = jnp.broadcast_to(jnp.asarray(used, jnp.int32), (B,))
    scalars = (layer, used, head)
    kernel = _kernel(kind)
    if mesh is None:
        return kernel(K, scalars, q_BNH, keys, values, allowed_B1S, new)

    batch = partition_spec(("batch",), (B,), mesh)[0]
    heads, kv_heads = head_axes(N, K, mesh)

    def local(scalars: tuple[Array, ...], q: Array, keys: Array, *rest: Any) -> Array:
        if heads == kv_heads:
            return kernel(keys.shape[2], scalars, q, keys, *rest)
        return kernel(1, (*scalars[:2], shared_head(K, mesh).reshape(1)), q, keys, *rest)

    cache = PartitionSpec(None, batch, kv_heads)
    token = PartitionSpec(batch, kv_heads)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            (PartitionSpec(), PartitionSpec(batch), PartitionSpec()),
            PartitionSpec(batch, heads),
            *(cache, cache, PartitionSpec(batch)),
            None if new is None else (token, token),
        ),
        out_specs=PartitionSpec(batch, heads),
        check_vma=False,  # the kernel doesn't say over which axes its results vary
    )(scalars, q_BNH, keys, values, allowed_B1S, new)


def _kernel(kind: AttentionKind) -> Callable[..., Array]:
    if kind in ("splash", "splash_interpret"):  # imported here: only TPUs need the kernels
        from mllama_jax.attention.decode_kernel import attend_kernel

        return partial(attend_kernel, interpret=kind == "splash_interpret")
    return _attend_plain


def _attend_plain(K: int, *arguments: Any) -> Array:
    """Loops are what a CPU is good at; elsewhere it pays to look at all slots at once."""
    return jax.lax.platform_dependent(
        *arguments, cpu=partial(attend_rows, K), default=partial(_attend_layer, K)
    )


def _attend_layer(
    K: int,
    scalars: tuple[Array, ...],
    q_BNH: Array,
    keys: Array,
    values: Array,
    allowed_B1S: Array,
    new: tuple[Array, Array] | None,
) -> Array:
    (layer,), used_B, (head,) = scalars
    _, B, _, S, H = keys.shape
    k_BKSH, v_BKSH = (
        jax.lax.dynamic_slice(stack, (layer, 0, head, 0, 0), (1, B, K, S, H))[0]
        for stack in (keys, values)
    )
    q_B1NH, allowed = q_BNH[:, None], allowed_B1S != 0
    if new is None:
        k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
        return attend_batched(q_B1NH, k_BSKH, v_BSKH, TileMask(allowed, tokens_per_tile=1))[:, 0]
    k_B1KH, v_B1KH = (jax.lax.dynamic_slice_in_dim(x, head, K, axis=1).swapaxes(1, 2) for x in new)
    return attend_step(q_B1NH, k_BKSH, v_BKSH, k_B1KH, v_B1KH, allowed, used_B)[:, 0]

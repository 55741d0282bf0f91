"""Windows of one slot in the cache, on devices that may hold different slots."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mllama_jax.shapes import Array, Float, Int
from mllama_jax.sharding import partition_spec

__all__ = ["read_window", "write_window"]


def read_window(
    stack: Float[Array, "layers B K S H"],
    slot: Int[Array, ""],
    start: Int[Array, ""] | int,
    size: int,
    mesh: Mesh | None,
) -> Float[Array, "layers 1 K size H"]:
    """``size`` tokens of one slot; on a mesh all devices that share its heads get them."""
    batch, heads = _axes(stack, mesh)
    if batch is None:
        return _read(stack, slot, start, size)

    def local(stack: Array, slot: Array, start: Array) -> Array:
        own, is_own = _own_slot(stack, slot, batch)
        window = _read(stack, own, start, size)
        return jax.lax.psum(jnp.where(is_own, window, 0), batch)

    assert mesh is not None
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(None, batch, heads), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, None, heads),
    )(stack, slot, jnp.asarray(start, jnp.int32))


def write_window(
    stack: Float[Array, "layers B K S H"],
    window: Float[Array, "layers 1 K size H"],
    slot: Int[Array, ""],
    start: Int[Array, ""] | int,
    mesh: Mesh | None,
) -> Float[Array, "layers B K S H"]:
    """The stack with other tokens in one slot; the stack's memory is reused."""
    window = window.astype(stack.dtype)
    batch, heads = _axes(stack, mesh)
    if batch is None:
        return jax.lax.dynamic_update_slice(stack, window, (0, slot, 0, start, 0))

    def local(stack: Array, window: Array, slot: Array, start: Array) -> Array:
        own, is_own = _own_slot(stack, slot, batch)
        kept = _read(stack, own, start, window.shape[3])
        window = jnp.where(is_own, window, kept)
        return jax.lax.dynamic_update_slice(stack, window, (0, own, 0, start, 0))

    assert mesh is not None
    split = PartitionSpec(None, batch, heads)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, PartitionSpec(None, None, heads), PartitionSpec(), PartitionSpec()),
        out_specs=split,
    )(stack, window, slot, jnp.asarray(start, jnp.int32))


def _axes(stack: Array, mesh: Mesh | None) -> tuple[tuple[str, ...] | str | None, ...]:
    """The mesh axes that slots and heads are split over."""
    if mesh is None:
        return None, None
    spec = partition_spec(("batch", "kv_heads"), stack.shape[1:3], mesh)
    return spec[0], spec[1]


def _read(stack: Array, slot: Array, start: Array | int, size: int) -> Array:
    layers, _, K, _, H = stack.shape
    return jax.lax.dynamic_slice(stack, (0, slot, 0, start, 0), (layers, 1, K, size, H))


def _own_slot(stack: Array, slot: Array, batch: tuple[str, ...] | str) -> tuple[Array, Array]:
    """The slot as this device counts its own ones, and whether it is one of them."""
    own = slot - jax.lax.axis_index(batch) * stack.shape[1]
    return jnp.clip(own, 0, stack.shape[1] - 1), (own >= 0) & (own < stack.shape[1])

"""Where a kernel runs: on a mesh, each device computes its own samples and heads."""

from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

from mllama_jax.masks import Mask
from mllama_jax.shapes import Array, Float
from mllama_jax.sharding import partition_spec

Kernel = Callable[[Array, Array, Array, Mask | None], Array]


def on_mesh(
    kernel: Kernel,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
    mesh: Mesh,
) -> Float[Array, "B T N H"]:
    """Runs ``kernel(q, k, v, mask)`` with samples split over data and fsdp, heads over tensor.

    With fewer key/value heads than devices along tensor, each device takes the one that its query
    heads share. What a mesh does not divide is computed by all its devices.
    """
    (B, _, N, _), K = q_BTNH.shape, k_BSKH.shape[2]
    batch = partition_spec(("batch",), (B,), mesh)[0]
    heads, kv_heads = head_axes(N, K, mesh)

    def local(q: Array, k: Array, v: Array, mask: Mask | None) -> Array:
        if heads != kv_heads:
            head = shared_head(K, mesh)
            k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
        return kernel(q, k, v, mask)

    def spec(factor: Array) -> PartitionSpec:
        """Factors of masks have samples first, or are vectors that all samples share."""
        return PartitionSpec(batch if factor.ndim > 1 and factor.shape[0] == B else None)

    q_spec = PartitionSpec(batch, None, heads, None)
    kv_spec = PartitionSpec(batch, None, kv_heads, None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, jax.tree.map(spec, mask)),
        out_specs=q_spec,
        check_vma=False,  # the kernels don't say over which axes their results vary
    )(q_BTNH, k_BSKH, v_BSKH, mask)


def head_axes(num_heads: int, num_kv_heads: int, mesh: Mesh) -> tuple[str | None, str | None]:
    """The mesh axes that query heads and key/value heads are split over, None for whole ones."""
    parts = mesh.shape.get("tensor", 1)
    fewer = parts % num_kv_heads == 0
    if parts == 1 or num_heads % parts or (num_kv_heads % parts and not fewer):
        return None, None
    return "tensor", "tensor" if num_kv_heads % parts == 0 else None


def shared_head(num_kv_heads: int, mesh: Mesh) -> Array:
    """Inside `jax.shard_map`, with fewer key/value heads than devices along tensor: the one that
    this device's query heads share."""
    return jax.lax.axis_index("tensor") // (mesh.shape["tensor"] // num_kv_heads)


_PLATFORMS: Mapping[str, Sequence[str]] = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}
"""Kinds of attention that run on some devices only."""


def check_platform(kind: str, mesh: Mesh | None) -> None:
    """Raises ValueError unless the devices that the kind will run on are of its platforms.

    They are the mesh's, which need not be here: programs for TPUs are compiled without one.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    platforms = _PLATFORMS.get(kind, (platform,))
    if platform not in platforms:
        raise ValueError(
            f"attention={kind!r} runs on {platforms[0]}, the device is a {platform}: choose "
            "'splash' for TPUs, 'cudnn' for NVIDIA GPUs, 'xla' for any device"
        )

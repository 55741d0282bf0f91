"""Scaled dot-product attention with grouped heads, in named kinds that give the same result.

================ ===========================================================================
reference        scores, softmax and product at full size
xla              blocks of queries, so that no more than a block of scores exists at a time
cudnn            fused kernels for NVIDIA GPUs (bfloat16 and float16)
splash           fused kernels for TPUs
splash_interpret splash's kernels operation by operation, on any device: slow, for tests
================ ===========================================================================

Every kind but ``reference`` computes calls of fewer than `FEWEST_QUERIES` queries as ``xla`` does:
a fused kernel has nothing to gain there. Decoding reads the cache where it lies: one token after
the other by `decode`, with ``splash`` in a kernel of its own, and a few at once by `step`.

A query that may attend to nothing gets exact zeros.
"""

from typing import Literal, get_args

from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mllama_jax.attention.names import ATTENTION_RESULT
from mllama_jax.attention.on_mesh import check_platform
from mllama_jax.attention.reference import attend_with_weights
from mllama_jax.attention.xla import attend_xla
from mllama_jax.masks import Mask
from mllama_jax.shapes import Array, Float

AttentionKind = Literal["reference", "xla", "cudnn", "splash", "splash_interpret"]
ATTENTION_KINDS: tuple[str, ...] = get_args(AttentionKind)
FEWEST_QUERIES = 128

__all__ = [
    "ATTENTION_KINDS",
    "ATTENTION_RESULT",
    "FEWEST_QUERIES",
    "AttentionKind",
    "attend",
    "attend_with_weights",
    "check_attention_devices",
    "check_attention_kind",
]


def check_attention_kind(kind: str) -> None:
    """Raises ValueError unless ``kind`` names an implementation."""
    if kind not in ATTENTION_KINDS:
        raise ValueError(f"attention={kind!r}: expected one of {', '.join(ATTENTION_KINDS)}")


def check_attention_devices(kind: str, dtype: DTypeLike, mesh: Mesh | None) -> None:
    """Raises ValueError unless ``kind`` computes in this dtype on these devices.

    Args:
      mesh: as for `attend`.
    """
    check_attention_kind(kind)
    check_platform(kind, mesh)
    if kind == "cudnn":
        from mllama_jax.attention.cudnn import check_dtype

        check_dtype(dtype)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
    kind: AttentionKind,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of each query over the keys that its mask allows (all of them without a mask).

    Consecutive groups of ``N // K`` query heads share a key/value head. Scores and softmax are
    float32, the result has the values' dtype. What the backward pass needs of it is marked with
    the name `ATTENTION_RESULT` for rematerialisation.

    Args:
      mesh: what the computation is split over: samples over data and fsdp, heads over tensor.

    Raises:
      ValueError: the kind is unknown, is not for these devices, or can't take the mask or dtype.
    """
    check_attention_kind(kind)
    if kind == "reference":
        out = attend_with_weights(q_BTNH, k_BSKH, v_BSKH, mask)[0]
    elif kind == "xla" or q_BTNH.shape[1] < FEWEST_QUERIES:
        out = attend_xla(q_BTNH, k_BSKH, v_BSKH, mask, mesh)
    elif kind == "cudnn":
        from mllama_jax.attention.cudnn import attend_cudnn

        out = attend_cudnn(q_BTNH, k_BSKH, v_BSKH, mask, mesh)
    else:  # imported here: only TPUs need the kernels
        from mllama_jax.attention.splash import attend_splash

        interpret = kind == "splash_interpret"
        return attend_splash(q_BTNH, k_BSKH, v_BSKH, mask, mesh, interpret=interpret)
    return checkpoint_name(out, ATTENTION_RESULT)

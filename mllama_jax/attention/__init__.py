"""Scaled dot-product attention with grouped heads, in named kinds that give the same result.

========== =============================================================================
reference  scores, softmax and product at full size; also returns the weights
xla        blocks of queries, so that no more than a block of scores exists at a time
========== =============================================================================

A query that may attend to nothing gets exact zeros.
"""

from typing import Literal, get_args

from jax.sharding import Mesh

from mllama_jax.attention.reference import attend_with_weights
from mllama_jax.attention.xla import attend_xla
from mllama_jax.masks import Mask
from mllama_jax.shapes import Array, Float

AttentionKind = Literal["reference", "xla"]
ATTENTION_KINDS: tuple[str, ...] = get_args(AttentionKind)

__all__ = [
    "ATTENTION_KINDS",
    "AttentionKind",
    "attend",
    "attend_with_weights",
    "check_attention_kind",
]


def check_attention_kind(kind: str) -> None:
    """Raises ValueError unless ``kind`` names an implementation."""
    if kind not in ATTENTION_KINDS:
        raise ValueError(f"attention={kind!r}: expected one of {', '.join(ATTENTION_KINDS)}")


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
    float32, the result has the values' dtype.
    """
    if kind == "reference":
        return attend_with_weights(q_BTNH, k_BSKH, v_BSKH, mask)[0]
    check_attention_kind(kind)
    return attend_xla(q_BTNH, k_BSKH, v_BSKH, mask)

"""What the splash kernels compute, counted: a compiler sees a call of theirs as a black box."""

import math
from dataclasses import dataclass

from mllama_jax.attention.blocks import choose_blocks

_LANES = 128


@dataclass(frozen=True)
class KernelCost:
    """The work of one call's kernels, with padding and all that is computed twice.

    Attributes:
      flops: of matrix products, multiplications and additions.
      exponentials: of the softmax; each comes with about ten other operations on vectors.
      bytes: that it waits for, of a kernel that does little but read.
    """

    flops: float
    exponentials: float
    bytes: float = 0.0


def splash_cost(
    batch: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    *,
    backward: bool,
    causal: bool = False,
    padding_pairs: bool = False,
    tokens_per_tile: int | None = None,
    itemsize: int = 2,
) -> KernelCost:
    """The cost of `mllama_jax.attention.splash.attend_splash`.

    Each score takes two products forward (with keys and values) and five backward: scores once
    more and four gradients; seven where the queries' gradient has its own kernel. Keys and values
    are as wide as the registers' 128 lanes at least.

    Args:
      num_heads: of the queries; key/value heads make no difference.
      backward: forward and backward pass, not the forward pass alone.
      causal: queries and keys start in the same slot (`CausalMask`).
      padding_pairs: a `PaddingPairMask`, which takes two features of queries and keys.
      tokens_per_tile: of a `TileMask`, all of whose tiles are counted as used.
      itemsize: bytes of a number.
    """
    blocks = choose_blocks(
        num_queries, num_keys, itemsize, causal=causal, keys_skipped_together=tokens_per_tile
    )
    rows = range(blocks.queries, blocks.num_queries + 1, blocks.queries)
    num_columns = blocks.num_keys // blocks.keys
    computed = sum(
        min(math.ceil(end / blocks.keys), num_columns) if causal else num_columns for end in rows
    )
    scores = batch * num_heads * computed * blocks.queries * blocks.keys
    keys, values = _up(head_dim + (2 if padding_pairs else 0)), _up(head_dim)
    products, exponentials = keys + values, 1
    if backward:
        products += 3 * keys + 2 * values
        exponentials += 1
        if not blocks.fused_backward:
            products += keys + values
            exponentials += 1
    return KernelCost(2.0 * scores * products, float(scores * exponentials))


def _up(head_dim: int) -> int:
    return math.ceil(head_dim / _LANES) * _LANES

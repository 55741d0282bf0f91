"""How the splash kernels cut queries and keys into blocks.

A kernel computes one block of queries against one block of keys at a time. Larger blocks spend
fewer cycles a score; they fit the length worse, skip less, and have to fit the fast memory.
"""

import math
from dataclasses import dataclass

from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes

# Blocks are multiples of a vector register's lanes.
_LANES = 128
_MOST_QUERIES = 640
_MOST_KEYS = {2: 3328, 4: 1664}  # by bytes a number
_MOST_KEYS_AT_ONCE = 2176
# Cycles a score are as 1 + this / block: fits the compiler's schedules for v5e, v5p and v6e.
_OVERHEAD = 150
# One backward kernel does all, but holds a gradient of the queries for each block of keys. Beyond
# this many, a second kernel that computes scores once more is better than the memory.
_MOST_PARTIAL_GRADIENTS = 4


@dataclass(frozen=True)
class Blocks:
    """Padded lengths and block sizes of one call.

    Attributes:
      num_queries, num_keys: lengths with padding, multiples of the blocks.
      queries, keys: the size of a block.
      keys_at_once: what a block of keys is computed in; divides it.
      fused_backward: one backward kernel for all gradients, not a second one for the queries'.
    """

    num_queries: int
    num_keys: int
    queries: int
    keys: int
    keys_at_once: int
    fused_backward: bool

    def sizes(self) -> BlockSizes:
        """As the kernels want them; the same for all kernels."""
        return BlockSizes(
            block_q=self.queries,
            block_kv=self.keys,
            block_kv_compute=self.keys_at_once,
            block_q_dkv=self.queries,
            block_kv_dkv=self.keys,
            block_kv_dkv_compute=self.keys_at_once,
            block_q_dq=None if self.fused_backward else self.queries,
            block_kv_dq=None if self.fused_backward else self.keys,
            use_fused_bwd_kernel=self.fused_backward,
        )


def choose_blocks(
    num_queries: int,
    num_keys: int,
    itemsize: int,
    *,
    causal: bool = False,
    keys_skipped_together: int | None = None,
) -> Blocks:
    """The blocks with the fewest cycles, by an estimate.

    Args:
      itemsize: bytes of one number of the queries.
      causal: about half of the scores need not be computed.
      keys_skipped_together: keys that a mask allows or forbids together; blocks are no larger.
    """
    most = _MOST_KEYS[max(itemsize, 2)]
    fused = num_keys <= _MOST_PARTIAL_GRADIENTS * most
    least = math.ceil(num_keys / _MOST_PARTIAL_GRADIENTS) if fused else 1
    if keys_skipped_together is not None:
        most = min(most, _up(max(keys_skipped_together, least), _LANES))
    sizes = [size for size in range(_LANES, most + 1, _LANES) if size >= least]
    keys = min(
        (size for size in sizes if _at_once(size) <= _MOST_KEYS_AT_ONCE),
        key=lambda size: _cycles(num_keys, size, causal),
    )
    queries = min(
        range(_LANES, _MOST_QUERIES + 1, _LANES), key=lambda size: _cycles(num_queries, size)
    )
    return Blocks(
        num_queries=_up(num_queries, queries),
        num_keys=_up(num_keys, keys),
        queries=queries,
        keys=keys,
        keys_at_once=_at_once(keys),
        fused_backward=fused,
    )


def _cycles(length: int, block: int, causal: bool = False) -> float:
    """Up to a factor. Of causal scores the blocks on the diagonal are computed in full."""
    padded = _up(length, block)
    computed = (padded + block) / 2 if causal else padded
    return computed * (1 + _OVERHEAD / block)


def _at_once(keys: int) -> int:
    """Halves overlap: one's products with the other's exponentials."""
    halves = keys >= 1024 and keys % (2 * _LANES) == 0
    return keys // 2 if halves else keys


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple

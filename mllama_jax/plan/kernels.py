"""The work of the attention kernels in a compiled program, from the arrays that they are given."""

import math

from mllama_jax.attention.costs import KernelCost
from mllama_jax.plan.hlo import KernelCall
from mllama_jax.plan.hlo_text import num_bytes

_LANES = 128
_DECODE_ROWS = 8  # a group's query heads fill up a tile of registers
_FLOATS = ("bf16", "f16", "f32")

Shape = tuple[int, ...]


def kernel_cost(call: KernelCall) -> KernelCost | None:
    """One call's matrix products and exponentials; None of a kernel that is not attention's.

    Every score takes two products forward, and five backward where one kernel makes all gradients.
    Keys and values are as wide as the registers' lanes at least. Blocks beyond the causal diagonal
    are skipped; all tiles of pictures are counted as used.
    """
    if call.name == "decode_attention":
        return _decode(call)
    floats = [shape for dtype, shape in call.operands if dtype in _FLOATS and len(shape) > 2]
    if len(floats) < 3 or not _is_attention(*floats[:3]):
        return None
    q, k, v = floats[:3]
    scores = math.prod(q[:-1]) * k[-2] * _computed(call)
    keys, values = _wide(k), _wide(v)
    if len(floats) == 3:
        products = keys + values
    else:
        # Each kernel computes scores and the weights' gradients. Its own results are dk and dv, or
        # dq, or all three; the others are scratch.
        gradients = sum(dtype in _FLOATS and len(shape) >= len(q) for dtype, shape in call.results)
        products = keys + values + (keys + values) * (gradients > 1) + keys * (gradients != 2)
    return KernelCost(2.0 * scores * products, float(scores))


def _is_attention(q: Shape, k: Shape, v: Shape) -> bool:
    return len(q) == len(k) == len(v) and q[-1] == k[-1] and k[:-1] == v[:-1]


def _decode(call: KernelCall) -> KernelCost:
    """Of one token a sample, over all slots of its cache: one layer of those that are given."""
    q = next(shape for dtype, shape in call.operands if dtype in _FLOATS and len(shape) == 4)
    caches = [(dtype, shape) for dtype, shape in call.operands if len(shape) == 5]
    samples, heads, _, head_dim = q
    scores = samples * heads * _DECODE_ROWS * caches[0][1][-2]
    read = sum(num_bytes(dtype, shape) / shape[0] for dtype, shape in caches)
    return KernelCost(2.0 * scores * 2 * head_dim, float(scores), read)


def _computed(call: KernelCall) -> float:
    """The part of all blocks of scores that is computed."""
    if "segmented" not in call.name:
        return 1.0
    grid = next(shape for dtype, shape in call.operands if dtype == "s32" and len(shape) == 3)
    rows, columns = grid[1:]
    shapes = [shape for dtype, shape in call.operands if dtype in _FLOATS]
    queries, keys = shapes[0][-2] // rows, shapes[1][-2] // columns
    reached = (math.ceil((row + 1) * queries / keys) for row in range(rows))
    return sum(min(number, columns) for number in reached) / (rows * columns)


def _wide(shape: Shape) -> int:
    return math.ceil(shape[-1] / _LANES) * _LANES

"""The work of kernels, told from a program's arrays, next to the formula of attention itself."""

import pytest

from mllama_jax.attention.blocks import choose_blocks
from mllama_jax.attention.costs import splash_cost
from mllama_jax.plan.hlo import KernelCall
from mllama_jax.plan.kernels import kernel_cost

BATCH, HEADS, KV_HEADS = 3, 8, 2
SHAPES = {
    # queries, keys, head dim, what splash_cost and choose_blocks are told
    "self-attention": (2048, 2048, 128, {"causal": True}),
    "vision": (6432, 6432, 80, {"padding_pairs": True}),
    "cross-attention": (2048, 6404, 128, {"tokens_per_tile": 1601}),
    "several images": (2048, 5 * 6404, 128, {"tokens_per_tile": 1601}),  # two backward kernels
}


def call(name, blocks, width, value_width, gradients):
    """A call with the arrays that the compiled kernels of `attend_splash` have."""
    q = (BATCH, HEADS, blocks.num_queries, width)
    k = (BATCH, KV_HEADS, blocks.num_keys, width)
    v = (*k[:-1], value_width)
    grid = (1, blocks.num_queries // blocks.queries, blocks.num_keys // blocks.keys)
    operands = [("s32", grid), ("s32", grid), ("bf16", q), ("bf16", k), ("bf16", v)]
    scratch = [("f32", (BATCH, blocks.queries, 128))] * 3
    results = {
        "": [("bf16", (*q[:-1], value_width)), ("f32", (*q[:-1], 128))],
        "dq": [("bf16", q)],
        "dkv": [("bf16", k), ("bf16", v)],
        "all": [("bf16", (BATCH, grid[2], *q[1:])), ("bf16", k), ("bf16", v)],
    }[gradients]
    if gradients:
        sums = ("f32", (BATCH, HEADS, 8, blocks.num_queries))
        operands += [sums, ("bf16", (*q[:-1], value_width)), sums]
    return KernelCall(name, "part", "forward", tuple(operands), (*scratch, *results), 1.0, False)


@pytest.mark.parametrize("kind", SHAPES)
def test_kernels_do_what_attention_asks_for(kind):
    queries, keys, head_dim, options = SHAPES[kind]
    blocks = choose_blocks(
        *(queries, keys, 2),
        causal=options.get("causal", False),
        keys_skipped_together=options.get("tokens_per_tile"),
    )
    assert blocks.fused_backward == (kind != "several images")
    name = "splash_mha_segmented" if kind == "self-attention" else "closed_call"
    width = head_dim + 2 if "padding_pairs" in options else head_dim
    expected = [
        splash_cost(BATCH, queries, keys, HEADS, head_dim, backward=backward, **options)
        for backward in (False, True)
    ]
    forward = kernel_cost(call(name, blocks, width, head_dim, ""))
    assert forward is not None
    assert (forward.flops, forward.exponentials) == pytest.approx(
        (expected[0].flops, expected[0].exponentials)
    )
    kinds = ["all"] if blocks.fused_backward else ["dkv", "dq"]
    costs = [kernel_cost(call(name, blocks, width, head_dim, kind)) for kind in kinds]
    both = [forward, *(cost for cost in costs if cost is not None)]
    assert sum(cost.flops for cost in both) == pytest.approx(expected[1].flops)
    assert sum(cost.exponentials for cost in both) == pytest.approx(expected[1].exponentials)


def test_decoding_waits_for_one_layer_of_the_cache():
    cache = ("bf16", (32, 16, 1, 4096, 128))
    q = ("bf16", (16, 1, 4, 128))
    cost = kernel_cost(
        KernelCall("decode_attention", "part", "forward", (q, cache, cache), (q,), 32.0, True)
    )
    assert cost is not None
    assert cost.bytes == 2 * 16 * 4096 * 128 * 2


def test_a_kernel_that_is_not_attention_is_not_costed():
    array = ("bf16", (8, 128, 128))
    assert kernel_cost(KernelCall("ragged", "", "forward", (array,), (array,), 1.0, False)) is None

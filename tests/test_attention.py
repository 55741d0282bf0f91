"""Masks against literal matrices; the kinds of attention against the textbook and each other."""

from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from mllama_jax.attention import attend, attend_with_weights, check_attention_kind
from mllama_jax.attention.by_head import attend_by_head
from mllama_jax.attention.xla import attend_batched
from mllama_jax.masks import CausalMask, PaddingPairMask, TileMask

RANDOM = np.random.default_rng(0)
WAYS = {
    "reference": partial(attend, kind="reference"),
    # What the kind "xla" is on a CPU, and what it is elsewhere.
    "by head": attend_by_head,
    "batched": attend_batched,
}


def matrix(text: str) -> np.ndarray:
    """Lines of 1 and 0, blank lines between samples."""
    return np.array(
        [[[c == "1" for c in row] for row in block.split()] for block in text.split("\n\n")]
    )


def test_causal_mask():
    mask = CausalMask(jnp.arange(4), jnp.asarray([[1, 1, 1, 1], [0, 0, 1, 1]], bool))
    expected = matrix("1000 1100 1110 1111\n\n0000 0000 0010 0011")
    np.testing.assert_array_equal(mask.rows(0, 4), expected)
    np.testing.assert_array_equal(mask.rows(1, 2), expected[:, 1:3])


def test_causal_mask_of_a_cache():
    """Two new tokens in slots 2 and 3 of five; slot 1 of the second sample is padding."""
    mask = CausalMask(jnp.array([2, 3]), jnp.asarray([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]], bool))
    np.testing.assert_array_equal(mask.rows(0, 2), matrix("11100 11110\n\n10100 10110"))


def test_tile_mask():
    mask = TileMask(jnp.asarray([[[0, 0, 0], [1, 1, 0], [0, 0, 1]]], bool), tokens_per_tile=2)
    expected = matrix("000000 111100 000011")
    np.testing.assert_array_equal(mask.rows(0, 3), expected)
    np.testing.assert_array_equal(mask.rows(1, 2), expected[:, 1:])


def test_padding_pair_mask():
    """Only padding is hidden, and only from padding."""
    mask = PaddingPairMask(jnp.asarray([[0, 1, 0, 1], [0, 0, 0, 1]], bool))
    expected = matrix("1111 1010 1111 1010\n\n1111 1111 1111 1110")
    np.testing.assert_array_equal(mask.rows(0, 4), expected)
    np.testing.assert_array_equal(mask.rows(2, 2), expected[:, 2:])


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def textbook(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """One query, head and sample at a time."""
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        keys = np.flatnonzero(allowed[b, t])
        if len(keys) == 0:
            continue
        kv_head = n // (N // k.shape[2])
        scores = k[b, keys, kv_head] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, kv_head] / weights.sum()
    return out


@pytest.mark.parametrize("way", WAYS)
def test_grouped_attention_by_the_textbook(way: str):
    q, k, v = 3 * normal(2, 5, 6, 4), normal(2, 7, 3, 4), normal(2, 7, 3, 4)
    tiles = jnp.asarray(RANDOM.random((2, 5, 7)) < 0.6).at[1, 2].set(False)
    out = WAYS[way](q, k, v, TileMask(tiles, 1))
    expected = textbook(*map(np.asarray, (q, k, v, tiles)))
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_array_equal(out[1, 2], 0)
    unmasked = textbook(*map(np.asarray, (q, k, v)), np.ones((2, 5, 7), bool))
    np.testing.assert_allclose(WAYS[way](q, k, v, None), unmasked, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_key_that_counts_as_many(way: str):
    q, k, v = normal(2, 4, 2, 4), normal(2, 4, 2, 4), normal(2, 4, 2, 4)
    padding = jnp.asarray([[0, 1, 0, 1], [0, 0, 1, 0]], bool)
    mask = PaddingPairMask(padding, jnp.asarray([[1, 1, 1, 3], [1, 2, 1, 1]], jnp.float32))
    out = WAYS[way](q, k, v, mask)
    for b, keys in enumerate(([0, 1, 2, 3, 3, 3], [0, 1, 1, 2, 3])):
        allowed = np.asarray(mask.rows(0, 4))[b : b + 1][:, :, keys]
        repeated = (np.asarray(x)[b : b + 1][:, keys] for x in (k, v))
        expected = textbook(np.asarray(q)[b : b + 1], *repeated, allowed)
        np.testing.assert_allclose(out[b : b + 1], expected, atol=1e-6)


def test_weights():
    q, k, v = normal(1, 3, 4, 2), normal(1, 3, 2, 2), normal(1, 3, 2, 2)
    mask = CausalMask(jnp.arange(3), jnp.asarray([[False, True, True]]))
    out, weights = attend_with_weights(q, k, v, mask)
    assert weights.shape == (1, 4, 3, 3)
    np.testing.assert_allclose(weights.sum(-1), np.broadcast_to([0, 1, 1], (1, 4, 3)), atol=1e-6)
    np.testing.assert_array_equal(weights[:, :, :, 0], 0)
    np.testing.assert_array_equal(weights[:, :, 1, 2], 0)
    by_weights = jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(out, by_weights, atol=1e-6)


def _masks(B: int, T: int, S: int) -> dict[str, Any]:
    """Each kind, with queries that see nothing wherever the kind allows it."""
    valid = jnp.asarray(RANDOM.random((B, S)) < 0.7).at[0, :2].set(False)
    tiles = jnp.asarray(RANDOM.random((B, T, S // 2)) < 0.5).at[:, :3].set(False)
    return {
        "causal": CausalMask(jnp.arange(T) * S // T, valid),
        "tiles": TileMask(tiles, 2),
        "none": None,
    }


# Whole blocks of queries, and one that repeats rows of the block before.
@pytest.mark.parametrize("T", [1024, 1030])
def test_kinds_agree_on_long_inputs(T: int):
    B, N, K, H, S = 2, 4, 2, 6, 300
    q, k, v = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)
    masks = _masks(B, T, S)
    weights = normal(B, T, N, H)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        def weighted(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, way: Any) -> Any:
            out = WAYS[way](q, k, v, mask)
            return (out * weights).sum(), out

        return {
            (name, way): jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(q, k, v, mask, way)
            for name, mask in masks.items()
            for way in WAYS
        }

    results = run(q, k, v)
    for (name, way), ((_, out), gradients) in results.items():
        mask = masks[name]
        (_, expected), expected_gradients = results[name, "reference"]
        np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=f"{name} {way}")
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            scale = np.abs(other).max()
            np.testing.assert_allclose(gradient, other, atol=1e-5 * scale, err_msg=f"{name} {way}")
        if mask is not None:
            blind = ~np.asarray(mask.rows(0, T)).any(-1)
            assert blind.any()
            np.testing.assert_array_equal(out[blind], 0)
            np.testing.assert_array_equal(gradients[0][blind], 0)


def test_vision_mask_on_long_inputs():
    B, E, N, H = 2, 600, 2, 4
    q, k, v = normal(B, E, N, H), normal(B, E, N, H), normal(B, E, N, H)
    mask = PaddingPairMask(jnp.asarray(RANDOM.random((B, E)) < 0.4))
    expected = WAYS["reference"](q, k, v, mask)
    for way in ("by head", "batched"):
        np.testing.assert_allclose(WAYS[way](q, k, v, mask), expected, atol=1e-5, err_msg=way)


def test_a_cpu_attends_by_head_and_accelerators_do_not():
    q = normal(1, 600, 2, 4)

    def lowered(attend: Any, platform: str) -> str:
        return attend.trace(q).lower(lowering_platforms=(platform,)).as_text()

    chosen = jax.jit(lambda q: attend(q, q, q, None, "xla"))
    # Two blocks of 300 queries, one head at a time; two of 320, all heads.
    products = {"cpu": "tensor<300x600xf32>", "cuda": "x320x600xf32>"}
    for platform, product in products.items():
        text = lowered(chosen, platform)
        assert [other in text for other in products.values()].count(True) == 1
        assert product in text
    np.testing.assert_array_equal(chosen(q), jax.jit(attend_by_head)(q, q, q, None))


@pytest.mark.parametrize("way", WAYS)
def test_large_scores(way: str):
    """Scores far beyond what ``exp`` can hold."""
    q = jnp.full((1, 1, 1, 2), 1e3)
    k = jnp.asarray([[[[1e3, 0.0]], [[-1e3, 0.0]]]])
    v = jnp.asarray([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    np.testing.assert_allclose(WAYS[way](q, k, v, None)[0, 0, 0], [1, 2])


@pytest.mark.parametrize("way", WAYS)
def test_scores_of_low_precision_inputs_are_float32(way: str):
    """256 and 257 are the same number in bfloat16, but not the same score."""
    q = jnp.asarray([[[[16.0, 1.0]]]], jnp.bfloat16)
    k = jnp.asarray([[[[16.0, 0.0]], [[16.0, 1.0]]]], jnp.bfloat16)
    v = jnp.asarray([[[[0.0, 0.0]], [[1.0, 1.0]]]], jnp.bfloat16)
    out = WAYS[way](q, k, v, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), 1 / (1 + np.exp(-(2**-0.5))), rtol=0.01)


def test_no_full_size_scores():
    """Never more than a block of scores is held; in the backward pass neither."""

    def largest(way: str) -> int:
        def total(q: jax.Array) -> jax.Array:
            return WAYS[way](q, k, k, mask).sum()

        sizes: list[int] = []

        def visit(jaxpr: Any) -> None:
            for equation in jaxpr.eqns:
                sizes.extend(out.aval.size for out in equation.outvars)
                for inner in jax.extend.core.jaxprs_in_params(equation.params):
                    visit(inner)

        visit(jax.make_jaxpr(jax.grad(total))(q).jaxpr)
        return max(sizes)

    T = 2048
    q, k = normal(1, T, 2, 2), normal(1, T, 1, 2)
    mask = CausalMask(jnp.arange(T), jnp.ones((1, T), bool))
    assert largest("reference") >= 2 * T * T
    assert largest("batched") <= 2 * 512 * T
    assert largest("by head") <= 2 * 512 * T


def test_kind_must_be_known():
    check_attention_kind("xla")
    with pytest.raises(ValueError, match="attention='flash': expected one of reference, xla"):
        check_attention_kind("flash")

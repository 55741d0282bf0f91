"""Calls of `attend` in which every mask has its difficulties, and how to compare two ways."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllama_jax.attention import attend
from mllama_jax.masks import CausalMask, Mask, PaddingPairMask, TileMask

Attend = Callable[[Any, Any, Any, Mask | None], Any]


class Case(NamedTuple):
    """Shapes of a call, and its mask; ``blind`` queries may attend to nothing."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    mask: Mask | None
    has_blind: bool = False


def make_cases(seed: int = 0, images: int = 3, tiles_an_image: int = 2) -> dict[str, Case]:
    random = np.random.default_rng(seed)
    B, N, K, H = 2, 4, 2, 16
    T, S = (int(random.integers(*limits)) for limits in ((130, 250), (300, 500)))
    valid = random.random((B, S)) < 0.7
    valid[0, :3] = False
    segments = jnp.asarray(np.sort(random.integers(0, 4, (B, T)), 1), jnp.int32)
    M, L, P = images, tiles_an_image, 101
    tiles = random.random((B, T, M * L)) < 0.3
    tiles[:, :5] = False
    # A block of queries in the first sample uses no image; no sample the last tile but one.
    tiles[0], tiles[:, :, -2] = False, False
    padding = jnp.asarray(random.random((B, 600)) < 0.4).at[1].set(True)
    counts = jnp.asarray(random.integers(1, 4, (B, 600)), jnp.float32)
    return {
        "causal": Case(B, T, T, N, K, H, _causal(0, T, valid[:, :T]), True),
        "cache": Case(B, T, S, N, K, H, _causal(40, T, valid)),
        "packed": Case(B, T, T, N, K, H, CausalMask(jnp.arange(T), segments, segments), True),
        "tiles": Case(B, T, M * L * P, N, K, H, TileMask(jnp.asarray(tiles), P), True),
        "vision": Case(B, 600, 600, 2, 2, 80, PaddingPairMask(padding), True),
        "counted": Case(B, 600, 600, 2, 2, 80, PaddingPairMask(padding, counts), True),
        "whole blocks": Case(B, 256, 256, N, N, H, None),
        "no mask": Case(B, T, S, N, 1, H, None),
    }


def _causal(start: int, T: int, valid: np.ndarray) -> CausalMask:
    return CausalMask(start + jnp.arange(T), jnp.asarray(valid))


def inputs(case: Case) -> list[jax.Array]:
    """Queries, keys, values, and a gradient of the result."""
    random = np.random.default_rng(1)
    B, T, S, N, K, H = case[:6]
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def results(case: Case, compute: Attend, dtype: Any = jnp.float32) -> list[np.ndarray]:
    """The result and the gradients of queries, keys and values."""

    @jax.jit
    def run(q: Any, k: Any, v: Any, gradient: Any, mask: Any) -> Any:
        out, backward = jax.vjp(lambda q, k, v: compute(q, k, v, mask), q, k, v)
        return out, *backward(gradient)

    arguments = (x.astype(dtype) for x in inputs(case))
    return [np.asarray(x, np.float32) for x in run(*arguments, case.mask)]


def assert_like_reference(case: Case, compute: Attend, dtype: Any = jnp.float32) -> None:
    """Result and gradients equal those of "reference"; queries without a key have exact zeros.

    In a dtype of fewer digits than float32's, they equal the reference's in float32 to a few of
    its roundings.
    """
    found = results(case, compute, dtype)
    expected = results(case, lambda q, k, v, mask: attend(q, k, v, mask, "reference"))
    tolerance = 3e-6 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    for name, one, other in zip("oqkv", found, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=tolerance * scale, rtol=0, err_msg=name)
    blind = np.zeros((case.B, case.T), bool)
    if case.mask is not None:
        blind |= ~np.asarray(case.mask.rows(0, case.T)).any(-1)
    assert blind.any() == case.has_blind
    for one in found[:2]:
        np.testing.assert_array_equal(one[blind], 0)

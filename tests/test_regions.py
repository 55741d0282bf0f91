"""Regions of tensors in other orders of axes, and the copy that puts them in order."""

import math
import random

import einops
import ml_dtypes
import numpy as np
import pytest

from mllama_jax.convert.blocks import copy_blocks
from mllama_jax.convert.lazy import ArrayTensor
from mllama_jax.convert.regrouped import Regrouped, groups, reversed_axes, shape_of
from mllama_jax.convert.table import ROWS

SIZES = {"N": 3, "K": 2, "H": 4, "D": 5, "F": 6, "C": 3, "h": 2, "w": 4, "P": 3, "L": 2, "R": 3}
SIZES |= {"O": 7, "W": 8, "rows": 9}
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8)


@pytest.mark.parametrize("axes", sorted({row.axes for row in ROWS}))
def test_a_region_is_that_of_the_whole_rearranged_by_einops(axes):
    rng = random.Random(axes)
    for moved in (axes, reversed_axes(axes)):
        named = {name: SIZES[name] for group in groups(moved) for name in group if name in SIZES}
        shape = shape_of(groups(moved.split(" -> ")[0]), {**named, "1": 1})
        values = np.arange(math.prod(shape)).reshape(shape)
        expected = einops.rearrange(values, moved, **named)
        view = Regrouped(ArrayTensor(values), moved, tuple(named.items()))
        assert view.shape == expected.shape
        for _ in range(100):
            starts = [rng.randrange(size) for size in expected.shape]
            region = tuple(
                slice(start, rng.randrange(start, size) + 1)
                for start, size in zip(starts, expected.shape, strict=True)
            )
            np.testing.assert_array_equal(view.read(region), expected[region])


def test_blocks_are_copied_whatever_the_order_in_memory():
    """Also empty ones, parts of larger arrays, and into other dtypes."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    for _ in range(1000):
        shape = [rng.choice([0, 1, 2, 5, 13, 30]) for _ in range(rng.randrange(5))]
        source = numbers.integers(0, 100, shape).astype(rng.choice(DTYPES))
        source = source.transpose(rng.sample(range(source.ndim), source.ndim))
        if rng.random() < 0.3:
            source = source[tuple(slice(1, size) for size in source.shape)]
        around = np.zeros([size + 2 for size in source.shape], rng.choice([source.dtype, "f4"]))
        target = around[tuple(slice(1, -1) for _ in source.shape)] if source.ndim else around
        copy_blocks(target, source)
        np.testing.assert_array_equal(target, source.astype(target.dtype))
        assert np.count_nonzero(around) == np.count_nonzero(source)

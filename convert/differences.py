"""How the numbers of two blocks of one shape differ."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from mllama_jax.convert.lazy import Region

# So many numbers are compared at a time: a processor's cache holds their float64 copies.
_CHUNK = 2**17

Index = tuple[int, ...]


@dataclass(frozen=True)
class Tolerance:
    """Numbers are close if `|a - b| <= atol + rtol * |b|`.

    Raises:
        ValueError: one of the two is not a number from 0 on.
    """

    atol: float
    rtol: float

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: expected a number from 0 on")


@dataclass(frozen=True)
class Difference:
    """How two tensors, or blocks of them, differ.

    Attributes:
        count: numbers that differ: in their bits, or by more than the tolerance if there is one.
            Of different dtypes and without a tolerance: in their values.
        max_abs, max_abs_index: the largest `|a - b|` and where it is. It is infinite where only
            one is NaN or infinite; equal infinities, and two NaNs, differ by 0.
        max_rel, max_rel_index: the same for `|a - b| / |b|`, infinite where only b is 0.
        identical: same dtype, same bits.
    """

    count: int = 0
    max_abs: float = 0.0
    max_abs_index: Index | None = None
    max_rel: float = 0.0
    max_rel_index: Index | None = None
    identical: bool = True

    def __add__(self, other: Self) -> "Difference":
        worst_abs = other if other.max_abs > self.max_abs else self
        worst_rel = other if other.max_rel > self.max_rel else self
        return Difference(
            count=self.count + other.count,
            max_abs=worst_abs.max_abs,
            max_abs_index=worst_abs.max_abs_index,
            max_rel=worst_rel.max_rel,
            max_rel_index=worst_rel.max_rel_index,
            identical=self.identical and other.identical,
        )


def difference_of(
    a: np.ndarray, b: np.ndarray, region: Region, tolerance: Tolerance | None
) -> Difference:
    """Compares two blocks.

    Args:
        region: where the blocks lie in their tensors; indices are the tensors'.
    """
    if a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b)):
        return Difference()
    found = Difference(identical=False)
    a, b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        found += _chunk_difference(a[chunk], b[chunk], start, region, tolerance)
    return found


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _chunk_difference(
    a: np.ndarray, b: np.ndarray, start: int, region: Region, tolerance: Tolerance | None
) -> Difference:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        size_b = np.abs(wide_b)
        gap = np.abs(wide_a - wide_b)
        if not np.isfinite(gap.max()):
            gap[(wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))] = 0
            gap[np.isnan(gap)] = np.inf
        relative = gap / size_b
        if not np.isfinite(relative.max()):
            relative[gap == 0] = 0
            relative[np.isnan(relative)] = np.inf
        limit = None if tolerance is None else tolerance.atol + tolerance.rtol * size_b
    if limit is not None:
        # An infinite gap is never within the limit, though an infinite b may make that infinite.
        differs = (gap > limit) | np.isinf(gap)
    else:
        differs = _bits(a) != _bits(b) if a.dtype == b.dtype else gap > 0

    def worst(of: np.ndarray) -> tuple[float, Index | None]:
        place = int(of.argmax())
        return float(of[place]), _index(start + place, region) if of[place] > 0 else None

    max_abs, max_abs_index = worst(gap)
    max_rel, max_rel_index = worst(relative)
    return Difference(
        int(differs.sum()), max_abs, max_abs_index, max_rel, max_rel_index, identical=False
    )


def _index(place: int, region: Region) -> Index:
    """The index in the whole tensor of an entry of a block."""
    lengths = tuple(axis.stop - axis.start for axis in region)
    inner = np.unravel_index(place, lengths)
    return tuple(int(i) + axis.start for i, axis in zip(inner, region, strict=True))

"""Reading tensors block by block in several threads, and what kind of numbers a block holds."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeVar

import ml_dtypes
import numpy as np

from mllama_jax.convert.lazy import LazyTensor, Region
from mllama_jax.convert.targets.target import row_blocks

Job = TypeVar("Job")
Result = TypeVar("Result")

_INFINITY_BITS = {
    np.dtype(dtype): int(np.array(np.inf, dtype).view(bits))
    for dtype, bits in (
        (np.float64, np.uint64),
        (np.float32, np.uint32),
        (np.float16, np.uint16),
        (ml_dtypes.bfloat16, np.uint16),
    )
}


@dataclass(frozen=True)
class Values:
    """What kind of numbers a tensor, or a block of it, holds.

    Attributes:
        nans: values that are no number.
        infinities: of either sign.
        largest: the largest magnitude among the finite values; 0 if there are none.
    """

    nans: int = 0
    infinities: int = 0
    largest: float = 0.0

    @property
    def all_zero(self) -> bool:
        return self == Values()

    @property
    def finite(self) -> bool:
        return not (self.nans or self.infinities)

    def __add__(self, other: Self) -> "Values":
        return Values(
            self.nans + other.nans,
            self.infinities + other.infinities,
            max(self.largest, other.largest),
        )


def values_of(block: np.ndarray) -> Values:
    """Looks through a block of any real dtype.

    Finite blocks of the usual dtypes are read twice and copied never: the order of floating-point
    numbers of one sign is that of their bits.
    """
    if block.size == 0:
        return Values()
    infinity = _INFINITY_BITS.get(block.dtype)
    if infinity is None:
        return _slow_values(block)
    bits = block.view(f"u{block.itemsize}")
    most_positive = int(block.view(f"i{block.itemsize}").max())  # below zero if all have the sign
    most_negative = int(bits.max()) - (1 << 8 * block.itemsize - 1)  # below zero if none has it
    magnitude = max(most_positive, most_negative)
    if magnitude >= infinity:
        return _slow_values(block)
    return Values(largest=float(np.array(magnitude, bits.dtype).view(block.dtype)))


def _slow_values(block: np.ndarray) -> Values:
    block = block.astype(np.float64 if block.itemsize > 4 else np.float32)
    nans = int(np.isnan(block).sum())
    finite = np.isfinite(block)
    largest = float(np.abs(block, where=finite, out=np.zeros_like(block)).max())
    return Values(nans, int(block.size - finite.sum()) - nans, largest)


def blocks_of(tensor: LazyTensor) -> tuple[Region, ...]:
    """Regions of about 16 MiB that together are the tensor."""
    return row_blocks(tensor.shape, tensor.dtype)


def in_threads(
    work: Callable[[Job], Result], jobs: Iterable[Job], workers: int | None
) -> Iterator[Result]:
    """`map(work, jobs)` in threads, one for each processor (at most 8) if not said otherwise.

    An error ends the work that has not begun.

    Raises:
        ValueError: `workers` is less than 1.
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(work, jobs)
    finally:
        pool.shutdown(cancel_futures=True)

"""Tensors that are read by regions: what every checkpoint format offers and every writer takes.

A region is one `slice(start, stop)` for each axis. Reading a region of a view reads the regions of
what lies below that cover it, so that a device's part of a parameter, or a block of it on its way
into another file, never needs the whole tensor in memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

Region = tuple[slice, ...]


class LazyTensor(Protocol):
    """A tensor of known shape and dtype whose values are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, region: Region) -> np.ndarray:
        """The values of a region, of `extent(region)`'s shape; not to be written to.

        May be called from several threads at once.
        """
        ...


def whole(shape: Sequence[int]) -> Region:
    """The region that is everything."""
    return tuple(slice(0, size) for size in shape)


def extent(region: Region) -> tuple[int, ...]:
    """The shape of a region."""
    return tuple(axis.stop - axis.start for axis in region)


def resolved(index: Sequence[slice | int], shape: Sequence[int]) -> Region:
    """An index as jax gives it (open slices) as a region.

    Raises:
        ValueError: a slice has a step.
    """
    found = []
    for axis, size in zip(index, shape, strict=True):
        if isinstance(axis, int):
            axis = slice(axis, axis + 1)
        start, stop, step = axis.indices(size)
        if step != 1:
            raise ValueError(f"{axis}: expected step 1")
        found.append(slice(start, stop))
    return tuple(found)


def num_bytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def read_whole(tensor: LazyTensor) -> np.ndarray:
    return tensor.read(whole(tensor.shape))


@dataclass(frozen=True)
class ArrayTensor:
    """An array in memory (numpy or jax), seen as a lazy tensor."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def read(self, region: Region) -> np.ndarray:
        return np.asarray(self.array[region])


@dataclass(frozen=True)
class Sliced:
    """A region of a tensor as a tensor of its own."""

    base: LazyTensor
    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        return extent(self.region)

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, region: Region) -> np.ndarray:
        return self.base.read(
            tuple(
                slice(outer.start + inner.start, outer.start + inner.stop)
                for outer, inner in zip(self.region, region, strict=True)
            )
        )


def along(base: LazyTensor, axis: int, start: int, stop: int) -> Sliced:
    """`base[..., start:stop, ...]` with the slice on `axis`."""
    region = list(whole(base.shape))
    region[axis] = slice(start, stop)
    return Sliced(base, tuple(region))


@dataclass(frozen=True)
class Concatenated:
    """Tensors one after the other on an axis; they agree on dtype and on all other axes."""

    parts: tuple[LazyTensor, ...]
    axis: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        first = list(self.parts[0].shape)
        first[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(first)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, region: Region) -> np.ndarray:
        wanted = region[self.axis]
        pieces = []
        begin = 0
        for part in self.parts:
            end = begin + part.shape[self.axis]
            start, stop = max(wanted.start, begin), min(wanted.stop, end)
            if start < stop:
                inner = list(region)
                inner[self.axis] = slice(start - begin, stop - begin)
                pieces.append(part.read(tuple(inner)))
            begin = end
        if not pieces:
            return np.empty(extent(region), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, self.axis)


@dataclass(frozen=True)
class Cast:
    """A tensor in another dtype."""

    base: LazyTensor
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read(self, region: Region) -> np.ndarray:
        return self.base.read(region).astype(self.dtype, copy=False)

"""The leaves of our tree, read by regions out of the tensors that a checkpoint stores."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType

import jax.numpy as jnp
import numpy as np

from mllama_jax.convert.blocks import copy_cast
from mllama_jax.convert.lazy import LazyTensor, Region, extent
from mllama_jax.convert.regrouped import Regrouped, groups
from mllama_jax.convert.table import Tensor
from mllama_jax.convert.targets.target import row_blocks
from mllama_jax.convert.values import in_threads

# Small, as an allocator may keep a block for each thread, but no smaller: a block that covers only
# a part of the chunks that an Orbax checkpoint is stored in reads all of them.
_BLOCK_BYTES = 2**23

# What a CPU device asks of an array's address if it is to take the array without a copy.
_ALIGNMENT = 64

Aim = tuple[Region, np.ndarray]
"""A region of one layer's values, and the array that receives it."""


@dataclass(frozen=True)
class Leaf:
    """A leaf of our tree and where its values are stored.

    Attributes:
        shape: of the leaf.
        dtype: that its values are cast to.
        parts: (stored name, values in our axes) of every layer, or of the one tensor that a leaf
            is that is not stacked.
        stacked: whether the leaf has a leading axis of layers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[str, Regrouped], ...]
    stacked: bool

    def read(self, regions: Sequence[Region]) -> list[np.ndarray]:
        """The values of regions, cast.

        All of them are filled together, in several threads and block by block of what is stored:
        what several regions have in every row of a stored tensor is not gone through again for
        each of them. Beside the result, memory holds a few blocks.

        Raises:
            CheckpointError: float16 can't hold a value; as the tensors' `read`.
        """
        results = [aligned(extent(region), self.dtype) for region in regions]
        aims = list(zip(regions, results, strict=True))
        jobs = [
            (name, view, block, inner)
            for entry, (name, view) in enumerate(self.parts)
            if (inner := _of_entry(aims, entry) if self.stacked else aims)
            for box in _boxes([region for region, _ in inner])
            for block in _blocks(view, box)
        ]
        for _ in in_threads(_read_block, jobs, None):
            pass
        return results


def make_leaf(
    parts: Sequence[Tensor],
    matched: Mapping[str, tuple[str, LazyTensor]],
    dtype: np.dtype | None,
) -> Leaf:
    """The leaf that all these tensors are, one for each layer if it is stacked.

    Args:
        parts: all tensors of one path.
        matched: Hub name -> (stored name, tensor), as `match` returns it.
        dtype: None is the widest of the tensors'.
    """
    views = []
    for part in parts:
        name, stored = matched[part.hub]
        views.append((name, part.to_ours(stored)))
    dtype = dtype or widest({view.dtype for _, view in views})
    return Leaf(parts[0].leaf_shape, dtype, tuple(views), parts[0].index is not None)


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that holds the values of all of these."""
    first, *others = dtypes
    for other in others:
        first = jnp.promote_types(first, other)
    return np.dtype(first)


def _read_block(job: tuple[str, Regrouped, Region, Sequence[Aim]]) -> None:
    name, view, block, aims = job
    copy_common(view.read(block), block, aims, name)


def copy_common(values: np.ndarray, place: Region, aims: Sequence[Aim], name: str) -> None:
    """Copies to each aim what it has in common with the values of a region, cast.

    Raises:
        CheckpointError: as `copy_cast`.
    """
    for region, result in aims:
        common = tuple(
            slice(max(one.start, other.start), min(one.stop, other.stop))
            for one, other in zip(place, region, strict=True)
        )
        if all(axis.start < axis.stop for axis in common):
            target = result[_relative(common, region)]
            copy_cast(target, values[_relative(common, place)], name)


def _of_entry(aims: Sequence[Aim], entry: int) -> list[Aim]:
    """What of a stacked leaf's regions lies in one layer."""
    return [
        (region[1:], result[entry - region[0].start])
        for region, result in aims
        if region[0].start <= entry < region[0].stop
    ]


def _boxes(regions: Sequence[Region]) -> list[Region]:
    """The regions as one if they are a box without gaps."""
    hull = tuple(
        slice(min(axis.start for axis in axes), max(axis.stop for axis in axes))
        for axes in zip(*regions, strict=True)
    )
    together = sum(math.prod(extent(region)) for region in regions)
    return [hull] if together == math.prod(extent(hull)) else list(regions)


def _blocks(view: Regrouped, box: Region) -> list[Region]:
    """A box, cut along the axis that is outermost where the values are stored."""
    source, target = map(groups, view.axes.split(" -> "))
    axis = next(i for i, group in enumerate(target) if source[0][0] in group)
    return [
        tuple(
            slice(outer.start + inner.start, outer.start + inner.stop)
            for outer, inner in zip(box, block, strict=True)
        )
        for block in row_blocks(extent(box), view.dtype, axis=axis, block_bytes=_BLOCK_BYTES)
    ]


def _relative(inner: Region, outer: Region) -> tuple[slice | EllipsisType, ...]:
    """Where an outer region's array holds an inner region: the index of a view."""
    axes = (
        slice(one.start - other.start, one.stop - other.start)
        for one, other in zip(inner, outer, strict=True)
    )
    # An ellipsis, because of an array without axes an empty index is a copy.
    return (*axes, ...)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """`np.empty`, at an address that a CPU device takes as it is."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)

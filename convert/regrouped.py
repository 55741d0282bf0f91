"""One tensor in two orders of axes, read by regions: the arithmetic behind the table's axes."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mllama_jax.convert.lazy import LazyTensor, Region

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Regrouped:
    """`einops.rearrange(base, axes)`, read by regions.

    Attributes:
        base: the tensor as it is stored.
        axes: as `einops` writes them: `"(N H) D -> D N H"`; `1` is an axis of one entry.
        sizes: the length of every named axis.
    """

    base: LazyTensor
    axes: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self._target, self._sizes)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {**dict(self.sizes), "1": 1}

    @cached_property
    def _source(self) -> Groups:
        return groups(self.axes.split(" -> ")[0])

    @cached_property
    def _target(self) -> Groups:
        return groups(self.axes.split(" -> ")[1])

    def read(self, region: Region) -> np.ndarray:
        # A box of single axes that covers the region and is without gaps in either grouping.
        box = {
            axis: span
            for group, wanted in zip(self._target, region, strict=True)
            for axis, span in _split(group, wanted, self._sizes).items()
        }
        for group in (*self._source, *self._target):
            box |= _widened(group, box, self._sizes)
        values = self.base.read(tuple(_joined(group, box, self._sizes) for group in self._source))
        lengths = {axis: span.stop - span.start for axis, span in box.items()}
        flat_source = [axis for group in self._source for axis in group]
        flat_target = [axis for group in self._target for axis in group]
        values = values.reshape([lengths[axis] for axis in flat_source])
        values = values.transpose([flat_source.index(axis) for axis in flat_target])
        values = values.reshape(shape_of(self._target, lengths))
        covered = [_joined(group, box, self._sizes) for group in self._target]
        return values[
            tuple(
                slice(want.start - have.start, want.stop - have.start)
                for want, have in zip(region, covered, strict=True)
            )
        ]


def reversed_axes(axes: str) -> str:
    """`"a -> b"` -> `"b -> a"`."""
    source, target = axes.split(" -> ")
    return f"{target} -> {source}"


def groups(axes: str) -> Groups:
    """`"(N H) D"` -> `(("N", "H"), ("D",))`."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", axes))


def shape_of(grouped: Groups, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in group) for group in grouped)


def _split(group: Sequence[str], wanted: slice, sizes: Mapping[str, int]) -> dict[str, slice]:
    """The smallest box of a group's axes that covers a slice of the group."""
    box: dict[str, slice] = {}
    start, stop = wanted.start, wanted.stop
    for position, axis in enumerate(group):
        inner = math.prod(sizes[name] for name in group[position + 1 :])
        if start == stop:
            box[axis] = slice(0, 0)
            continue
        first, last = start // inner, (stop - 1) // inner
        box[axis] = slice(first, last + 1)
        if first == last:
            start, stop = start - first * inner, stop - first * inner
        else:
            start, stop = 0, inner
    return box


def _widened(
    group: Sequence[str], box: Mapping[str, slice], sizes: Mapping[str, int]
) -> dict[str, slice]:
    """The box, with axes made whole where the group's slice would otherwise have gaps."""
    found: dict[str, slice] = {}
    several = False
    for axis in group:
        found[axis] = slice(0, sizes[axis]) if several else box[axis]
        several |= found[axis].stop - found[axis].start > 1
    return found


def _joined(group: Sequence[str], box: Mapping[str, slice], sizes: Mapping[str, int]) -> slice:
    """The slice of a group that a box of its axes is."""
    start, length = 0, 1
    for axis in group:
        start = start * sizes[axis] + box[axis].start
    for axis in group:
        length *= box[axis].stop - box[axis].start
    return slice(start, start + length)

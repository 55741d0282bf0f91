"""Kernels quantised on their way from a checkpoint to devices, the same for every split of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import Region, extent, whole
from mllama_jax.convert.leaves import Aim, Leaf, aligned, copy_common
from mllama_jax.convert.regrouped import Regrouped, groups
from mllama_jax.convert.targets.target import row_blocks
from mllama_jax.convert.values import in_threads
from mllama_jax.quantisation import STORED, Quantisation, quantised, scale_shape

# Of a tensor as it is stored; each thread has one such block in memory, in float32 several times.
_BLOCK_BYTES = 2**23


@dataclass(frozen=True)
class QuantisedLeaf:
    """A kernel's values in few bits and their scales, read by regions of either.

    Attributes:
        leaf: the kernel as floating-point numbers.
        kind: of quantisation.
    """

    leaf: Leaf
    kind: Quantisation

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return STORED[self.kind]

    @cached_property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the leaf of scales.

        Raises:
            ValueError: the inputs can't be divided into groups.
        """
        first = self._first_output
        inputs = self.shape[self._stacked : first]
        scales = scale_shape(self.kind, inputs, self.shape[first:])
        return (*self.shape[: self._stacked], *scales)

    def read(
        self, regions: Sequence[Region], scale_regions: Sequence[Region]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The values of regions, and the scales of others.

        A scale is of all inputs of its group, also where a region has a part of them: every block
        that is read has whole inputs, and as many outputs as fit.

        Raises:
            CheckpointError: a value is not finite; as the tensors' `read`.
        """
        kernels = [aligned(extent(region), self.dtype) for region in regions]
        scales = [aligned(extent(region), np.dtype(np.float32)) for region in scale_regions]
        kernel_aims = list(zip(regions, kernels, strict=True))
        scale_aims = list(zip(scale_regions, scales, strict=True))
        jobs = [(entry, box, kernel_aims, scale_aims) for entry, box in self._blocks(regions)]
        for _ in in_threads(self._read_block, jobs, None):
            pass
        return kernels, scales

    @property
    def _stacked(self) -> int:
        """Axes of layers."""
        return int(self.leaf.stacked)

    @property
    def _num_inputs(self) -> int:
        # A stored kernel is (outputs, inputs), each of them one axis that may hold several.
        return len(groups(self._view(0).axes.split(" -> ")[0])[1])

    @property
    def _first_output(self) -> int:
        return self._stacked + self._num_inputs

    def _view(self, entry: int) -> Regrouped:
        return self.leaf.parts[entry][1]

    def _blocks(self, regions: Sequence[Region]) -> Iterator[tuple[int, Region]]:
        """(layer, region of it) with all inputs, which together hold the regions' outputs."""
        if not regions:
            return
        entries = {
            entry
            for region in regions
            for entry in (range(region[0].start, region[0].stop) if self._stacked else [0])
        }
        hull = list(whole(self.shape[self._stacked : self._first_output]))
        for axis in range(self._first_output, len(self.shape)):
            starts, stops = zip(*((r[axis].start, r[axis].stop) for r in regions), strict=True)
            hull.append(slice(min(starts), max(stops)))
        for entry in sorted(entries):
            for block in row_blocks(
                extent(tuple(hull)),
                self._view(entry).dtype,
                axis=self._num_inputs,
                block_bytes=_BLOCK_BYTES,
            ):
                yield (
                    entry,
                    tuple(
                        slice(outer.start + inner.start, outer.start + inner.stop)
                        for outer, inner in zip(hull, block, strict=True)
                    ),
                )

    def _read_block(self, job: tuple[int, Region, list[Aim], list[Aim]]) -> None:
        entry, block, kernel_aims, scale_aims = job
        name, view = self.leaf.parts[entry]
        values = view.read(block).astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{name}: holds values that are not finite in float32, which can't be quantised"
            )
        kernel, scale = quantised(values, self.kind, self._num_inputs)
        own = (slice(entry, entry + 1),) if self._stacked else ()
        outputs = block[self._num_inputs :]
        num_scales = scale.ndim - len(outputs)
        for part, inputs, aims in (
            (kernel, block[: self._num_inputs], kernel_aims),
            (scale, whole(scale.shape[:num_scales]), scale_aims),
        ):
            if self._stacked:
                part = part[None]
            copy_common(part, (*own, *inputs, *outputs), aims, name)

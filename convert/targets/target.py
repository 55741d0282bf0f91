"""What a format offers to a conversion: a list of tensors to write, and how to write a block."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mllama_jax.convert.lazy import LazyTensor, Region, whole

BLOCK_BYTES = 2**24
"""About as much is read, transformed and written at a time by one worker."""


@dataclass(frozen=True)
class Output:
    """One tensor of a result.

    Attributes:
        name: unique in the result; for journals and messages.
        source: what the source calls the tensor that it is made from.
        values: the tensor in the result's order of axes, in the source's dtype.
        dtype: in which it is written.
        blocks: regions that together are the whole tensor; each is written by one call.
    """

    name: str
    source: str
    values: LazyTensor
    dtype: np.dtype
    blocks: tuple[Region, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Target(Protocol):
    """A result that is being written into a folder.

    Until `finish` the folder holds nothing new that loads; an earlier checkpoint in it stays as it
    is. The names of unfinished files and folders end in `.incomplete`.

    Attributes:
        ordered: blocks must be written one after the other, in the order of `outputs`; otherwise
            several threads may write at once and in any order.
    """

    ordered: bool

    @property
    def outputs(self) -> Sequence[Output]:
        """In the order in which they are best written."""
        ...

    def start(self, done: Collection[str]) -> None:
        """Opens the unfinished files.

        Args:
            done: names of outputs that an earlier process wrote and flushed: these are kept. With
                none, what an earlier process left is removed.
        """
        ...

    def write(self, output: Output, region: Region, values: np.ndarray) -> None:
        """Writes one block: C-contiguous, of the output's dtype."""
        ...

    def flush(self) -> None:
        """Returns when everything written so far would survive a crash of the machine.

        May be called while other threads write.
        """
        ...

    def close(self) -> None:
        """Lets go of open files. What is written stays, for another process to go on from."""
        ...

    def sha256(self) -> dict[str, str]:
        """SHA-256 of the result's weight files by name, when everything is written."""
        ...

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Puts everything in its place: the weights, then these files, config.json last."""
        ...


def row_blocks(
    shape: Sequence[int],
    dtype: np.dtype,
    *,
    axis: int = 0,
    multiple: int = 1,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Region, ...]:
    """Regions of about `block_bytes` that cut a shape along one axis, at multiples of a number."""
    if 0 in shape or not shape:
        return (whole(shape),)
    entry_bytes = math.prod(shape) // shape[axis] * dtype.itemsize
    step = max(1, block_bytes // entry_bytes // multiple) * multiple
    regions = []
    for start in range(0, shape[axis], step):
        region = list(whole(shape))
        region[axis] = slice(start, min(start + step, shape[axis]))
        regions.append(tuple(region))
    return tuple(regions)

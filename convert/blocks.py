"""Copying between arrays whose axes lie in different orders."""

import math
from collections.abc import Sequence

import numpy as np

from mllama_jax.convert.errors import CheckpointError

# As many rows of a matrix stay in a processor's first cache while they are read side by side.
_ROWS = 12
_SAME_SIZE = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy_blocks(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, a few of the source's rows at a time.

    A plain copy of a transposed matrix reads one value from each of thousands of rows in turn; this
    is three to ten times as fast on matrices of the released models' size. Values are cast to the
    target's dtype.
    """
    if target.dtype == source.dtype and target.dtype.itemsize in _SAME_SIZE:
        # numpy copies integers faster than the dtypes of other packages.
        integers = _SAME_SIZE[target.dtype.itemsize]
        target, source = target.view(integers), source.view(integers)
    shape = _merged_shape(target, source)
    target, source = target.reshape(shape), source.reshape(shape)
    axis = int(np.argmax(source.strides)) if source.size and source.ndim else 0
    if axis == 0:
        target[...] = source
        return
    for start in range(0, source.shape[axis], _ROWS):
        block = (*(slice(None),) * axis, slice(start, start + _ROWS))
        target[block] = source[block]


def _merged_shape(*arrays: np.ndarray) -> Sequence[int]:
    """The shape with axes merged that lie one within the other in all arrays."""
    shape = list(arrays[0].shape)
    strides = [list(array.strides) for array in arrays]
    for axis in range(len(shape) - 2, -1, -1):
        if all(own[axis] == own[axis + 1] * shape[axis + 1] for own in strides):
            shape[axis : axis + 2] = [math.prod(shape[axis : axis + 2])]
            for own in strides:
                del own[axis]
    return shape


def copy_cast(target: np.ndarray, values: np.ndarray, name: str) -> None:
    """`target[...] = values` in the target's dtype.

    Raises:
        CheckpointError: float16 can't hold a value of the tensor called `name`.
    """
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        copy_blocks(target, values)
    if target.dtype == np.float16 != values.dtype and not np.isfinite(target).all():
        raise CheckpointError(
            f"{name}: holds values beyond float16's largest, 65504; use bfloat16 or float32"
        )

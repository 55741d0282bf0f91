"""Weights of linear maps as integers with scales: less memory, and less to read for every token.

A weight is ``integer * scale``. Integers are symmetric around zero and scales float32:

* int8, -127 … 127: a scale for each output, the largest magnitude among its weights over 127;
* int4, -7 … 7: a scale for each output and group of inputs, the largest magnitude over 7. A group
  is 128 inputs that follow each other on the innermost input axis, or as many of `GROUP_SIZES` as
  divide that axis.

An integer is the weight over its scale, both float32, rounded to the nearest and halves to even; if
all weights of a scale are zero, so are the scale and the integers. Activations stay as they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mllama_jax.shapes import Array

Quantisation = Literal["int8", "int4"]

LARGEST: Mapping[Quantisation, int] = {"int8": 127, "int4": 7}
"""The integers' largest magnitude."""

GROUP_SIZES = (128, 64, 32, 16)
"""Inputs that share a scale of int4: the first of these that divides the axis."""


def check_quantisation(kind: str | None) -> None:
    """Raises ValueError unless it is a kind of quantisation, or None."""
    if kind is not None and kind not in LARGEST:
        raise ValueError(f"quantise={kind!r}: expected one of {', '.join(get_args(Quantisation))}")


def is_quantised(path: Sequence[str]) -> bool:
    """Whether a parameter of a model is stored as integers, if any are.

    These are the kernels of all projections of the decoder's layers, of both kinds.

    Args:
      path: of the parameter in the model's tree.
    """
    return path[-1] == "kernel" and any(name.startswith("block_") for name in path)


def scale_shape(
    kind: Quantisation, inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[int, ...]:
    """The shape of a kernel's scales.

    Args:
      inputs, outputs: lengths of the kernel's axes.

    Raises:
      ValueError: the innermost input axis can't be divided into groups.
    """
    if kind == "int8":
        return tuple(outputs)
    length = inputs[-1]
    size = next((size for size in GROUP_SIZES if length % size == 0), None)
    if size is None:
        raise ValueError(
            f"int4 needs groups of {', '.join(map(str, GROUP_SIZES))} inputs, none of which "
            f"divides {length}; use int8"
        )
    return (*inputs[:-1], length // size, *outputs)


def quantised(
    weights: np.ndarray, kind: Quantisation, num_inputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """A kernel's integers and scales, as they are defined at the top of this file.

    Args:
      weights: (inputs …, outputs …), of finite values.
      num_inputs: so many of its axes are inputs.

    Returns:
      The integers, of the weights' shape and dtype ``kind``, and the scales (`scale_shape`).
    """
    inputs, outputs = weights.shape[:num_inputs], weights.shape[num_inputs:]
    scales = scale_shape(kind, inputs, outputs)
    grouped = weights.astype(np.float32, copy=False).reshape(_grouped(inputs, outputs, scales))
    over = _group_axes(num_inputs, len(outputs), len(scales))
    largest = np.maximum(grouped.max(over, keepdims=True), -grouped.min(over, keepdims=True))
    scale = largest / np.float32(LARGEST[kind])
    # Where all are zero, or so small that their scale is, any divisor will do.
    integers = grouped / np.where(scale > 0, scale, np.float32(np.inf))
    np.rint(integers, out=integers)
    np.clip(integers, -LARGEST[kind], LARGEST[kind], out=integers)
    stored = integers.astype(np.int8).astype(jnp.dtype(kind), copy=False)
    return stored.reshape(weights.shape), scale.reshape(scales)


def num_inputs_of(kernel: Array, scale: Array) -> int:
    """How many axes of a quantised kernel of one layer are inputs."""
    if scale.ndim < kernel.ndim:
        return kernel.ndim - scale.ndim
    # The one axis on which they differ is the innermost input: no group has a single entry.
    return 1 + next(i for i in range(kernel.ndim) if kernel.shape[i] != scale.shape[i])


def dequantised(kernel: Array, scale: Array, num_inputs: int) -> jax.Array:
    """The weights that integers and scales stand for, float32, of the kernel's shape."""
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    over = _group_axes(num_inputs, len(outputs), scale.ndim)
    grouped = kernel.reshape(_grouped(inputs, outputs, scale.shape)).astype(jnp.float32)
    weights = grouped * jnp.expand_dims(jnp.asarray(scale), over)
    return weights.reshape(kernel.shape)


def product(x: Array, kernel: Array, scale: Array, num_inputs: int, dtype: DTypeLike) -> jax.Array:
    """The linear map of the last ``num_inputs`` axes of ``x`` by quantised weights.

    Sums are float32, and are rounded to ``dtype`` once. A scale of a whole output multiplies the
    sum; of int4 the weights themselves are made, and rounded to ``dtype``: sums of every group
    would take more memory than they do.
    """
    x = x.astype(dtype)
    contracted = (tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs)))
    has_groups = scale.ndim == kernel.ndim
    weights = dequantised(kernel, scale, num_inputs) if has_groups else kernel
    # The integers of int8 are exact in every dtype; their sums would overflow float16.
    result = jax.lax.dot_general(
        x, weights.astype(dtype), (contracted, ((), ())), preferred_element_type=jnp.float32
    )
    return (result if has_groups else result * scale).astype(dtype)


def _grouped(
    inputs: Sequence[int], outputs: Sequence[int], scales: Sequence[int]
) -> tuple[int, ...]:
    """The kernel's shape, with the innermost input axis in two if there are groups."""
    if len(scales) == len(outputs):
        return (*inputs, *outputs)
    num_groups = scales[len(inputs) - 1]
    return (*inputs[:-1], num_groups, inputs[-1] // num_groups, *outputs)


def _group_axes(num_inputs: int, num_outputs: int, scale_ndim: int) -> tuple[int, ...]:
    """Axes of a grouped kernel that share a scale."""
    return tuple(range(num_inputs)) if scale_ndim == num_outputs else (num_inputs,)


def num_bytes(shape: Sequence[int], dtype: DTypeLike) -> int:
    """What an array takes on an accelerator, where two int4 share a byte."""
    bits = 4 if jnp.dtype(dtype) == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    return math.prod(shape) * bits // 8

"""Weights of linear maps in few bits, with scales: less memory, and less to read for every token.

A weight is ``value * scale``, and scales are float32:

* int8, an integer -127 … 127: a scale for each output, the largest magnitude among its weights
  over 127;
* int4, an integer -7 … 7: a scale for each output and group of inputs, the largest magnitude over
  7. A group is 128 inputs that follow each other on the innermost input axis, or as many of
  `GROUP_SIZES` as divide that axis;
* nf4, one of the 16 `NORMAL_FLOATS`, whose place among them is stored: scales as int4's, of groups
  of 64 inputs or fewer, and the largest magnitude itself. (Dettmers et al., "QLoRA", 2023, without
  their second quantisation, that of the scales.)

A value is the nearest to the weight over its scale, both float32; of integers that are as near the
even one, of normal floats the lower. If all weights of a scale are zero, so are the scale and the
values. Activations stay as they are.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mllama_jax.shapes import Array

Quantisation = Literal["int8", "int4", "nf4"]

LARGEST: Mapping[Quantisation, int] = {"int8": 127, "int4": 7, "nf4": 1}
"""The values' largest magnitude."""

STORED: Mapping[Quantisation, np.dtype] = {
    "int8": np.dtype(jnp.int8),
    "int4": np.dtype(jnp.int4),
    "nf4": np.dtype(jnp.uint4),
}
"""The dtype of kernels, which tells the kinds apart."""

GROUP_SIZES: Mapping[Quantisation, tuple[int, ...]] = {
    "int4": (128, 64, 32, 16),
    "nf4": (64, 32, 16),
}
"""Inputs that share a scale: the first of these that divides the axis."""

NORMAL_FLOATS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of nf4, float32: quantiles of a normal distribution (appendix E of the paper)."""


def check_quantisation(kind: str | None) -> None:
    """Raises ValueError unless it is a kind of quantisation, or None."""
    if kind is not None and kind not in LARGEST:
        raise ValueError(f"quantise={kind!r}: expected one of {', '.join(get_args(Quantisation))}")


def is_quantised(path: Sequence[str]) -> bool:
    """Whether a parameter of a model is quantised, if any are.

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
    if kind not in GROUP_SIZES:
        return tuple(outputs)
    length, sizes = inputs[-1], GROUP_SIZES[kind]
    size = next((size for size in sizes if length % size == 0), None)
    if size is None:
        raise ValueError(
            f"{kind} needs groups of {', '.join(map(str, sizes))} inputs, none of which divides "
            f"{length}; use int8"
        )
    return (*inputs[:-1], length // size, *outputs)


def quantised(
    weights: np.ndarray, kind: Quantisation, num_inputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """A kernel's values and scales, as they are defined at the top of this file.

    Args:
      weights: (inputs …, outputs …), of finite values.
      num_inputs: so many of its axes are inputs.

    Returns:
      The values as they are `STORED`, of the weights' shape, and the scales (`scale_shape`).
    """
    inputs, outputs = weights.shape[:num_inputs], weights.shape[num_inputs:]
    scales = scale_shape(kind, inputs, outputs)
    grouped = weights.astype(np.float32, copy=False).reshape(_grouped(inputs, outputs, scales))
    over = _group_axes(num_inputs, len(outputs), len(scales))
    largest = np.maximum(grouped.max(over, keepdims=True), -grouped.min(over, keepdims=True))
    scale = largest / np.float32(LARGEST[kind])
    # Where all are zero, or so small that their scale is, any divisor will do.
    ratios = grouped / np.where(scale > 0, scale, np.float32(np.inf))
    if kind == "nf4":
        nearest = _nearest_normal_floats(ratios)
    else:
        np.rint(ratios, out=ratios)
        np.clip(ratios, -LARGEST[kind], LARGEST[kind], out=ratios)
        nearest = ratios.astype(np.int8)
    stored = nearest.astype(STORED[kind], copy=False)
    return stored.reshape(weights.shape), scale.reshape(scales)


def _nearest_normal_floats(ratios: np.ndarray) -> np.ndarray:
    """Their places in the table, uint8."""
    places = np.zeros_like(ratios, np.uint8)
    for below, above in itertools.pairwise(NORMAL_FLOATS):
        places += ratios > np.float32((below + above) / 2)
    return places


def num_inputs_of(kernel: Array, scale: Array) -> int:
    """How many axes of a quantised kernel of one layer are inputs."""
    if scale.ndim < kernel.ndim:
        return kernel.ndim - scale.ndim
    # The one axis on which they differ is the innermost input: no group has a single entry.
    return 1 + next(i for i in range(kernel.ndim) if kernel.shape[i] != scale.shape[i])


def dequantised(kernel: Array, scale: Array, num_inputs: int) -> jax.Array:
    """The weights that values and scales stand for, float32, of the kernel's shape."""
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    over = _group_axes(num_inputs, len(outputs), scale.ndim)
    grouped = kernel.reshape(_grouped(inputs, outputs, scale.shape))
    is_nf4 = kernel.dtype == STORED["nf4"]
    values = _normal_floats(grouped) if is_nf4 else grouped.astype(jnp.float32)
    weights = values * jnp.expand_dims(jnp.asarray(scale), over)
    return weights.reshape(kernel.shape)


def _normal_floats(places: Array) -> Array:
    """The values at places of the table, float32."""
    found: Array = jax.lax.platform_dependent(places, tpu=_selected, default=_looked_up)
    return found


def _looked_up(places: Array) -> Array:
    return jnp.asarray(NORMAL_FLOATS, jnp.float32)[places.astype(jnp.int32)]


def _selected(places: Array) -> Array:
    """Bit by bit, halves of the table are chosen from.

    The TPU's compiler fuses these selections into the product that wants the values, and no lookup.
    """
    bits = places.astype(jnp.int32)
    values: list[Array] = [jnp.float32(value) for value in NORMAL_FLOATS]
    while len(values) > 1:
        is_odd = bits & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_odd, odd, even) for even, odd in pairs]
        bits >>= 1
    return values[0]


def product(x: Array, kernel: Array, scale: Array, num_inputs: int, dtype: DTypeLike) -> jax.Array:
    """The linear map of the last ``num_inputs`` axes of ``x`` by quantised weights.

    Sums are float32, and are rounded to ``dtype`` once. A scale of a whole output multiplies the
    sum; of groups the weights themselves are made, and rounded to ``dtype``: sums of every group
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
    """What an array takes on an accelerator, where two numbers of 4 bits share a byte."""
    is_half_byte = jnp.dtype(dtype) in (jnp.int4, jnp.uint4)
    bits = 4 if is_half_byte else 8 * jnp.dtype(dtype).itemsize
    return math.prod(shape) * bits // 8

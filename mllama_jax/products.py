"""Products with weights, of which the gradient is formed as the weights lie.

JAX's own rule computes the transposed gradient and turns it over. XLA's compiler for CPUs then
writes a transposed copy of the result's gradient in memory first, which takes as long as the
product itself.

There is no forward-mode derivative (`jax.jvp`).
"""

from functools import partial

import jax
from jax.custom_derivatives import CustomVJPPrimal
from jax.typing import DTypeLike

from mllama_jax.shapes import Array, Float

_Kept = tuple[Array | None, Array | None]
"""Input and weights, each where the gradient of the other is asked for."""


def weight_product(
    x: Float[Array, "..."],
    weights: Float[Array, "..."],
    contract: int = 1,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """The product over the last ``contract`` axes of ``x`` and the first ones of ``weights``.

    Args:
      x, weights: of one dtype.
      dtype: of the result, if it is not theirs.
    """
    return _product(contract, dtype, x, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(contract: int, dtype: DTypeLike | None, x: Array, weights: Array) -> Array:
    axes = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract)))
    return jax.lax.dot_general(x, weights, (axes, ((), ())), preferred_element_type=dtype)


def _forward(
    contract: int, dtype: DTypeLike | None, x: CustomVJPPrimal, weights: CustomVJPPrimal
) -> tuple[Array, _Kept]:
    kept = (x.value if weights.perturbed else None, weights.value if x.perturbed else None)
    return _product(contract, dtype, x.value, weights.value), kept


def _backward(
    contract: int, dtype: DTypeLike | None, kept: _Kept, g: Array
) -> tuple[Array | None, Array | None]:
    x, weights = kept
    dx = dweights = None
    if weights is not None:
        of_g = tuple(range(g.ndim - (weights.ndim - contract), g.ndim))
        axes = (of_g, tuple(range(contract, weights.ndim)))
        dx = jax.lax.dot_general(g, weights, (axes, ((), ())), preferred_element_type=dtype)
        dx = dx.astype(weights.dtype)
    if x is not None:
        rows = tuple(range(x.ndim - contract))
        dweights = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=dtype)
        dweights = dweights.astype(x.dtype)
    return dx, dweights


_product.defvjp(_forward, _backward, symbolic_zeros=True)

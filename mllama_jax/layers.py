"""Building blocks that the vision encoder and the decoder share.

Parameters carry logical axis names only; what they are split over is decided elsewhere.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mllama_jax.shapes import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def logical(initializer: jax.nn.initializers.Initializer, *axes: str | None) -> Callable[..., Any]:
    """Names the axes of the parameter that ``initializer`` makes."""
    return nn.with_logical_partitioning(initializer, axes)


def projection(
    features: int | Sequence[int],
    axes: Sequence[str],
    *,
    name: str | None,
    std: float,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    contract: int = 1,
    use_bias: bool = False,
    dot_general: Callable[..., Array] | None = None,
) -> nn.DenseGeneral:
    """A linear map of the last ``contract`` axes to ``features``; ``axes`` are the kernel's."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-contract, 0)),
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=logical(jax.nn.initializers.normal(std), *axes),
        bias_init=logical(jax.nn.initializers.zeros, *axes[contract:]),
        dot_general=dot_general,
        name=name,
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last axis; statistics in float32.

    Source: transformers 4.54.1, modeling_mllama.py: MllamaTextRMSNorm.
    """

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones = logical(jax.nn.initializers.ones, "norm")
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


def layer_norm(
    name: str | None, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike
) -> nn.LayerNorm:
    """Layer norm of the last axis; statistics in float32."""
    return nn.LayerNorm(
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        scale_init=logical(jax.nn.initializers.ones, "norm"),
        bias_init=logical(jax.nn.initializers.zeros, "norm"),
        name=name,
    )


def gated(x: Array, gate: Array) -> Array:
    """``tanh(gate) * x``, the tanh in float32."""
    return x * jnp.tanh(gate.astype(jnp.float32)).astype(x.dtype)

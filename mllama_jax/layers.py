"""Building blocks that the vision encoder and the decoder share.

Parameters carry logical axis names only; what they are split over is decided elsewhere.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mllama_jax.execution import Execution
from mllama_jax.products import weight_product
from mllama_jax.quantisation import STORED, Quantisation, product, scale_shape
from mllama_jax.shapes import Array
from mllama_jax.sharding import constrain

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


class Projection(nn.DenseGeneral):
    """A linear map whose weights are used as they are split over a mesh.

    Weights are cast before they are gathered, so that devices exchange the computation's dtype;
    the gradient of a weight is reduced onto the devices that hold its parts.

    A low-rank adapter, if there is one for this map, is added: parameters "a" (input axes, rank)
    and "b" (rank, output axes) beside the kernel; b holds the adapter's scale.

    Attributes:
      weight_axes: logical names of the kernel's axes.
      mesh: as in `mllama_jax.execution.Execution`.
    """

    weight_axes: tuple[str, ...] = ()
    mesh: Mesh | None = None

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        if self.is_initializing():
            return value
        kind = next((kind for kind, dtype in STORED.items() if value.dtype == dtype), None)
        if kind is not None:
            raise ValueError(
                f"{'/'.join(self.path)}/{name} is {value.dtype}: these parameters are quantised "
                f"and the model is not; load both with quantise={kind!r}"
            )
        if self.mesh is None:
            return value
        axes = self.weight_axes if name == "kernel" else self.weight_axes[-value.ndim :]
        return constrain(value.astype(self.dtype), self.mesh, *axes)

    def __call__(self, inputs: Array) -> Array:
        contracted = len(self.axis) if isinstance(self.axis, tuple) else 1
        return _adapted(self, super().__call__(inputs), inputs, contracted)


class QuantisedProjection(nn.Module):
    """A linear map without bias, of weights as `mllama_jax.quantisation` stores them.

    Adapters are added as `Projection` adds them.

    Attributes:
      features: lengths of the output axes.
      contract: so many last axes of the input are mapped.
      kind: of quantisation.
      weight_axes: logical names of the kernel's axes.
      dtype: of the computation.
      mesh: as in `mllama_jax.execution.Execution`.
    """

    features: tuple[int, ...]
    contract: int
    kind: Quantisation
    weight_axes: tuple[str, ...]
    dtype: DTypeLike
    mesh: Mesh | None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        shape = inputs.shape[-self.contract :]
        try:
            scales = scale_shape(self.kind, shape, self.features)
        except ValueError as error:
            raise ValueError(f"{'/'.join(self.path)}/kernel: {error}") from None
        stored = STORED[self.kind]
        kernel = self._weights("kernel", self.weight_axes, (*shape, *self.features), stored)
        axes = self.weight_axes[-len(self.features) :]
        if len(scales) > len(axes):
            *outer, innermost = self.weight_axes[: self.contract]
            axes = (*outer, f"{innermost}_groups", *axes)
        scale = self._weights("scale", axes, scales, jnp.float32)
        result = product(inputs, kernel, scale, self.contract, self.dtype)
        return _adapted(self, result, inputs, self.contract)

    def _weights(
        self, name: str, axes: Sequence[str], shape: tuple[int, ...], dtype: DTypeLike
    ) -> Array:
        zeros = logical(jax.nn.initializers.zeros, *axes)
        value: Array = self.param(name, zeros, shape, dtype)
        if value.dtype != dtype:
            raise ValueError(
                f"{'/'.join(self.path)}/{name} is {value.dtype}, of a model with "
                f"quantise={self.kind!r} it is {jnp.dtype(dtype)}: load both with the same quantise"
            )
        return value if self.is_initializing() else constrain(value, self.mesh, *axes)


def _adapted(
    module: Projection | QuantisedProjection, result: Array, inputs: Array, contracted: int
) -> Array:
    """A projection's result with that of its low-rank adapter, if there is one."""
    if not module.has_variable("params", "a"):
        return result
    a: Array = module.get_variable("params", "a").astype(module.dtype)
    b: Array = module.get_variable("params", "b").astype(module.dtype)
    low_rank = weight_product(inputs.astype(module.dtype), a, contracted)
    return result + weight_product(low_rank, b).astype(result.dtype)


def projection(
    features: int | Sequence[int],
    axes: Sequence[str],
    *,
    name: str | None,
    std: float,
    execution: Execution,
    contract: int = 1,
    use_bias: bool = False,
    result_dtype: DTypeLike | None = None,
) -> Projection | QuantisedProjection:
    """A linear map of the last ``contract`` axes to ``features``; ``axes`` are the kernel's.

    The result has the computation's dtype, if no other one is asked for.
    """
    if execution.quantise is not None:
        if use_bias or result_dtype is not None:
            raise ValueError(f"{name}: no bias and no dtype of its own can be quantised")
        return QuantisedProjection(
            (features,) if isinstance(features, int) else tuple(features),
            contract,
            execution.quantise,
            tuple(axes),
            execution.dtype,
            execution.mesh,
            name=name,
        )
    return Projection(
        features,
        axis=tuple(range(-contract, 0)),
        use_bias=use_bias,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        kernel_init=logical(jax.nn.initializers.normal(std), *axes),
        bias_init=logical(jax.nn.initializers.zeros, *axes[contract:]),
        dot_general=partial(_dot_general, dtype=result_dtype),
        name=name,
        weight_axes=tuple(axes),
        mesh=execution.mesh,
    )


def _dot_general(
    x: Array, weights: Array, dimensions: Any, precision: None = None, *, dtype: DTypeLike | None
) -> Array:
    """`weight_product` as `flax.linen.DenseGeneral` calls it."""
    del precision
    (contracted, _), _ = dimensions
    return weight_product(x, weights, len(contracted), dtype)


class Embedding(nn.Module):
    """A table of which rows are looked up, an index outside of it finds NaN.

    On a mesh each device looks up its own columns for the samples of all that share them: neither
    the table nor its gradient is exchanged, only results.
    """

    num_rows: int
    features: int
    std: float
    execution: Execution

    @nn.compact
    def __call__(self, ids_BT: Array) -> Array:
        execution = self.execution
        axes = ("embedding_rows", "embed")
        normal = logical(jax.nn.initializers.normal(self.std), *axes)
        shape = (self.num_rows, self.features)
        table = self.param("embedding", normal, shape, execution.param_dtype)
        table = table.astype(execution.dtype)
        if not self.is_initializing():
            table = constrain(table, execution.mesh, *axes)
        x_BTD = jnp.take(table, ids_BT, axis=0)
        x_BTD = constrain(x_BTD, execution.mesh, "gathered_batch", "length", "embed")
        return constrain(x_BTD, execution.mesh, "batch", "length", None)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last axis; statistics in float32.

    Source: transformers 4.54.1, modeling_mllama.py: MllamaTextRMSNorm.
    """

    epsilon: float
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones = logical(jax.nn.initializers.ones, "norm")
        scale = self.param("scale", ones, (x.shape[-1],), self.execution.param_dtype)
        if not self.is_initializing():
            scale = constrain(scale, self.execution.mesh, "norm")
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.execution.dtype)


class LayerNorm(nn.LayerNorm):
    """Flax's, with parameters and their gradients whole on every device of a mesh."""

    mesh: Mesh | None = None

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        return value if self.is_initializing() else constrain(value, self.mesh, "norm")


def layer_norm(name: str | None, epsilon: float, execution: Execution) -> LayerNorm:
    """Layer norm of the last axis; statistics in float32."""
    return LayerNorm(
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        scale_init=logical(jax.nn.initializers.ones, "norm"),
        bias_init=logical(jax.nn.initializers.zeros, "norm"),
        name=name,
        mesh=execution.mesh,
    )


def scan_layers(step: Callable[..., Any], length: int) -> Any:
    """A module class whose layers are stacked: ``step`` takes (carry, own item, shared value)."""
    return nn.scan(
        step,  # type: ignore[arg-type]
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
        # What is checked would be a value that all layers share, of which there is none; it costs
        # tracing the layer once more.
        check_constancy_invariants=False,
    )


def gated(x: Array, gate: Array) -> Array:
    """``tanh(gate) * x``, the tanh in float32."""
    return x * jnp.tanh(gate.astype(jnp.float32)).astype(x.dtype)

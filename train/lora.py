"""Low-rank adapters: which projections have one, their parameters, and merging them.

The model adds an adapter where it finds one beside a kernel, as parameters "a" and "b"
(`mllama_jax.layers.Projection`); its own parameters stay as they are.
"""

import fnmatch
import math
from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.sharding import param_axes, partition_spec
from mllama_jax.train.components import Path, component_of, joined
from mllama_jax.train.settings import LoraConfig, Recipe

_CONTRACTED = {"o_proj": 2, "patch_embedding": 3}
"""Input axes of a kernel, where there is more than one."""


@dataclass(frozen=True)
class Adapter:
    """Shapes and logical axes of one projection's adapter, scanned layers first."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    a_axes: tuple[str | None, ...]
    b_axes: tuple[str | None, ...]


def num_input_axes(projection: Path) -> int:
    """How many axes of a projection's kernel, without that of stacked layers, are inputs."""
    return _CONTRACTED.get(projection[-1], 1)


def adapters_of(model: PretrainedModule, recipe: Recipe) -> dict[Path, Adapter]:
    """The adapters that a recipe asks for, by the projection's path; none if no mode is lora.

    Raises:
        ValueError: a component whose mode is lora has no projections; a pattern of ``lora.targets``
            matches none of these components' projections: names those that exist.
    """
    components = {name for name, mode in recipe.trained.modes.items() if mode == "lora"}
    if not components:
        return {}
    shapes = flax.traverse_util.flatten_dict(model.param_shapes())
    axes = flax.traverse_util.flatten_dict(param_axes(model))
    kernels = {path[:-1]: path for path in shapes if path[-1] == "kernel"}
    owners = {path: component_of(model, path) for path in kernels}
    if without := components - set(owners.values()):
        raise ValueError(
            f"trained: {', '.join(sorted(without))} can't have mode lora: there are no projections "
            "in it; expected frozen or full"
        )
    names = {"/".join(path): path for path in kernels if owners[path] in components}
    chosen: set[Path] = set()
    for pattern in recipe.lora.targets:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ValueError(
                f"lora.targets: {pattern!r} matches no projection of "
                f"{', '.join(sorted(components))}; there are:\n  " + "\n  ".join(sorted(names))
            )
        chosen |= {names[name] for name in matching}
    return {
        path: _adapter(path, shapes[kernels[path]].shape, axes[kernels[path]], recipe.lora.rank)
        for path in sorted(chosen)
    }


def _adapter(path: Path, shape: tuple[int, ...], axes: tuple[str, ...], rank: int) -> Adapter:
    stacked = int(axes[0] == "layers")
    inputs = stacked + num_input_axes(path)
    return Adapter(
        a=(*shape[:inputs], rank),
        b=(*shape[:stacked], rank, *shape[inputs:]),
        a_axes=(*axes[:inputs], None),
        b_axes=(*axes[:stacked], None, *axes[inputs:]),
    )


def init_adapters(model: PretrainedModule, recipe: Recipe, key: jax.Array) -> Params:
    """Adapters that change nothing yet, float32, split over the model's mesh as the kernels are.

    a is uniform within ±1/sqrt(inputs), b is zero.
    Source: PEFT 0.18.1, tuners/lora/layer.py: reset_lora_parameters.
    """
    adapters = adapters_of(model, recipe)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(adapters))
        return _tree(
            {
                path: {
                    "a": _uniform(key, adapter),
                    "b": jnp.zeros(adapter.b, jnp.float32),
                }
                for key, (path, adapter) in zip(keys, adapters.items(), strict=True)
            }
        )

    return jax.jit(init, out_shardings=adapter_shardings(model, recipe))(key)


def _uniform(key: jax.Array, adapter: Adapter) -> jax.Array:
    stacked = adapter.a_axes[0] == "layers"
    limit = 1 / math.sqrt(math.prod(adapter.a[int(stacked) : -1]))
    return jax.random.uniform(key, adapter.a, jnp.float32, -limit, limit)


def adapter_shardings(model: PretrainedModule, recipe: Recipe) -> Any:
    """A `NamedSharding` for every array of the adapters, None without a mesh."""
    mesh = model.mesh
    if mesh is None:
        return None
    return _tree(
        {
            path: {
                "a": NamedSharding(mesh, partition_spec(adapter.a_axes, adapter.a, mesh)),
                "b": NamedSharding(mesh, partition_spec(adapter.b_axes, adapter.b, mesh)),
            }
            for path, adapter in adapters_of(model, recipe).items()
        }
    )


def scaled(params: Params, config: LoraConfig) -> Params:
    """The tree that the model is called with: the adapters' b times ``alpha / rank``."""
    scale = config.alpha / config.rank
    flat = flax.traverse_util.flatten_dict(params)
    return _tree({path: leaf * scale if path[-1] == "b" else leaf for path, leaf in flat.items()})


def merged(params: Params, trained: Params, config: LoraConfig) -> Params:
    """A whole model's parameters, which compute alone what they and the adapters compute together.

    Each kernel's sum is made in float32 and rounded once, to the kernel's dtype.

    Args:
        params: those that are not trained themselves.
        trained: the others, and adapters.
        config: the adapters'.

    Raises:
        ValueError: a kernel with an adapter is quantised.
    """
    flat = flax.traverse_util.flatten_dict(joined(params, scaled(trained, config)))
    for path in [path[:-1] for path in flat if path[-1] == "a"]:
        kernel, a, b = flat[*path, "kernel"], flat.pop((*path, "a")), flat.pop((*path, "b"))
        if jnp.issubdtype(kernel.dtype, jnp.integer):
            raise ValueError(
                f"{'/'.join(path)}/kernel is quantised ({kernel.dtype}): merge adapters into the "
                "parameters as they are loaded without quantise"
            )
        total = kernel.astype(jnp.float32) + _product(a, b, kernel.ndim)
        flat[*path, "kernel"] = total.astype(kernel.dtype)
    return _tree(flat)


def _product(a: jax.Array, b: jax.Array, kernel_ndim: int) -> jax.Array:
    if a.ndim + b.ndim - 2 == kernel_ndim:
        return jnp.tensordot(a, b, 1)
    return jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)  # stacked layers


def _tree(flat: dict[Path, Any]) -> Any:
    return flax.traverse_util.unflatten_dict(flat)

"""What test_splash.py runs in a process of its own: eight virtual devices, and TPUs to compile for.

Prints what it found as JSON. Environment variables are set by the test, before jax starts.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from attention_cases import assert_like_reference, make_cases
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mllama_jax.attention import ATTENTION_RESULT, attend
from mllama_jax.masks import CausalMask, Mask, PaddingPairMask, TileMask
from mllama_jax.sharding import parse_mesh

MESHES = {
    "tiles": "data=2,fsdp=2,tensor=2",  # more devices than samples
    "packed": "fsdp=2,tensor=4",  # more devices than key/value heads
    "vision": "fsdp=2,tensor=2,data=2",
    "no mask": "tensor=8",  # heads that can't be split
}


def on_meshes() -> None:
    cases = make_cases()
    for name, written in MESHES.items():
        mesh = parse_mesh(written)
        assert_like_reference(
            cases[name],
            lambda q, k, v, mask, mesh=mesh: attend(q, k, v, mask, "splash_interpret", mesh),
        )


Call = tuple[tuple[int, ...], Mask]


def compile_for(topology: str, calls: Sequence[Call], remat: Any = None) -> Any:
    """Forward and backward passes of some calls, one program for one device."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh([[devices[0]]], ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def run(q: Any, k: Any, v: Any, gradient: Any, mask: Any) -> Any:
        def compute(q: Any, k: Any, v: Any) -> Any:
            return attend(q, k, v, mask, "splash", mesh)

        if remat is not None:
            compute = jax.checkpoint(compute, policy=remat)
        out, backward = jax.vjp(compute, q, k, v)
        return out, backward(gradient)

    arguments = []
    for (B, T, S, N, K, H), mask in calls:
        mask = jax.tree.map(lambda x: array(x.shape, x.dtype), mask)
        q, k = array((B, T, N, H)), array((B, S, K, H))
        arguments.append((q, k, k, q, mask))
    run_all = jax.jit(lambda arguments: [run(*one) for one in arguments], out_shardings=whole)
    return run_all.lower(arguments).compile()


def compiled() -> dict[str, int]:
    """Numbers of kernels, and bytes of temporary memory at full length."""

    def kernels(*arguments: Any) -> int:
        text = compile_for(*arguments).as_text()
        return text.count('custom_call_target="tpu_custom_call"')

    causal = (2, 300, 300, 4, 2, 128), CausalMask(jnp.arange(300), jnp.ones((2, 300), bool))
    tiles = (1, 200, 404, 4, 2, 128), TileMask(jnp.ones((1, 200, 4), bool), 101)
    vision = (2, 264, 264, 2, 2, 80), PaddingPairMask(jnp.zeros((2, 264), bool))
    large_vision = (1, 6432, 6432, 2, 2, 80), PaddingPairMask(jnp.zeros((1, 6432), bool))
    large_cross = (1, 2048, 6404, 4, 1, 128), TileMask(jnp.ones((1, 2048, 4), bool), 1601)
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(ATTENTION_RESULT)
    memory = compile_for("v6e:2x2", [large_vision, large_cross]).memory_analysis()
    return {
        "v5e": kernels("v5e:2x2", [causal, tiles, vision]),
        "v6e": kernels("v6e:2x2", [causal, tiles, vision]),
        "v5p": kernels("v5p:2x2x1", [causal, tiles, vision]),
        "result kept": kernels("v6e:2x2", [vision], named),
        "nothing kept": kernels("v6e:2x2", [vision], policies.nothing_saveable),
        "temporary": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    if sys.argv[1] == "meshes":
        on_meshes()
    else:
        print(json.dumps(compiled()))

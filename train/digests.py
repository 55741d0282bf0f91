"""Numbers that tell whether arrays are still what they were, wherever they lie."""

from typing import Any

import jax
import jax.numpy as jnp

from mllama_jax.shapes import Array

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(tree: Any) -> dict[str, int]:
    """A 32-bit number for each array, by its path; any bit that changes changes it.

    It is computed on the devices, each from its own part, and is the same on every mesh.
    """
    return {path: int(number) for path, number in jax.device_get(_digests(tree)).items()}


@jax.jit
def _digests(tree: Any) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): _digest(leaf) for path, leaf in leaves}


def _digest(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype in (jnp.int4, jnp.uint4):
        x = x.astype(jnp.int8)
    unsigned = _UNSIGNED[x.dtype.itemsize]
    bits = x.astype(unsigned) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    # Odd weights, so that no change of one number is lost, and others for other places.
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weights = place * jnp.uint32(2_654_435_769) * 2 + 1
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)

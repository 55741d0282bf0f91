"""Rows of a batch on their way to the devices: each process has those of its own devices."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mllama_jax.sharding import partition_spec, place_parts


def rows_of_process(batch_size: int, mesh: Mesh | None) -> list[int]:
    """The rows of a batch that devices of this process hold, rising; all of them without a mesh."""
    if mesh is None:
        return list(range(batch_size))
    sharding = NamedSharding(mesh, partition_spec(("batch",), (batch_size,), mesh))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    numbers = np.arange(batch_size)
    return sorted({row for part in parts if part for row in numbers[part].tolist()})


def place_rows(
    arrays: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Puts a batch on a mesh; all processes of the mesh call this, each with rows of its own.

    Args:
        arrays: of `rows` alone, (len(rows), …).
        rows: from `rows_of_process`.
        batch_size: rows of the whole batch.
        mesh: None is the default device.
    """
    return {name: _place(x, rows, batch_size, mesh) for name, x in arrays.items()}


def _place(x: np.ndarray, rows: Sequence[int], batch_size: int, mesh: Mesh | None) -> jax.Array:
    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        first = int(np.searchsorted(rows, start))
        return x[(slice(first, first + stop - start), *index[1:])]

    shape = (batch_size, *x.shape[1:])
    return place_parts(part, shape, mesh, "batch", *[None] * (x.ndim - 1))

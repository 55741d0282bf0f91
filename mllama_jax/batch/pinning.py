"""The engine's programs on a mesh, each compiled once whatever ran before it.

A program is compiled for its arguments' shardings, down to how these are written. Left to the
compiler, every program would leave the slots with shardings of its own, and the next one would be
compiled again for each of them, in the middle of a job.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mllama_jax.batch.copying import copy_prompt
from mllama_jax.batch.programs import Slots, decode, guide, prefill, start, write_picture

__all__ = ["Programs", "pinned_programs"]


@dataclass(frozen=True)
class Programs:
    """Those of `programs` and `copying`, by their names."""

    write_picture: Callable[..., Any] = write_picture
    prefill: Callable[..., Any] = prefill
    copy_prompt: Callable[..., Any] = copy_prompt
    start: Callable[..., Any] = start
    decode: Callable[..., Any] = decode
    guide: Callable[..., Any] = guide


def pinned_programs(slots: Slots) -> Programs:
    """Programs that leave the slots on the devices where they are now; what else they return that
    other programs take is on all devices."""
    if not isinstance(slots.tiles.sharding, NamedSharding):
        return Programs()
    return _pinned(jax.tree.map(lambda x: x.sharding, slots))


@lru_cache(maxsize=8)
def _pinned(shardings: Any) -> Programs:
    """Shared by all engines with the same sizes and mesh, as the programs themselves are."""
    whole = NamedSharding(shardings.tiles.mesh, PartitionSpec())

    def pinned(program: Callable[..., Any], results: Any, *static: str) -> Callable[..., Any]:
        return jax.jit(
            program, static_argnames=static, donate_argnames="slots", out_shardings=results
        )

    return Programs(
        write_picture=pinned(write_picture, shardings, "model"),
        prefill=pinned(
            prefill,
            # Log-probabilities of the prompt are for the host.
            (shardings, whole, None),
            *("model", "num_tiles", "is_first", "with_prompt_logprobs"),
        ),
        copy_prompt=pinned(copy_prompt, shardings, "model"),
        start=pinned(start, (shardings, None), "model"),
        decode=pinned(decode, (shardings, None), "model", "num_steps", "with_images"),
        guide=pinned(guide, shardings),
    )

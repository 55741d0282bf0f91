"""A prompt that was read for one of a request's answers, given to the others."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mllama_jax.batch.programs import Slots, small_parts_whole
from mllama_jax.batch.rules import NOTHING
from mllama_jax.batch.sampling import RowHistory
from mllama_jax.batch.windows import read_window, write_window
from mllama_jax.shapes import Array, Int

__all__ = ["copy_prompt"]


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def copy_prompt(
    model: Any,
    slots: Slots,
    source: Int[Array, ""],
    slot: Int[Array, ""],
    length: Int[Array, ""],
) -> Slots:
    """Puts a slot's prompt and pictures into another slot, as if it had been read there.

    Args:
        source: the slot that has read it; whatever of its answer follows is not looked at.
        slot: that gets it.
        length: tokens of the prompt.
    """
    cache, mesh = slots.cache, model.mesh

    def copied(stack: Any) -> Array:
        window = read_window(stack, source, 0, stack.shape[3], mesh)
        return write_window(stack, window, slot, 0, mesh)

    def put(values: Array, value: Array | int | bool) -> Array:
        return values.at[slot].set(value)

    history = slots.history
    slots = replace(
        slots,
        cache=replace(
            cache,
            keys=copied(cache.keys),
            values=copied(cache.values),
            cross_keys=copied(cache.cross_keys),
            cross_values=copied(cache.cross_values),
            length=put(cache.length, length),
        ),
        tiles=put(slots.tiles, slots.tiles[source]),
        active=put(slots.active, False),
        history=RowHistory(
            counts=put(history.counts, jnp.int32(0)),
            in_prompt=put(history.in_prompt, history.in_prompt[source]),
            last=put(history.last, jnp.int32(NOTHING)),
        ),
    )
    return small_parts_whole(slots, mesh)

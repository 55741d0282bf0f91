"""How many requests at a time, and how long: chosen from the memory that there is."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mllama_jax.batch.device import empty_slots
from mllama_jax.batch.host_memory import available_memory
from mllama_jax.batch.options import EngineOptions
from mllama_jax.sharding import num_parts

__all__ = ["choose_options", "describe", "needed_memory"]

_LARGEST = ((4096, 4), (4096, 2), (2048, 2), (2048, 1), (1024, 1), (512, 1))
"""Tokens of a request, and how many pictures of the most tiles, from the most generous on."""

_ENOUGH_SLOTS = 8
"""Fewer are only taken where shorter requests would not make room for more."""

_NUM_SLOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Of each group of devices that holds slots of its own."""

_MOST_SLOTS_ON_CPU = 8
"""There the products with weights are no cheaper a token with more."""

_CHUNKS = (512, 256, 128, 64, 32)
"""Tokens of a prompt that are read at once, the longest; a slot has room for whole chunks."""

_MOST_WASTED = 1 / 8
"""Of a slot, for the sake of longer chunks."""

_USED_FRACTION = 0.92
"""Of the memory that is free; the rest is for what no formula counts."""


def choose_options(
    model: Any,
    *,
    num_slots: int | None = None,
    max_length: int | None = None,
    max_tiles: int | None = None,
    memory: int | None = None,
) -> EngineOptions:
    """The engine's sizes for a model and its devices.

    Args:
        model: whose parameters are on their devices already.
        num_slots, max_length, max_tiles: chosen by the caller; None leaves them open.
        memory: bytes for the engine beside the parameters, on each device; None asks the devices.

    Raises:
        ValueError: not even one slot fits; a size that no model or not this one can have.
    """
    _check_given(model, num_slots, max_length, max_tiles)
    is_cpu = _devices(model)[0].platform == "cpu"
    memory = free_memory(model) if memory is None else memory
    groups = num_parts("batch", 0, model.mesh)
    counts = [count * groups for count in _NUM_SLOTS]
    if is_cpu:
        counts = [count for count in counts if count <= max(_MOST_SLOTS_ON_CPU, groups)]
    if num_slots is not None:
        counts = [num_slots]
    found: EngineOptions | None = None
    smallest = None
    for length, tiles in _shapes(model, max_length, max_tiles):
        for count in counts:
            options = _options(count, length, tiles, is_cpu=is_cpu)
            smallest = needed_memory(model, options)
            if smallest > memory * _USED_FRACTION:
                break
            if found is None or count > found.num_slots:
                found = options
        if found is not None and found.num_slots >= min(_ENOUGH_SLOTS, counts[-1]):
            return found
    if found is None:
        raise ValueError(
            f"{_gib(memory)} of each device's memory is free beside the parameters, and the engine "
            f"needs {_gib(smallest or 0)} for {counts[0]} slots: give a smaller max_length or "
            "max_tiles, or split the model over more devices"
        )
    return found


def _check_given(
    model: Any, num_slots: int | None, max_length: int | None, max_tiles: int | None
) -> None:
    positions = model.text_config.max_position_embeddings
    tiles = model.config.vision_config.max_num_tiles
    given = (
        ("num_slots", num_slots, 1, None, ""),
        ("max_length", max_length, 2, positions, ", the positions that the model knows"),
        ("max_tiles", max_tiles, tiles, None, ", the tiles of one picture"),
    )
    problems = [
        f"{name} (--{name.replace('_', '-')}) is {value}; expected "
        + (f"at least {least}" if most is None else f"{least} to {most}")
        + why
        for name, value, least, most, why in given
        if value is not None and not least <= value <= (value if most is None else most)
    ]
    if problems:
        raise ValueError("; ".join(problems))


def needed_memory(model: Any, options: EngineOptions) -> int:
    """Bytes on each device beside the parameters: the slots, the pictures that are kept, and about
    what the largest program works with."""
    return (
        _slots_memory(model, options)
        + _num_features(model, options) * _features_memory(model)
        + max(_encoder_memory(model, options), _prefill_memory(model, options))
    )


def describe(model: Any, options: EngineOptions) -> str:
    """What was chosen, in lines for people."""
    tiles, most = options.max_tiles, model.config.vision_config.max_num_tiles
    return (
        f"{options.num_slots} slots of {options.max_length} tokens and {tiles} tiles "
        f"({tiles // most} whole pictures) each; prompts in chunks of up to "
        f"{options.prompt_lengths[-1]}; {options.decode_steps} tokens a dispatch\n"
        f"{_gib(needed_memory(model, options))} of {_gib(free_memory(model))} free on "
        "each device beside the parameters (estimated)"
    )


def free_memory(model: Any) -> int:
    """Bytes on each of the model's devices that nothing holds yet; of a CPU, what the system can
    give this process."""
    stats = [device.memory_stats() for device in _devices(model)]
    known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s]
    if known:
        return min(known)
    return available_memory() // len(stats)


def _devices(model: Any) -> list[jax.Device]:
    if model.mesh is None:
        return [jax.local_devices()[0]]
    return [d for d in model.mesh.devices.flat if d.process_index == jax.process_index()]


def _shapes(model: Any, max_length: int | None, max_tiles: int | None) -> Iterator[tuple[int, int]]:
    most = model.config.vision_config.max_num_tiles
    limit = model.text_config.max_position_embeddings
    seen = set()
    for length, pictures in _LARGEST:
        shape = (
            min(length, limit) if max_length is None else max_length,
            pictures * most if max_tiles is None else max_tiles,
        )
        if shape not in seen:
            seen.add(shape)
            yield shape


def _options(num_slots: int, max_length: int, max_tiles: int, *, is_cpu: bool) -> EngineOptions:
    # A short prompt takes a TPU as long as one of some hundred tokens, but a CPU less.
    lengths = (32, 64, 128, 256) if is_cpu else (128,)
    tiles = (4, 8) if is_cpu else (4,)
    chunk = _chunk(max_length)
    return EngineOptions(
        num_slots=num_slots,
        max_length=max_length,
        max_tiles=max_tiles,
        prompt_lengths=(*(length for length in lengths if length < chunk), chunk),
        tile_counts=(*(count for count in tiles if count < max_tiles), max_tiles),
        # A batch of pictures takes a CPU no less time a picture, and more memory.
        pictures_at_once=(1,) if is_cpu else (1, 4),
        pictures_kept=16,
        num_workers=max(2, (os.cpu_count() or 2) // 2),
    )


def _chunk(max_length: int) -> int:
    """The longest that wastes little of a slot."""
    rooms = {chunk: -(-max_length // chunk) * chunk for chunk in _CHUNKS}
    most = min(rooms.values()) * (1 + _MOST_WASTED)
    return next(chunk for chunk, room in rooms.items() if room <= most)


def _slots_memory(model: Any, options: EngineOptions) -> int:
    leaves = jax.eval_shape(lambda: jax.tree.leaves(empty_slots(model, options)))
    heads = model.text_config.num_key_value_heads
    parts = num_parts("batch", options.num_slots, model.mesh)
    parts *= num_parts("kv_heads", heads, model.mesh)
    total = 0
    for leaf in leaves:
        is_cache = leaf.ndim == 5
        total += leaf.size * leaf.dtype.itemsize // (parts if is_cache else 1)
    return total


def _num_features(model: Any, options: EngineOptions) -> int:
    """Pictures whose features are in memory together."""
    groups = num_parts("batch", 0, model.mesh)
    vision = model.config.vision_config
    most = -(-options.max_tiles // vision.max_num_tiles)
    return options.pictures_kept + options.pictures_at_once[-1] * groups + most


def _features_memory(model: Any) -> int:
    vision, text = model.config.vision_config, model.text_config
    tokens = vision.max_num_tiles * vision.num_patches
    return int(tokens * text.hidden_size * jnp.dtype(model.dtype).itemsize)


def _encoder_memory(model: Any, options: EngineOptions) -> int:
    """A layer's activations, and all layers' outputs that the decoder gets."""
    vision, mesh = model.config.vision_config, model.mesh
    tokens = options.pictures_at_once[-1] * vision.max_num_tiles * vision.num_patches
    width = vision.intermediate_size // num_parts("vision_mlp", vision.intermediate_size, mesh)
    values = vision.vision_output_dim + 4 * vision.hidden_size + 2 * width
    return int(tokens * values * jnp.dtype(model.dtype).itemsize)


def _prefill_memory(model: Any, options: EngineOptions) -> int:
    """A layer's activations, and a slot's own part of the cache, which is read and written back."""
    text, mesh = model.text_config, model.mesh
    width = text.intermediate_size // num_parts("mlp", text.intermediate_size, mesh)
    values = options.prompt_lengths[-1] * (6 * text.hidden_size + 3 * width)
    cache = 2 * _slots_memory(model, options) // options.num_slots
    return int(values * jnp.dtype(model.dtype).itemsize) + cache


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

"""The compiled programs of generation, and the bounded set of shapes that they are compiled for.

pictures → `encode_pictures` → `prefill` → `decode`, as often as the host wants to look

Rows of a batch end at the same slot: prompts stand at the right end of a bucket of slots, whatever
side they were padded on, and all rows write their next token to the same slot.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mllama_jax.cache import MllamaCache
from mllama_jax.generation.sampling import SamplingParams, sample
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array, Bool, Float, Int
from mllama_jax.sharding import constrain, num_parts, partition_spec, place, place_parts, zeros

__all__ = [
    "IMAGE_BUCKETS",
    "LENGTH_BUCKETS",
    "PICTURE_BATCHES",
    "DecodeState",
    "Prompt",
    "Rules",
    "bucket",
    "decode",
    "encode",
    "encode_pictures",
    "prefill",
]

LENGTH_BUCKETS = (
    *(32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    *(6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072),
)
"""Slots of prompts and of caches."""

IMAGE_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Images of a sample."""

PICTURE_BATCHES = (1, 2, 4, 8)
"""Pictures that the vision encoder takes at once."""


def bucket(size: int, sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` that holds ``size``; beyond the last, the next multiple of it."""
    fitting = (candidate for candidate in sizes if candidate >= size)
    return next(fitting, -(-size // sizes[-1]) * sizes[-1])


@struct.dataclass
class Prompt:
    """Prompts at the right end of T slots, in a cache of S slots.

    Attributes:
        input_ids, position_ids: (B, T) int32; positions count a row's own tokens.
        attention_mask: (B, S) int32, 0 for the slots before a row's first token, otherwise 1.
        cross_attention_states: (B, V, D), image features, or None.
        cross_attention_mask: (B, T, M, L) int32, or None for all tiles. New tokens repeat its last
            row.
    """

    input_ids: Int[Array, "B T"]
    position_ids: Int[Array, "B T"]
    attention_mask: Int[Array, "B S"]
    cross_attention_states: Float[Array, "B V D"] | None
    cross_attention_mask: Int[Array, "B T M L"] | None


@struct.dataclass
class Rules:
    """How tokens are chosen and what ends a row. All of it is data: no change recompiles.

    Attributes:
        sampling: per row.
        keys: (B,) random keys; the draw of a row's n-th new token folds in n.
        is_end: (W,) bool, the tokens that end a row.
        min_new_tokens: int32, no end token is chosen before this many new tokens.
        pad_token_id: int32, fills rows that have ended.
    """

    sampling: SamplingParams
    keys: Array
    is_end: Bool[Array, " W"]
    min_new_tokens: Int[Array, ""]
    pad_token_id: Int[Array, ""]


@struct.dataclass
class DecodeState:
    """Where a batch stands; goes into `decode`, which reuses its memory, and comes out.

    Attributes:
        cache: keys and values of everything but the last token.
        attention_mask, cross_attention_mask: as in `Prompt`, the latter (B, 1, M, L).
        tokens: (B, S) int32, new tokens from column 0 on.
        last: (B,) int32, the newest token.
        position: (B,) int32, where it stands.
        step: int32, how many new tokens there are, padding of ended rows included.
        lengths: (B,) int32, how many of them are a row's own.
        ended: (B,) bool.
    """

    cache: MllamaCache
    attention_mask: Int[Array, "B S"]
    cross_attention_mask: Int[Array, "B 1 M L"] | None
    tokens: Int[Array, "B S"]
    last: Int[Array, " B"]
    position: Int[Array, " B"]
    step: Int[Array, ""]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]


def encode_pictures(
    model: Any,
    params: Params,
    pixel_values: np.ndarray,
    aspect_ratio_ids: np.ndarray,
    aspect_ratio_mask: np.ndarray | None,
    wanted: np.ndarray,
    num_images: int,
) -> Float[Array, "B V D"]:
    """Image features of the wanted pictures; the others are zero and cost nothing.

    On a mesh the pictures are split over the axes of the batch.

    Args:
        pixel_values, aspect_ratio_ids, aspect_ratio_mask: (B, M, …), as in `model.encode_images`.
        wanted: (B, M) bool, at least one of them True.
        num_images: image slots of each sample of the result, M or more.

    Returns:
        (B, num_images * L * P, D).
    """
    mesh = model.mesh
    batch_size = len(wanted)
    # Devices that hold different rows encode the pictures of their own rows.
    groups = num_parts("batch", batch_size, mesh)
    own_rows = batch_size // groups
    sizes = [num_parts("batch", 0, mesh) // groups * size for size in PICTURE_BATCHES]
    rows, images = np.nonzero(wanted)
    order = _by_group(rows // own_rows, groups)
    states = None
    for start in range(0, order.shape[1], sizes[-1]):
        chosen = order[:, start : start + sizes[-1]]
        missing = bucket(chosen.shape[1], sizes) - chosen.shape[1]
        chosen = np.pad(chosen, ((0, 0), (0, missing)), constant_values=_NOTHING).ravel()
        pixels, ids, tiles = (
            None if values is None else _picked(values, rows[chosen], images[chosen], mesh)
            for values in (pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        )
        features = encode(model, params, pixels, ids, tiles)
        if states is None:
            shape = (batch_size, num_images, *features.shape[1:])
            states = zeros(shape, features.dtype, mesh, "batch", None, None, None)
        # What fills up a batch goes nowhere: its slot is out of range.
        slots = rows[chosen] % own_rows * num_images + images[chosen]
        slots = np.where(chosen == _NOTHING, own_rows * num_images, slots).astype(np.int32)
        states = _put(states, features, place(slots, mesh), mesh)
    assert states is not None
    return states.reshape(batch_size, -1, states.shape[-1])


_NOTHING = -1


def _by_group(group_of: np.ndarray, num_groups: int) -> np.ndarray:
    """(groups, most): the indices of each group's members, filled up with `_NOTHING`."""
    members = [np.flatnonzero(group_of == group) for group in range(num_groups)]
    most = max(map(len, members))
    return np.stack([np.pad(m, (0, most - len(m)), constant_values=_NOTHING) for m in members])


def _picked(values: np.ndarray, rows: np.ndarray, images: np.ndarray, mesh: Mesh | None) -> Array:
    """One image of each of these rows; a process picks only what its own devices take."""
    shape = (len(rows), 1, *values.shape[2:])

    def pick(index: tuple[slice, ...]) -> np.ndarray:
        return values[rows[index[0]], images[index[0]]][:, None]

    return place_parts(pick, shape, mesh, "batch", *[None] * (len(shape) - 1))


@partial(jax.jit, static_argnames=("model", "num_tiles"))
def encode(
    model: Any,
    params: Params,
    pixel_values: Array,
    ids: Array,
    mask: Array | None,
    num_tiles: int | None = None,
) -> Array:
    """`model.encode_images`, compiled: features (B, M * L * P, D), split over the samples."""
    features = model.apply(
        {"params": params}, pixel_values, ids, mask, num_tiles, method="encode_images"
    )
    return constrain(features, model.mesh, "batch", None, None)


@partial(jax.jit, static_argnames="mesh", donate_argnames="states")
def _put(states: Array, features: Array, slots: Array, mesh: Mesh | None) -> Array:
    """Writes features to slots, which each group of devices counts among its own rows."""

    def put(states: Array, features: Array, slots: Array) -> Array:
        flat = states.reshape(-1, *states.shape[2:])
        return flat.at[slots].set(features, mode="drop").reshape(states.shape)

    if mesh is None:
        return put(states, features, slots)
    own = partition_spec(("batch",), states.shape[:1], mesh)
    return jax.shard_map(put, mesh=mesh, in_specs=(own, own, own), out_specs=own)(
        states, features, slots
    )


@partial(jax.jit, static_argnames="model")
def prefill(model: Any, params: Params, prompt: Prompt, rules: Rules) -> DecodeState:
    """Reads the prompts and chooses each row's first token.

    Args:
        model: hashable.
    """
    batch_size, num_slots = prompt.attention_mask.shape
    # Without a past: attention then knows that slots and tokens are the same.
    output = model.apply(
        {"params": params},
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask[:, : prompt.input_ids.shape[1]],
        position_ids=prompt.position_ids,
        cross_attention_states=prompt.cross_attention_states,
        cross_attention_mask=prompt.cross_attention_mask,
        use_cache=True,
        num_logits_to_keep=1,
    )
    cross_mask = prompt.cross_attention_mask
    state = DecodeState(
        cache=output.past_key_values.with_slots(num_slots).split_over(model.mesh),
        attention_mask=prompt.attention_mask,
        cross_attention_mask=None if cross_mask is None else cross_mask[:, -1:],
        tokens=jnp.full((batch_size, num_slots), rules.pad_token_id, jnp.int32),
        last=prompt.input_ids[:, -1],
        position=prompt.position_ids[:, -1],
        step=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros(batch_size, jnp.int32),
        ended=jnp.zeros(batch_size, bool),
    )
    return _choose(model, state, output.logits[:, -1], rules)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: Any,
    params: Params,
    state: DecodeState,
    rules: Rules,
    stopped: Bool[Array, " B"],
    limit: Int[Array, ""],
) -> DecodeState:
    """Adds tokens until all rows have ended or there are ``limit`` new tokens, on the device alone.

    Args:
        state: from `prefill` or from the last call; its memory is reused.
        stopped: rows that the host has ended.
        limit: at most the cache's slots less those of the prompt, plus 1.
    """

    def goes_on(state: DecodeState) -> Array:
        return (state.step < limit) & ~jnp.all(state.ended)

    def add_token(state: DecodeState) -> DecodeState:
        position = state.position + 1
        output = model.apply(
            {"params": params},
            input_ids=state.last[:, None],
            attention_mask=state.attention_mask,
            position_ids=position[:, None],
            cross_attention_mask=state.cross_attention_mask,
            past_key_values=state.cache,
            use_cache=True,
        )
        state = replace(state, cache=output.past_key_values, position=position)
        return _choose(model, state, output.logits[:, -1], rules)

    state = replace(state, ended=state.ended | stopped)
    return jax.lax.while_loop(goes_on, add_token, state)


def _choose(
    model: Any, state: DecodeState, logits: Float[Array, "B W"], rules: Rules
) -> DecodeState:
    """Chooses every row's next token and writes it down."""
    # A draw goes over a row's logits many times: each row is drawn on one device.
    logits = constrain(logits, model.mesh, "sampled", None)
    too_early = rules.is_end & (state.step < rules.min_new_tokens)
    keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, state.step)
    chosen = sample(keys, jnp.where(too_early, -jnp.inf, logits), rules.sampling)
    token = jnp.where(state.ended, rules.pad_token_id, chosen)
    state = replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        last=token,
        step=state.step + 1,
        lengths=state.lengths + ~state.ended,
        ended=state.ended | rules.is_end[token],
    )

    def whole(small: Array) -> Array:
        return constrain(small, model.mesh, *[None] * small.ndim)

    # The host of every process looks at all of the state but the cache.
    rest = {field.name: getattr(state, field.name) for field in fields(state)}
    cache = rest.pop("cache").split_over(model.mesh)
    return DecodeState(cache=cache, **jax.tree.map(whole, rest))

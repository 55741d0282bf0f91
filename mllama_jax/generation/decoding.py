"""The compiled programs of generation, and the bounded set of shapes that they are compiled for.

pictures → `encode_pictures` → `prefill` → `decode`, as often as the host wants to look

Rows of a batch end at the same slot: prompts stand at the right end of a bucket of slots, whatever
side they were padded on, and all rows write their next token to the same slot.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mllama_jax.cache import MllamaCache
from mllama_jax.generation.sampling import SamplingParams, sample
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array, Bool, Float, Int

__all__ = [
    "IMAGE_BUCKETS",
    "LENGTH_BUCKETS",
    "PICTURE_BATCHES",
    "DecodeState",
    "Prompt",
    "Rules",
    "bucket",
    "decode",
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

    Args:
        pixel_values, aspect_ratio_ids, aspect_ratio_mask: (B, M, …), as in `model.encode_images`.
        wanted: (B, M) bool, at least one of them True.
        num_images: image slots of each sample of the result, M or more.

    Returns:
        (B, num_images * L * P, D).
    """
    batch_size = len(wanted)
    rows, images = np.nonzero(wanted)
    slots = rows * num_images + images
    states = None
    for start in range(0, len(rows), PICTURE_BATCHES[-1]):
        chosen = slice(start, start + PICTURE_BATCHES[-1])
        size = bucket(len(rows[chosen]), PICTURE_BATCHES)

        def pick(values: np.ndarray, chosen: slice = chosen, size: int = size) -> np.ndarray:
            picked = values[rows[chosen], images[chosen]]
            return np.concatenate([picked, np.repeat(picked[:1], size - len(picked), axis=0)])

        mask = None if aspect_ratio_mask is None else pick(aspect_ratio_mask)[:, None]
        features = _encode(
            model, params, pick(pixel_values)[:, None], pick(aspect_ratio_ids)[:, None], mask
        )
        if states is None:
            shape = (batch_size * num_images, *features.shape[1:])
            states = jnp.zeros(shape, features.dtype)
        # What fills up a batch goes nowhere: its slot is out of range.
        places = np.full(size, len(states), np.int32)
        places[: len(slots[chosen])] = slots[chosen]
        states = _place(states, features, places)
    assert states is not None
    return states.reshape(batch_size, -1, states.shape[-1])


@partial(jax.jit, static_argnames="model")
def _encode(
    model: Any, params: Params, pixel_values: Array, ids: Array, mask: Array | None
) -> Array:
    return model.apply({"params": params}, pixel_values, ids, mask, method="encode_images")


@partial(jax.jit, donate_argnames="states")
def _place(states: Array, features: Array, places: Array) -> Array:
    return states.at[places].set(features, mode="drop")


@partial(jax.jit, static_argnames="model")
def prefill(model: Any, params: Params, prompt: Prompt, rules: Rules) -> DecodeState:
    """Reads the prompts and chooses each row's first token.

    Args:
        model: a module with `init_cache`, hashable.
    """
    batch_size, num_slots = prompt.attention_mask.shape
    output = model.apply(
        {"params": params},
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        position_ids=prompt.position_ids,
        cross_attention_states=prompt.cross_attention_states,
        cross_attention_mask=prompt.cross_attention_mask,
        past_key_values=model.init_cache(batch_size, num_slots),
        use_cache=True,
        num_logits_to_keep=1,
    )
    cross_mask = prompt.cross_attention_mask
    state = DecodeState(
        cache=output.past_key_values,
        attention_mask=prompt.attention_mask,
        cross_attention_mask=None if cross_mask is None else cross_mask[:, -1:],
        tokens=jnp.full((batch_size, num_slots), rules.pad_token_id, jnp.int32),
        last=prompt.input_ids[:, -1],
        position=prompt.position_ids[:, -1],
        step=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros(batch_size, jnp.int32),
        ended=jnp.zeros(batch_size, bool),
    )
    return _choose(state, output.logits[:, -1], rules)


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
        return _choose(state, output.logits[:, -1], rules)

    state = replace(state, ended=state.ended | stopped)
    return jax.lax.while_loop(goes_on, add_token, state)


def _choose(state: DecodeState, logits: Float[Array, "B W"], rules: Rules) -> DecodeState:
    """Chooses every row's next token and writes it down."""
    too_early = rules.is_end & (state.step < rules.min_new_tokens)
    keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, state.step)
    chosen = sample(keys, jnp.where(too_early, -jnp.inf, logits), rules.sampling)
    token = jnp.where(state.ended, rules.pad_token_id, chosen)
    return replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        last=token,
        step=state.step + 1,
        lengths=state.lengths + ~state.ended,
        ended=state.ended | rules.is_end[token],
    )

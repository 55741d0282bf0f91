"""What the engine runs on the devices: a fixed number of slots, filled and emptied one by one.

pictures → `encode` → `write_picture` → `prefill`, chunk by chunk → `start` → `decode`, some tokens
at a time

Each slot holds one request. Its text and its pictures lie at the beginning of the slot's own
cache, whatever its neighbours are doing. All programs take the slots and give them back; what a
program is compiled for are sizes out of the engine's options, never those of a request.
"""

from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mllama_jax.batch.rules import TOP_LOGPROBS, RowRules, with_guide_masks, with_row
from mllama_jax.batch.sampling import RowHistory, choose, is_end, with_prompt
from mllama_jax.batch.windows import read_window, write_window
from mllama_jax.cache import IMAGE_TOKENS_MULTIPLE, MllamaCache
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array, Bool, Float, Int, UInt
from mllama_jax.sharding import constrain

__all__ = [
    "Chunk",
    "Logprobs",
    "PromptChunk",
    "Slots",
    "decode",
    "guide",
    "prefill",
    "small_parts_whole",
    "start",
    "write_picture",
]


@struct.dataclass
class Slots:
    """Where all slots stand, B of them; donated to every program that takes it.

    Attributes:
        cache: keys and values of everything but the newest tokens; ``length`` is (B,), and image
            tokens are those of C tiles.
        tiles: (B, C) bool, the tiles that the newest token sees.
        last: (B,) int32, the newest token.
        step: (B,) int32, how many new tokens there are.
        limit: (B,) int32, how many there may be.
        active: (B,) bool; False for slots that are free, being filled or at their end.
        rules, history: of the choice of tokens.
    """

    cache: MllamaCache
    tiles: Bool[Array, "B C"]
    last: Int[Array, " B"]
    step: Int[Array, " B"]
    limit: Int[Array, " B"]
    active: Bool[Array, " B"]
    rules: RowRules
    history: RowHistory


@struct.dataclass
class PromptChunk:
    """T tokens of a prompt, and the slot that they go to.

    Attributes:
        input_ids: (1, T) int32; what stands behind ``length`` tokens is not looked at.
        next_ids: (1, T) int32, the token behind each, whose log-probability may be asked for.
        tiles: (1, T, C) bool, the tiles that each token sees.
        slot, start, length: int32; the tokens stand at ``start``, a multiple of the largest T.
    """

    input_ids: Int[Array, "1 T"]
    next_ids: Int[Array, "1 T"]
    tiles: Bool[Array, "1 T C"]
    slot: Int[Array, ""]
    start: Int[Array, ""]
    length: Int[Array, ""]


@struct.dataclass
class Logprobs:
    """Of tokens, and of the most likely ones in their place; zeros where nobody asks for them."""

    of_token: Float[Array, "B n"]
    top_ids: Int[Array, "B n top"]
    top: Float[Array, "B n top"]


@struct.dataclass
class Chunk:
    """New tokens of B slots.

    Attributes:
        packed: (B, n + 2) int32: the tokens, how many of them a slot has got, and whether it goes
            on; one array, because each that the host looks at is a journey of its own.
        logprobs: of the tokens.
    """

    packed: Int[Array, "B n+2"]
    logprobs: Logprobs


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def write_picture(
    model: Any,
    params: Params,
    slots: Slots,
    features: Float[Array, "V D"],
    slot: Int[Array, ""],
    first_tile: Int[Array, ""],
) -> Slots:
    """Writes the keys and values of a picture into a slot, from one of its tiles on.

    All tiles of the picture are written, as far as there is room; the next picture covers what its
    arrangement left empty.

    Args:
        features: (V, D), of L tiles; as `encode` gives them.
    """
    output = model.apply(
        {"params": params},
        # The compiler leaves out what only the token needs.
        input_ids=jnp.zeros((1, 1), jnp.int32),
        cross_attention_states=features[None],
        use_cache=True,
    )
    new, cache = output.past_key_values, slots.cache
    num_new = features.shape[0]
    per_tile = cache.num_image_tokens // slots.tiles.shape[1]
    # A window that does not fit behind its tile begins earlier, and leaves there what there was.
    start = jnp.minimum(first_tile * per_tile, cache.num_image_tokens - num_new)
    ahead = first_tile * per_tile - start

    def written(stack: Any, fresh: Any) -> Array:
        old = read_window(stack, slot, start, num_new, model.mesh)
        fresh = jnp.roll(fresh[:, :, :, :num_new].astype(stack.dtype), ahead, axis=3)
        keep = (jnp.arange(num_new) < ahead)[:, None]
        return write_window(stack, jnp.where(keep, old, fresh), slot, start, model.mesh)

    cache = replace(
        cache,
        cross_keys=written(cache.cross_keys, new.cross_keys),
        cross_values=written(cache.cross_values, new.cross_values),
    )
    return replace(slots, cache=cache.split_over(model.mesh))


@partial(
    jax.jit,
    static_argnames=("model", "num_tiles", "is_first", "with_prompt_logprobs"),
    donate_argnames="slots",
)
def prefill(
    model: Any,
    params: Params,
    slots: Slots,
    chunk: PromptChunk,
    *,
    num_tiles: int,
    is_first: bool,
    with_prompt_logprobs: bool,
) -> tuple[Slots, Float[Array, "1 W"], Logprobs | None]:
    """Reads a chunk of a prompt into a slot.

    Args:
        num_tiles: so many of the slot's tiles are looked at; 0 if it has no pictures.
        is_first: nothing stands before the chunk.
        with_prompt_logprobs: also return the log-probabilities of ``next_ids``.

    Returns:
        The slots, the logits behind the chunk's last token, and the log-probabilities.
    """
    T = chunk.input_ids.shape[1]
    num_slots = T if is_first else slots.cache.max_length
    past = _past(slots, chunk, num_slots, num_tiles, model.mesh)
    output = model.apply(
        {"params": params},
        input_ids=chunk.input_ids,
        past_key_values=past,
        cross_attention_mask=chunk.tiles[..., :num_tiles, None] if num_tiles else None,
        use_cache=True,
        num_logits_to_keep=0 if with_prompt_logprobs else (chunk.length - 1)[None],
    )
    logits, prompt_logprobs = output.logits, None
    if with_prompt_logprobs:
        prompt_logprobs = _raw_logprobs(logits, chunk.next_ids)
        logits = jax.lax.dynamic_slice_in_dim(logits, chunk.length - 1, 1, axis=1)

    is_prompt = jnp.arange(T) < chunk.length
    history = with_prompt(
        slots.history, chunk.slot, chunk.input_ids[0], is_prompt, chunk.start == 0
    )
    last_tiles = jax.lax.dynamic_index_in_dim(chunk.tiles[0], chunk.length - 1, keepdims=False)
    slots = replace(
        slots,
        cache=_with_tokens(slots.cache, output.past_key_values, chunk, num_slots, model.mesh),
        tiles=jax.lax.dynamic_update_index_in_dim(slots.tiles, last_tiles, chunk.slot, 0),
        active=jax.lax.dynamic_update_index_in_dim(slots.active, False, chunk.slot, 0),
        history=history,
    )
    return small_parts_whole(slots, model.mesh), logits[:, -1], prompt_logprobs


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def start(
    model: Any,
    slots: Slots,
    logits: Float[Array, "1 W"],
    slot: Int[Array, ""],
    limit: Int[Array, ""],
    rules: RowRules,
    is_eos: Bool[Array, " W"],
) -> tuple[Slots, Chunk]:
    """Chooses the first new token of a slot whose prompt has been read.

    Args:
        logits: of `prefill`.
        limit: how many new tokens there may be.
        rules: of the request, one row.
        is_eos: the model's end tokens.
    """
    token, *logprobs, history = choose(
        constrain(logits, model.mesh, None, None),
        rules,
        jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), slots.history),
        jnp.zeros(1, jnp.int32),
        jnp.ones(1, bool),
        is_eos,
    )
    goes_on = ~is_end(token, rules, is_eos)[0] & (limit > 1)

    def put(values: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(values, value, slot, 0)

    slots = replace(
        slots,
        last=put(slots.last, token[0]),
        step=put(slots.step, jnp.int32(1)),
        limit=put(slots.limit, limit),
        active=put(slots.active, goes_on),
        rules=with_row(slots.rules, slot, rules),
        history=jax.tree.map(lambda all, row: put(all, row[0]), slots.history, history),
    )
    packed = jnp.stack([token[0], jnp.int32(1), goes_on.astype(jnp.int32)])[None]
    first = Chunk(packed, Logprobs(*(x[:, None] for x in logprobs)))
    return small_parts_whole(slots, model.mesh), first


@partial(jax.jit, static_argnames=("model", "num_steps", "with_images"), donate_argnames="slots")
def decode(
    model: Any,
    params: Params,
    slots: Slots,
    is_eos: Bool[Array, " W"],
    stopped: Bool[Array, " B"],
    limit: Int[Array, ""],
    enough: Int[Array, ""],
    *,
    num_steps: int,
    with_images: bool,
) -> tuple[Slots, Chunk]:
    """Adds up to ``limit`` tokens to each active slot, on the device alone.

    Args:
        is_eos: the model's end tokens.
        stopped: slots that the host has ended.
        limit: at most ``num_steps``.
        enough: once so many slots have come to their end, the others are not gone on with.
        num_steps: columns of the result.
        with_images: False if no active slot has a picture.
    """
    B = slots.last.shape[0]
    whole_cache = slots.cache
    slots = replace(slots, active=slots.active & ~stopped)
    num_active = slots.active.sum()
    if not with_images:
        cache = replace(whole_cache, cross_keys=None, cross_values=None, num_image_tokens=0)
        slots = replace(slots, cache=cache)

    def goes_on(carry: tuple[Array, Slots, Chunk]) -> Array:
        still_active = carry[1].active.sum()
        return (carry[0] < limit) & (still_active > 0) & (num_active - still_active < enough)

    def add_token(carry: tuple[Array, Slots, Chunk]) -> tuple[Array, Slots, Chunk]:
        i, slots, chunk = carry
        was_active, length = slots.active, slots.cache.length
        output = model.apply(
            {"params": params},
            input_ids=slots.last[:, None],
            past_key_values=slots.cache,
            cross_attention_mask=slots.tiles[:, None, :, None] if with_images else None,
            use_cache=True,
        )
        token, *logprobs, history = choose(
            # Choosing goes over a row's logits many times: each row is on one device.
            constrain(output.logits[:, -1], model.mesh, "sampled", None),
            slots.rules,
            slots.history,
            slots.step,
            was_active,
            is_eos,
        )
        step = slots.step + was_active
        cache = replace(output.past_key_values, length=length + was_active)
        slots = replace(
            slots,
            cache=cache,
            last=jnp.where(was_active, token, slots.last),
            step=step,
            active=was_active & ~is_end(token, slots.rules, is_eos) & (step < slots.limit),
            history=history,
        )
        chunk = jax.tree.map(
            lambda all, new: jax.lax.dynamic_update_index_in_dim(all, new, i, 1),
            replace(chunk, packed=chunk.packed.at[:, num_steps].add(was_active)),
            Chunk(token, Logprobs(*logprobs)),
        )
        return i + 1, small_parts_whole(slots, model.mesh), chunk

    top = (B, num_steps, min(TOP_LOGPROBS, is_eos.shape[0]))
    nothing = Chunk(
        packed=jnp.zeros((B, num_steps + 2), jnp.int32),
        logprobs=Logprobs(jnp.zeros(top[:2]), jnp.zeros(top, jnp.int32), jnp.zeros(top)),
    )
    _, slots, chunk = jax.lax.while_loop(goes_on, add_token, (jnp.int32(0), slots, nothing))
    packed = chunk.packed.at[:, -1].set(slots.active)
    if not with_images:
        whole_cache = replace(
            whole_cache,
            keys=slots.cache.keys,
            values=slots.cache.values,
            length=slots.cache.length,
        )
        slots = replace(slots, cache=whole_cache)
    return slots, replace(chunk, packed=packed)


@partial(jax.jit, donate_argnames="slots")
def guide(slots: Slots, masks: UInt[Array, "B words"], rows: Bool[Array, " B"]) -> Slots:
    """Replaces what may be chosen next in the slots that ``rows`` names."""
    return replace(slots, rules=with_guide_masks(slots.rules, masks, rows))


def _raw_logprobs(logits_1TW: Array, ids_1T: Array) -> Logprobs:
    logprobs = jax.nn.log_softmax(logits_1TW.astype(jnp.float32))
    of_token = jnp.take_along_axis(logprobs, ids_1T[..., None], axis=-1)[..., 0]
    top, top_ids = jax.lax.top_k(logprobs, min(TOP_LOGPROBS, logprobs.shape[-1]))
    return Logprobs(of_token, top_ids, top)


def small_parts_whole(slots: Slots, mesh: Mesh | None) -> Slots:
    """All devices hold everything but the cache."""

    def whole(x: Array) -> Array:
        return constrain(x, mesh, *[None] * x.ndim)

    parts = {field.name: getattr(slots, field.name) for field in fields(slots)}
    cache = parts.pop("cache").split_over(mesh)
    cache = replace(cache, length=whole(cache.length))
    return Slots(cache=cache, **jax.tree.map(whole, parts))


def _past(
    slots: Slots, chunk: PromptChunk, num_slots: int, num_tiles: int, mesh: Mesh | None
) -> MllamaCache:
    """What stands before a chunk of a prompt, in a cache of its own."""
    cache = slots.cache

    def of_slot(stack: Any, size: int) -> Array:
        return read_window(stack, chunk.slot, 0, size, mesh)

    num_image_tokens = cache.num_image_tokens // slots.tiles.shape[1] * num_tiles
    room = num_image_tokens + -num_image_tokens % IMAGE_TOKENS_MULTIPLE
    return MllamaCache(
        keys=of_slot(cache.keys, num_slots),
        values=of_slot(cache.values, num_slots),
        cross_keys=of_slot(cache.cross_keys, room) if room else None,
        cross_values=of_slot(cache.cross_values, room) if room else None,
        length=chunk.start,
        num_image_tokens=num_image_tokens,
    )


def _with_tokens(
    cache: MllamaCache, row: MllamaCache, chunk: PromptChunk, num_slots: int, mesh: Mesh | None
) -> MllamaCache:
    """The cache with a slot's text as it stands after a chunk of its prompt."""
    T = chunk.input_ids.shape[1]
    first = 0 if num_slots == T else chunk.start

    def written(stack: Array, text: Array) -> Array:
        new = jax.lax.dynamic_slice_in_dim(text, first, T, axis=3)
        return write_window(stack, new, chunk.slot, chunk.start, mesh)

    length = chunk.start + chunk.length
    return replace(
        cache,
        keys=written(cache.keys, row.keys),
        values=written(cache.values, row.values),
        length=jax.lax.dynamic_update_index_in_dim(cache.length, length, chunk.slot, 0),
    )

"""What a call of the decoder gives: checked, and brought to the form that the layers take."""

import jax
import jax.numpy as jnp

from mllama_jax.cache import MllamaCache
from mllama_jax.configs import MllamaTextConfig
from mllama_jax.masks import TileMask
from mllama_jax.shapes import Array


def batch_and_length(
    input_ids: Array | None, inputs_embeds: Array | None, config: MllamaTextConfig
) -> tuple[int, int]:
    """The sizes B and T of a call; raises ValueError if it has none."""
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {input_ids.shape}, expected (batch, tokens)")
        return input_ids.shape[0], input_ids.shape[1]
    assert inputs_embeds is not None
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size:
        raise ValueError(
            f"inputs_embeds has shape {inputs_embeds.shape}, expected (batch, tokens, "
            f"hidden_size={config.hidden_size})"
        )
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def check_shape(name: str, array: Array | None, *allowed: tuple[int, ...]) -> None:
    """Raises ValueError unless the array, if given, has one of the allowed shapes."""
    if array is not None and array.shape not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")


def check_cache(cache: MllamaCache, batch_size: int, length: int, start: Array) -> None:
    """Raises ValueError if the cache is of another batch, or (outside `jax.jit`) too full."""
    if cache.keys.shape[1] != batch_size:
        raise ValueError(
            f"past_key_values holds {cache.keys.shape[1]} samples, the inputs {batch_size}"
        )
    used = 0 if isinstance(start, jax.core.Tracer) else int(start.max())
    if used + length > cache.max_length:
        raise ValueError(
            f"past_key_values has {cache.max_length} slots; {used} are used and {length} more are "
            "needed: make it larger (init_cache)"
        )


def check_segments(*, hf_masked_rows: bool, **excluded: bool) -> None:
    """Raises ValueError if packed texts are given along with what has no meaning for them.

    Args:
      hf_masked_rows: the module's.
      **excluded: arguments of the call, and whether they are given.
    """
    given = [name for name, is_given in excluded.items() if is_given]
    if given:
        raise ValueError(
            f"segment_ids and {', '.join(given)} exclude each other: packed texts are read whole, "
            "and segment 0 is padding"
        )
    if hf_masked_rows:
        raise ValueError(
            "segment_ids needs hf_masked_rows=False: with True, a token that may attend to no "
            "image attends to all images of its row, here those of other texts"
        )


def segment_positions(segment_ids_BT: Array) -> Array:
    """The place of each token in its own text, (B, T) int32."""
    places = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    before = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    starts = jnp.where(segment_ids_BT != before, places, 0)
    return places - jax.lax.cummax(starts, axis=1)


def features_of_samples(states: Array, batch_size: int, config: MllamaTextConfig) -> Array:
    """(B, V, D) image features from these, or from Hugging Face's (B*M*L, P, D)."""
    if states.ndim < 3 or states.shape[0] % batch_size or states.shape[-1] != config.hidden_size:
        raise ValueError(
            f"cross_attention_states has shape {states.shape}, expected (batch={batch_size}, image "
            f"tokens, hidden_size={config.hidden_size}) or (batch * images * tiles, patches, "
            "hidden_size)"
        )
    return states.reshape(batch_size, -1, config.hidden_size)


def check_room_for_images(cache: MllamaCache, num_image_tokens: int) -> None:
    """Raises ValueError if the cache holds other images than these."""
    if cache.num_image_tokens not in (0, num_image_tokens):
        raise ValueError(
            f"past_key_values holds {cache.num_image_tokens} image tokens a sample, the new images "
            f"have {num_image_tokens}: images are given once, at the start"
        )


def valid_slots(attention_mask: Array | None, batch_size: int, num_slots: int) -> Array:
    """(B, slots) bool: False for padding; slots beyond the mask count as tokens."""
    if attention_mask is None:
        return jnp.ones((batch_size, num_slots), bool)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask has shape {attention_mask.shape}, expected (batch={batch_size}, "
            "tokens)"
        )
    missing = num_slots - attention_mask.shape[1]
    if missing < 0:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, there are {num_slots} slots"
        )
    return jnp.pad(attention_mask != 0, ((0, 0), (0, missing)), constant_values=True)


def tile_mask(
    mask: Array | None,
    batch_size: int,
    length: int,
    num_image_tokens: int,
    cache_position: Array | None,
    hf_masked_rows: bool,
) -> tuple[TileMask | None, Array | None]:
    """The tile mask of the layers, and which tokens may attend to some tile."""
    if mask is None or num_image_tokens == 0:
        return None, None
    if mask.ndim == 4 and mask.shape[1] != length and cache_position is not None:
        mask = mask[:, cache_position]
    num_tiles = mask.shape[-1] * mask.shape[-2] if mask.ndim == 4 else 0
    if mask.shape[:2] != (batch_size, length) or not num_tiles or num_image_tokens % num_tiles:
        raise ValueError(
            f"cross_attention_mask has shape {mask.shape}, expected (batch={batch_size}, tokens="
            f"{length}, images, tiles) with {num_image_tokens} image tokens a sample"
        )
    tiles_BTL = mask.reshape(batch_size, length, num_tiles) != 0
    sees_image_BT = tiles_BTL.any(-1)
    if hf_masked_rows:
        tiles_BTL = tiles_BTL | ~sees_image_BT[..., None]
    return TileMask(tiles_BTL, num_image_tokens // num_tiles), sees_image_BT

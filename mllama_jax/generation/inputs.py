"""The inputs of `generate`: checked, then brought to the shapes that programs are compiled for."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mllama_jax.configs import MllamaConfig, MllamaTextConfig
from mllama_jax.generation.decoding import (
    IMAGE_BUCKETS,
    LENGTH_BUCKETS,
    Prompt,
    bucket,
    encode_pictures,
)
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array
from mllama_jax.sharding import place
from mllama_jax.text import GenerativeModule

__all__ = ["Images", "Text", "check_images", "check_text", "host_arrays", "make_prompt"]


@dataclass(frozen=True)
class Text:
    """Prompts as they were given.

    Attributes:
        input_ids: (B, T) int32.
        mask: (B, T) bool, True for tokens; in each row they stand without a gap.
    """

    input_ids: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Images:
    """Pictures, or image features (``states``), of a batch.

    Attributes:
        pixel_values: (B, M, L, C, h, w).
        aspect_ratio_ids: (B, M).
        aspect_ratio_mask: (B, M, L).
        states: (B, V, D), with V divisible by M * L of ``mask``.
        mask: (B, T, M, L) bool, which tiles each token may attend to.
    """

    mask: np.ndarray
    pixel_values: np.ndarray | None = None
    aspect_ratio_ids: np.ndarray | None = None
    aspect_ratio_mask: np.ndarray | None = None
    states: Array | None = None


def check_text(
    config: MllamaTextConfig, input_ids: Any, attention_mask: Any, pad_token_id: int | None
) -> Text:
    """The prompts as arrays of the host.

    Raises:
        ValueError: shapes are wrong; an id is not in the vocabulary; a row has no token, or padding
            between tokens; there is padding, but no mask.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(
            f"input_ids is {ids.dtype} of shape {ids.shape}, expected integers (batch, tokens), "
            "neither of them 0"
        )
    outside = np.argwhere((ids < 0) | (ids >= config.num_embeddings))
    if len(outside):
        row, column = outside[0]
        raise ValueError(
            f"input_ids[{row}, {column}] is {ids[row, column]}, but the model has "
            f"{config.num_embeddings} token embeddings"
        )
    if attention_mask is None:
        if pad_token_id is not None and (ids[:, [0, -1]] == pad_token_id).any():
            raise ValueError(
                f"input_ids begins or ends with pad_token_id={pad_token_id}, but there is no "
                "attention_mask: give the one that the processor returned"
            )
        return Text(ids.astype(np.int32), np.ones(ids.shape, bool))
    mask = np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, input_ids {ids.shape}")
    first, length = mask.argmax(1), mask.sum(1)
    columns = np.arange(ids.shape[1])
    gapless = (columns >= first[:, None]) & (columns < (first + length)[:, None])
    for row in range(len(ids)):
        if not length[row]:
            raise ValueError(f"row {row} has no tokens: attention_mask is 0 everywhere")
        if (mask[row] != gapless[row]).any():
            raise ValueError(
                f"row {row} of attention_mask has zeros between ones; padding must be on the left "
                "or on the right"
            )
    return Text(ids.astype(np.int32), mask)


def check_images(
    model: GenerativeModule,
    text: Text,
    *,
    pixel_values: Any,
    aspect_ratio_ids: Any,
    aspect_ratio_mask: Any,
    cross_attention_mask: Any,
    cross_attention_states: Any,
) -> Images | None:
    """The pictures or image features; None if there are none.

    Raises:
        ValueError: arguments exclude each other, one is missing, or shapes disagree.
    """
    given = {
        "aspect_ratio_ids": aspect_ratio_ids,
        "aspect_ratio_mask": aspect_ratio_mask,
        "cross_attention_mask": cross_attention_mask,
    }
    if pixel_values is not None:
        if not isinstance(model.config, MllamaConfig):
            raise ValueError(
                f"{type(model).__name__} has no vision encoder: use MllamaForConditionalGeneration "
                "for pixel_values, or give cross_attention_states"
            )
        if cross_attention_states is not None:
            raise ValueError("pixel_values and cross_attention_states exclude each other")
        if aspect_ratio_ids is None:
            raise ValueError("pixel_values needs aspect_ratio_ids")
        return _pictures(model.config, text, pixel_values, **given)
    if cross_attention_states is not None:
        return _features(model.text_config, text, cross_attention_states, cross_attention_mask)
    alone = [name for name, value in given.items() if value is not None]
    if alone:
        raise ValueError(f"{alone[0]} was given without pixel_values or cross_attention_states")
    return None


def _pictures(
    config: MllamaConfig,
    text: Text,
    pixel_values: Any,
    aspect_ratio_ids: Any,
    aspect_ratio_mask: Any,
    cross_attention_mask: Any,
) -> Images:
    vision = config.vision_config
    pixels, ids = np.asarray(pixel_values), np.asarray(aspect_ratio_ids)
    batch_size = len(text.input_ids)
    tile = (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)
    if pixels.ndim != 6 or len(pixels) != batch_size or pixels.shape[2:] != tile:
        raise ValueError(
            f"pixel_values has shape {pixels.shape}, expected (batch={batch_size}, images, tiles="
            f"{tile[0]}, channels={tile[1]}, height={tile[2]}, width={tile[3]})"
        )
    images = pixels.shape[:3]
    if ids.shape != images[:2]:
        raise ValueError(
            f"aspect_ratio_ids has shape {ids.shape}, expected {images[:2]} to match pixel_values"
        )
    tiles = None if aspect_ratio_mask is None else np.asarray(aspect_ratio_mask)
    if tiles is not None and tiles.shape != images:
        raise ValueError(
            f"aspect_ratio_mask has shape {tiles.shape}, expected {images} to match pixel_values"
        )
    shape = (*text.input_ids.shape, *images[1:])
    mask = np.ones(shape, bool)
    if cross_attention_mask is not None:
        mask = np.asarray(cross_attention_mask) != 0
    if mask.shape != shape:
        raise ValueError(
            f"cross_attention_mask has shape {mask.shape}, expected {shape} to match input_ids and "
            "pixel_values"
        )
    return Images(mask, pixels, ids, tiles)


def _features(
    config: MllamaTextConfig, text: Text, states: Any, cross_attention_mask: Any
) -> Images:
    batch_size, length = text.input_ids.shape
    if states.ndim < 3 or states.shape[0] % batch_size or states.shape[-1] != config.hidden_size:
        raise ValueError(
            f"cross_attention_states has shape {states.shape}, expected (batch={batch_size}, image "
            f"tokens, hidden_size={config.hidden_size})"
        )
    states = states.reshape(batch_size, -1, config.hidden_size)
    mask = np.ones((batch_size, length, 1, 1), bool)
    if cross_attention_mask is not None:
        mask = np.asarray(cross_attention_mask) != 0
    fits = mask.ndim == 4 and mask.shape[:2] == text.input_ids.shape
    num_tiles = mask.shape[-2] * mask.shape[-1] if fits else 0
    if not num_tiles or states.shape[1] % num_tiles:
        raise ValueError(
            f"cross_attention_mask has shape {mask.shape}, expected (batch={batch_size}, tokens="
            f"{length}, images, tiles) with {states.shape[1]} image tokens a sample"
        )
    return Images(mask, states=states)


def host_arrays(images: Images | None) -> list[np.ndarray]:
    """What of the pictures or features lies in this process's memory."""
    values = [] if images is None else list(vars(images).values())
    return [value for value in values if isinstance(value, np.ndarray)]


def make_prompt(
    model: GenerativeModule, params: Params, text: Text, images: Images | None, max_new_tokens: int
) -> Prompt:
    """Encodes the pictures and moves the prompts to the right end of a bucket of slots."""
    lengths = text.mask.sum(1)
    num_prompt_slots = bucket(int(lengths.max()), LENGTH_BUCKETS)
    # The last new token is never read, so it needs no slot.
    num_slots = bucket(num_prompt_slots + max_new_tokens - 1, LENGTH_BUCKETS)
    start = num_prompt_slots - lengths[:, None]
    slots = np.arange(num_slots)
    source = slots[:num_prompt_slots] - start + text.mask.argmax(1)[:, None]
    is_token = slots[:num_prompt_slots] >= start

    def align(values: np.ndarray) -> Array:
        extra = tuple(range(2, values.ndim))
        aligned = np.take_along_axis(values, np.expand_dims(np.maximum(source, 0), extra), axis=1)
        aligned = np.where(np.expand_dims(is_token, extra), aligned, 0)
        return whole(aligned)

    def whole(values: np.ndarray) -> Array:
        return place(values.astype(np.int32), model.mesh)

    states = mask = None
    if images is not None:
        states, mask = _image_states(model, params, images)
    return Prompt(
        input_ids=align(text.input_ids),
        position_ids=whole(np.maximum(slots[:num_prompt_slots] - start, 0)),
        attention_mask=whole(slots >= start),
        cross_attention_states=states,
        cross_attention_mask=None if mask is None else align(mask),
    )


def _image_states(
    model: GenerativeModule, params: Params, images: Images
) -> tuple[Array | None, np.ndarray | None]:
    """Image features and their mask, for a number of images out of `IMAGE_BUCKETS`.

    Pictures that no token may attend to are left out. Only where fully masked rows attend to
    everything (``hf_masked_rows``) they matter, and so does the number of images.
    """
    wanted = np.any(images.mask, axis=(1, 3))
    num_images = wanted.shape[1]
    if model.hf_masked_rows:
        wanted = np.ones_like(wanted)
    elif not wanted.any():
        return None, None
    else:
        num_images = bucket(num_images, IMAGE_BUCKETS)
    missing = num_images - wanted.shape[1]
    mask = np.pad(images.mask, ((0, 0), (0, 0), (0, missing), (0, 0)))
    if images.states is not None:
        per_image = images.states.shape[1] // wanted.shape[1]
        states = place(images.states, model.mesh, "batch", None, None)
        return jnp.pad(states, ((0, 0), (0, missing * per_image), (0, 0))), mask
    assert images.pixel_values is not None
    assert images.aspect_ratio_ids is not None
    states = encode_pictures(
        model,
        params,
        images.pixel_values,
        images.aspect_ratio_ids,
        images.aspect_ratio_mask,
        wanted,
        num_images,
    )
    return states, mask

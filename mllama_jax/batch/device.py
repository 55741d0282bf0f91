"""The engine's devices: the slots, the encoded pictures, and the programs that work on them."""

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllama_jax.batch.options import EngineOptions
from mllama_jax.batch.prepare import PreparedPicture
from mllama_jax.batch.programs import (
    Chunk,
    PromptChunk,
    Slots,
    decode,
    guide,
    prefill,
    write_picture,
)
from mllama_jax.batch.rules import blank_rules
from mllama_jax.batch.sampling import RowHistory
from mllama_jax.batch.sequences import Sequence as Answering
from mllama_jax.cache import MllamaCache
from mllama_jax.generation.decoding import bucket, encode
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array
from mllama_jax.sharding import num_parts, place

__all__ = ["Device"]


class Device:
    """Dispatches programs; returns before the devices have computed anything.

    Args:
        model, params: with its own mesh, if it has one.
        options: sizes.
        end_tokens: the model's.

    Attributes:
        pictures_encoded, pictures_reused: so far.
    """

    def __init__(
        self, model: Any, params: Params, options: EngineOptions, end_tokens: Collection[int]
    ):
        # The generation configuration is none of the compiled programs' business.
        self._model = model.clone(generation_config=None)
        self._params = params
        self._options = options
        self._vocab_size = model.text_config.vocab_size
        is_eos = np.zeros(self._vocab_size, bool)
        is_eos[[token for token in end_tokens if token < self._vocab_size]] = True
        self._is_eos = place(is_eos, model.mesh)
        self._slots = _empty_slots(self._model, options)
        self._features: OrderedDict[bytes, Array] = OrderedDict()
        self._programs: set[tuple[Any, ...]] = set()
        self.pictures_encoded = 0
        self.pictures_reused = 0

    @property
    def num_programs(self) -> int:
        """Programs that were compiled."""
        return len(self._programs)

    def encode(self, pictures: Sequence[PreparedPicture]) -> None:
        """Runs the vision encoder over the pictures that it has not seen lately."""
        missing = {p.key: p for p in pictures if p.key not in self._features}
        self.pictures_encoded += len(missing)
        self.pictures_reused += len(pictures) - len(missing)
        # Devices that hold different samples encode pictures of their own.
        groups = num_parts("batch", 0, self._model.mesh)
        sizes = [groups * size for size in self._options.pictures_at_once]
        left = list(missing.values())
        while left:
            size = max((s for s in sizes if s <= len(left)), default=sizes[0])
            now, left = left[:size], left[size:]
            self._encode(now, size)
        for picture in pictures:
            self._features.move_to_end(picture.key)

    def _encode(self, pictures: list[PreparedPicture], size: int) -> None:
        self._programs.add(("encode", size))
        filled = pictures + pictures[-1:] * (size - len(pictures))
        pixels = np.stack([p.pixel_values[None] for p in filled])
        ids = np.array([[p.aspect_ratio_id] for p in filled], np.int32)
        num_tiles = pixels.shape[2]
        tiles = np.array([[np.arange(num_tiles) < p.num_tiles] for p in filled], np.int32)
        mesh = self._model.mesh
        placed = (place(x, mesh, "batch", *[None] * (x.ndim - 1)) for x in (pixels, ids, tiles))
        features = encode(self._model, self._params, *placed)
        for i, picture in enumerate(pictures):
            self._features[picture.key] = _one(features, i)

    def forget_pictures(self) -> None:
        """Keeps no more encoded pictures than the options say."""
        while len(self._features) > self._options.pictures_kept:
            self._features.popitem(last=False)

    def write_pictures(self, slot: int, pictures: Sequence[PreparedPicture]) -> None:
        """Puts encoded pictures into a slot, one behind the other."""
        first_tile = 0
        for picture in pictures:
            self._programs.add(("write_picture",))
            self._slots = write_picture(
                self._model,
                self._params,
                self._slots,
                self._features[picture.key],
                *self._placed(np.int32(slot), np.int32(first_tile)),
            )
            first_tile += picture.num_tiles

    def prefill(self, slot: int, answer: Answering) -> Chunk:
        """Reads the next chunk of an answer's prompt; with the last one comes the first token."""
        prepared, start = answer.job.prepared, answer.position
        lengths = self._options.prompt_lengths
        size = min(len(prepared.input_ids) - start, lengths[-1])
        T = bucket(size, lengths) if start == 0 else lengths[-1]
        end = start + size
        ids = np.pad(prepared.input_ids[start:end], (0, T - size))
        next_ids = np.pad(prepared.input_ids[start + 1 : end + 1], (0, T))[:T]
        num_tiles = sum(picture.num_tiles for picture in prepared.pictures)
        static = {
            "num_tiles": bucket(num_tiles, self._options.tile_counts) if num_tiles else 0,
            "is_first": start == 0,
            "with_prompt_logprobs": answer.job.wants_prompt_logprobs and answer.index == 0,
        }
        self._programs.add(("prefill", T, *static.values()))
        fields: dict[str, Any] = {
            "input_ids": ids[None].astype(np.int32),
            "next_ids": np.minimum(next_ids, self._vocab_size - 1)[None].astype(np.int32),
            "tiles": self._tiles(prepared, start, T)[None],
            "slot": np.int32(slot),
            "start": np.int32(start),
            "length": np.int32(size),
            "limit": np.int32(answer.limit),
            "is_last": np.bool_(end == len(prepared.input_ids)),
        }
        self._slots, first, prompt_logprobs = prefill(
            self._model,
            self._params,
            self._slots,
            *self._placed(PromptChunk(**fields), answer.rules),
            self._is_eos,
            **static,
        )
        answer.position = end
        if prompt_logprobs is not None:
            answer.job.prompt_logprobs.append((prompt_logprobs, size))
        return first

    def _tiles(self, prepared: Any, start: int, T: int) -> np.ndarray:
        """(T, C) bool: the tiles of the slot that each token of a chunk sees."""
        tiles = np.zeros((T, self._options.max_tiles), bool)
        first_tile = 0
        for picture, (first, behind) in zip(prepared.pictures, prepared.spans, strict=True):
            rows = slice(max(first - start, 0), max(behind - start, 0))
            tiles[rows, first_tile : first_tile + picture.num_tiles] = True
            first_tile += picture.num_tiles
        return tiles

    def decode(self, owners: Mapping[int, Answering], *, one_step: bool) -> Chunk:
        """New tokens of the slots that have an owner; all others are ended."""
        options = self._options
        guides = {slot: a.guide for slot, a in owners.items() if a.guide is not None}
        if guides:
            self._guide(guides)
        stopped = np.ones(options.num_slots, bool)
        stopped[list(owners)] = False
        with_images = any(answer.job.prepared.pictures for answer in owners.values())
        self._programs.add(("decode", with_images))
        self._slots, chunk = decode(
            self._model,
            self._params,
            self._slots,
            self._is_eos,
            *self._placed(stopped, np.int32(1 if one_step else options.decode_steps)),
            num_steps=options.decode_steps,
            with_images=with_images,
        )
        return chunk

    def _guide(self, guides: Mapping[int, Any]) -> None:
        self._programs.add(("guide",))
        num_slots = self._options.num_slots
        masks = np.zeros((num_slots, math.ceil(self._vocab_size / 32)), np.uint32)
        rows = np.zeros(num_slots, bool)
        for slot, guiding in guides.items():
            masks[slot], rows[slot] = guiding.mask(), True
        self._slots = guide(self._slots, *self._placed(masks, rows))

    def _placed(self, *values: Any) -> tuple[Any, ...]:
        """Small arrays of the host on all devices."""
        return jax.tree.map(lambda x: place(x, self._model.mesh), values)


@jax.jit
def _one(features: Array, i: Array | int) -> Array:
    return jax.lax.dynamic_index_in_dim(features, i, keepdims=False)


def _empty_slots(model: Any, options: EngineOptions) -> Slots:
    num_slots, vocab_size = options.num_slots, model.text_config.vocab_size
    tokens = options.max_tiles * model.config.vision_config.num_patches

    @jax.jit
    def empty() -> Slots:
        def none() -> Array:
            return jnp.zeros(num_slots, jnp.int32)

        cache = MllamaCache.create(
            model.text_config, num_slots, options.max_length, tokens, jnp.dtype(model.dtype)
        )
        return Slots(
            cache=replace(cache, length=none()).split_over(model.mesh),
            tiles=jnp.zeros((num_slots, options.max_tiles), bool),
            last=none(),
            step=none(),
            limit=none(),
            active=jnp.zeros(num_slots, bool),
            rules=jax.tree.map(jnp.asarray, blank_rules(num_slots, vocab_size)),
            history=RowHistory.blank(num_slots, vocab_size),
        )

    return empty()

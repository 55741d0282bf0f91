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
from mllama_jax.batch.pinning import pinned_programs
from mllama_jax.batch.prepare import PreparedPicture
from mllama_jax.batch.programs import Chunk, Logprobs, PromptChunk, Slots
from mllama_jax.batch.requests import SamplingOptions
from mllama_jax.batch.rules import RowRules, blank_rules, make_row_rules
from mllama_jax.batch.sampling import RowHistory
from mllama_jax.batch.sequences import Sequence as Answering
from mllama_jax.cache import MllamaCache
from mllama_jax.generation.decoding import bucket, encode
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array
from mllama_jax.sharding import num_parts, place
from mllama_jax.tiles import computed_tiles, missing_tiles_are_alike

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
        vision = model.config.vision_config
        if options.max_tiles < vision.max_num_tiles:
            raise ValueError(
                f"max_tiles={options.max_tiles}: a picture alone may have {vision.max_num_tiles}"
            )
        # The generation configuration is none of the compiled programs' business.
        self._model = model.clone(generation_config=None)
        self._params = params
        self._options = options
        self._vocab_size = model.text_config.vocab_size
        is_eos = np.zeros(self._vocab_size, bool)
        is_eos[[token for token in end_tokens if token < self._vocab_size]] = True
        self._is_eos = place(is_eos, model.mesh)
        self._slots = empty_slots(self._model, options)
        self._run = pinned_programs(self._slots)
        # Missing tiles of a picture then need to be computed only once.
        self._alike = missing_tiles_are_alike(vision, params["vision_model"])
        self._features: OrderedDict[bytes, Array] = OrderedDict()
        self._programs: set[tuple[Any, ...]] = set()
        self.pictures_encoded = 0
        self.pictures_reused = 0

    @property
    def num_programs(self) -> int:
        """Programs that were compiled."""
        return len(self._programs)

    def warm_up(self) -> None:
        """Compiles what requests will need, but for guided ones and prompts' log-probabilities.

        What it leaves in the slots is covered by the requests that take them.
        """
        options = self._options
        vision = self._model.config.vision_config
        tile = (vision.num_channels, vision.image_size, vision.image_size)
        nothing = np.zeros((1, *tile), np.float32)
        blank = PreparedPicture(b"", nothing, aspect_ratio_id=1, num_tiles=1)
        for num_computed in {self._num_computed(n + 1) for n in range(vision.max_num_tiles)}:
            for size in self._encoder_batches:
                self._encode([blank], size, num_computed)
        self.write_pictures(0, [blank])
        self._features.clear()

        lengths = [(T, True) for T in options.prompt_lengths]
        if options.cache_length > options.prompt_lengths[-1]:
            lengths.append((options.prompt_lengths[-1], False))
        rules = make_row_rules(SamplingOptions(), self._vocab_size, default_seed=0)
        for T, is_first in lengths:
            ids = np.zeros(T, np.int32)
            no_tiles = np.zeros((T, options.max_tiles), bool)
            chunk = _prompt_chunk(ids, ids, no_tiles, slot=0, start=0)
            for num_tiles in (0, *options.tile_counts):
                logits, _ = self._prefill(chunk, num_tiles=num_tiles, is_first=is_first)
        self._start(logits, 0, 1, rules)
        self._copy_prompt(0, 0, 1)
        for with_images in (False, True):
            self._decode(np.ones(options.num_slots, bool), 1, enough=1, with_images=with_images)

    def encode(self, pictures: Sequence[PreparedPicture]) -> None:
        """Runs the vision encoder over the pictures that it has not seen lately."""
        missing = {p.key: p for p in pictures if p.key not in self._features}
        self.pictures_encoded += len(missing)
        self.pictures_reused += len(pictures) - len(missing)
        by_tiles: dict[int, list[PreparedPicture]] = {}
        for picture in missing.values():
            by_tiles.setdefault(self._num_computed(picture.num_tiles), []).append(picture)
        sizes = self._encoder_batches
        for num_computed, left in by_tiles.items():
            while left:
                size = max((size for size in sizes if size <= len(left)), default=sizes[0])
                self._encode(left[:size], size, num_computed)
                left = left[size:]
        for picture in pictures:
            self._features.move_to_end(picture.key)

    @property
    def _encoder_batches(self) -> list[int]:
        # Devices that hold different samples encode pictures of their own.
        groups = num_parts("batch", 0, self._model.mesh)
        return [groups * size for size in self._options.pictures_at_once]

    def _num_computed(self, num_tiles: int) -> int:
        """The tiles that the encoder computes for a picture of so many."""
        most: int = self._model.config.vision_config.max_num_tiles
        return computed_tiles(num_tiles, most) if self._alike else most

    def _encode(self, pictures: list[PreparedPicture], size: int, num_computed: int) -> None:
        self._programs.add(("encode", size, num_computed))
        filled = pictures + pictures[-1:] * (size - len(pictures))
        num_tiles = self._model.config.vision_config.max_num_tiles
        pixels = np.zeros((size, 1, num_tiles, *filled[0].pixel_values.shape[1:]), np.float32)
        for row, picture in zip(pixels, filled, strict=True):
            row[0, : picture.num_tiles] = picture.pixel_values
        ids = np.array([[p.aspect_ratio_id] for p in filled], np.int32)
        tiles = np.array([[np.arange(num_tiles) < p.num_tiles] for p in filled], np.int32)
        mesh = self._model.mesh
        placed = (place(x, mesh, "batch", *[None] * (x.ndim - 1)) for x in (pixels, ids, tiles))
        features = encode(self._model, self._params, *placed, num_tiles=num_computed)
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
            self._slots = self._run.write_picture(
                self._model,
                self._params,
                self._slots,
                self._features[picture.key],
                *self._placed(np.int32(slot), np.int32(first_tile)),
            )
            first_tile += picture.num_tiles

    def prefill(self, slot: int, answer: Answering) -> Chunk | None:
        """Reads the next chunk of an answer's prompt; with the last one comes the first token."""
        prepared, first = answer.job.prepared, answer.position
        lengths = self._options.prompt_lengths
        size = min(len(prepared.input_ids) - first, lengths[-1])
        T = bucket(size, lengths) if first == 0 else lengths[-1]
        end = first + size
        num_tiles = sum(picture.num_tiles for picture in prepared.pictures)
        with_logprobs = answer.job.wants_prompt_logprobs and answer.index == 0
        logits, prompt_logprobs = self._prefill(
            _prompt_chunk(
                prepared.input_ids[first:end],
                np.minimum(prepared.input_ids[first + 1 : end + 1], self._vocab_size - 1),
                self._tiles(prepared, first, T),
                slot=slot,
                start=first,
            ),
            num_tiles=bucket(num_tiles, self._options.tile_counts) if num_tiles else 0,
            is_first=first == 0,
            with_prompt_logprobs=with_logprobs,
        )
        answer.position = end
        if prompt_logprobs is not None:
            answer.job.prompt_logprobs.append((prompt_logprobs, size))
        if not answer.is_filled:
            return None
        if answer.job.options.n > 1:
            answer.job.logits = logits
        return self._start(logits, slot, answer.limit, answer.rules)

    def _prefill(
        self,
        chunk: PromptChunk,
        *,
        num_tiles: int,
        is_first: bool,
        with_prompt_logprobs: bool = False,
    ) -> tuple[Array, Logprobs | None]:
        sizes = (chunk.input_ids.shape[1], num_tiles, is_first, with_prompt_logprobs)
        self._programs.add(("prefill", *sizes))
        self._slots, logits, prompt_logprobs = self._run.prefill(
            self._model,
            self._params,
            self._slots,
            *self._placed(chunk),
            num_tiles=num_tiles,
            is_first=is_first,
            with_prompt_logprobs=with_prompt_logprobs,
        )
        return logits, prompt_logprobs

    def _start(self, logits: Array, slot: int, limit: int, rules: RowRules) -> Chunk:
        self._programs.add(("start",))
        numbers = self._placed(np.int32(slot), np.int32(limit), rules)
        self._slots, first = self._run.start(
            self._model, self._slots, logits, *numbers, self._is_eos
        )
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

    def copy_prompt(self, source: int, slot: int, answer: Answering) -> Chunk:
        """Gives a slot the prompt that another has read for the same request; then comes the first
        token."""
        logits = answer.job.logits
        assert logits is not None
        answer.position = len(answer.job.prepared.input_ids)
        self._copy_prompt(source, slot, answer.position)
        return self._start(logits, slot, answer.limit, answer.rules)

    def _copy_prompt(self, source: int, slot: int, length: int) -> None:
        self._programs.add(("copy_prompt",))
        numbers = self._placed(np.int32(source), np.int32(slot), np.int32(length))
        self._slots = self._run.copy_prompt(self._model, self._slots, *numbers)

    def decode(
        self,
        owners: Mapping[int, Answering],
        *,
        masks: Mapping[int, np.ndarray],
        one_step: bool,
        is_wanted: bool,
    ) -> Chunk:
        """New tokens of the slots that have an owner; all others are ended.

        Args:
            masks: of the guided slots, `Guide.mask`.
            is_wanted: requests wait for slots, so it ends once there are some.
        """
        if masks:
            self._guide(masks)
        stopped = np.ones(self._options.num_slots, bool)
        stopped[list(owners)] = False
        num_slots = self._options.num_slots
        return self._decode(
            stopped,
            1 if one_step else self._options.decode_steps,
            # One in many is a part of what is used well, and looking takes time.
            enough=max(1, num_slots // 8) if is_wanted else num_slots,
            with_images=any(answer.job.prepared.pictures for answer in owners.values()),
        )

    def _decode(self, stopped: np.ndarray, limit: int, *, enough: int, with_images: bool) -> Chunk:
        self._programs.add(("decode", with_images))
        self._slots, chunk = self._run.decode(
            self._model,
            self._params,
            self._slots,
            self._is_eos,
            *self._placed(stopped, np.int32(limit), np.int32(enough)),
            num_steps=self._options.decode_steps,
            with_images=with_images,
        )
        return chunk

    def _guide(self, masks: Mapping[int, np.ndarray]) -> None:
        self._programs.add(("guide",))
        num_slots = self._options.num_slots
        words = np.zeros((num_slots, math.ceil(self._vocab_size / 32)), np.uint32)
        rows = np.zeros(num_slots, bool)
        for slot, mask in masks.items():
            words[slot], rows[slot] = mask, True
        self._slots = self._run.guide(self._slots, *self._placed(words, rows))

    def _placed(self, *values: Any) -> tuple[Any, ...]:
        """Small arrays of the host on all devices."""
        return jax.tree.map(lambda x: place(x, self._model.mesh), values)


def _prompt_chunk(
    ids: np.ndarray, next_ids: np.ndarray, tiles: np.ndarray, **numbers: int
) -> PromptChunk:
    """A chunk of as many tokens as ``tiles`` has rows; fewer are filled up."""
    T = len(tiles)

    def filled(ids: np.ndarray) -> Any:
        return np.pad(ids, (0, T - len(ids)))[None].astype(np.int32)

    fields: dict[str, Any] = {name: np.int32(number) for name, number in numbers.items()}
    fields |= {"length": np.int32(len(ids)), "tiles": tiles[None]}
    return PromptChunk(input_ids=filled(ids), next_ids=filled(next_ids), **fields)


@jax.jit
def _one(features: Array, i: Array | int) -> Array:
    return jax.lax.dynamic_index_in_dim(features, i, keepdims=False)


def empty_slots(model: Any, options: EngineOptions) -> Slots:
    num_slots, vocab_size = options.num_slots, model.text_config.vocab_size
    tokens = options.max_tiles * model.config.vision_config.num_patches

    @jax.jit
    def empty() -> Slots:
        def none() -> Array:
            return jnp.zeros(num_slots, jnp.int32)

        cache = MllamaCache.create(
            model.text_config, num_slots, options.cache_length, tokens, jnp.dtype(model.dtype)
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

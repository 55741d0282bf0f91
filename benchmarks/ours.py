"""Our side of the mixed job: the engine that `mllama-jax batch` runs."""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from harness import clock
from job import read_job

from mllama_jax import MllamaForConditionalGeneration, MllamaProcessor
from mllama_jax.batch.answers import Answer
from mllama_jax.batch.device import Device
from mllama_jax.batch.engine import Engine, EngineOptions
from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.programs import Chunk
from mllama_jax.batch.requests import parse_record
from mllama_jax.flops import decoder_flops, total, vision_flops


@cache
def _loaded(folder: str) -> tuple[Any, Any, Any]:
    model, params = MllamaForConditionalGeneration.from_pretrained(folder)
    return model, params, MllamaProcessor.from_pretrained(folder)


@cache
def _engine(folder: str, pictures: str, options: str) -> Engine:
    """One for all runs, so that its programs are compiled once."""
    model, params, processor = _loaded(folder)
    sources = PictureSources(allowed_folders=(Path(pictures),))
    return Engine(model, params, processor, options=_options(options), sources=sources)


def _options(text: str) -> EngineOptions:
    """From "num_slots=8 prompt_lengths=64,128"."""
    found: dict[str, Any] = {}
    for word in text.split():
        name, value = word.split("=")
        numbers = tuple(map(int, value.split(",")))
        found[name] = (
            numbers if name in ("prompt_lengths", "tile_counts", "pictures_at_once") else numbers[0]
        )
    if "max_tiles" in found:
        found.setdefault("tile_counts", (found["max_tiles"],))
    return EngineOptions(**found)


def run(folder: str, job: str, ids: list[str] | None = None, options: str = "") -> dict[str, Any]:
    """Answers all requests."""
    engine = _engine(folder, str(Path(job).parent), options)
    engine._device._features.clear()  # pictures of an earlier run would cost nothing
    before = engine.stats
    answers = {}
    for answer in engine.run(parse_record(record) for record in read_job(job, ids)):
        if not isinstance(answer, Answer):
            raise answer.error
        [choice] = answer.choices
        found = {"tokens": choice.token_ids, "text": choice.text}
        answers[answer.prepared.request.custom_id] = found
    compiled = engine.stats.programs - before.programs
    return {"answers": answers, "compiled": compiled}


class _Timed:
    """A device that waits for each program, and adds up what it took.

    Attributes:
        seconds, calls: by program.
        work: bytes that decoding has to read, operations of the others.
    """

    def __init__(self, device: Device, options: EngineOptions):
        self._device = device
        self._options = options
        self._config = device._model.config
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.work: Counter[str] = Counter()
        self.weights = decoded_weights(device._params)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def encode(self, pictures: Any) -> None:
        known = self._device._features.keys()
        new = {p.key: p.num_tiles for p in pictures if p.key not in known}
        with _Clock(self, "encode"):
            self._device.encode(pictures)
        for num_tiles in new.values():
            self.work["encode"] += _vision_work(self._config, self._device._num_computed(num_tiles))

    def write_pictures(self, slot: int, pictures: Any) -> None:
        with _Clock(self, "write pictures"):
            self._device.write_pictures(slot, pictures)
        flops = decoder_flops(self._config, 1, 0, len(pictures))["image keys and values"]
        self.work["write pictures"] += flops.total

    def prefill(self, slot: int, answer: Any) -> Chunk:
        start = answer.position
        with _Clock(self, "prefill"):
            chunk = self._device.prefill(slot, answer)
        pictures = answer.job.prepared.pictures
        tiles = self._config.vision_config.max_num_tiles
        images = sum(picture.num_tiles for picture in pictures) / tiles
        flops = decoder_flops(
            self._config,
            1,
            answer.position - start,
            images,  # type: ignore[arg-type]
            past=start,
            new_images=False,
            logits=1,
        )
        self.work["prefill"] += total(flops)
        return chunk

    def decode(self, owners: Any, **arguments: Any) -> Chunk:
        cache = self._device._slots.cache
        with _Clock(self, "decode"):
            chunk = self._device.decode(owners, **arguments)
        counts = np.asarray(chunk.packed)[:, -2]
        steps = int(counts.max())
        self.calls["decode steps"] += steps
        self.calls["decoded tokens"] += int(counts.sum())
        used = 0
        for slot, answer in owners.items():
            own = len(answer.job.prepared.input_ids) + len(answer._tokens) + counts[slot] / 2
            tiles = sum(picture.num_tiles for picture in answer.job.prepared.pictures)
            patches = self._config.vision_config.num_patches
            used += counts[slot] * own * _token_bytes(cache.keys)
            used += counts[slot] * tiles * patches * _token_bytes(cache.cross_keys)
        self.work["decode"] += steps * self.weights + used
        return chunk


class _Clock:
    def __init__(self, timed: _Timed, name: str):
        self._timed, self._name = timed, name

    def __enter__(self) -> None:
        self._started = clock()

    def __exit__(self, *_: Any) -> None:
        device = self._timed._device
        jax.block_until_ready((device._slots, list(device._features.values())))
        self._timed.seconds[self._name] += clock() - self._started
        self._timed.calls[self._name] += 1


def _vision_work(config: Any, num_tiles: int) -> float:
    """Operations for a picture of which so many tiles are computed."""
    ratios = [(h, w) for h, w in config.vision_config.supported_aspect_ratios if h * w <= num_tiles]
    vision = replace(
        config.vision_config, max_num_tiles=num_tiles, supported_aspect_ratios=tuple(ratios)
    )
    return total(vision_flops(replace(config, vision_config=vision), 1))


def decoded_weights(params: Any) -> int:
    """Bytes of the weights that each new token reads: decoder and head, not the embedding."""
    language = params["language_model"]
    parts = (language["model"]["layers"], language["lm_head"])
    return sum(leaf.nbytes for part in parts for leaf in jax.tree.leaves(part))


def _token_bytes(keys: Any) -> int:
    """Keys and values of one token in all layers."""
    layers, _, heads, _, size = keys.shape
    return 2 * layers * heads * size * keys.dtype.itemsize


def profile(
    folder: str, job: str, ids: list[str] | None = None, options: str = ""
) -> dict[str, Any]:
    """Where the time goes if nothing overlaps: seconds, calls and work of each program."""
    engine = _engine(folder, str(Path(job).parent), options)
    device = engine._device
    timed = _Timed(device, engine.options)
    engine._device = timed  # type: ignore[assignment]
    try:
        run(folder, job, ids, options)
    finally:
        engine._device = device
    # `asdict` would count a Counter's items.
    return {"parts": dict(timed.seconds), "calls": dict(timed.calls), "work": dict(timed.work)}


TASKS = {"run": run, "profile": profile}

"""The arrays of a batch: sources → `BatchPlan` (which examples) → `Collator` (arrays) → Grain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from mllama_jax.loss import IGNORED_LABEL
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.processing.prompt_images import cross_attention_mask, image_spans
from mllama_jax.train.data.examples import Example, ExampleMaker
from mllama_jax.train.data.loading import load_pictures
from mllama_jax.train.data.packing import Row
from mllama_jax.train.data.plan import BatchPlan, PlannedBatch
from mllama_jax.train.data.records import BadRecord, Record
from mllama_jax.train.data.settings import DataConfig
from mllama_jax.train.data.sources import Sources


@dataclass(frozen=True)
class HostBatch:
    """What a process holds of a batch.

    ``arrays`` are the model's arguments and ``labels``, of this process's rows alone; integers are
    int32. ``problems`` are those of the records that nothing is learned from: all whose text is
    at fault, and those of this process's rows whose pictures are. The counts, and ``filled``, the
    share of the places for tokens that hold one, are of the whole batch.
    """

    arrays: dict[str, np.ndarray]
    problems: tuple[BadRecord, ...]
    num_examples: int
    num_tokens: int
    num_images: int
    filled: float


class Records(Protocol):
    """Conversations by number, with their pictures."""

    def record(self, index: int) -> Record: ...


class Collator:
    """Makes the arrays of some rows of a batch; only the pictures of these are read.

    Rows are padded on the right. Packed ones have ``segment_ids`` in place of ``attention_mask``.
    Of a record that can't be used there is one token that nothing is learned from, and no picture.
    """

    def __init__(
        self, processor: MllamaProcessor, records: Records, make: ExampleMaker, rows: Sequence[int]
    ):
        """Args: the processor; whose pictures are read; what makes examples; the numbers of this
        process's rows of every batch."""
        self._processor = processor
        self._records = records
        self._make = make
        self._rows = tuple(rows)
        self._pad = processor.tokenizer.pad_token_id or 0

    def __call__(self, batch: PlannedBatch) -> HostBatch:
        rows = [list(batch.rows[row]) for row in self._rows]
        problems = [example.problem for example in batch.examples if example.problem]
        arrays, num_tiles = self._pictures(rows, batch.num_images, problems)
        shape = (len(rows), batch.length)
        ids = np.full(shape, self._pad, np.int32)
        segments = np.zeros(shape, np.int32)
        labels = np.full(shape, IGNORED_LABEL, np.int32)
        spans: list[list[tuple[int, int]]] = []
        for row, examples in enumerate(rows):
            start = 0
            spans.append([])
            for segment, example in enumerate(examples, start=1):
                stop = start + len(example.ids)
                ids[row, start:stop], labels[row, start:stop] = example.ids, example.labels
                segments[row, start:stop] = segment
                # A row's only text sees its last pictures from the padding, too.
                seen = ids[row, start : stop if batch.is_packed else None]
                spans[row] += [
                    (start + first, start + end)
                    for first, end in image_spans(seen.tolist(), self._processor.image_token_id)
                ]
                start = stop
        arrays |= {"input_ids": ids, "labels": labels}
        if batch.is_packed:
            arrays["segment_ids"] = segments
        else:
            arrays["attention_mask"] = segments
        if batch.num_images:
            of_tiles = (*shape, *arrays["aspect_ratio_mask"].shape[1:])
            arrays["cross_attention_mask"] = cross_attention_mask(spans, num_tiles, of_tiles)
        num_tokens = sum(len(example.ids) for example in batch.examples)
        return HostBatch(
            arrays=narrowed(arrays),
            problems=tuple(problems),
            num_examples=len(batch.examples),
            num_tokens=num_tokens,
            num_images=sum(example.num_images for example in batch.examples),
            filled=num_tokens / (len(batch.rows) * batch.length),
        )

    def _pictures(
        self, rows: list[Row], num_images: int, problems: list[BadRecord]
    ) -> tuple[dict[str, np.ndarray], list[list[int]]]:
        """The arrays of the rows' pictures, and the number of tiles of each.

        Examples whose pictures can't be read are replaced in the lists.
        """
        if not num_images:
            return {}, []
        to_tiles = self._processor.image_processor
        slots = (len(rows), num_images, to_tiles.max_image_tiles)
        tile = (to_tiles.size or {})["height"]
        pixels: np.ndarray | None = None
        ratios, ratio_mask = np.zeros(slots[:2], np.int32), np.zeros(slots, np.int32)
        ratio_mask[..., 0] = 1  # of slots without a picture, too
        num_tiles: list[list[int]] = [[] for _ in rows]
        places = [
            (row, place) for row, examples in enumerate(rows) for place in range(len(examples))
        ]
        for row, place in places:
            example = rows[row][place]
            if not example.num_images:
                continue
            try:
                features = self._tiles(example)
            except BadRecord as problem:
                problems.append(problem)
                rows[row][place] = self._make.without(example.record, problem)
                continue
            start = len(num_tiles[row])
            found, here = features["pixel_values"], (row, slice(start, start + example.num_images))
            if pixels is None:
                pixels = np.zeros((*slots, *found.shape[3:]), found.dtype)
            pixels[here] = found[0]
            ratios[here] = features["aspect_ratio_ids"][0]
            ratio_mask[here] = features["aspect_ratio_mask"][0]
            num_tiles[row] += features["num_tiles"][0]
        if pixels is None:
            pixels = np.zeros((*slots, 3, tile, tile), np.float32)
        arrays = {
            "pixel_values": pixels,
            "aspect_ratio_ids": ratios,
            "aspect_ratio_mask": ratio_mask,
        }
        return arrays, num_tiles

    def _tiles(self, example: Example) -> Mapping[str, Any]:
        """What the image processor makes of the example's pictures.

        Raises:
            BadRecord: some of them can't be used.
        """
        to_tiles = self._processor.image_processor
        record = self._records.record(example.record)
        pictures = load_pictures(record, bool(to_tiles.do_convert_rgb))
        try:
            return to_tiles([pictures], return_tensors="np")
        except ValueError as error:
            raise BadRecord(record.where, str(error)) from None


def narrowed(features: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same arrays with integers as int32, which is what the device holds."""
    return {
        name: values.astype(np.int32, copy=False) if values.dtype.kind == "i" else values
        for name, values in features.items()
    }


def make_dataset(
    sources: Sources,
    processor: MllamaProcessor,
    config: DataConfig,
    *,
    steps: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset[HostBatch]:
    """The run's batches in order, prepared ahead by threads.

    The batches follow from the records, the settings and the seed, and are the same whatever
    `rows` are. Its iterator's state is a place in the run; with the same records and settings it
    goes on with the very batches that would have come.

    Args:
        sources: the records.
        processor: of the model that is trained.
        config: the settings.
        steps: length of the run.
        seed: decides the order.
        rows: of each batch, the rows that this process prepares; None for all.
    """
    make = ExampleMaker(processor, config)
    plan = BatchPlan(sources, make, config, steps, seed)
    rows = range(config.batch_size) if rows is None else rows
    dataset = grain.MapDataset.source(plan).map(Collator(processor, sources, make, rows))
    batches = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=plan.places_ahead)
    )
    if not config.packing:
        return batches
    # Most of the plan's places may be empty.
    options = grain.experimental.DatasetOptions(filter_warn_threshold_ratio=None)
    batches = grain.experimental.WithOptionsIterDataset(batches, options)
    return grain.experimental.LimitIterDataset(batches, steps)

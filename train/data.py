"""From records to batches: which records stand together, and the arrays that the model is given.

records → `BatchPlan` (which records) → `Collator` (arrays) → `make_dataset` (Grain, with threads)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from mllama_jax.loss import IGNORED_LABEL
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.train.config import DataConfig
from mllama_jax.train.records import DataError, Record

HostBatch = dict[str, np.ndarray]


class BatchPlan:
    """The records of each batch of a run, found from the batch's number and the seed alone.

    Every epoch has its own order. Within it, records with equally many pictures stand together, so
    that hardly any picture slot of a batch is padding, and the batches come in random order. The
    records that fill no batch at an epoch's end are left out of it; which ones changes.
    """

    def __init__(self, records: Sequence[Record], batch_size: int, num_batches: int, seed: int):
        """Args: records, how many make a batch, the length of the run in batches, and the seed."""
        if len(records) < batch_size:
            raise DataError(
                f"There are {len(records)} conversations, fewer than data.batch_size={batch_size}: "
                "lower it, or give more of them."
            )
        self._records = records
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed
        self._num_images = np.array([len(record.images) for record in records])
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros((0, 0), np.int64))

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> list[Record]:
        epoch, place = divmod(int(index), len(self._records) // self._batch_size)
        return [self._records[i] for i in self._batches(epoch)[place]]

    def _batches(self, epoch: int) -> np.ndarray:
        """Record numbers (batches, batch_size) of an epoch. The latest one is kept."""
        kept_epoch, batches = self._epoch  # read once: other threads replace the pair
        if kept_epoch != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(len(self._records))
            used = order[: len(order) // self._batch_size * self._batch_size]
            used = used[np.argsort(self._num_images[used], kind="stable")]
            batches = rng.permutation(used.reshape(-1, self._batch_size))
            self._epoch = (epoch, batches)
        return batches


class Collator:
    """Makes the model's arrays of a batch of records.

    Rows are padded on the right to the smallest of ``lengths`` that holds the longest, and
    pictures to the most of any record. Integers are int32. ``labels`` (B, T) are the ids of the
    assistant's answers, each with the tokens that end it, and -100 anywhere else.
    """

    def __init__(
        self,
        processor: MllamaProcessor,
        lengths: Sequence[int],
        date_string: str = DataConfig.date_string,
    ):
        """Args: the processor; the rising lengths in tokens that rows are padded to; today's date
        for the chat template."""
        self._processor = processor
        self._lengths = tuple(lengths)
        self._date_string = date_string

    def __call__(self, records: Sequence[Record]) -> HostBatch:
        """Raises `DataError` for a record that is too long, that the chat template does not write
        with all its pictures, or whose answers can't be found or hold no tokens.
        """
        texts = [self._text(record) for record in records]
        features = self._processor(
            images=[list(record.images) for record in records],
            text=texts,
            padding="max_length",
            max_length=self._length_for(texts, records),
            padding_side="right",
            return_tensors="np",
        )
        labels = np.full_like(features["input_ids"], IGNORED_LABEL)
        for row, record in enumerate(records):
            length = int(features["attention_mask"][row].sum())
            for start, stop in self._answers(record, texts[row]):
                # Counted from the end: BOS may have been put in front.
                span = slice(length - start, length - stop)
                labels[row, span] = features["input_ids"][row, span]
            if (labels[row] == IGNORED_LABEL).all():
                raise DataError(
                    f"{record.where}: there is nothing to learn: the assistant's answers are "
                    "empty, and the chat template ends them with no token."
                )
        return narrowed({**features, "labels": labels})

    def _text(self, record: Record) -> str:
        """The whole conversation."""
        text = self._rendered(record, record.messages)
        token = self._processor.image_token
        if text.count(token) != len(record.images):
            raise DataError(
                f"{record.where}: the chat template writes {text.count(token)} {token} for "
                f"{len(record.images)} pictures: {text!r}"
            )
        return text

    def _rendered(self, record: Record, messages: Sequence[Any], **options: Any) -> str:
        """Some of the record's messages, as the chat template writes them."""
        try:
            return self._processor.apply_chat_template(
                list(messages), date_string=self._date_string, **options
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"{record.where}: {error}") from error

    def _length_for(self, texts: Sequence[str], records: Sequence[Record]) -> int:
        bos = self._processor.bos_token
        # The processor puts BOS in front of a text without it.
        lengths = [
            len(self._encode(text)) + (bos is not None and bos not in text) for text in texts
        ]
        too_long = [
            f"{record.where}: {length} tokens"
            for record, length in zip(records, lengths, strict=True)
            if length > self._lengths[-1]
        ]
        if too_long:
            raise DataError(
                f"Conversations are longer than the longest of data.lengths, {self._lengths[-1]}; "
                "shorten them or add a length:\n  " + "\n  ".join(too_long)
            )
        return next(length for length in self._lengths if length >= max(lengths))

    def _answers(self, record: Record, text: str) -> list[tuple[int, int]]:
        """Where the assistant's answers start and stop, in tokens from the end of the row.

        A conversation up to an answer's header must be a prefix of the whole one, in text and in
        ids: what training sees is then what generating from such a prompt sees.
        """
        ids = self._encode(text)
        spans = []
        for index, message in enumerate(record.messages):
            if message["role"] != "assistant":
                continue
            edges = []
            for messages, opens in (
                (record.messages[:index], True),
                (record.messages[: index + 1], False),
            ):
                part = (
                    self._rendered(record, messages, add_generation_prompt=opens)
                    if messages
                    else ""
                )
                part_ids = self._encode(part)
                if not text.startswith(part) or ids[: len(part_ids)] != part_ids:
                    raise DataError(
                        f"{record.where}: messages[{index}]: the chat template writes the "
                        "conversation up to here differently when more follows, so the answer's "
                        f"tokens can't be told apart. Whole: {text!r}; up to here: {part!r}"
                    )
                edges.append(len(ids) - len(part_ids))
            spans.append((edges[0], edges[1]))
        return spans

    def _encode(self, text: str) -> list[int]:
        return self._processor.tokenizer.encode(text, add_special_tokens=False)


def narrowed(features: Mapping[str, Any]) -> HostBatch:
    """The same arrays with integers as int32, which is what the device holds."""
    return {
        name: values.astype(np.int32) if values.dtype.kind == "i" else values
        for name, values in features.items()
    }


def make_dataset(
    records: Sequence[Record],
    processor: MllamaProcessor,
    config: DataConfig,
    *,
    steps: int,
    seed: int,
) -> grain.IterDataset:
    """The run's batches in order, prepared ahead by threads.

    Its iterator's state is a place in the run; with the same records and settings it goes on with
    the very batches that would have come.
    """
    plan = BatchPlan(records, config.batch_size, steps, seed)
    dataset = grain.MapDataset.source(plan).map(
        Collator(processor, config.lengths, config.date_string)
    )
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * config.threads)
    )

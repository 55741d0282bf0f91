"""Answers to held-out questions, compared word for word."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.pretrained import Params
from mllama_jax.processing.batch_feature import BatchFeature
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.train.config import DataConfig, EvaluationConfig
from mllama_jax.train.data.loading import load_pictures
from mllama_jax.train.data.records import BadRecord, Record


@dataclass(frozen=True)
class Answer:
    """What the model said to a record's question."""

    record: Record
    text: str

    @property
    def is_right(self) -> bool:
        """Whether it is the record's answer, but for space around it."""
        return self.text == self.record.answer.strip()


def answer_records(
    model: MllamaForConditionalGeneration,
    params: Params,
    processor: MllamaProcessor,
    records: Sequence[Record],
    config: EvaluationConfig,
    date_string: str = DataConfig.date_string,
    is_stopped: Callable[[], bool] = lambda: False,
    problems: list[BadRecord] | None = None,
) -> list[Answer]:
    """The model's greedy answers to the records' questions, in the records' order.

    Of more than `config.limit` records, so many are asked, evenly spread. The chat template is told
    that `date_string` is today's date. There are no answers at all if `is_stopped` says so between
    two batches.

    Args:
        problems: gets those of records whose pictures can't be read, which are not asked then.

    Raises:
        BadRecord: pictures can't be read, and there is no list for their problems.
    """
    asked = chosen(records, config.limit)
    # Equally many pictures stand together, so that few picture slots are padding.
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].images))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), config.batch_size):
        if is_stopped():
            return []
        chunk = order[start : start + config.batch_size]
        pictures = _pictures(processor, [asked[i] for i in chunk], problems)
        batch = [i for i, found in zip(chunk, pictures, strict=True) if found is not None]
        if not batch:
            continue
        images = [found for found in pictures if found is not None]
        # Where some are left, one question is asked again, for the sake of the shape.
        filled = batch + batch[-1:] * (config.batch_size - len(batch))
        images += images[-1:] * (config.batch_size - len(batch))
        inputs = _prompts(processor, [asked[i] for i in filled], images, date_string)
        output = model.generate(
            params, **inputs, do_sample=False, max_new_tokens=config.max_new_tokens
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        for i, text in zip(batch, texts, strict=False):
            answers[i] = Answer(asked[i], text)
    return [answers[i] for i in sorted(answers)]


def _pictures(
    processor: MllamaProcessor, records: Sequence[Record], problems: list[BadRecord] | None
) -> list[list[Any] | None]:
    """Each record's pictures; None where they can't be read, by any process of a job."""
    found: list[list[Any] | None] = []
    for record in records:
        try:
            found.append(load_pictures(record, bool(processor.image_processor.do_convert_rgb)))
        except BadRecord as problem:
            if problems is None:
                raise
            problems.append(problem)
            found.append(None)
    if problems is None or jax.process_count() == 1:
        return found
    is_read = np.array([pictures is not None for pictures in found])
    everywhere = multihost_utils.process_allgather(is_read).all(0)
    return [pictures if good else None for pictures, good in zip(found, everywhere, strict=True)]


def chosen(records: Sequence[Record], limit: int | None) -> list[Record]:
    """At most `limit` of the records, evenly spread; None means all."""
    if limit is None or limit >= len(records):
        return list(records)
    return [records[i] for i in np.linspace(0, len(records) - 1, limit).round().astype(int)]


def _prompts(
    processor: MllamaProcessor,
    records: Sequence[Record],
    images: Sequence[Sequence[Any]],
    date_string: str,
) -> BatchFeature:
    texts = [
        processor.apply_chat_template(
            list(record.question), add_generation_prompt=True, date_string=date_string
        )
        for record in records
    ]
    return processor(images=images, text=texts, padding=True, return_tensors="np")


@dataclass(frozen=True)
class Score:
    """How many answers to one kind of question are right."""

    kind: str
    asked: int
    right: int

    @property
    def accuracy(self) -> float:
        """From 0 to 1; NaN if nothing was asked."""
        return self.right / self.asked if self.asked else float("nan")


def scores(answers: Sequence[Answer]) -> list[Score]:
    """A score for each kind, in order of first appearance, and one named "all" at the end."""
    asked = Counter(answer.record.kind for answer in answers)
    right = Counter(answer.record.kind for answer in answers if answer.is_right)
    by_kind = [Score(kind, asked[kind], right[kind]) for kind in asked if kind != "all"]
    return [*by_kind, Score("all", asked.total(), right.total())]


def table(results: Sequence[Score]) -> str:
    """The scores as lines of text."""
    width = max(len("kind"), *(len(score.kind) for score in results))
    return "\n".join(_lines(results, width))


def _lines(results: Sequence[Score], width: int) -> Iterator[str]:
    yield f"{'kind':<{width}}  {'asked':>6}  {'right':>6}  {'accuracy':>8}"
    for score in results:
        yield f"{score.kind:<{width}}  {score.asked:>6}  {score.right:>6}  {score.accuracy:>8.1%}"

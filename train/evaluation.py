"""Answers to held-out questions, compared word for word."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.pretrained import Params
from mllama_jax.processing.batch_feature import BatchFeature
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.train.config import DataConfig, EvaluationConfig
from mllama_jax.train.data.pictures import readable
from mllama_jax.train.data.records import Record


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
) -> list[Answer]:
    """The model's greedy answers to the records' questions, in the records' order.

    Of more than `config.limit` records, so many are asked, evenly spread. The chat template is told
    that `date_string` is today's date. There are no answers at all if `is_stopped` says so between
    two batches.
    """
    asked = chosen(records, config.limit)
    # Equally many pictures stand together, so that few picture slots are padding.
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].images))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), config.batch_size):
        if is_stopped():
            return []
        batch = order[start : start + config.batch_size]
        # The last batch is filled up with one question again, for the sake of its shape.
        filled = batch + batch[-1:] * (config.batch_size - len(batch))
        inputs = _prompts(processor, [asked[i] for i in filled], date_string)
        output = model.generate(
            params, **inputs, do_sample=False, max_new_tokens=config.max_new_tokens
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        for i, text in zip(batch, texts, strict=False):
            answers[i] = Answer(asked[i], text)
    return [answers[i] for i in range(len(asked))]


def chosen(records: Sequence[Record], limit: int | None) -> list[Record]:
    """At most `limit` of the records, evenly spread; None means all."""
    if limit is None or limit >= len(records):
        return list(records)
    return [records[i] for i in np.linspace(0, len(records) - 1, limit).round().astype(int)]


def _prompts(
    processor: MllamaProcessor, records: Sequence[Record], date_string: str
) -> BatchFeature:
    texts = [
        processor.apply_chat_template(
            list(record.question), add_generation_prompt=True, date_string=date_string
        )
        for record in records
    ]
    images = [[readable(picture) for picture in record.images] for record in records]
    return processor(images=images, text=texts, padding=True, return_tensors="np")


@dataclass(frozen=True)
class Score:
    """How many answers to one kind of question are right."""

    kind: str
    asked: int
    right: int

    @property
    def accuracy(self) -> float:
        """From 0 to 1."""
        return self.right / self.asked


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

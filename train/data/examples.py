"""From a conversation to ids and labels; its pictures are only counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllama_jax.loss import IGNORED_LABEL
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.train.data.records import BadRecord, Record
from mllama_jax.train.data.settings import DataConfig


@dataclass(frozen=True)
class Example:
    """What a record is learned as.

    ``ids`` and ``labels`` (T,) int32; labels are the ids that are learned, -100 anywhere else.
    ``record`` is the number of the record that the pictures are read from.
    """

    record: int
    where: str
    ids: np.ndarray
    labels: np.ndarray
    num_images: int
    problem: BadRecord | None = None
    """Why nothing is learned from it."""


class ExampleMaker:
    """Writes conversations with the chat template and finds what is learned of them."""

    def __init__(self, processor: MllamaProcessor, config: DataConfig):
        """Args: the processor; of the settings, lengths, packing, max_images, loss_on and
        date_string."""
        self._processor = processor
        self._longest = config.lengths[-1]
        self._most_images = config.max_images if config.packing else None
        self._learns_all = config.loss_on == "all"
        self._date_string = config.date_string
        pad = processor.tokenizer.pad_token_id
        self._nothing = np.array([0 if pad is None else pad], np.int32)

    def __call__(self, number: int, record: Record) -> Example:
        """Args: the record's number, and the record without its pictures.

        Raises:
            BadRecord: it is too long or has too many pictures for a packed row, the chat template
                does not write it with all its pictures, or its answers can't be found or hold no
                tokens.
        """
        text = self._text(record)
        ids = self._encode(text)
        whole = np.array(self._with_bos(text, ids), np.int32)
        if len(whole) > self._longest:
            raise BadRecord(
                record.where,
                f"{len(whole)} tokens, longer than the longest of data.lengths, {self._longest}: "
                "shorten it or add a length",
            )
        if self._most_images is not None and len(record.images) > self._most_images:
            raise BadRecord(
                record.where,
                f"{len(record.images)} pictures, and with data.packing a row has up to "
                f"data.max_images={self._most_images}: leave some out or raise it",
            )
        labels = np.full_like(whole, IGNORED_LABEL)
        if self._learns_all:
            labels = np.where(whole == self._processor.image_token_id, IGNORED_LABEL, whole)
        else:
            for start, stop in self._answers(record, text, ids):
                # Counted from the end: BOS may have been put in front.
                span = slice(len(whole) - start, len(whole) - stop)
                labels[span] = whole[span]
        if (labels[1:] == IGNORED_LABEL).all():
            raise BadRecord(
                record.where,
                "there is nothing to learn: the assistant's answers are empty, and the chat "
                "template ends them with no token",
            )
        return Example(number, record.where, whole, labels, len(record.images))

    def without(self, number: int, problem: BadRecord) -> Example:
        """An example in the place of one with a problem; nothing is learned from it."""
        labels = np.full_like(self._nothing, IGNORED_LABEL)
        return Example(number, problem.where, self._nothing, labels, 0, problem)

    def _with_bos(self, text: str, ids: list[int]) -> list[int]:
        """The ids with BOS, behind the pictures that they begin with if there is none: what
        `MllamaProcessor` does."""
        bos = self._processor.bos_token
        if bos is None or bos in text:
            return ids
        image, place = self._processor.image_token_id, 0
        while place < len(ids) and ids[place] == image:
            place += 1
        return [*ids[:place], *self._encode(bos), *ids[place:]]

    def _text(self, record: Record) -> str:
        """The whole conversation."""
        text = self._rendered(record, record.messages)
        token = self._processor.image_token
        if text.count(token) != len(record.images):
            raise BadRecord(
                record.where,
                f"the chat template writes {text.count(token)} {token} for {len(record.images)} "
                f"pictures: {text!r}",
            )
        return text

    def _rendered(self, record: Record, messages: Sequence[Any], **options: Any) -> str:
        """Some of the record's messages, as the chat template writes them."""
        try:
            return self._processor.apply_chat_template(
                list(messages), date_string=self._date_string, **options
            )
        except (TypeError, ValueError) as error:
            raise BadRecord(record.where, str(error)) from error

    def _answers(self, record: Record, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """Where the assistant's answers start and stop, in tokens from the end of the row.

        A conversation up to an answer's header must be a prefix of the whole one, in text and in
        ids: what training sees is then what generating from such a prompt sees.
        """
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
                    raise BadRecord(
                        record.where,
                        f"messages[{index}]: the chat template writes the conversation up to here "
                        "differently when more follows, so the answer's tokens can't be told "
                        f"apart. Whole: {text!r}; up to here: {part!r}",
                    )
                edges.append(len(ids) - len(part_ids))
            spans.append((edges[0], edges[1]))
        return spans

    def _encode(self, text: str) -> list[int]:
        return self._processor.tokenizer.encode(text, add_special_tokens=False)

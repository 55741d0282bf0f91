"""Files of questions with reference answers, as requests that the batch engine answers."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from mllama_jax.batch.inputs import Entry, Shard
from mllama_jax.batch.request_json import is_unicode, short
from mllama_jax.batch.requests import Request, SamplingOptions
from mllama_jax.evaluation.choices import LETTERS, written
from mllama_jax.train.data.files import RecordFile, open_files
from mllama_jax.train.data.formats import FORMATS, found_format, to_record
from mllama_jax.train.data.pictures import Picture, is_in_bucket, readable
from mllama_jax.train.data.records import BadRecord, DataError, Record, listed, message_text
from mllama_jax.train.data.settings import DataConfig

__all__ = ["Question", "Questions"]


@dataclass(frozen=True)
class Question:
    """A question with what people answered.

    Attributes:
        id: its name in the file; of one that has none, ``#`` and its number.
        category: that it is counted in.
        messages: what is asked, as `Request.messages` has it.
        references: right answers; of a question with choices the letter, and the choice.
        choices: of which one is right; empty if the answer is free.
    """

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


class Questions:
    """All questions of a file; a source of requests for `mllama_jax.batch.job.run_job`.

    The whole file is checked when it is opened; later only what is asked for is read.

    Args:
        path: of a file in one of the forms and formats of training data, see ``docs/data.md``.
        options: how answers are chosen.
        suffix: written below each question.
        folder: that relative paths of pictures start at; by default that of the file.
        cache: folder on this machine for copies of what can't be read in place.

    Attributes:
        path: of the file.
        folders: that relative paths of pictures start at.
        fingerprint: differs, if what is asked does.

    Raises:
        FileNotFoundError, DataError: no such file; questions that can't be used, of which the
            first 20 are listed.
    """

    def __init__(
        self,
        path: str | Path,
        options: SamplingOptions | None = None,
        *,
        suffix: str = "",
        folder: Path | None = None,
        cache: str = DataConfig.cache,
    ):
        self.path = str(path)
        self._options = options or SamplingOptions(temperature=0.0)
        self._suffix = suffix
        self._folder = None if folder is None else epath.Path(folder)
        self._files = open_files(self.path, cache)
        self._starts = np.cumsum([0, *map(len, self._files)])
        self.folders = tuple(dict.fromkeys(map(self._start_of, self._files)))
        self._ids: list[str] = []
        self.fingerprint = self._checked()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Question]:
        """All questions, read lazily, without their pictures' bytes."""
        return (self.question(index, pictures=False) for index in range(len(self)))

    def question(self, index: int, pictures: bool = True) -> Question:
        """A question.

        Args:
            index: from 0 on.
            pictures: False may give empty bytes for pictures, which is faster.

        Raises:
            BadRecord: it can't be used.
        """
        file, row = self._at(index)
        where = file.where(row)
        try:
            values = file.read(row, pictures)
        except ValueError as error:
            raise BadRecord(where, str(error)) from None
        if not isinstance(values, Mapping):
            raise BadRecord(where, f"expected an object, found {short(values)}")
        return self._question(index, values, where, file)

    # As a source of requests

    def entries(self) -> Iterator[Entry]:
        """All questions, by their ids."""
        return (Entry(number, name, number - 1) for number, name in enumerate(self._ids, 1))

    def request(self, entry: Entry) -> Request:
        """What a question asks."""
        return self.asked(self.question(entry.data))

    def asked(self, question: Question) -> Request:
        """The request that a question is."""
        return Request(question.id, "chat", question.messages, options=self._options)

    def count(self, shard: Shard) -> int:
        """How many questions a shard has."""
        return sum(shard.takes(number) for number in range(1, len(self) + 1))

    # Reading

    def _at(self, index: int) -> tuple[RecordFile, int]:
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[place], index - int(self._starts[place])

    def _checked(self) -> str:
        """Reads all, for their ids and the fingerprint."""
        if not len(self):
            raise DataError(f"{self.path}: holds no questions")
        problems: list[BadRecord] = []
        first: dict[str, str] = {}
        digest = hashlib.sha256()
        for index in range(len(self)):
            file, row = self._at(index)
            try:
                question = self.question(index, pictures=False)
                earlier = first.setdefault(question.id, file.where(row))
                if earlier != file.where(row):
                    why = f"the id {short(question.id)} is that of {earlier}, too"
                    raise BadRecord(file.where(row), why)
            except BadRecord as problem:
                problems.append(problem)
                continue
            self._ids.append(question.id)
            digest.update(repr((question.id, question.messages, question.choices)).encode())
        if problems:
            raise DataError(f"The questions can't be used:{listed(problems)}")
        return digest.hexdigest()[:16]

    def _question(
        self, index: int, values: Mapping[str, Any], where: str, file: RecordFile
    ) -> Question:
        values = {name: value for name, value in values.items() if value is not None}
        form = found_format(values)
        if form is None:
            keys = ", ".join(map(repr, FORMATS.values()))
            found = ", ".join(map(str, values)) or "none"
            raise BadRecord(where, f"expected exactly one of the keys {keys}; found {found}")
        problems: list[str] = []
        name = _name(values.get("id", f"#{index + 1}"), problems)
        category = values.get("category", values.get("kind", "all"))
        choices: tuple[str, ...] = ()
        references: tuple[str, ...] = ()
        if form == "vqa":
            choices = _choices(values.get("choices"), problems)
            references = _references(values, choices, problems)
            values = _as_conversation(values, choices)
        elif unused := [key for key in ("choices", "answer", "answers") if key in values]:
            problems.append(f"{unused[0]!r} belongs to 'question'")
        try:
            record = to_record({**values, "kind": str(category)}, form, where, self._start_of(file))
        except BadRecord as bad:
            problems.append(bad.why)
        if problems:
            raise BadRecord(where, "; ".join(problems))
        if not record.question:
            raise BadRecord(where, "its only message is the answer; expected a question before it")
        references = references or (record.answer,)
        texts = (record.kind, *references, *map(message_text, record.messages))
        if not all(map(is_unicode, texts)):
            raise BadRecord(where, "a text holds half of a surrogate pair, which is no character")
        messages = _with_suffix(_filled_in(record), self._suffix)
        return Question(name, record.kind, messages, references, choices)

    def _start_of(self, file: RecordFile) -> epath.Path:
        """What relative paths of pictures start at; absolute."""
        folder = self._folder or file.folder
        return folder if is_in_bucket(folder) else epath.Path(os.path.abspath(folder))


# --- columns --------------------------------------------------------------------------------------


def _name(value: Any, problems: list[str]) -> str:
    text = str(value) if type(value) in (str, int) else ""
    if not text or not is_unicode(text):
        problems.append(f"'id' is {short(value)}, expected a text or a number")
    return text


def _choices(value: Any, problems: list[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    given = value if isinstance(value, list) else []
    choices = tuple(map(_text, given))
    if not 2 <= len(choices) <= len(LETTERS) or not all(choices):
        problems.append(f"'choices' is {short(value)}, expected 2 to {len(LETTERS)} texts")
        return ()
    return tuple(choice or "" for choice in choices)


def _references(
    values: Mapping[str, Any], choices: tuple[str, ...], problems: list[str]
) -> tuple[str, ...]:
    given = [values[key] for key in ("answer", "answers") if key in values]
    if len(given) != 1:
        found = "both" if given else "neither"
        problems.append(f"expected 'answer' or 'answers', found {found}")
        return ()
    answers = given[0] if isinstance(given[0], list) else [given[0]]
    answers = [item.get("answer") if isinstance(item, Mapping) else item for item in answers]
    if choices:
        return _letter_and_choice(answers, choices, problems)
    texts = tuple(text for text in map(_text, answers) if text is not None)
    if not texts or len(texts) != len(answers):
        problems.append(f"the answer is {short(given[0])}, expected a text or a list of texts")
    return texts


def _letter_and_choice(
    answers: list[Any], choices: tuple[str, ...], problems: list[str]
) -> tuple[str, ...]:
    """The right choice of a letter, of a choice's text, or of its number from 0 on."""
    letters = LETTERS[: len(choices)]
    found: set[int] = set()
    if len(answers) == 1 and isinstance(answers[0], str):
        found = {i for i, choice in enumerate(choices) if choice == answers[0]}
        found |= {i for i, letter in enumerate(letters) if letter == answers[0]}
    elif len(answers) == 1 and type(answers[0]) is int:
        found = {answers[0]}.intersection(range(len(choices)))
    if len(found) != 1:
        meant = "no choice" if not found else f"both of {', '.join(letters[i] for i in found)}"
        problems.append(
            f"the answer is {short(answers[0] if len(answers) == 1 else answers)}, which means "
            f"{meant}; expected a letter of {letters}, the text of one choice, or its number from 0"
        )
        return ()
    [right] = found
    return letters[right], choices[right]


def _text(value: Any) -> str | None:
    """Numbers are answers, too."""
    return str(value) if type(value) in (str, int, float) else None


def _as_conversation(values: Mapping[str, Any], choices: tuple[str, ...]) -> dict[str, Any]:
    """The columns that `to_record` reads, with the choices below the question."""
    question = values["question"]
    if choices and isinstance(question, str):
        question = f"{question}\n{written(choices)}"
    kept = {name: value for name, value in values.items() if name in ("image", "images")}
    return {**kept, "question": question, "answer": ""}


# --- messages -------------------------------------------------------------------------------------


def _filled_in(record: Record) -> tuple[dict[str, Any], ...]:
    """What is asked, each picture in its part."""
    pictures = iter(record.images)
    return tuple(
        {**message, "content": _content(message["content"], pictures)}
        for message in record.question
    )


def _content(content: Any, pictures: Iterator[Picture]) -> Any:
    if isinstance(content, str):
        return content
    return [
        {**part, "image": readable(next(pictures))} if part["type"] == "image" else dict(part)
        for part in content
    ]


def _with_suffix(messages: tuple[dict[str, Any], ...], suffix: str) -> tuple[dict[str, Any], ...]:
    if not suffix or not messages:
        return messages
    *others, last = messages
    content = last["content"]
    if isinstance(content, str):
        content = f"{content}\n{suffix}"
    elif content and content[-1]["type"] == "text":
        content = [*content[:-1], {"type": "text", "text": f"{content[-1]['text']}\n{suffix}"}]
    else:
        content = [*content, {"type": "text", "text": suffix}]
    return (*others, {**last, "content": content})

"""One conversation, and what is said about those that can't be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllama_jax.train.data.pictures import Picture

_PROBLEMS_SHOWN = 20


class DataError(ValueError):
    """Training data can't be used; the message names file and record of each problem."""


class BadRecord(DataError):
    """One record can't be used.

    Attributes:
        where: file and record.
        why: everything that is wrong with it.
    """

    def __init__(self, where: str, why: str):
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why


@dataclass(frozen=True)
class Record:
    """One conversation, whatever form its file has.

    ``messages`` have a role (system, user or assistant) and content, which is text or a list of
    ``{"type": "text", "text": …}`` and ``{"type": "image"}``; the last one is the assistant's.
    ``images`` are the pictures in the order of the image parts. ``kind`` groups records in an
    evaluation; it is "all" where the file does not say.
    """

    where: str
    """File and record, for messages."""
    kind: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Picture, ...]

    @property
    def question(self) -> tuple[Mapping[str, Any], ...]:
        """The messages before the last one, which is the assistant's answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last message."""
        return message_text(self.messages[-1])


def message_text(message: Mapping[str, Any]) -> str:
    """A message's text parts, joined."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def question_text(record: Record) -> str:
    """All that was said before the answer, without pictures."""
    return "\n".join(map(message_text, record.question))


def listed(problems: Sequence[object]) -> str:
    """The first problems, one a line, and how many more there are."""
    lines = [f"\n  {problem}" for problem in problems[:_PROBLEMS_SHOWN]]
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f"\n  … and {len(problems) - _PROBLEMS_SHOWN} more")
    return "".join(lines)

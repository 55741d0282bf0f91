"""The forms that conversations have in files, all brought to one: `Record`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from etils import epath

from mllama_jax.train.data.pictures import Picture, located
from mllama_jax.train.data.records import BadRecord, Record

FORMATS: dict[str, str] = {"messages": "messages", "llava": "conversations", "vqa": "question"}
"""Name of a form -> the key by which it is told from the others."""

_ROLES = ("system", "user", "assistant")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in _ROLES}}
_MARK = "<image>"

Message = dict[str, Any]


def found_format(values: Mapping[str, Any]) -> str | None:
    """The form of a record with these fields; None if it has the key of none, or of several."""
    names = [name for name, key in FORMATS.items() if values.get(key) is not None]
    return names[0] if len(names) == 1 else None


def to_record(values: Any, form: str, where: str, folder: epath.Path) -> Record:
    """A record of one of `FORMATS`; `docs/data.md` shows each.

    Fields that are null count as absent.

    Args:
        values: the record, as JSON or a table has it.
        form: a name from `FORMATS`.
        where: its file and place, for messages.
        folder: that relative paths of pictures start at.

    Raises:
        BadRecord: it is no such record; everything that is wrong is in the message.
    """
    if not isinstance(values, Mapping):
        expected = FORMATS[form]
        raise BadRecord(
            where, f"expected an object with {expected!r}, found {type(values).__name__}"
        )
    reader = _Reader(folder)
    kind = values.get("kind")
    if not isinstance(kind, str | None):
        reader.problems.append(f"'kind' is {kind!r}, expected a string")
    listed = reader.column(values)
    messages = {"messages": reader.messages, "llava": reader.llava, "vqa": reader.vqa}[form](
        values, listed
    )
    if messages and messages[-1]["role"] not in ("assistant", None):
        reader.problems.append(
            f"the last message's role is {messages[-1]['role']!r}, expected 'assistant'"
        )
    if reader.problems:
        raise BadRecord(where, "; ".join(reader.problems))
    return Record(where, kind or "all", tuple(messages), tuple(reader.images))


class _Reader:
    """Reads one record: its messages are returned, pictures and problems are noted."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self.images: list[Picture] = []
        self.problems: list[str] = []

    def column(self, values: Mapping[str, Any]) -> list[Any]:
        """The pictures that stand beside the conversation, in ``image`` or ``images``."""
        given = [values[key] for key in ("image", "images") if values.get(key) is not None]
        if len(given) > 1:
            self.problems.append("it has 'image' and 'images', expected one of them")
        listed: list[Any] = []
        for value in given[:1]:
            listed = list(value) if isinstance(value, list | tuple) else [value]
        return [picture for picture in listed if not _is_null(picture)]

    def add(self, picture: Any) -> None:
        try:
            self.images.append(located(picture, self._folder))
        except ValueError as error:
            self.problems.append(str(error))

    # OpenAI messages

    def messages(self, values: Mapping[str, Any], listed: list[Any]) -> list[Message]:
        given = values.get("messages")
        if not isinstance(given, list) or not given:
            self.problems.append(f"'messages' is {given!r}, expected a list of messages")
            return []
        waiting = list(listed)
        messages = [self._message(i, message, waiting) for i, message in enumerate(given)]
        if waiting:
            self.problems.append(
                f"it has {len(listed)} pictures beside the messages, of which {len(waiting)} are "
                "of no part of type 'image'"
            )
        return messages

    def _message(self, index: int, message: Any, waiting: list[Any]) -> Message:
        at = f"messages[{index}]"
        if not isinstance(message, Mapping):
            self.problems.append(
                f"{at}: expected an object with 'role' and 'content', found {message!r}"
            )
            return {"role": None}
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            self.problems.append(f"{at}: role is {role!r}, expected one of {', '.join(_ROLES)}")
        if isinstance(content, list):
            content = [self._part(at, role, part, waiting) for part in content]
        elif not isinstance(content, str):
            self.problems.append(f"{at}: content is {content!r}, expected text or a list of parts")
        return {"role": role, "content": content}

    def _part(self, at: str, role: Any, part: Any, waiting: list[Any]) -> Message:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                self.problems.append(
                    f"{at}: a part of type 'text' has text={part.get('text')!r}, expected a string"
                )
            return {"type": "text", "text": part.get("text")}
        if kind not in ("image", "image_url"):
            self.problems.append(
                f"{at}: a part is {part!r}, expected type 'text', 'image' or 'image_url'"
            )
            return {"type": None}
        picture = part.get(kind)
        if kind == "image_url" and isinstance(picture, Mapping):
            picture = picture.get("url")
        if picture is None and kind == "image" and waiting:
            picture = waiting.pop(0)
        if role == "assistant":
            self.problems.append(f"{at}: the assistant's content holds a picture, {picture!r:.80}")
        self.add(picture)
        return {"type": "image"}

    # LLaVA, ShareGPT

    def llava(self, values: Mapping[str, Any], listed: list[Any]) -> list[Message]:
        turns = values.get("conversations")
        if not isinstance(turns, list) or not turns:
            self.problems.append(f"'conversations' is {turns!r}, expected a list of turns")
            return []
        messages = [self._turn(i, turn) for i, turn in enumerate(turns)]
        self._place(sum(_count(message) for message in messages), listed)
        return messages

    def _turn(self, index: int, turn: Any) -> Message:
        at = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            self.problems.append(
                f"{at}: expected an object with 'from' and 'value', found {turn!r}"
            )
            return {"role": None, "content": ""}
        speaker, text = turn.get("from"), turn.get("value")
        role = _LLAVA_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            self.problems.append(
                f"{at}: from is {speaker!r}, expected one of {', '.join(_LLAVA_ROLES)}"
            )
        if not isinstance(text, str):
            self.problems.append(f"{at}: value is {text!r}, expected a string")
            text = ""
        if role == "assistant" and _MARK in text:
            self.problems.append(f"{at}: the assistant's text holds {_MARK}")
        return {"role": role, "content": _content(text)}

    # Questions and answers in columns

    def vqa(self, values: Mapping[str, Any], listed: list[Any]) -> list[Message]:
        question = values.get("question")
        if not isinstance(question, str):
            self.problems.append(f"'question' is {question!r}, expected a string")
            question = ""
        if _MARK not in question:
            question = _MARK * len(listed) + question
        asked = {"role": "user", "content": _content(question)}
        self._place(_count(asked), listed)
        return [asked, {"role": "assistant", "content": self._answer(values)}]

    def _answer(self, values: Mapping[str, Any]) -> str:
        """The answer; of several, the most frequent one, and of those the first."""
        given = values.get("answer")
        if given is None:
            given = values.get("answers")
        answers = given if isinstance(given, list) else [given]
        answers = [a.get("answer") if isinstance(a, Mapping) else a for a in answers]
        if not answers or not all(isinstance(answer, str) for answer in answers):
            self.problems.append(
                f"'answer' (or 'answers') is {given!r}, expected a string or a list of them"
            )
            return ""
        return Counter(answers).most_common(1)[0][0]

    def _place(self, marks: int, listed: list[Any]) -> None:
        if marks != len(listed):
            self.problems.append(f"its text has {marks} {_MARK} for {len(listed)} pictures")
        for picture in listed:
            self.add(picture)


def _is_null(picture: Any) -> bool:
    """Whether it is what some tables hold where there is no picture."""
    is_struct = isinstance(picture, Mapping)
    return is_struct and picture.get("bytes") is None and picture.get("path") is None


def _content(text: str) -> str | list[Message]:
    """Text with marks as parts. The newline between a mark and text belongs to the mark."""
    pieces = text.split(_MARK)
    if len(pieces) == 1:
        return text
    parts: list[Message] = []
    for index, piece in enumerate(pieces):
        if index:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if index < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _count(message: Message) -> int:
    content = message["content"]
    return sum(part["type"] == "image" for part in content) if isinstance(content, list) else 0

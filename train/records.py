"""Conversations on disk: reading JSONL and checking every line before training starts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

_ROLES = ("system", "user", "assistant")
_PROBLEMS_SHOWN = 20


class DataError(ValueError):
    """Training data can't be used; the message names file and line of each problem."""


@dataclass(frozen=True)
class Record:
    """One conversation.

    ``messages`` are OpenAI-style, their content text or parts of type "text" and "image".
    ``images`` are the pictures' paths in the order of the image parts. ``kind`` groups records in
    an evaluation; it is "all" where the file does not say.
    """

    where: str
    """File and line, for messages."""
    kind: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...]

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


def read_records(file: epath.PathLike) -> list[Record]:
    """Reads and checks a JSONL file of conversations.

    Each line is ``{"messages": [{"role": …, "content": …}, …], "kind": …}``; ``kind`` is optional.
    Content is a string or a list of ``{"type": "text", "text": …}`` and
    ``{"type": "image", "image": path}``; a relative path starts at the file's own folder. The last
    message is the assistant's. Empty lines are passed over.

    Raises:
        DataError: lines that are not such conversations, or whose pictures do not exist. The
            first 20 problems are listed, and how many there are.
        FileNotFoundError: there is no such file.
    """
    file = epath.Path(file)
    if not file.exists():
        raise FileNotFoundError(f"There is no data file {str(file)!r}.")
    records, problems = [], []
    seen: dict[str, bool] = {}
    # Bytes: JSON may hold characters that str.splitlines would end a line at.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            problems.append(f"{where}: not JSON: {error}")
            continue
        found = list(_problems(values))
        if not found:
            record = _record(where, values, file.parent)
            found = [
                f"there is no picture {path!r}"
                for path in record.images
                if not _is_file(path, seen)
            ]
            records.append(record)
        problems.extend(f"{where}: {problem}" for problem in found)
    if problems:
        shown = problems[:_PROBLEMS_SHOWN]
        more = f"\n  … and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise DataError("The data can't be used:\n  " + "\n  ".join(shown) + more)
    if not records:
        raise DataError(f"{file}: holds no conversations")
    return records


def _record(where: str, values: Mapping[str, Any], folder: epath.Path) -> Record:
    messages = tuple(values["messages"])
    images = tuple(
        str(folder / part["image"])
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    )
    return Record(where, values.get("kind", "all"), messages, images)


def _is_file(path: str, seen: dict[str, bool]) -> bool:
    if path not in seen:
        seen[path] = epath.Path(path).is_file()
    return seen[path]


def _problems(values: Any) -> Iterator[str]:
    """What keeps a parsed line from being a conversation."""
    if not isinstance(values, dict):
        yield f"expected an object with 'messages', found {type(values).__name__}"
        return
    if not isinstance(values.get("kind", "all"), str):
        yield f"'kind' is {values['kind']!r}, expected a string"
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        yield f"'messages' is {messages!r}, expected a list of messages"
        return
    for index, message in enumerate(messages):
        for problem in _message_problems(message):
            yield f"messages[{index}]: {problem}"
    if isinstance(messages[-1], dict) and messages[-1].get("role") != "assistant":
        yield f"the last message's role is {messages[-1].get('role')!r}, expected 'assistant'"


def _message_problems(message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"expected an object with 'role' and 'content', found {message!r}"
        return
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        yield f"role is {role!r}, expected one of {', '.join(_ROLES)}"
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        yield f"content is {content!r}, expected text or a list of parts"
        return
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image"):
            yield f"a part is {part!r}, expected type 'text' or 'image'"
        elif not isinstance(part.get(kind), str):
            yield f"a part of type {kind!r} has {kind}={part.get(kind)!r}, expected a string"
        elif kind == "image" and role == "assistant":
            yield f"the assistant's content holds a picture, {part['image']!r}"

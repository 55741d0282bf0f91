"""One line of JSON, read without trust: what is wrong with it is collected, not lost."""

import json
import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MAX_DEPTH", "MAX_LINE_BYTES", "Problems", "is_unicode", "read_record", "short"]

MAX_LINE_BYTES = 64 * 2**20
"""Longest line: room for several pictures of 10 MB in base64."""

MAX_DEPTH = 100
"""Deepest nesting of lists and objects; nested JSON schemas need some tens."""

_MOST_DIGITS = 40
_MOST_PROBLEMS = 20


@dataclass
class Problems:
    """What is wrong with a request, each with the field at fault if there is one."""

    found: list[tuple[str | None, str]] = field(default_factory=list)

    def add(self, name: str | None, what: str) -> None:
        """Adds a problem; ``name`` stands before it."""
        self.found.append((name, f"{name}: {what}" if name else what))

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        lines = [text for _, text in self.found[:_MOST_PROBLEMS]]
        if len(self.found) > _MOST_PROBLEMS:
            lines.append(f"and {len(self.found) - _MOST_PROBLEMS} more problems")
        return "; ".join(lines)


def short(value: Any, limit: int = 60) -> str:
    """A value as an error shows it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return repr(value if len(value) <= limit else f"{value[:limit]}…")
    text = reprlib.repr(value)  # Of long lists and texts only the ends.
    return text if len(text) <= limit else f"{text[:limit]}…"


def read_record(line: str | bytes, problems: Problems) -> dict[str, Any]:
    """The object of a line.

    Keys that come twice, numbers that are none, text that is no Unicode and too deep a nesting are
    added to ``problems``; the object is there all the same, with its ``custom_id``.

    Raises:
        ValueError: the line is too long, empty, no UTF-8, no JSON or no object.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"it has {len(line)} bytes, and a line may have {MAX_LINE_BYTES}: give pictures as "
            "paths, not in base64"
        )
    text = _decode(line) if isinstance(line, bytes) else line
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise ValueError("it is empty; expected a JSON object")
    try:
        record = _loads(text, problems)
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 20, 0) : error.pos + 20]
        raise ValueError(
            f"it is not valid JSON: {error.msg} at character {error.pos}, near {short(near)}"
        ) from None
    except RecursionError:
        raise ValueError(_too_deep("far deeper than that")) from None
    if not isinstance(record, dict):
        raise ValueError(f"it is {short(record)}; expected a JSON object")
    _check_tree(record, problems)
    return record


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8: {error.reason} at byte {error.start}; write the file as UTF-8"
        ) from None


def _loads(text: str, problems: Problems) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in items:
            if name in found:
                problems.add(None, f"the key {short(name)} comes twice in one object")
            found[name] = value
        return found

    def constant(name: str) -> None:
        problems.add(None, f"{name} is no number in JSON")

    def integer(digits: str) -> int:
        if len(digits) <= _MOST_DIGITS:
            return int(digits)
        problems.add(None, f"a number has {len(digits)} digits: {digits[:10]}…")
        return 0

    def real(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            problems.add(None, f"the number {short(digits)} is too large")
        return value

    return json.loads(
        text,
        object_pairs_hook=pairs,
        parse_constant=constant,
        parse_int=integer,
        parse_float=real,
    )


def _too_deep(found: str) -> str:
    return f"lists and objects may be nested {MAX_DEPTH} deep; they are {found}"


def _check_tree(record: dict[str, Any], problems: Problems) -> None:
    """Depth, and text that no file in UTF-8 could hold."""
    level: list[Any] = [record]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not is_unicode(value):
                    problems.add(None, f"{value[:20]!a} holds half of a surrogate pair, no text")
            elif isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
    problems.add(None, _too_deep("deeper"))


def is_unicode(text: str) -> bool:
    """Whether a text can be written to a file: JSON can spell halves of surrogate pairs."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

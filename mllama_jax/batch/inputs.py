"""What a job is to answer: the lines of a requests file, or the pictures of a folder.

Every entry has a key, which its result has too (`result_key`): the ``custom_id``, or the number of
a line that has none. That is how a job knows what it has done.
"""

import hashlib
import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from mllama_jax.batch.request_json import MAX_LINE_BYTES, Problems
from mllama_jax.batch.requests import (
    Request,
    RequestError,
    SamplingOptions,
    _custom_id,
    parse_line,
)

__all__ = [
    "Entry",
    "Item",
    "PictureFolder",
    "RequestsFile",
    "Shard",
    "Source",
    "items",
    "keyed",
    "result_key",
]

PICTURE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
)

_NUMBERED = re.compile(r"line (\d+): ")


@dataclass(frozen=True)
class Entry:
    """Something to answer, not looked at closely.

    Attributes:
        number: from 1 on; of the line.
        custom_id: None if there is no usable one.
        data: what `Source.request` makes a request of.
    """

    number: int
    custom_id: str | None
    data: Any


class Source(Protocol):
    """Where requests come from; the same every time that it is read."""

    def entries(self) -> Iterator[Entry]:
        """All of them, read lazily."""

    def request(self, entry: Entry) -> Request:
        """What an entry asks; raises RequestError for one that can't be answered."""

    def count(self, shard: "Shard") -> int:
        """How many entries a shard has."""


@dataclass(frozen=True)
class Shard:
    """One part of a job that several processes share: every ``count``-th line."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its written form, ``"I/N"``.

        Raises:
            ValueError: not of this form, or I is not from 0 to N - 1.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        index, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if index >= count:
            raise ValueError(
                f"shard {text!r}: expected I/N, the I-th of N parts, I from 0 to N - 1: 0/4"
            )
        return cls(index, count)

    def within(self, index: int, count: int) -> "Shard":
        """One of ``count`` parts of this part: every ``count``-th of its lines."""
        return Shard(self.index + self.count * index, self.count * count)

    def takes(self, number: int) -> bool:
        """Whether the line is one of this part."""
        return number % self.count == self.index

    def path(self, path: Path) -> Path:
        """Where this part writes: ``results.jsonl`` becomes ``results.0-of-4.jsonl``."""
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}.{self.index}-of-{self.count}{path.suffix}")


@dataclass(frozen=True)
class Item:
    """An entry that is to be answered.

    Attributes:
        custom_id: of its result; None if that is known by the number of its line.
        request: or the reason why it can't be answered.
    """

    custom_id: str | None
    request: Request | RequestError


class RequestsFile:
    """Lines as `parse_line` reads them; blank ones are passed over.

    Args:
        path: of the file.
        defaults: what holds where a line says nothing.

    Raises:
        FileNotFoundError, ValueError: there is no such file.
    """

    def __init__(self, path: Path, defaults: SamplingOptions | None = None):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; expected a JSONL file of requests")
        # A job that is carried on reads it again, which pipes can't do.
        if not path.is_file():
            raise ValueError(f"{path}: not a regular file; expected a JSONL file of requests")
        self.path = path
        self._defaults = defaults

    def entries(self) -> Iterator[Entry]:
        """All lines that are not blank."""
        for number, line in self._lines():
            yield Entry(number, _custom_id_of(line), line)

    def request(self, entry: Entry) -> Request:
        """The line, parsed."""
        return parse_line(entry.data, number=entry.number, defaults=self._defaults)

    def count(self, shard: Shard) -> int:
        """Reads the whole file."""
        return sum(shard.takes(number) for number, _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        with self.path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = line
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                if not line.isspace():
                    yield number, line.rstrip(b"\r\n")


class PictureFolder:
    """The same prompt about every picture of a folder and the folders below, in name order.

    A picture's path within the folder is its ``custom_id``. Hidden files are passed over.

    Args:
        folder: where they lie; requests may read it (`PictureSources`).
        prompt: the text behind the picture.
        options: how answers are chosen.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """

    def __init__(self, folder: Path, prompt: str, options: SamplingOptions | None = None):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected one with pictures")
        self.path = folder
        self._prompt = prompt
        self._options = options or SamplingOptions()
        root = os.fspath(folder.resolve())
        self._root = root
        self._paths = [os.path.relpath(path, root) for path in _pictures(root)]
        if not self._paths:
            raise ValueError(f"{folder}: no pictures in it ({', '.join(sorted(PICTURE_SUFFIXES))})")

    def entries(self) -> Iterator[Entry]:
        """All pictures."""
        for number, path in enumerate(self._paths, 1):
            # Linux allows names that are no text.
            yield Entry(number, os.fsencode(path).decode(errors="backslashreplace"), path)

    def request(self, entry: Entry) -> Request:
        """The prompt about this picture."""
        picture = {"type": "image", "image": os.path.join(self._root, entry.data)}
        content = [picture, {"type": "text", "text": self._prompt}]
        return Request(
            custom_id=entry.custom_id or "",
            kind="chat",
            messages=({"role": "user", "content": content},),
            options=self._options,
        )

    def count(self, shard: Shard) -> int:
        """How many pictures the shard has."""
        return sum(shard.takes(number) for number in range(1, len(self._paths) + 1))


def keyed(source: Source) -> Iterator[tuple[Entry, bytes, int | None]]:
    """All entries with their keys, and the number of an earlier entry with the same ``custom_id``.

    The first entry has the ``custom_id`` for its key, all later ones their own number.
    """
    first: dict[bytes, int] = {}
    for entry in source.entries():
        key, earlier = _key(entry.custom_id, entry.number), entry.number
        if entry.custom_id is not None:
            earlier = first.setdefault(key, entry.number)
        if earlier == entry.number:
            yield entry, key, None
        else:
            yield entry, _key(None, entry.number), earlier


def items(source: Source, shard: Shard, done: Container[bytes]) -> Iterator[Item]:
    """What of a shard is left to do.

    An entry whose ``custom_id`` came before can't be told from that one in the results, so it is
    an error. To find these, every shard looks at the ids of all entries.

    Args:
        done: keys of what has a result.
    """
    for entry, key, earlier in keyed(source):
        if not shard.takes(entry.number) or key in done:
            continue
        if earlier is not None:
            error = RequestError(
                f"line {entry.number}: custom_id: found {entry.custom_id!r}, which line {earlier} "
                "has; expected one that no other line has",
                field="custom_id",
            )
            yield Item(None, error)
            continue
        try:
            request: Request | RequestError = source.request(entry)
        except RequestError as error:
            request = error
        yield Item(entry.custom_id, request)


def result_key(line: Mapping[str, Any]) -> bytes:
    """The key of the entry that a line of a results file belongs to.

    Raises:
        ValueError, KeyError, TypeError: the line is none that this package writes.
    """
    custom_id = line["custom_id"]
    if isinstance(custom_id, str):
        return _key(custom_id, 0)
    number = _NUMBERED.match(line["error"]["message"])
    if custom_id is not None or number is None:
        raise ValueError("neither a custom_id nor the number of a line")
    return _key(None, int(number[1]))


def _key(custom_id: str | None, number: int) -> bytes:
    name = f"line {number}" if custom_id is None else f"id {custom_id}"
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _custom_id_of(line: bytes) -> str | None:
    """The ``custom_id`` that `parse_line` would find, in a fraction of its time."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        # Huge integers are no error here, as they are none there.
        record = json.loads(line.decode().removeprefix("\ufeff").strip(), parse_int=float)
    except (ValueError, RecursionError):
        return None
    return _custom_id(record, Problems()) if isinstance(record, dict) else None


def _pictures(folder: str) -> Iterator[str]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _pictures(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES:
            yield entry.path

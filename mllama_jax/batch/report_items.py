"""What stands on a job's page: prompts, texts and pictures, bounded, whatever they are."""

import base64
import hashlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image

from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.report_page import safe
from mllama_jax.batch.requests import Request
from mllama_jax.processing.image_loading import load_image

__all__ = ["FOLDED_ANSWER", "Item", "Thumbnails", "add_prompt"]

_LONGEST_SIDE = 320
_MOST_PICTURES, _MOST_CHARACTERS, _MOST_PARTS = 16, 20_000, 200
"""Of one item; what goes beyond is only counted."""

_FOLDED_PROMPT, FOLDED_ANSWER = 500, 3000
"""Longer texts are folded."""

_SECONDS_TO_FETCH = 120.0
"""For all pictures from addresses together; the job itself has fetched them once already."""


@dataclass(frozen=True)
class _Thumbnail:
    """A small picture as a data URL; `key` is the same for the same picture."""

    key: bytes
    url: str
    name: str


@dataclass(eq=False)
class Item:
    """One request and what became of it, as pieces of HTML and the pictures between them."""

    kind: str
    pieces: list[str | _Thumbnail] = field(default_factory=list)
    characters: int = 0

    def add(self, html: str) -> None:
        """Adds HTML."""
        self.pieces.append(html)

    def add_text(self, text: str, folded: int) -> None:
        """Adds a text from outside; the bound on an item's characters holds for all together."""
        left = max(0, _MOST_CHARACTERS - self.characters)
        self.characters += len(text)
        whole = _text(text[:left])
        if len(text) > left:
            whole += f'<div class="note">… and {len(text) - left:,} more characters</div>\n'
        if len(text) > folded:
            beginning = f'<span class="beginning">{_text(text[: folded // 2] + " …")}</span>'
            count = f'<span class="note">{len(text):,} characters</span>'
            whole = f"<details><summary>{count}{beginning}</summary>{whole}</details>\n"
        self.add(whole)

    def write(self, file: IO[str], thumbnails: "Thumbnails") -> None:
        """Writes the item, and those of its pictures that were not written before."""
        for piece in self.pieces:
            file.write(piece if isinstance(piece, str) else thumbnails.html(piece))


def _text(text: str) -> str:
    return f'<div class="text" dir="auto">{safe(text)}</div>\n'


def add_prompt(item: Item, request: Request, thumbnails: "Thumbnails") -> None:
    """Adds what a request says: its texts, and small pictures between them."""
    left_out = num_pictures = 0
    for number, (what, value) in enumerate(_parts(request)):
        num_pictures += what == "picture"
        if number >= _MOST_PARTS or (what == "picture" and num_pictures > _MOST_PICTURES):
            left_out += 1
        elif what == "picture":
            item.pieces.append(thumbnails.read(value))
        elif what == "role":
            item.add(f'<div class="role">{safe(value)}</div>\n')
        else:
            item.add_text(value, _FOLDED_PROMPT)
    if left_out:
        item.add(f'<p class="note">… and {left_out:,} more parts</p>\n')


def _parts(request: Request) -> Iterator[tuple[str, Any]]:
    """What a request says, in order: each a "role", a "text" or a "picture"."""
    for source in request.images:
        yield "picture", source
    if request.messages is None:
        yield "role", "prompt"
        prompt = request.prompt
        yield "text", prompt if isinstance(prompt, str) else f"token ids {list(prompt or ())}"
    for message in request.messages or ():
        yield "role", str(message.get("role"))
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ({"text": content},):
            if part.get("type") == "image":
                yield "picture", part.get("image")
            else:
                yield "text", str(part.get("text") or "")


# --- pictures -------------------------------------------------------------------------------------


class Thumbnails:
    """Reads pictures, and writes each distinct one once."""

    def __init__(self, sources: PictureSources):
        self._sources = sources
        self._written: dict[bytes, str] = {}
        self._keys: dict[bytes, bytes] = {}  # of thumbnails, by a hash of what was read
        self._seconds_left = _SECONDS_TO_FETCH

    def read(self, source: Any) -> _Thumbnail | str:
        """A picture made small, or a box that says why not."""
        name = _name(source)
        try:
            if not isinstance(source, str):
                return _thumbnail(source, name)
            data = self._data(source)
            known = self._keys.get(_hash(data), b"")
            if known in self._written:
                return _Thumbnail(known, "", name)
            thumbnail = _thumbnail(data, name)
            self._keys[_hash(data)] = thumbnail.key
            return thumbnail
        except Exception as error:  # a broken picture must not cost the page
            why = safe(f"{error}"[:1000])
            return (
                f'<figure><div class="unread">{why}</div>'
                f"<figcaption>{safe(name)}</figcaption></figure>\n"
            )

    def _data(self, source: str) -> bytes:
        if not source[:6].lower().startswith(("http:", "https:")):
            return self._sources.read(source)
        if self._seconds_left <= 0:
            raise ValueError(
                f"not fetched once more: others took {_SECONDS_TO_FETCH:g} s together already"
            )
        begin = time.monotonic()
        try:
            return self._sources.read(source)
        finally:
            self._seconds_left -= time.monotonic() - begin

    def html(self, thumbnail: _Thumbnail) -> str:
        """The picture itself the first time, then what the page's script makes a copy of it."""
        known = self._written.get(thumbnail.key)
        if known is None:
            known = self._written[thumbnail.key] = f"p{len(self._written)}"
            image = f'id="{known}" src="{thumbnail.url}"'
        else:
            image = f'data-copy-of="{known}"'
        name = safe(thumbnail.name)
        return f'<figure><img {image} alt="{name}"><figcaption>{name}</figcaption></figure>\n'


def _thumbnail(picture: Any, name: str) -> _Thumbnail:
    image = load_image(picture)
    scale = min(1.0, _LONGEST_SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85, subsampling=0)
    jpeg = file.getvalue()
    return _Thumbnail(
        _hash(jpeg), f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}", name
    )


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _name(source: Any) -> str:
    if not isinstance(source, str | Path):
        return type(source).__name__
    text = str(source)
    if text[:5].lower() == "data:":
        return f"{text.partition(',')[0][:60]},… ({len(text):,} characters)"
    return text if len(text) <= 200 else f"…{text[-200:]}"

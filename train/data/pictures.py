"""Where the pictures of records are: in files, in buckets, or in the records themselves."""

import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

Picture = str | bytes
"""A path, a ``file:`` or ``data:`` URL, an address in a bucket, or an image file's bytes."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")
_BUCKETS = ("gs", "s3")


def located(value: Any, folder: epath.Path) -> Picture:
    """A picture as a record names it; relative paths start at `folder`.

    Args:
        value: text, bytes, or Hugging Face's ``{"bytes": …, "path": …}``, of which bytes count
            first.
        folder: that of the file with the record.

    Raises:
        ValueError: none of these, or an address that would have to be downloaded.
    """
    if isinstance(value, Mapping):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"a picture is {value!r}, expected a path, a data: URL or bytes")
    scheme = _SCHEME.match(value)
    kind = scheme[1].lower() if scheme else ""
    if kind in ("data", "file") or (scheme and scheme[2] and kind in _BUCKETS):
        return value
    if scheme and (scheme[2] or kind in ("http", "https")):
        raise ValueError(
            f"the picture {value!r} would have to be downloaded in every epoch, which training "
            "does not do; download it once and give its path, or copy it into a bucket (gs://)"
        )
    return os.fspath(folder / value)


def is_missing(picture: Picture, seen: dict[str, bool]) -> bool:
    """Whether it is the path of no file. Buckets are not asked: each answer would take long.

    Args:
        picture: as `located` returns it.
        seen: what was found before, by path; added to.
    """
    if isinstance(picture, bytes) or _SCHEME.match(picture):
        return False
    if picture not in seen:
        seen[picture] = not os.path.isfile(picture)
    return seen[picture]


def readable(picture: Picture) -> Any:
    """The picture as something that `mllama_jax.processing.image_loading.load_picture` reads."""
    if isinstance(picture, str) and is_in_bucket(picture):
        return epath.Path(picture)
    return picture


def is_in_bucket(path: epath.PathLike) -> bool:
    """Whether it is an address in cloud storage."""
    return os.fspath(path).lower().startswith(tuple(f"{kind}://" for kind in _BUCKETS))

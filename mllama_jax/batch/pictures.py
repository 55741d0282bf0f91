"""Where pictures may come from: named folders, the request itself, and addresses if allowed."""

import base64
import binascii
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from mllama_jax.batch.request_json import short

__all__ = ["MAX_PICTURE_BYTES", "PictureSources"]

MAX_PICTURE_BYTES = 2**27
"""Largest encoded picture, 128 MiB; how many pixels it may hold, `image_loading` says."""

SECONDS_TO_FETCH = 60.0
"""For a whole remote picture, from the first to the last byte."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")
_DATA_HEADER = re.compile(r"data:image/[\w.+*-]+(;[\w.+-]+=[^;,]*)*;base64", re.IGNORECASE)
_PIECE = 2**16


@dataclass(frozen=True)
class PictureSources:
    """Reads what requests call a picture. A request is not trusted; these limits are.

    Attributes:
        allowed_folders: files must lie in one of them, or below, once all links are followed.
            Relative paths start at the first. Empty: no files at all.
        allow_remote: fetch http and https addresses. Whatever this machine can reach, a request
            can then reach, too.

    ``mllama-jax batch`` calls them ``--allow-folder`` and ``--allow-remote``.
    """

    allowed_folders: tuple[Path, ...] = ()
    allow_remote: bool = False

    def __post_init__(self) -> None:
        folders = tuple(Path(folder).resolve() for folder in self.allowed_folders)
        object.__setattr__(self, "allowed_folders", folders)

    def read(self, source: str) -> bytes:
        """The bytes of a picture's file, at most `MAX_PICTURE_BYTES`; not decoded.

        Args:
            source: a path, a ``file:`` URL, a ``data:image/…;base64,`` URL, or an http(s) address.

        Raises:
            ValueError: it must not be read, isn't there, or is malformed or too large.
        """
        scheme = _SCHEME.match(source)
        kind = scheme[1].lower() if scheme else ""
        if kind == "data":
            return _data_url(source)
        if kind in ("http", "https"):
            return self._fetch(source)
        if kind == "file":
            return self._file(_file_url_path(source), source)
        if scheme and scheme[2]:
            raise ValueError(
                f"{short(source)}: nothing reads {kind}:// here; copy the picture into a folder"
            )
        return self._file(source, source)

    def _file(self, path: str, source: str) -> bytes:
        folders = " or ".join(repr(str(folder)) for folder in self.allowed_folders)
        if not folders:
            raise ValueError(
                f"{short(source)}: no folder is open to requests; name one with --allow-folder "
                "(allowed_folders)"
            )
        try:
            file = (self.allowed_folders[0] / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{short(source)}: not a usable path: {error}") from None
        if not any(file.is_relative_to(folder) for folder in self.allowed_folders):
            raise ValueError(
                f"{short(source)}: it lies outside of {folders}, the folders that requests may "
                "read; open its folder with --allow-folder (allowed_folders)"
            )
        try:
            # Pipes and devices would be read forever.
            if file.exists() and not file.is_file():
                raise ValueError(f"{short(source)}: it is no file")
            with file.open("rb") as opened:
                data = opened.read(MAX_PICTURE_BYTES + 1)
        except FileNotFoundError:
            raise ValueError(
                f"{short(source)}: no such file in {folders}; relative paths start at "
                f"{str(self.allowed_folders[0])!r}"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{short(source)}: it can't be read: {error.strerror or error}"
            ) from None
        return _not_too_large(data, source)

    def _fetch(self, source: str) -> bytes:
        if not self.allow_remote:
            raise ValueError(
                f"{short(source)}: nothing is downloaded; allow it with --allow-remote "
                "(allow_remote), or give a path"
            )
        end = time.monotonic() + SECONDS_TO_FETCH
        pieces: list[bytes] = []
        size = 0
        try:
            with _opener().open(source, timeout=SECONDS_TO_FETCH) as response:
                # One piece at a time, so a server that drips can't hold on longer.
                while size <= MAX_PICTURE_BYTES and (piece := response.read1(_PIECE)):
                    pieces.append(piece)
                    size += len(piece)
                    if time.monotonic() > end:
                        raise TimeoutError(f"not complete after {SECONDS_TO_FETCH:g} seconds")
                missing = response.length
        except (OSError, HTTPException, ValueError) as error:
            # Of urllib's errors the reason says more than the error.
            reason = getattr(error, "reason", None) or error
            code = ""
            if isinstance(error, urllib.error.HTTPError):
                code = f"{error.code} "
                error.close()
            raise ValueError(f"{short(source)}: it can't be fetched: {code}{reason}") from None
        data = _not_too_large(b"".join(pieces), source)
        if missing:
            raise ValueError(
                f"{short(source)}: the connection broke {missing} bytes before its end"
            )
        return data


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https alone: a redirect can't lead to a file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _file_url_path(source: str) -> str:
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError as error:
        raise ValueError(f"{short(source)}: not a usable URL: {error}") from None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError(f"{short(source)}: expected file:///path, on this machine")
    if parts.query or parts.fragment:
        raise ValueError(f"{short(source)}: write ? as %3F and # as %23 in a file's URL")
    return urllib.parse.unquote(parts.path)


def _data_url(source: str) -> bytes:
    header, comma, body = source.partition(",")
    if not comma or not _DATA_HEADER.fullmatch(header):
        raise ValueError(
            f"a data URL that begins with {short(header)}; expected data:image/png;base64,… "
            "(or another kind of image)"
        )
    if len(body) > MAX_PICTURE_BYTES * 3 // 2:
        raise ValueError(_too_large(f"a data URL of {len(body)} characters"))
    try:
        if "%" in body:
            body = urllib.parse.unquote(body, errors="strict")
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URL's base64 is broken: {error}") from None
    return _not_too_large(data, header)


def _not_too_large(data: bytes, source: str) -> bytes:
    if len(data) > MAX_PICTURE_BYTES:
        raise ValueError(_too_large(short(source)))
    return data


def _too_large(what: str) -> str:
    return f"{what}: too large; a picture may have {MAX_PICTURE_BYTES} bytes: shrink it first"

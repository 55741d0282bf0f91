"""Files in cloud storage (gs://, s3://, az://), read by ranges of bytes.

epath lists folders there and reads small files. What it opens reads ahead, though, by megabytes
that nobody asked for, and asks for a file's description first; here a range is one request.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from etils import epath
from etils.epath import backend

# Begins of files and small pieces that lie side by side come in one request.
_BUFFER_BYTES = 2**16
# What `pieces` are of: so large that an answer from the cloud takes longer than the wait for it.
_REQUEST_BYTES = 2**24
_READ_BYTES = 2**22


def is_cloud(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def check_folder(folder: epath.Path) -> None:
    """Looks up a cloud folder; one request, which also answers later questions about its files.

    Raises:
        FileNotFoundError: nothing is there.
        NotADirectoryError: it is a file.
        PermissionError: it may not be listed.
        ImportError: the package is absent that speaks to this cloud.
        OSError: the cloud can't be reached.
    """
    text = os.fspath(folder)
    client = _client(text)
    # Clients keep what they listed for as long as the process lives; files may have come since.
    client.invalidate_cache()
    with _named_errors(text):
        entries = client.ls(text, detail=True)
    name = text.partition("://")[2]
    if any(entry["name"] == name and entry["type"] == "file" for entry in entries):
        raise NotADirectoryError(f"{text!r} is a file; expected the folder that holds it")


def read_range(file: epath.Path, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a cloud file; fewer if it ends before.

    Raises:
        FileNotFoundError, PermissionError, ImportError, OSError: as `check_folder`.
    """
    if start >= stop:
        return b""
    text = os.fspath(file)
    client = _client(text)
    with _named_errors(text):
        data = client.cat_file(text, start=start, end=stop)
    if len(data) > stop - start:
        raise OSError(
            f"{text}: answered a request for {stop - start} bytes with {len(data)}; if it is kept "
            "compressed (Content-Encoding: gzip), store it without"
        )
    return data


def open_binary(file: epath.Path) -> BinaryIO:
    """Opens a local or cloud file for reading."""
    return io.BufferedReader(_Ranges(file), _BUFFER_BYTES) if is_cloud(file) else open(file, "rb")


def pieces(file: epath.Path) -> Iterator[bytes]:
    """All of a local or cloud file, in its order."""
    if is_cloud(file):
        size = file.stat().length
        for start in range(0, size, _REQUEST_BYTES):
            yield read_range(file, start, min(size, start + _REQUEST_BYTES))
        return
    with open(file, "rb") as stream:
        while data := stream.read(_READ_BYTES):
            yield data


class _Ranges(io.RawIOBase):
    """A cloud file as a stream that fetches what is read."""

    def __init__(self, file: epath.Path):
        self._file = file
        self._size = file.stat().length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError(f"{os.fspath(self._file)}: seek to {begin + offset}")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        data = read_range(self._file, self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _client(path: str) -> Any:
    """fsspec's client, the one that epath uses too, so that both know what was listed."""
    try:
        return backend.fsspec_backend.fs(path)
    except ImportError as error:
        scheme = path.partition("://")[0]
        how = "pip install 'mllama-jax[gcs]'" if scheme == "gs" else str(error)
        raise ImportError(f"{path}: a package is absent that reads {scheme}://: {how}") from error


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Errors of clients, which have types of their own and may not say what was asked for."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is nothing at {path!r}: no such bucket, or nothing of that name in it"
        ) from error
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        denied = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
        if denied or getattr(error, "code", None) in (401, 403):
            raise PermissionError(
                f"{path}: may not be read; log in (for gs://: `gcloud auth application-default "
                f"login`), or ask for the right to list and read it. {found}"
            ) from error
        raise OSError(f"{path}: can't be read from the cloud: {found}") from error

"""A file that is written from its first byte to its last, and hashed on the way."""

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from etils import epath

_CHUNK_BYTES = 2**22


class StreamedFile:
    """One thread appends; `flush` may be called by others meanwhile.

    Args:
        path: local or cloud. Going on in a file needs a local one.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        self._changing = threading.Lock()
        self._stream: BinaryIO | None = None

    def begin(self) -> None:
        """Makes the file anew."""
        with self._changing:
            self._stream = self._path.open("wb")
        self._hash = hashlib.sha256()

    def reopen(self, num_bytes: int) -> None:
        """Keeps so much of an earlier process's file, all of which is to be `read_again`.

        Raises:
            OSError: the file is shorter.
        """
        stream = open(self._path, "r+b")  # noqa: SIM115
        with self._changing:
            self._stream = stream
        self._hash = hashlib.sha256()
        if stream.seek(0, os.SEEK_END) < num_bytes:
            raise OSError(f"{stream.name}: shorter than an earlier process left it")
        stream.truncate(num_bytes)
        stream.seek(0)

    def read_again(self, num_bytes: int) -> Iterator[bytes]:
        """The next bytes of what was kept."""
        assert self._stream is not None
        while num_bytes:
            data = self._stream.read(min(num_bytes, _CHUNK_BYTES))
            self._hash.update(data)
            num_bytes -= len(data)
            yield data

    def append(self, data: bytes | memoryview) -> None:
        """Writes bytes, which must not change any more."""
        assert self._stream is not None
        if self._hashing is not None:
            self._hashing.result()
        # Beside writing: each takes about as long as the other.
        self._hashing = self._hasher.submit(self._hash.update, data)
        self._stream.write(data)

    def flush(self) -> None:
        """Returns when what was appended is on disk."""
        with self._changing:
            if self._stream is None:
                return
            self._stream.flush()
            try:
                # A handle of its own: another thread may close the file meanwhile.
                handle = os.dup(self._stream.fileno())
            except (OSError, AttributeError):
                return  # cloud streams have none; closing them is what completes the object
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        self.flush()
        with self._changing:
            if self._stream is not None:
                self._stream.close()
                self._stream = None
        self._hasher.shutdown()

    def sha256(self) -> str:
        """Of everything, once the file is closed."""
        return self._hash.hexdigest()

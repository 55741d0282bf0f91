"""SHA-256 of a source's files, computed beside the conversion."""

import hashlib
import threading
from collections.abc import Callable, Mapping

from etils import epath

from mllama_jax.cloud import pieces
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.sources.source import Source
from mllama_jax.hub import published_sha256


class SourceHashes:
    """Hashes files one after the other in a thread of its own; use as a context manager.

    Reading goes through a file from its first byte to its last, so it also brings the file into
    memory in the order in which a disk is fastest.

    Args:
        source: its files are hashed.
        known: name -> SHA-256 of files that an earlier process hashed.
        on_hashed: told of each file when it is done.
    """

    def __init__(
        self,
        source: Source,
        known: Mapping[str, str],
        on_hashed: Callable[[str, str], None],
    ):
        self._source = source
        self._hashes = dict(known)
        self._on_hashed = on_hashed
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="source hashes", daemon=True)

    def __enter__(self) -> "SourceHashes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> dict[str, str]:
        """File -> SHA-256, named as `Source.label` does; waits for it.

        Raises:
            CheckpointError: a file of the hub's cache is not what the hub published.
            OSError: a file can't be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return {name: self._hashes[name] for name in map(self._source.label, self._source.files)}

    def _run(self) -> None:
        try:
            for file in self._source.files:
                if self._source.label(file) not in self._hashes and not self._hash(file):
                    return
        except BaseException as error:
            self._error = error

    def _hash(self, file: epath.Path) -> bool:
        """Whether the file was read to its end."""
        found = hashlib.sha256()
        for data in pieces(file):
            if self._stop.is_set():
                return False
            found.update(data)
        digest = found.hexdigest()
        published = published_sha256(file)
        if published is not None and published != digest:
            raise CheckpointError(
                f"{file}: its SHA-256 is {digest}, but the hub published {published}: the download "
                "is damaged; remove the file and fetch it again"
            )
        name = self._source.label(file)
        self._hashes[name] = digest
        self._on_hashed(name, digest)
        return True

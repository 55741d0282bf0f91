"""The results file of a job: appended to, one process at a time, and carried on after any end.

Beside ``results.jsonl`` lies ``results.jsonl.job.json``, which says what kind of job writes it.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mllama_jax.batch.inputs import result_key

__all__ = ["ResultsFile", "as_bytes", "read_job", "read_results", "replace_file", "write_job"]

_SECONDS_BETWEEN_SYNCS = 5.0

# Line breaks to some readers, and to `str.splitlines`.
_ESCAPED = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


class ResultsFile:
    """Use as a context manager: what is in the file, and more lines for it.

    Every line goes to the operating system in one piece when it is appended, so it outlives the
    process. The disk is told to keep it within about five seconds (`update`) and at the end; a
    machine that loses its power loses these seconds, and they are done again. A last line without
    its end, which only an interrupted process leaves, is cut off.

    Args:
        path: of the file; made if absent.
        fingerprint: what must be the same for results to belong together; JSON values.
        retry_errors: error lines are dropped, so that they count as not done.

    Attributes:
        path: of the file.
        done: keys of the lines that were there (`inputs.result_key`).
        num_lines: there are now.
        num_errors: error lines among them.
        kept: what earlier runs have noted with `keep`.

    Raises:
        FileExistsError: the file belongs to no job, or to one with another fingerprint; another
            process writes it.
        ValueError: a line of it is not one that this package writes.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, retry_errors: bool = False):
        self.path = path
        self.done: set[bytes] = set()
        self.num_lines = self.num_errors = 0
        self.kept: dict[str, Any] = {}
        # As it is when it is read back.
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._unsynced_since: float | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _locked(path)
        try:
            self._check_job()
            self._read(retry_errors)
        except BaseException:
            self._file.close()
            raise

    def keep(self, **values: Any) -> None:
        """Notes values for later runs of the job; JSON values."""
        if {**self.kept, **values} != self.kept:
            self.kept |= values
            write_job(self.path, self._fingerprint, self.kept)

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line."""
        data = memoryview(as_bytes(line))
        while data:
            data = data[os.write(self._file.fileno(), data) :]
        self._count(line)
        if self._unsynced_since is None:
            self._unsynced_since = time.monotonic()
        self.update()

    def update(self) -> None:
        """To be called often, so that lines don't wait for the disk until the next is appended."""
        since = self._unsynced_since
        if since is not None and time.monotonic() - since > _SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Returns when the disk has all lines."""
        os.fsync(self._file.fileno())
        self._unsynced_since = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            self.sync()

    def _check_job(self) -> None:
        job = read_job(self.path)
        if not self.path.stat().st_size:
            write_job(self.path, self._fingerprint, {})
        elif job is None:
            raise FileExistsError(
                f"{self.path} exists, and no job has written it ({job_path(self.path).name} is "
                "missing): give another output"
            )
        else:
            check_same(self.path, job["fingerprint"], self._fingerprint)
            self.kept = job["kept"]

    def _read(self, retry_errors: bool) -> None:
        end = 0
        for offset, data, line in read_results(self.path):
            self.done.add(result_key(line))
            self._count(line)
            end = offset + len(data)
        if retry_errors and self.num_errors:
            self._drop_errors()
        elif end < self.path.stat().st_size:
            os.ftruncate(self._file.fileno(), end)
        os.lseek(self._file.fileno(), 0, os.SEEK_END)

    def _drop_errors(self) -> None:
        self.done, self.num_lines, self.num_errors = set(), 0, 0
        incomplete = self.path.with_name(f".{self.path.name}.incomplete")
        with self._file:
            file = incomplete.open("w+b")
            # Whoever comes once it is in its place finds it locked.
            fcntl.flock(file, fcntl.LOCK_EX)
            for _, data, line in read_results(self.path):
                if line["error"] is None:
                    file.write(data)
                    self.done.add(result_key(line))
                    self._count(line)
            _put_in_place(file, incomplete, self.path)
        self._file = file

    def _count(self, line: Mapping[str, Any]) -> None:
        self.num_lines += 1
        self.num_errors += line["error"] is not None


def read_results(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """The whole lines of a results file: where each begins, its bytes, and what it says.

    Raises:
        ValueError: a line is not one that this package writes.
    """
    offset = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                return
            try:
                line = json.loads(data)
                result_key(line)
                _ = line["error"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number} is not a result of a job "
                    f"({type(error).__name__}: {error}); remove it, or give another output"
                ) from None
            yield offset, data, line
            offset += len(data)


def as_bytes(line: Mapping[str, Any]) -> bytes:
    """A line of the file; raises ValueError for what JSON can't hold."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False).translate(_ESCAPED)
    return text.encode() + b"\n"


def job_path(path: Path) -> Path:
    """Where the job of a results file is described."""
    return path.with_name(f"{path.name}.job.json")


def read_job(path: Path) -> dict[str, Any] | None:
    """The job that writes a results file: its ``fingerprint`` and what was ``kept``; None if there
    is none."""
    file = job_path(path)
    try:
        job = json.loads(file.read_bytes())
        return {"fingerprint": dict(job["fingerprint"]), "kept": dict(job["kept"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file}: not the description of a job; remove it, and give another output"
        ) from None


def write_job(path: Path, fingerprint: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Says which job writes a results file."""
    text = json.dumps({"fingerprint": fingerprint, "kept": kept}, indent=2)
    replace_file(job_path(path), [f"{text}\n".encode()])


def check_same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises FileExistsError, naming what differs, unless the fingerprints are equal."""
    differences = "; ".join(_differences(then, now))
    if differences:
        raise FileExistsError(
            f"{path} was begun by another job: {differences}. Carry on with what was then, or give "
            f"another output; to begin anew, remove {path.name} and {job_path(path).name}"
        )


def _differences(
    then: Mapping[str, Any], now: Mapping[str, Any], within: str = ""
) -> Iterator[str]:
    for name in {**then, **now}:
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{within}{name}.")
        elif old != new:
            yield f"{within}{name} was {json.dumps(old)} and is now {json.dumps(new)}"


def replace_file(path: Path, pieces: Iterator[bytes] | list[bytes]) -> None:
    """Writes a file; one that is there is replaced, and never seen half-written."""
    incomplete = path.with_name(f".{path.name}.incomplete")
    try:
        with incomplete.open("wb") as file:
            file.writelines(pieces)
            _put_in_place(file, incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)


def _put_in_place(file: BinaryIO, incomplete: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    incomplete.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Returns when the disk knows which files are in it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        # Some file systems of networks refuse it for folders, and need it as little.
        with suppress(OSError):
            os.fsync(opened)
    finally:
        os.close(opened)


def _locked(path: Path) -> BinaryIO:
    """The file, which no other process of this kind then writes."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FileExistsError(
                f"{path}: another process is writing it; wait for its end, or give another output"
            ) from None
        # Another process may have put a new file there meanwhile.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()

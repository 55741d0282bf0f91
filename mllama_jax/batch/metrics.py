"""The numbers of a running job as lines of JSON, for whatever draws curves."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

from mllama_jax.batch.stats import EngineStats

__all__ = ["MetricsWriter"]

_SPEEDS = {
    "requests_per_second": ("done", "failed"),
    "tokens_in_per_second": ("tokens_in",),
    "tokens_out_per_second": ("tokens_out",),
}


class MetricsWriter:
    """Appends a line every few seconds, and one at the end.

    Use as a context manager around the work. Each line has ``time`` (seconds since 1970),
    ``seconds`` since the start, all of `EngineStats`, and ``requests_per_second``,
    ``tokens_in_per_second`` and ``tokens_out_per_second`` since the line before. A job that is
    carried on writes behind the lines of the earlier run; its counters and ``seconds`` begin anew.

    Args:
        path: of the file; None writes nothing.
        stats: what is done.
        every: seconds between two lines.
    """

    def __init__(self, path: Path | None, stats: Callable[[], EngineStats], every: float = 10.0):
        self._path, self._stats, self._every = path, stats, every
        self._started = self._written_at = monotonic()
        self._written = stats()

    def update(self) -> None:
        """Writes a line if it is time for one; to be called often."""
        if self._path is not None and monotonic() - self._written_at >= self._every:
            self._write()

    def __enter__(self) -> Self:
        self._started = self._written_at = monotonic()
        self._written = self._stats()
        if self._path is not None:
            _end_torn_line(self._path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._path is not None:
            self._write()

    def _write(self) -> None:
        now, stats = monotonic(), self._stats()
        passed = max(now - self._written_at, 1e-9)
        numbers = {
            "time": round(time.time(), 3),
            "seconds": round(now - self._started, 3),
            **dataclasses.asdict(stats),
        }
        for name, counters in _SPEEDS.items():
            more = sum(getattr(stats, c) - getattr(self._written, c) for c in counters)
            numbers[name] = round(more / passed, 3)
        assert self._path is not None
        with self._path.open("a") as file:
            file.write(json.dumps(numbers) + "\n")
        self._written_at, self._written = now, stats


def _end_torn_line(path: Path) -> None:
    """So that the first new line stands alone, whatever an earlier process was doing at its end."""
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")

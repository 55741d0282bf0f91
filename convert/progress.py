"""How far a long piece of work on files is: a bar on a terminal, plain lines anywhere else."""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class ByteProgress:
    """Bytes done, rate and time left, on standard error.

    Use as a context manager around the work; `add` may be called from several threads. Where
    standard error is no terminal, a line appears about every 10 seconds and one at the end.

    Args:
        total: bytes of the whole work.
        description: what is done: "converting".
    """

    def __init__(self, total: int, description: str):
        self._total, self._description = total, description
        self._done, self._skipped = 0, 0
        self._started = self._reported = time.monotonic()
        self._lock = threading.Lock()
        self._bar = _bar(total, description) if sys.stderr.isatty() else None

    def add(self, num_bytes: int) -> None:
        """Counts bytes that are done."""
        with self._lock:
            self._done += num_bytes
            if self._bar is not None:
                self._bar.update(num_bytes)
            elif time.monotonic() - self._reported >= _SECONDS_BETWEEN_LINES:
                self._print_line()

    def skip(self, num_bytes: int) -> None:
        """Counts bytes that an earlier process did, and leaves them out of the rate."""
        with self._lock:
            self._done += num_bytes
            self._skipped += num_bytes
            if self._bar is not None:
                self._bar.initial += num_bytes
                self._bar.n += num_bytes
                self._bar.refresh()

    def say(self, text: str) -> None:
        """Prints something without disturbing the bar."""
        if self._bar is not None:
            tqdm.tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            else:
                self._print_line()

    def _print_line(self) -> None:
        self._reported = time.monotonic()
        seconds = self._reported - self._started
        rate = (self._done - self._skipped) / max(seconds, 1e-9)
        left = self._total - self._done
        percent = 100 * self._done / self._total if self._total else 100.0
        when = f"{duration(left / rate)} left" if left > 0 and rate > 0 else duration(seconds)
        print(
            f"{self._description}: {size(self._done)} of {size(self._total)} ({percent:.1f} %), "
            f"{rate / 1e9:.3f} GB/s, {when}",
            file=sys.stderr,
            flush=True,
        )


def _bar(total: int, description: str) -> tqdm.tqdm:
    # Some terminals (of containers, above all) don't know their width; tqdm would show nothing.
    knows_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm.tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        ncols=None if knows_width else 80,
        dynamic_ncols=knows_width,
        file=sys.stderr,
    )


def size(num_bytes: int) -> str:
    """`21300000000` -> `"21.3 GB"`."""
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.{3 if unit == 1e12 else 1}f} {name}"
    return f"{num_bytes} bytes"


def duration(seconds: float) -> str:
    """`3725.0` -> `"1:02:05"`; below a minute `"42 s"`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

"""How far a batch job is: a bar on a terminal, plain lines anywhere else."""

import os
import sys
from collections import deque
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self

import tqdm

from mllama_jax.batch.stats import EngineStats

__all__ = ["BatchProgress"]

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_REDRAWS = 0.2
_WINDOW_SECONDS = 60.0
_SAMPLES_IN_WINDOW = 60


class BatchProgress:
    """Requests done and failed, tokens a second in and out, slots busy and time left.

    Use as a context manager around the work. It goes to standard error: a bar on a terminal, a
    line every 30 seconds and one at the end anywhere else. Speeds, and the time left that follows
    from them, are of the last minute.

    Args:
        stats: what is done. Requests that fail before they reach the engine have to be among its
            ``failed`` to be counted.
        total: requests of the whole job, with the skipped ones; None: not known.
        skipped: requests that an earlier run has done.
        show: False shows nothing at all.
    """

    def __init__(
        self, stats: Callable[[], EngineStats], *, total: int | None, skipped: int, show: bool
    ):
        self._stats, self._total, self._skipped, self._show = stats, total, skipped, show
        self._bar: tqdm.tqdm | None = None
        self._samples: deque[tuple[float, EngineStats]] = deque()
        self._shown_at = 0.0

    def update(self) -> None:
        """Shows where the job is, if that was not shown just now; to be called often."""
        if not self._show:
            return
        pause = _SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_REDRAWS
        now = monotonic()
        if now - self._shown_at >= pause:
            self._draw(now)

    def __enter__(self) -> Self:
        now = self._shown_at = monotonic()
        self._samples = deque([(now, self._stats())])
        if self._show and sys.stderr.isatty():
            self._bar = _bar(self._total, self._skipped)
            self._draw(now)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._show:
            self._draw(monotonic())
        if self._bar is not None:
            self._bar.close()

    def _draw(self, now: float) -> None:
        self._shown_at = now
        stats = self._stats()
        done = self._skipped + stats.done + stats.failed
        text = self._text(now, stats, done)
        self._sample(now, stats)
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text, refresh=True)
        else:
            of_all = "" if self._total is None else f" of {self._total:,}"
            print(f"{done:,}{of_all} requests, {text}", file=sys.stderr, flush=True)

    def _text(self, now: float, stats: EngineStats, done: int) -> str:
        since, earlier = self._samples[0]
        seconds = max(now - since, 1e-9)
        parts = [f"{stats.failed:,} failed"] if stats.failed else []
        tokens_in = (stats.tokens_in - earlier.tokens_in) / seconds
        tokens_out = (stats.tokens_out - earlier.tokens_out) / seconds
        parts.append(f"tokens/s {tokens_in:,.0f} in, {tokens_out:,.0f} out")
        parts.append(f"slots {stats.slots_busy}/{stats.num_slots}")
        finished = stats.done + stats.failed - earlier.done - earlier.failed
        if self._total is not None and finished > 0 and done < self._total:
            left = (self._total - done) * seconds / finished
            parts.append(f"{tqdm.tqdm.format_interval(left)} left")
        return ", ".join(parts)

    def _sample(self, now: float, stats: EngineStats) -> None:
        """Keeps what the speeds are measured from."""
        if now - self._samples[-1][0] >= _WINDOW_SECONDS / _SAMPLES_IN_WINDOW:
            self._samples.append((now, stats))
        # The oldest that is left is as old as the window, so that the speed is of all of it.
        while len(self._samples) > 1 and now - self._samples[1][0] >= _WINDOW_SECONDS:
            self._samples.popleft()


def _bar(total: int | None, skipped: int) -> tqdm.tqdm:
    # Some terminals (of containers, above all) don't know their width; tqdm would show nothing.
    knows_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    counts = (
        "{n_fmt} requests" if total is None else "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}"
    )
    return tqdm.tqdm(
        total=total,
        initial=skipped,
        bar_format=counts + " [{elapsed}{postfix}]",
        ncols=None if knows_width else 120,
        dynamic_ncols=knows_width,
        file=sys.stderr,
    )

"""What a batch job has done, in a few lines for a person."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from time import monotonic

import numpy as np

from mllama_jax.batch.answers import Answer, Failure
from mllama_jax.batch.requests import RequestError
from mllama_jax.batch.stats import EngineStats

__all__ = ["Summary"]

_PERCENTILES = (50, 90, 99)
_WINDOW = 1.0
"""Seconds over which throughput is measured, at least."""

_CAUSES_KEPT, _CAUSES_SHOWN = 200, 5
_LONGEST_MESSAGE = 140
_QUOTED_OR_NUMBER = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


class Summary:
    """Counts results, and keeps what percentiles and the causes of errors need.

    Memory does not grow with the number of results: times go into histograms whose bins are 2 %
    wide, and a bounded number of causes is kept apart.

    Args:
        skipped: requests that an earlier run has done.

    The clock starts here, so make it when the work begins.
    """

    def __init__(self, skipped: int):
        self._skipped = skipped
        self._started = self._window_began = monotonic()
        self._counted: tuple[int, int] | None = None
        self._first_answer: float | None = None
        self._answered = self._failed = 0
        self._latencies = {
            "waiting": _Histogram(),
            "to first token": _Histogram(),
            "total": _Histogram(),
        }
        self._speeds = {"in": _Histogram(), "out": _Histogram(), "of one request": _Histogram()}
        self._causes: Counter[tuple[int, str, str]] = Counter()
        self._examples: dict[tuple[int, str, str], str] = {}

    def add(self, result: Answer | Failure) -> None:
        """Counts one result."""
        if isinstance(result, Failure):
            self._failed += 1
            self._add_cause(result.error)
            return
        if self._first_answer is None:
            self._first_answer = monotonic() - self._started
        self._answered += 1
        timings = result.timings
        times = (timings.waiting, timings.first_token, timings.total)
        for histogram, seconds in zip(self._latencies.values(), times, strict=True):
            histogram.add(seconds)
        tokens = sum(len(choice.token_ids) for choice in result.choices)
        if tokens and timings.total > timings.waiting:
            self._speeds["of one request"].add(tokens / (timings.total - timings.waiting))

    def update(self, stats: EngineStats) -> None:
        """Measures throughput; to be called after each step."""
        now = monotonic()
        counted = (stats.tokens_in, stats.tokens_out)
        if self._counted is None:
            self._counted = counted
        elif now - self._window_began < _WINDOW:
            return
        else:
            for name, more, before in zip(("in", "out"), counted, self._counted, strict=True):
                self._speeds[name].add((more - before) / (now - self._window_began))
        self._window_began, self._counted = now, counted

    def text(self, stats: EngineStats, stopped_by: str | None = None) -> str:
        """All of it, as lines.

        Args:
            stats: of the engine, at the end.
            stopped_by: what ended the job before its last request, such as "SIGTERM".
        """
        lines = [self._counts(), *self._errors()]
        if self._answered or self._failed:
            lines += self._work(stats, monotonic() - self._started)
        if self._answered:
            lines += _table("Latency", self._latencies, _seconds)
        lines += _table("Tokens/s", self._speeds, _number)
        if stopped_by is not None:
            lines.append(
                f"Stopped by {stopped_by} before the end: the same command carries on from here."
            )
        return "\n".join(lines)

    def _counts(self) -> str:
        if not (self._answered or self._failed):
            text = "No request was answered"
        else:
            text = f"{self._answered:,} answered, {self._failed:,} failed"
        return text + (f"; {self._skipped:,} were done before." if self._skipped else ".")

    def _add_cause(self, error: RequestError) -> None:
        # Requests that differ in a name, a number or a place have the same trouble.
        field = re.sub(r"\d+", "…", error.field or "")
        cause = (error.status_code, field, _QUOTED_OR_NUMBER.sub("…", str(error)[:1000]))
        if cause not in self._causes and len(self._causes) >= _CAUSES_KEPT:
            cause = (error.status_code, "", "other errors")
        self._causes[cause] += 1
        self._examples.setdefault(cause, str(error))

    def _errors(self) -> list[str]:
        lines = []
        shown = self._causes.most_common(_CAUSES_SHOWN)
        for cause, count in shown:
            status, field, text = cause
            example = self._examples[cause] if text != "other errors" else text
            where = f", {field}" if field else ""
            lines.append(f"  {count:,} × status {status}{where}: {_one_line(example)}")
        rest = self._failed - sum(count for _, count in shown)
        if rest:
            others = len(self._causes) - len(shown)
            lines.append(f"  {rest:,} × others ({others} kinds); the results say which")
        return lines

    def _work(self, stats: EngineStats, seconds: float) -> list[str]:
        per_second = 1 / max(seconds, 1e-9)
        first = ""
        if self._first_answer is not None:
            first = f", the first answer after {_seconds(self._first_answer)}"
        requests = (self._answered + self._failed) * per_second
        return [
            f"Time      {_seconds(seconds)}{first}; {_number(requests)} requests/s",
            f"Tokens    {stats.tokens_in:,} in ({_number(stats.tokens_in * per_second)}/s), "
            f"{stats.tokens_out:,} out ({_number(stats.tokens_out * per_second)}/s)",
            f"Pictures  {stats.pictures_encoded:,} encoded, {stats.pictures_reused:,} reused",
        ]


def _table(
    title: str, rows: Mapping[str, "_Histogram"], written: Callable[[float], str]
) -> list[str]:
    """Percentiles of what there is."""
    lines = [f"{title:<16}" + "".join(f"{f'p{percent}':>10}" for percent in _PERCENTILES)]
    for name, histogram in rows.items():
        if histogram.count:
            values = (written(histogram.percentile(percent)) for percent in _PERCENTILES)
            lines.append(f"  {name:<14}" + "".join(f"{value:>10}" for value in values))
    return lines if len(lines) > 1 else []


class _Histogram:
    """Of values from 0 on; the percentiles are off by 1 % at most."""

    _EDGES = np.geomspace(1e-6, 1e8, 1630)

    def __init__(self) -> None:
        self._counts = np.zeros(len(self._EDGES) + 1, np.int64)
        self._low, self._high = np.inf, 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self._counts[np.searchsorted(self._EDGES, value)] += 1
        self._low, self._high = min(self._low, value), max(self._high, value)
        self.count += 1

    def percentile(self, percent: float) -> float:
        """The least value that so many percent do not exceed."""
        rank = max(1, int(np.ceil(self.count * percent / 100)))
        place = int(np.searchsorted(np.cumsum(self._counts), rank))
        if place == 0:
            return self._low
        below, above = self._EDGES[max(place - 1, 0)], self._EDGES[min(place, len(self._EDGES) - 1)]
        return float(np.clip(np.sqrt(below * above), self._low, self._high))


def _one_line(text: str) -> str:
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"


def _seconds(seconds: float) -> str:
    """`0.0123` -> `"12.3 ms"`, `75.2` -> `"75.2 s"`, `3725` -> `"1:02:05"`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.{1 if seconds < 0.1 else 0}f} ms"
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _number(value: float) -> str:
    """Three digits or more: `0.0345`, `3.45`, `34.5`, `3,450`."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.3g}"

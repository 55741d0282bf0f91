"""What a batch job says of itself: progress, metrics, and the summary at the end."""

import fcntl
import json
import os
import pty
import struct
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllama_jax.batch import metrics, progress
from mllama_jax.batch import summary as summary_module
from mllama_jax.batch.answers import Answer, Choice, Failure, Timings
from mllama_jax.batch.engine import EngineStats
from mllama_jax.batch.metrics import MetricsWriter
from mllama_jax.batch.prepare import PreparedRequest
from mllama_jax.batch.progress import BatchProgress
from mllama_jax.batch.requests import Request, RequestError
from mllama_jax.batch.summary import Summary

NOTHING = EngineStats(0, 0, 0, 0, 0, 8, 0, 0, 0)
PREPARED = PreparedRequest(Request("a", "completion", prompt="b"), np.zeros(1, np.int32), (), ())


class Job:
    """Numbers that change, and a clock."""

    def __init__(self) -> None:
        self.stats = NOTHING
        self.now = 1000.0

    def goes_on(self, seconds: float, **changes: int) -> None:
        self.now += seconds
        self.stats = replace(self.stats, **changes)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    job = Job()
    monkeypatch.setattr(progress, "monotonic", lambda: job.now)
    monkeypatch.setattr(metrics, "monotonic", lambda: job.now)
    monkeypatch.setattr(summary_module, "monotonic", lambda: job.now)
    return job


def answer(waiting: float, first_token: float, total: float, tokens: int = 3) -> Answer:
    choice = Choice(0, tuple(range(tokens)), "text", "stop")
    return Answer(PREPARED, (choice,), None, Timings(waiting, first_token, total))


def failure(message: str, **changes: Any) -> Failure:
    return Failure("a", RequestError(message, **changes))


# --- summary --------------------------------------------------------------------------------------


def test_percentiles_are_those_of_all_answers():
    random = np.random.default_rng(0)
    totals = random.lognormal(0, 1.5, 5000)
    summary = Summary(skipped=0)
    for total in totals:
        summary.add(answer(total / 4, total / 2, total, tokens=6))
    for name, factor in [("waiting", 0.25), ("to first token", 0.5), ("total", 1)]:
        [line] = [x for x in summary.text(NOTHING).splitlines() if x.startswith(f"  {name} ")]
        values = line.removeprefix(f"  {name}").split()
        found = [
            float(value) * (0.001 if unit == "ms" else 1)
            for value, unit in zip(values[::2], values[1::2], strict=True)
        ]
        assert found == pytest.approx(np.quantile(totals, [0.5, 0.9, 0.99]) * factor, rel=0.02)
    # Six tokens in three quarters of the time.
    speeds = summary.text(NOTHING).splitlines()[-1].removeprefix("  of one request").split()
    expected = np.quantile(8 / totals, [0.5, 0.9, 0.99])
    assert [float(s.replace(",", "")) for s in speeds] == pytest.approx(expected, rel=0.02)


def test_throughput_is_measured_over_seconds(job: Job):
    summary = Summary(skipped=0)
    summary.update(replace(NOTHING, tokens_out=10**6))  # of an earlier run of the engine
    stats, rates = replace(NOTHING, tokens_out=10**6), []
    for second in range(100):
        for _ in range(4):  # steps of a quarter of a second
            stats = replace(stats, tokens_out=stats.tokens_out + second)
            job.goes_on(0.25)
            summary.update(stats)
        rates.append(4 * second)
    # A step that takes longer is one window.
    job.goes_on(4.0)
    summary.update(replace(stats, tokens_out=stats.tokens_out + 40_000, tokens_in=2_000))
    rates.append(10_000)
    *_, title, into, out = summary.text(replace(NOTHING, failed=1)).splitlines()
    assert title.split() == ["Tokens/s", "p50", "p90", "p99"]
    assert into.split() == ["in", "0", "0", "0"]
    name, *found = out.split()
    assert name == "out"
    expected = np.quantile(rates, [0.5, 0.9, 0.99], method="inverted_cdf")
    assert [float(f.replace(",", "")) for f in found] == pytest.approx(expected, rel=0.02)


def test_one_answer_is_every_percentile():
    summary = Summary(skipped=12_345)
    summary.add(answer(0.0, 0.25, 90.0, tokens=90))
    stats = replace(NOTHING, done=1, tokens_in=12_000, tokens_out=90, pictures_encoded=3)
    text = summary.text(stats)
    assert text.startswith("1 answered, 0 failed; 12,345 were done before.\n")
    assert [line.split() for line in text.splitlines()[5:8]] == [
        ["waiting", *["0.0", "ms"] * 3],
        ["to", "first", "token", *["250", "ms"] * 3],
        ["total", *["90.0", "s"] * 3],
    ]
    assert text.splitlines()[-1].split() == ["of", "one", "request", "1", "1", "1"]
    assert "12,000 in" in text
    assert "3 encoded, 0 reused" in text


def test_a_summary_of_nothing():
    assert Summary(0).text(NOTHING) == "No request was answered."
    text = Summary(7).text(NOTHING, stopped_by="SIGTERM")
    assert text.splitlines() == [
        "No request was answered; 7 were done before.",
        "Stopped by SIGTERM before the end: the same command carries on from here.",
    ]
    failed = Summary(0)
    failed.add(failure("no"))
    assert failed.text(NOTHING).startswith("0 answered, 1 failed.\n  1 × status 400: no\nTime ")
    silent = Summary(0)
    silent.add(answer(1.0, 1.0, 1.0, tokens=0))
    assert "of one request" not in silent.text(NOTHING)


def test_errors_are_grouped_by_cause():
    summary = Summary(0)
    for i in range(40):
        field = f"messages[{i}].content[{i % 3}]"
        summary.add(failure(f"{field}: '{i}.png': no such file\n in 'here'", field=field))
    for i in range(9):
        summary.add(failure(f"line {i}: it is not valid JSON"))
    summary.add(failure("it could not be prepared: \ud800" + "x" * 1000, status_code=500))
    lines = summary.text(NOTHING).splitlines()
    assert lines[0] == "0 answered, 50 failed."
    assert lines[1] == (
        "  40 × status 400, messages[…].content[…]: "
        "messages[0].content[0]: '0.png': no such file in 'here'"
    )
    assert lines[2] == "  9 × status 400: line 0: it is not valid JSON"
    assert lines[3].startswith("  1 × status 500: it could not be prepared: ?xxx")
    assert len(lines[3]) < 200


def test_memory_does_not_grow_with_the_results():
    summary = Summary(0)
    words = np.random.default_rng(0).integers(97, 123, (3000, 8), np.uint8)
    for word in words:
        summary.add(failure(word.tobytes().decode()))
    assert len(summary._causes) <= 201
    lines = summary.text(NOTHING).splitlines()
    assert lines[1] == "  2,800 × status 400: other errors"
    assert lines[6] == "  196 × others (196 kinds); the results say which"


# --- progress -------------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal(job: Job, capsys: pytest.CaptureFixture[str]):
    with BatchProgress(lambda: job.stats, total=1100, skipped=100, show=True) as shown:
        job.goes_on(29, done=1)
        shown.update()
        assert capsys.readouterr().err == ""
        job.goes_on(1, done=45, failed=5, tokens_in=90_000, tokens_out=1500, slots_busy=8)
        shown.update()
        assert capsys.readouterr().err == (
            "150 of 1,100 requests, 5 failed, tokens/s 3,000 in, 50 out, slots 8/8, 09:30 left\n"
        )
        # Two minutes in which little happens: the speed is that of the last one.
        for second in range(120):
            job.goes_on(1, done=45 + second // 30)
            shown.update()
        *_, last = capsys.readouterr().err.splitlines()
        assert last == (
            "153 of 1,100 requests, 5 failed, tokens/s 0 in, 0 out, slots 8/8, 7:53:30 left"
        )
        job.goes_on(1, done=995, slots_busy=0)
    assert capsys.readouterr().err.startswith("1,100 of 1,100 requests, 5 failed, tokens/s ")


def test_lines_without_a_total_and_nothing_at_all(job: Job, capsys: pytest.CaptureFixture[str]):
    with BatchProgress(lambda: job.stats, total=None, skipped=0, show=True):
        pass
    assert capsys.readouterr().err == "0 requests, tokens/s 0 in, 0 out, slots 0/8\n"
    with BatchProgress(lambda: job.stats, total=3, skipped=0, show=False) as shown:
        job.goes_on(100, done=3)
        shown.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [0, 150])
def test_a_bar_on_a_terminal(job: Job, monkeypatch: pytest.MonkeyPatch, columns: int):
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with BatchProgress(lambda: job.stats, total=200, skipped=50, show=True) as shown:
            job.goes_on(0.1, done=1)
            shown.update()
            job.goes_on(9.9, done=49, failed=1, tokens_out=1230, slots_busy=7)
            shown.update()
        stderr.flush()
        first, *_, last = os.read(terminal, 2**16).decode().strip().split("\r")
    os.close(terminal)
    assert "50/200" in first
    assert "100/200" in last
    assert "50%" in last
    assert last.endswith(", 1 failed, tokens/s 0 in, 123 out, slots 7/8, 00:20 left]")


# --- metrics --------------------------------------------------------------------------------------


def test_metrics(job: Job, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"time": 1}\n{"ti')  # where an earlier process was killed
    with MetricsWriter(path, lambda: job.stats) as writer:
        job.goes_on(9)
        writer.update()
        assert path.read_bytes().endswith(b'{"ti\n')
        job.goes_on(1, done=30, failed=10, tokens_in=100, slots_busy=8)
        writer.update()
        job.goes_on(5, done=40, tokens_in=110, tokens_out=20, pictures_encoded=7)
    first, torn, second, last = path.read_text().splitlines()
    assert (first, torn) == ('{"time": 1}', '{"ti')
    found = json.loads(second)
    assert found.pop("time") == pytest.approx(time.time(), abs=60)
    speeds = [found.pop(f"{name}_per_second") for name in ("requests", "tokens_in", "tokens_out")]
    assert speeds == [4.0, 10.0, 0.0]
    assert found == {
        "seconds": 10.0,
        "done": 30,
        "failed": 10,
        "tokens_in": 100,
        "tokens_out": 0,
        "slots_busy": 8,
        "num_slots": 8,
        "pictures_encoded": 0,
        "pictures_reused": 0,
        "programs": 0,
    }
    found = json.loads(last)
    assert (found["seconds"], found["requests_per_second"]) == (15.0, 2.0)
    assert (found["tokens_out_per_second"], found["pictures_encoded"]) == (4.0, 7)
    with MetricsWriter(None, lambda: job.stats) as nowhere:
        job.goes_on(99)
        nowhere.update()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

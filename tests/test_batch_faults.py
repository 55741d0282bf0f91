"""Jobs that are killed, stopped, or shared by processes: no result is missing, none is there twice.

The processes are real ones, and so are the command and the model.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from asking import EXAMPLE, PICTURES, ask
from processes import cpu_devices, results, start

from mllama_jax.batch.requests import Request


def record(request: Request) -> dict[str, Any]:
    """The line of a request."""
    [message] = request.messages or ()
    parts = [
        {"type": "image_url", "image_url": {"url": str(PICTURES[0].with_name(part["image"]))}}
        if part["type"] == "image"
        else part
        for part in message["content"]
    ]
    options = request.options
    body = {
        "messages": [{**message, "content": parts}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
    }
    return {
        "custom_id": request.custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }


def write_requests(file: Path, count: int, max_tokens: int) -> None:
    """Greedy and drawn ones, one that is malformed, one whose picture is missing, one twice."""
    requests = [
        ask(
            f"request {i}",
            "Which digit is this?",
            i % len(PICTURES),
            temperature=i % 2,
            max_tokens=max_tokens - i % 3,
            ignore_eos=True,
        )
        for i in range(count)
    ]
    lines = [json.dumps(record(request)) for request in requests]
    missing = {"type": "image_url", "image_url": {"url": "missing.png"}}
    other = record(requests[0])
    other["custom_id"], other["body"]["messages"][0]["content"] = "missing", [missing]
    lines[count // 3 : count // 3] = ["{", json.dumps(other), lines[0]]
    file.write_text("\n".join(lines) + "\n")


def lines(file: Path) -> list[str]:
    """The lines, sorted, but for their times."""
    found = []
    for line in file.read_text().splitlines():
        result = json.loads(line)
        result["response"]["body"].pop("created", None)
        found.append(json.dumps(result, sort_keys=True))
    return sorted(found)


def test_killed_at_any_moment_and_carried_on(tmp_path: Path):
    write_requests(tmp_path / "requests.jsonl", 80, max_tokens=12)
    [run] = results([start("batch_processes.py", 1, tmp_path, 5)])
    found = run.found
    assert found[0] == 0
    assert found == sorted(found)
    assert 0 < found[-1] < 83
    expected = lines(tmp_path / "undisturbed.jsonl")
    assert len(set(expected)) == 83
    assert lines(tmp_path / "killed.jsonl") == expected


def test_killed_while_results_are_rewritten(tmp_path: Path):
    """Errors dropped to be asked again, and shards merged: the old file or the new one is left."""
    [run] = results([start("rewriting_processes.py", 1, tmp_path)])
    assert run.found.keys() == {"errors", "merging", "merging again"}
    for work, found in run.found.items():
        assert found["wrong"] == [], work
        assert found["places"] > 50, work


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch")
    write_requests(path / "requests.jsonl", 80, max_tokens=20)
    return path


def command(folder: Path, output: str, *words: str, **environment: str) -> subprocess.Popen:
    """Starts the command for the requests of a folder."""
    options = {
        "--model": EXAMPLE / "model",
        "-i": folder / "requests.jsonl",
        "-o": folder / output,
        "--allow-folder": EXAMPLE,
        "--num-slots": 2,
        "--max-length": 96,
        "--max-tiles": 4,
        "--compilation-cache": folder / "compiled",
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "mllama_jax", "batch"),
            *(str(word) for item in options.items() for word in item),
            *words,
        ],
        env={**os.environ, **cpu_devices(1), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def merged(folder: Path) -> list[str]:
    """The results of two processes that share the requests."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        command(
            folder,
            "shared.jsonl",
            "--distributed",
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert "the results of all, in the order of the requests" in said[0][0]
    return lines(folder / "shared.jsonl")


def test_two_processes_share_a_job(folder: Path, merged: list[str]):
    shared = (folder / "shared.jsonl").read_text().splitlines()
    ids = [json.loads(line)["custom_id"] for line in shared]
    asked = []
    for line in (folder / "requests.jsonl").read_text().splitlines():
        custom_id = None if line == "{" else json.loads(line)["custom_id"]
        asked.append(None if custom_id in asked else custom_id)
    assert ids == asked
    parts = [lines(folder / f"shared.{index}-of-2.jsonl") for index in range(2)]
    assert all(len(part) in (41, 42) for part in parts)
    assert sorted(parts[0] + parts[1]) == merged


def test_stopped_by_a_signal_and_carried_on(folder: Path, merged: list[str]):
    output = folder / "stopped.jsonl"
    process = command(folder, output.name)
    end = time.monotonic() + 240
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "SIGTERM: finishing what has begun, for up to 30 seconds" in errors
    assert "Stopped by SIGTERM before the end: the same command carries on" in out
    count = len(lines(output))
    assert 3 <= count < 83
    assert f"{count} of 83 requests have a result." in out

    process = command(folder, output.name)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors  # three of the results are errors
    assert f"has {count} results; carrying on" in errors
    assert f"{count} were done before" in out
    assert lines(output) == merged

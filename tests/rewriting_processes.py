"""Kills processes in the lines of what rewrites results, read by `test_batch_faults.py`.

`rewriting_processes.py FOLDER`: errors are dropped to be asked again, and shards are merged, in a
process of its own for each line of the code that does it (of merging, each third), which is killed
there. Prints for each of these works in how many lines it was killed, and what was wrong behind
it, as JSON.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from mllama_jax.batch import merge, results_file
from mllama_jax.batch.inputs import RequestsFile, Shard
from mllama_jax.batch.merge import merge_shards
from mllama_jax.batch.results_file import ResultsFile

CODE = {module.__file__ for module in (merge, results_file)}
JOB = {"model": "digits"}


def killed_in_line(number: int, work: Callable[[], Any]) -> bool:
    """Whether the work is as long as that; it is killed before the line that it runs then."""
    pid = os.fork()
    if not pid:
        passed = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal passed
            if frame.f_code.co_filename not in CODE:
                return None
            passed += event == "line"
            if passed > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def result(name: str, error: str | None = None) -> dict[str, Any]:
    return {"custom_id": name, "error": error and {"message": error}}


def write(path: Path, *results: dict[str, Any]) -> None:
    with ResultsFile(path, JOB) as file:
        for line in results:
            file.append(line)


def names(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def killed_everywhere(
    begun: Path, work: Callable[[Path], Any], check: Callable[[Path], list[str]], step: int
) -> dict[str, Any]:
    """Each time in a fresh copy of the folder."""
    line, count, wrong = 0, 0, []
    folder = begun.with_name("copy")
    while True:
        shutil.copytree(begun, folder)
        was_killed = killed_in_line(line, lambda: work(folder))
        wrong += [f"line {line}: {what}" for what in check(folder)]
        shutil.rmtree(folder)
        if not was_killed:
            return {"places": count, "wrong": wrong}
        line, count = line + step, count + 1


def retry_errors(folder: Path) -> dict[str, Any]:
    begun = folder / "errors"
    begun.mkdir()
    write(
        begun / "results.jsonl", *(result(f"{i}", "no" if i % 3 == 1 else None) for i in range(5))
    )
    good = ["0", "2", "3"]

    def work(folder: Path) -> None:
        ResultsFile(folder / "results.jsonl", JOB, retry_errors=True)

    def check(folder: Path) -> list[str]:
        path, wrong = folder / "results.jsonl", []
        if names(path) not in (good, ["0", "1", "2", "3", "4"]):
            wrong.append(f"{names(path)} was left")
        with ResultsFile(path, JOB, retry_errors=True) as file:
            for name in ("1", "4"):
                file.append(result(name))
        if names(path) != [*good, "1", "4"]:
            wrong.append(f"{names(path)} was made of it")
        return wrong + stray(folder, "results.jsonl")

    return killed_everywhere(begun, work, check, step=1)


def merging(folder: Path, *, again: bool) -> dict[str, Any]:
    begun = folder / f"shards {again}"
    begun.mkdir()
    (begun / "requests.jsonl").write_text("".join(f'{{"custom_id": "{i}"}}\n' for i in range(5)))
    for index in range(2):
        shard = Shard(index, 2)
        lines = [result(f"{i}") for i in range(5) if shard.takes(i + 1)]
        write(shard.path(begun / "results.jsonl"), *lines[::-1])

    def work(folder: Path) -> None:
        merge_shards(RequestsFile(folder / "requests.jsonl"), folder / "results.jsonl")

    if again:
        work(begun)
    whole = [str(i) for i in range(5)]

    def check(folder: Path) -> list[str]:
        path, wrong = folder / "results.jsonl", []
        if (path.exists() or again) and names(path) != whole:
            wrong.append(f"{names(path)} was left")
        work(folder)
        if names(path) != whole:
            wrong.append(f"{names(path)} was made of it")
        shards = ("results.0-of-2.jsonl", "results.1-of-2.jsonl")
        return wrong + stray(folder, "requests.jsonl", "results.jsonl", *shards)

    return killed_everywhere(begun, work, check, step=3)


def stray(folder: Path, *known: str) -> list[str]:
    """Files that should not be there."""
    names = {file.name for file in folder.iterdir()}
    return sorted(names - {*known, *(f"{name}.job.json" for name in known)})


def main(folder: Path) -> dict[str, Any]:
    return {
        "errors": retry_errors(folder),
        "merging": merging(folder, again=False),
        "merging again": merging(folder, again=True),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))

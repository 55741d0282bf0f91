"""Runs a job that is killed again and again, read by `test_batch_faults.py`.

`batch_processes.py FOLDER SEED`: answers FOLDER/requests.jsonl into FOLDER/undisturbed.jsonl, and
into FOLDER/killed.jsonl by processes of which all but the last are killed while they work. Prints
how many lines each of these found, as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# Imported once, before the processes are forked; the model is loaded by each of them.
import jax

import mllama_jax.convert.load
import mllama_jax.processing.processor  # noqa: F401
from mllama_jax.batch.inputs import RequestsFile
from mllama_jax.batch.job import run_job
from mllama_jax.batch.results_file import ResultsFile

KILLS = 3


def answer(folder: Path, output: Path) -> None:
    import asking

    engine = asking.make_engine()
    with ResultsFile(output, {"model": "digits"}) as results:
        run_job(
            engine,
            RequestsFile(folder / "requests.jsonl"),
            results,
            tokenizer=asking.PROCESSOR.tokenizer,
            model_name="digits",
            show=False,
        )


def start(folder: Path, output: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        answer(folder, output)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kill_after(pid: int, output: Path, count: int, seconds: float) -> None:
    """Kills a process so many seconds after its output has so many lines."""
    while num_lines(output) < count:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def main(folder: Path, seed: int) -> list[int]:
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert os.waitpid(start(folder, folder / "undisturbed.jsonl"), 0)[1] == 0
    total = num_lines(folder / "undisturbed.jsonl")
    draw = random.Random(seed)
    output, found = folder / "killed.jsonl", []
    for _ in range(KILLS):
        found.append(num_lines(output))
        # None, too: before the first line of all, or of this process.
        wanted = found[-1] + draw.randrange(total // (KILLS + 1))
        kill_after(start(folder, output), output, wanted, draw.random() * 0.05)
    found.append(num_lines(output))
    assert os.waitpid(start(folder, output), 0)[1] == 0
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))

"""``mllama-jax convert`` as a user types it, and the progress that it shows."""

import json
import os
import pty
import shlex
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_checkpoint import arrays, random_params, tiny_config

from mllama_jax.cli import main
from mllama_jax.convert import plan_conversion, run_plan, save_params
from mllama_jax.convert import progress as progress_module
from mllama_jax.convert.progress import ByteProgress, duration, size
from mllama_jax.convert.verification import verify

LAYERS = "language_model.model.layers."


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    config = tiny_config()
    save_params(random_params(config), config, folder, "model")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``mllama-jax`` in this process; returns what it printed to its two outputs."""

    def run(*words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["mllama-jax", *map(str, words)])
        main()
        return tuple(capsys.readouterr())

    return run


def test_the_summary_says_how_to_verify(run, source, tmp_path):
    for number, options in enumerate(
        ([], ["--dtype", "float16"], ["--dtype", "bfloat16", "--text-dtype", "float32"])
    ):
        folder = tmp_path / f"result {number}"
        printed, told = run("convert", "--to", "hf", *options, source, folder)
        assert "converting: " in told
        assert f"{len(arrays(source))} tensors" in printed
        assert f"MllamaForConditionalGeneration.from_pretrained('{folder}')" in printed
        command = printed.split("To compare it with the source:\n")[1].splitlines()[0]
        words = shlex.split(command)
        assert words[:2] == ["mllama-jax", "verify"]
        printed, _ = run(*words[1:])
        assert printed.split("\n\n")[1].startswith("Equal: ")
        assert verify(source, folder).equal == (not options)


def test_dtypes_of_parts(run, source, tmp_path):
    parts = {"vision": "float16", "projector": "bfloat16", "text": "float32"}
    options = [word for part, dtype in parts.items() for word in (f"--{part}-dtype", dtype)]
    run("convert", "--to", "hf", *options, source, tmp_path / "result")
    names = dict(
        zip(("vision_model", "multi_modal_projector", "language_model"), parts, strict=True)
    )
    for name, array in arrays(tmp_path / "result").items():
        assert array.dtype.name == parts[names[name.split(".")[0]]], name


def test_text_only_and_shards(run, source, tmp_path):
    result = tmp_path / "result"
    words = ("convert", "--to", "hf", "--text-only", "--max-shard-size", "60KB", "--json")
    printed, _ = run(*words, source, result)
    done = json.loads(printed)
    assert len(list(result.glob("*.safetensors"))) > 1
    assert done["component"] == "language_model"
    assert done["tensors"] == len(arrays(result)) < len(arrays(source))
    assert done["bytes"] == sum(array.nbytes for array in arrays(result).values())
    assert done["resumed_bytes"] == 0
    assert done["peak_memory_bytes"] > 2**20
    printed, _ = run("verify", "--json", source, result)
    assert json.loads(printed)["component"] == "language_model"


def test_a_dry_run_prints_the_mapping_and_writes_nothing(run, source, tmp_path):
    words = ("convert", "--to", "hf", "--vision-dtype", "bfloat16", "--dry-run")
    printed, told = run(*words, source, tmp_path / "result")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in printed.splitlines() if line}
    up_proj = f"{LAYERS}{{0-5}}.mlp.up_proj.weight"
    assert rows[up_proj] == "(42, 24) float32 -> same name (42, 24) float32 24.2 kB"
    k_norm = f"{LAYERS}{{1,4}}.cross_attn.k_norm.weight"
    assert rows[k_norm] == "(4) float32 -> same name (4) float32 32 bytes"
    embedding = "vision_model.class_embedding"
    assert rows[embedding] == "(30) float32 -> same name (30) bfloat16 60 bytes"
    assert "are free there. Nothing was written." in printed
    assert told == ""
    found = json.loads(run(*words, "--json", source, tmp_path / "result")[0])
    assert not (tmp_path / "result").exists()
    assert {tensor["name"] for tensor in found["tensors"]} == arrays(source).keys()
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == found["bytes"]
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name[embedding] == {
        "source": embedding,
        "source_shape": [30],
        "source_dtype": "float32",
        "name": embedding,
        "shape": [30],
        "dtype": "bfloat16",
        "bytes": 60,
    }


def test_a_part_without_the_names_of_a_whole_model(run, tmp_path):
    """A tensor's name changes on the way: all layers still take one line."""
    config = tiny_config()
    save_params(random_params(config), config, tmp_path / "whole", "model")
    words = ("convert", "--to", "hf", "--text-only", "--dry-run")
    printed, _ = run(*words, tmp_path / "whole", tmp_path / "result")
    (line,) = [line for line in printed.splitlines() if ".up_proj." in line]
    assert line.split("->")[1].split()[0] == "model.layers.{0-5}.mlp.up_proj.weight"


def test_mistakes_end_in_one_message(run, source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for words, message in (
        ((tmp_path / "absent", tmp_path / "x"), "There is no folder"),
        ((source, tmp_path / "full"), "not empty"),
        ((source, source), "not to be touched"),
        (("--max-shard-size", "5 apples", source, tmp_path / "x"), "max_shard_size"),
        (("--text-only", "--vision-dtype", "float16", source, tmp_path / "x"), "no vision_model"),
    ):
        with pytest.raises(SystemExit, match=f"(?s)^mllama-jax: .*{message}"):
            run("convert", "--to", "hf", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_scripts_get_a_document_and_a_status(source, tmp_path):
    """In a process of its own: nothing but the document is on standard output."""

    def process(*words: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", "from mllama_jax.cli import main; main()"]
        return subprocess.run([*command, *map(str, words)], capture_output=True, text=True)

    result = tmp_path / "result"
    options = ("--to", "hf", "--dtype", "bfloat16", "--json")
    found = process("convert", *options, source, result)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["folder"] == str(result)
    assert "converting: " in found.stderr
    found = process("verify", "--json", source, result)
    assert found.returncode == 1, found.stderr
    assert json.loads(found.stdout)["equal"] is False


def test_help_lists_the_commands_and_explains_each(run, capsys):
    def printed(*words: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            run(*words)
        return capsys.readouterr().out

    listed = printed("--help")
    for command in ("convert", "inspect", "verify", "generate", "train", "demo"):
        (line,) = [line for line in listed.splitlines() if f"• {command} " in line]
        assert len(line.split()) > 6
    assert "exit status" not in listed
    assert "exit status is 0 if they are equal" in printed("verify", "--help")
    assert "$ mllama-jax convert --to hf model-orbax model-hf" in printed("convert", "--help")


def test_lines_of_progress(capsys, monkeypatch):
    with ByteProgress(10**7, "copying") as progress:
        progress.add(10**6)
        assert capsys.readouterr().err == ""  # too early for a line
        monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
        progress.add(10**6)
        first = capsys.readouterr().err
        progress.say("half-time")
        progress.add(8 * 10**6)
    assert first.startswith("copying: 2.0 MB of 10.0 MB (20.0 %), ")
    assert " GB/s, " in first
    assert first.endswith(" left\n")
    said, *_, last = capsys.readouterr().err.splitlines()
    assert said == "half-time"
    assert last.startswith("copying: 10.0 MB of 10.0 MB (100.0 %), ")
    assert not last.endswith("left")


def test_progress_of_several_threads_and_of_an_earlier_process(capsys):
    with ByteProgress(10**9, "copying") as progress:
        progress.skip(10**9 - 80_000)
        threads = [
            threading.Thread(target=lambda: [progress.add(1) for _ in range(10_000)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    line = capsys.readouterr().err
    assert "1.0 GB of 1.0 GB (100.0 %)" in line
    assert float(line.split(" GB/s")[0].split()[-1]) < 0.1  # 80 kB, not a gigabyte, took this time


def test_work_that_stops_half_way(capsys):
    def work() -> None:
        with ByteProgress(100, "copying") as progress:
            progress.add(40)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        work()
    assert capsys.readouterr().err.startswith("copying: 40 bytes of 100 bytes (40.0 %)")


def all_of(leader: int) -> bytes:
    """What a terminal received until its other end was closed."""
    received = b""
    with suppress(OSError):  # the end
        while data := os.read(leader, 2**16):
            received += data
    os.close(leader)
    return received


@pytest.mark.parametrize("columns", [0, 110])
def test_a_bar_on_a_terminal(monkeypatch, columns):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with ByteProgress(10**7, "copying") as progress:
            progress.skip(10**6)
            progress.add(4 * 10**6)
            progress.say("half-time")
            progress.add(5 * 10**6)
    shown = all_of(leader).decode()
    assert "half-time\r\n" in shown
    last = shown.strip().split("\r")[-1]
    assert last.startswith("copying: 100%")
    assert "10.0M/10.0M" in last
    assert "B/s" in last


def test_sizes_and_times():
    assert [size(n) for n in (0, 999, 1500, 21_340_441_670, 177_186_710_646, 2 * 10**12)] == [
        *("0 bytes", "999 bytes", "1.5 kB", "21.3 GB", "177.2 GB", "2.000 TB")
    ]
    assert [duration(s) for s in (0.2, 59.4, 60, 3725)] == ["0 s", "59 s", "0:01:00", "1:02:05"]


def test_a_conversion_that_is_taken_up_again_tells_what_was_done_first(source, tmp_path):
    """The bar leaves the first number that it hears out of the rate."""
    plan = plan_conversion(source, tmp_path / "result", to="hf")
    heard: list[int] = []
    run_plan(plan, progress=heard.append)
    assert heard[0] == 0
    assert sum(heard) == plan.total_bytes

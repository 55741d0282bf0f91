"""A job that is carried on is the same job: what is compared, and what may differ."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from asking import EXAMPLE

from mllama_jax.batch.identity import (
    check_requests,
    processor_identity,
    requests_identity,
    weights_identity,
)
from mllama_jax.cli import answering, main
from mllama_jax.convert import open_source


@pytest.mark.parametrize("begun", ["one\ntwo\n", "one\ntwo", "one\r\ntwo", ""])
def test_lines_may_be_added_and_not_changed(tmp_path: Path, begun: str):
    file, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    file.write_bytes(begun.encode())
    then = json.loads(json.dumps(requests_identity(file)))
    check_requests(results, None, file)
    end = "" if begun.endswith("\n") or not begun else "\n"
    for same in (begun, begun + end, begun + end + "three", begun + end + "three\nfour\n"):
        file.write_bytes(same.encode())
        check_requests(results, then, file)
    changed = [begun.replace("one", "eno"), begun[:-2]]
    changed += [] if begun.endswith("\n") else [begun + "more"]  # of the last line
    for other in changed if begun else ():
        file.write_bytes(other.encode())
        with pytest.raises(FileExistsError, match=r"requests.jsonl has changed since .*results"):
            check_requests(results, then, file)


def test_long_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mllama_jax.batch.identity._READ_BYTES", 7)
    file = tmp_path / "requests.jsonl"
    begun = b"".join(b"line %d\n" % i for i in range(50))
    file.write_bytes(begun)
    then = requests_identity(file)
    assert then["bytes"] == len(begun)
    monkeypatch.undo()
    assert requests_identity(file) == then
    file.write_bytes(begun + b"more")
    monkeypatch.setattr("mllama_jax.batch.identity._READ_BYTES", 7)
    check_requests(tmp_path, then, file)
    file.write_bytes(begun[:-3] + b"abc" + b"more")
    with pytest.raises(FileExistsError):
        check_requests(tmp_path, then, file)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLE / "model", tmp_path / "model"))


def test_a_copy_of_a_checkpoint_is_the_same(checkpoint: Path):
    ours, copy = open_source(EXAMPLE / "model"), open_source(checkpoint)
    os.utime(checkpoint / "tokenizer.json", (0, 0))
    (checkpoint / "README.md").write_text("for people")
    assert processor_identity(ours) == processor_identity(open_source(checkpoint))
    assert weights_identity(ours) == weights_identity(copy)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"]
)
def test_another_processor_is_noticed(checkpoint: Path, name: str):
    before = processor_identity(open_source(checkpoint))
    file = checkpoint / name
    file.write_text(file.read_text() + " ")
    assert processor_identity(open_source(checkpoint)) != before


def test_other_weights_are_noticed(checkpoint: Path):
    """Trained further: same names, same sizes, and most values are others."""
    before = weights_identity(open_source(checkpoint))
    [file] = checkpoint.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    data[header::50] = bytes(len(data[header::50]))
    file.write_bytes(data)
    assert weights_identity(open_source(checkpoint)) != before


class Loaded(Exception):
    """All that is checked before the model is loaded was as it was."""


def test_what_the_command_carries_on(
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
):
    requests, output = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_text('{"custom_id": "a"}\n{"custom_id": "b"}\n')
    done = '{"custom_id": "a", "error": null}\n{"custom_id": "b", "error": {"message": ""}}\n'

    def load(options: Any, results: Any, sources: Any) -> Any:
        results.keep(date="1 May 2025", max_length=96, max_tiles=4)
        raise Loaded

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(answering, "_load", load)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(answering, "_keep_compiled", lambda folder: None)

    def carried_on(*words: Any) -> str:
        """What is said; nothing if all is the same."""
        given = ("batch", "--model", checkpoint, "-i", requests, "-o", output, *words)
        monkeypatch.setattr("sys.argv", ["mllama-jax", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capfd.readouterr().err
        return "" if "Loaded" in said else said

    assert carried_on() == ""
    output.write_text(done.splitlines()[0] + "\n")
    assert carried_on() == ""
    assert carried_on("--max-length", 96, "--date", "1 May 2025") == ""
    assert "with --max-length 96, and is now to go on with 0; leave" in carried_on(
        "--max-length", 0
    )
    assert "was begun with --max-tiles 4" in carried_on("--max-tiles", 8)
    assert "was begun with --date 1 May 2025" in carried_on("--date", "2 May 2025")
    assert "pictures was" in carried_on("--allow-folder", EXAMPLE)
    assert "job: defaults.default_max_tokens was 16 and is now 7. Carry" in carried_on(
        "--max-tokens", 7
    )

    text = requests.read_text()
    requests.write_text(text + '{"custom_id": "c"}\n')
    assert carried_on() == ""
    requests.write_text(text.replace("b", "d"))
    assert "requests.jsonl has changed since" in carried_on()
    output.write_text(done)
    assert carried_on("--retry-errors", "--max-length", 128, "--max-tiles", 8) == ""
    assert output.read_text() == done.splitlines()[0] + "\n"

    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    assert "processor was" in carried_on()

"""Conversions that are stopped at any moment, and gone on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import numpy as np
import pytest
from tiny_checkpoint import random_params, tiny_config

from mllama_jax.convert import CheckpointError, convert, open_source, save_params
from mllama_jax.convert.lazy import read_whole
from mllama_jax.convert.plan import Format
from mllama_jax.convert.table import tensors

TESTS = Path(__file__).parent

# Converts into one folder after the other; in each the first process kills itself before its n-th
# access to the folder, n = 0, 1, …, and a second one goes on. Ends when a first one came through.
# Everything is imported once, before the many processes are forked.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from mllama_jax.convert import convert
from mllama_jax.convert import pipeline
import mllama_jax.convert.{module}

source, output = map(Path, sys.argv[1:3])
every = int(sys.argv[4])
# Everything that is whole is flushed and noted at once.
pipeline._FLUSH_SECONDS = 0.0

def child(kill_at, folder):
    left = kill_at

    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(
            arguments[0]
        ):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    if kill_at is not None:
        sys.addaudithook(hook)
    report = convert(source, folder, to=sys.argv[3], max_shard_size="150KB")
    (output / (folder.name + ".json")).write_text(json.dumps(report.resumed_bytes))

def process(kill_at, folder):
    pid = os.fork()
    if pid == 0:
        try:
            child(kill_at, folder)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for kill_at in range(0, 100_000, every):
    folder = output / f"{{kill_at:05}}"
    killed = process(kill_at, folder)
    assert killed in (0, -signal.SIGKILL), killed
    copy = output / (folder.name + ".left")
    if folder.exists():
        os.system(f"cp -r {{folder}} {{copy}}")
    if killed == 0:
        break
    assert process(None, folder) == 0
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    config = tiny_config()
    save_params(random_params(config), config, folder, "model", max_shard_size="100KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but for times in them."""
    files = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    provenance = json.loads(files["provenance.json"])
    del provenance["created"]
    return files | {"provenance.json": json.dumps(provenance).encode()}


def values(folder: Path) -> dict[str, bytes]:
    """Every tensor of a result."""
    found = open_source(folder).tensors
    return {name: read_whole(tensor).tobytes() for name, tensor in found.items()}


# What TensorStore opens no audit hook sees; the journal's own accesses come between its writes.
@pytest.mark.parametrize(("to", "module", "every"), [("hf", "save", 3), ("orbax", "save", 6)])
def test_killed_at_any_moment_and_gone_on_with(source, tmp_path, to: Format, module, every):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    script = KILLED.format(module=module)
    subprocess.run(
        [sys.executable, "-c", script, source, tmp_path, to, str(every)],
        check=True,
        timeout=300,
        cwd=TESTS,
    )
    whole = tmp_path / "whole"
    convert(source, whole, to=to, max_shard_size="150KB")
    expected, expected_values = contents(whole), values(whole)
    results = sorted(path for path in tmp_path.iterdir() if path.name.isdigit())
    assert len(results) > 10
    resumed = []
    for result in results:
        assert values(result) == expected_values
        if to == "hf":
            assert contents(result) == expected
        assert not [path for path in result.iterdir() if path.name.endswith(".incomplete")]
        resumed.append(json.loads((tmp_path / f"{result.name}.json").read_text()))
        left = tmp_path / f"{result.name}.left"
        if left.exists():
            assert_whole_or_refused(left, expected_values)
    # The later it was stopped, the less was done again.
    assert resumed[0] == 0
    assert max(resumed[:-1]) > 0.5 * sum(map(len, expected_values.values()))
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def assert_whole_or_refused(folder: Path, expected: dict[str, bytes]) -> None:
    """What a killed process leaves is never something that loads and is wrong."""
    if (folder / "config.json").exists():
        assert values(folder) == expected
    else:
        with pytest.raises((CheckpointError, FileNotFoundError), match=r"unfinished|no such file"):
            open_source(folder)


def test_a_full_disk_is_reported_and_the_conversion_gone_on_with(source, tmp_path):
    """The limit on a file's size stands in for the disk's."""
    script = """
import resource, sys
from mllama_jax.convert import convert
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))
convert(sys.argv[1], sys.argv[2], to="hf")
"""
    result = tmp_path / "result"
    child = subprocess.run(
        [sys.executable, "-c", script, source, result], capture_output=True, text=True, cwd=TESTS
    )
    assert child.returncode == 1
    assert "File too large" in child.stderr
    with pytest.raises(CheckpointError, match="unfinished conversion; run the same command again"):
        open_source(result)
    convert(source, result, to="hf")
    expected = tmp_path / "expected"
    convert(source, expected, to="hf")
    assert contents(result) == contents(expected)


def test_a_result_too_large_for_the_disk_is_refused_before_any_work(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(OSError, match=r"takes 1\.4 MB more, but 1\.0 MB are free; nothing was wr"):
        convert(source, tmp_path / "result", to="hf")
    assert not (tmp_path / "result").exists()


def test_what_lies_in_the_way(source, tmp_path):
    result = tmp_path / "result"
    convert(source, result, to="hf")
    first = contents(result)
    assert convert(source, result, to="hf").resumed_bytes > 0  # there is nothing left to do
    assert contents(result) == first
    with pytest.raises(FileExistsError, match="not empty; give another folder, or --overwrite"):
        convert(source, result, to="hf", dtype="bfloat16")
    (result / "notes.mine").write_text("mine")
    report = convert(source, result, to="hf", dtype="bfloat16", overwrite=True)
    assert report.resumed_bytes == 0
    assert (result / "notes.mine").read_text() == "mine"
    assert contents(result)["model.safetensors"] != first["model.safetensors"]

    for inside in (source, source / "result", source.parent):
        with pytest.raises(ValueError, match="is not to be touched"):
            convert(source, inside, to="hf")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileExistsError, match="is a file"):
        convert(source, file, to="hf")
    with pytest.raises(ValueError, match="must be a local one"):
        convert(source, "gs://bucket/result", to="hf")


def test_another_plan_does_not_go_on_from_a_conversion(source, tmp_path):
    """Neither other options nor another source."""
    result = tmp_path / "result"
    result.mkdir()
    stop_after(40, source, result)
    with pytest.raises(FileExistsError, match=r"unfinished conversion of .*source.*not the same"):
        convert(source, result, to="hf", dtype="bfloat16")
    copy = shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(FileExistsError, match="or its source has changed"):
        convert(copy, result, to="hf")
    assert convert(source, result, to="hf").resumed_bytes > 0


def stop_after(count: int, source: Path, result: Path) -> None:
    """A conversion to Hugging Face that fails after so many blocks."""
    from mllama_jax.convert import pipeline
    from mllama_jax.convert.targets.hugging_face import HuggingFaceTarget

    written = 0
    write = HuggingFaceTarget.write

    def failing(self, *block):
        nonlocal written
        written += 1
        if written > count:
            raise OSError("stopped")
        write(self, *block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceTarget, "write", failing)
        patch.setattr(pipeline, "_FLUSH_SECONDS", 0.0)
        with pytest.raises(OSError, match="stopped"):
            convert(source, result, to="hf")


def test_two_processes_do_not_convert_into_one_folder(source, tmp_path):
    import fcntl

    result = tmp_path / "result"
    result.mkdir()
    handle = os.open(result, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another process is converting into it"):
        convert(source, result, to="hf")
    os.close(handle)
    convert(source, result, to="hf")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_memory_does_not_grow_with_the_model(tmp_path, to):
    """Embedding and head of 192 MB each pass through a fraction of that."""
    script = """
import resource, sys
from mllama_jax.convert import convert
sizes = []
for name in ("small", "large"):
    convert(f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name} result", to=sys.argv[2], workers=2)
    sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(sizes[1] - sizes[0])
"""
    for name, vocab_size in (("small", 61), ("large", 2_000_000)):
        config = tiny_config(vocab_size=vocab_size)
        params = random_params(config) if name == "small" else zeros(config)
        save_params(params, config, tmp_path / name, "model")
    child = subprocess.run(
        [sys.executable, "-c", script, tmp_path, to], capture_output=True, text=True, check=True
    )
    assert int(child.stdout) < 160 * 2**20
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 380_000_000
    shutil.rmtree(tmp_path)


def zeros(config) -> dict:
    """Parameters that take no memory."""
    shapes = {tensor.path: tensor.leaf_shape for tensor in tensors(config, "model")}
    return flax.traverse_util.unflatten_dict(
        {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    )

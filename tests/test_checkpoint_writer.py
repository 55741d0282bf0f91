"""Folders of safetensors: their bytes, their shards, and what a killed save leaves behind."""

import json
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from folder_writer import Made, pending, write_folder
from tiny_checkpoint import assert_equal_trees, random_params, stored, tiny_config

import mllama_jax as mj
from mllama_jax.convert import load_params, save_params
from mllama_jax.convert.lazy import read_whole
from mllama_jax.convert.sources.shards import find_weights
from mllama_jax.convert.targets.hugging_face import num_bytes

TESTS = Path(__file__).parent
CONFIG = {"model_type": "mllama"}


def test_a_file_is_byte_for_byte_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"b": (3, 5), "a": (7,), "scalar": (), "empty": (0, 4), "ünï-code": (2,)}
    values = {
        f"{name}.{np.dtype(dtype)}": np.asarray(rng.normal(size=shape), dtype)
        for dtype in (np.float16, ml_dtypes.bfloat16, np.float32)
        for name, shape in shapes.items()
    }
    write_folder(tmp_path, [pending(*item) for item in values.items()], CONFIG)
    tensors = {
        name: torch.from_numpy(np.asarray(v, np.float32)).to(getattr(torch, str(v.dtype)))
        for name, v in values.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    found = (tmp_path / "model.safetensors").read_bytes()
    assert found == (tmp_path / "expected").read_bytes()
    read = find_weights(tmp_path).tensors
    assert {name: read_whole(tensor).tobytes() for name, tensor in read.items()} == {
        name: v.tobytes() for name, v in values.items()
    }


def test_arrays_in_any_order_of_memory_are_written_row_by_row(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_folder(
        tmp_path, [pending("t", values.T), pending("f", np.asfortranarray(values))], CONFIG
    )
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(read["t"], values.T)
    np.testing.assert_array_equal(read["f"], values)


def test_shards_hold_at_most_the_limit_and_a_larger_tensor_is_alone(tmp_path):
    sizes = {"a": 10, "b": 15, "c": 1, "d": 40, "e": 1, "f": 24}
    tensors = [pending(name, np.ones(size, np.float32)) for name, size in sizes.items()]
    write_folder(tmp_path, tensors, CONFIG, max_shard_size=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = "model-0000{}-of-00004.safetensors".format
    assert index == {
        "metadata": {"total_parameters": 91, "total_size": 364},
        "weight_map": {
            **dict.fromkeys("ab", file(1)),
            "c": file(2),
            "d": file(3),
            **dict.fromkeys("ef", file(4)),
        },
    }
    read = find_weights(tmp_path).tensors
    assert {name: tensor.file.name for name, tensor in read.items()} == index["weight_map"]


def test_few_tensors_are_held_at_a_time(tmp_path):
    size = 2**20
    tensors = [
        pending(f"{i:02}", Made(np.dtype("f4"), (size // 4,), lambda: np.ones(size // 4, "f4")))
        for i in range(40)
    ]
    tracemalloc.start()
    try:
        write_folder(tmp_path, tensors, CONFIG, max_shard_size="25MB")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert peak < 6 * size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (7, 7),
        ("7B", 7),
        ("5GB", 5_000_000_000),
        ("2 GiB", 2**31),
        ("1.5KB", 1500),
        ("3MiB", 3 * 2**20),
        ("1TB", 10**12),
    ],
)
def test_sizes(size, expected):
    assert num_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, 1.5, "5", "5 gigabytes", "0B", "-1GB", "GB", "5iB", None])
def test_unusable_sizes(tmp_path, size):
    with pytest.raises(ValueError, match=r"max_shard_size=.*expected bytes, or a string such as"):
        write_folder(tmp_path / "x", [], CONFIG, max_shard_size=size)
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_replaces_an_earlier_one_and_leaves_other_files(tmp_path):
    config = tiny_config()
    old, new = random_params(config, seed=1), random_params(config, seed=2)
    save_params(old, config, tmp_path, "model", max_shard_size="100KB")
    generation_config = mj.GenerationConfig(max_new_tokens=7)
    generation_config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / ".model.safetensors.incomplete").write_bytes(b"left over")
    save_params(new, config, tmp_path, "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert_equal_trees(load_params(tmp_path, config, "model"), new)
    assert mj.GenerationConfig.from_pretrained(tmp_path) == generation_config
    save_params(old, config, tmp_path, "model", max_shard_size="200KB")
    assert_equal_trees(load_params(tmp_path, config, "model"), old)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    def fail() -> np.ndarray:
        raise RuntimeError("out of memory")

    write_folder(tmp_path, [pending("a", np.ones(3, np.float32))], CONFIG)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    good = pending("a", np.zeros(3, np.float32))
    for values, error, message in [
        (fail, RuntimeError, "out of memory"),
        (
            lambda: np.ones(4, np.float32),
            ValueError,
            r"b: found float32\[4\], expected float32\[3\]",
        ),
        (
            lambda: np.ones(3, np.float16),
            ValueError,
            r"b: found float16\[3\], expected float32\[3\]",
        ),
    ]:
        bad = pending("b", Made(np.dtype(np.float32), (3,), values))
        with pytest.raises(error, match=message):
            write_folder(tmp_path, [good, bad], CONFIG, max_shard_size=12)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# Kills itself before the n-th access to the folder's files, for n = 0, 1, …, each time in a fresh
# copy of the folder; ends when a save came through. Imports once, so that the many runs are cheap.
KILLED_SAVES = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from folder_writer import Made, pending, write_folder

start, output = map(Path, sys.argv[1:])

def save(folder, kill_at):
    left = kill_at

    def step():
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def values():
        step()
        return np.full(30_000, 2, np.float32)

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
            step()

    sys.addaudithook(hook)
    tensors = [
        pending(name, Made(np.dtype("f4"), (30_000,), values)) for name in ("a", "b", "c")
    ]
    write_folder(folder, tensors, {"is": "new"}, max_shard_size=240_000)

for kill_at in range(1000):
    folder = output / f"{kill_at:03}"
    shutil.copytree(start, folder)
    child = os.fork()
    if child == 0:
        save(folder, kill_at)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint_or_none(tmp_path):
    start, output = tmp_path / "start", tmp_path / "output"
    old = [pending(name, np.full(20_000, 1, np.float32)) for name in "abcd"]
    write_folder(start, old, {"is": "old"}, max_shard_size=80_000)
    old_files = {file.name: file.read_bytes() for file in start.iterdir()}
    assert len(old_files) == 6
    output.mkdir()
    command = [sys.executable, "-c", KILLED_SAVES, start, output]
    subprocess.run(command, check=True, timeout=120, cwd=TESTS)

    states = [state_of(folder, old_files) for folder in sorted(output.iterdir())]
    # First the old one stays, then for a moment there is none, then the new one is there.
    order = ["old", "none", "new"]
    assert states == sorted(states, key=order.index)
    assert {*states} == {*order}
    assert len(states) > 15

    for folder in output.iterdir():
        write_folder(folder, old, {"is": "old"}, max_shard_size=80_000)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == old_files


def state_of(folder: Path, old_files: dict[str, bytes]) -> str:
    """What is in a folder; fails if that is neither a whole checkpoint nor visibly none."""
    if not (folder / "config.json").exists():
        return "none"
    whole = {
        file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")
    }
    if json.loads((folder / "config.json").read_text()) == {"is": "old"}:
        assert whole == old_files
        return "old"
    find_weights(folder)
    expected = np.full(30_000, 2, np.float32).tobytes()
    assert stored(folder) == dict.fromkeys("abc", ("F32", (30_000,), expected))
    assert len(whole) == 4
    return "new"


def test_a_process_killed_from_outside_in_the_middle_of_a_write(tmp_path):
    """Half of a tensor is on disk, the rest never comes."""
    config = tiny_config()
    old = random_params(config)
    save_params(old, config, tmp_path, "model")
    script = """
import sys, time
import numpy as np
from folder_writer import Made, pending, write_folder

def never():
    print("half", flush=True)
    time.sleep(600)

one = pending("a", np.zeros(100_000, np.float32))
two = pending("b", Made(np.dtype("f4"), (100_000,), never))
write_folder(sys.argv[1], [one, two], {})
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, cwd=TESTS
    ) as child:
        assert child.stdout.readline() == "half\n"
        incomplete = tmp_path / ".model.safetensors.incomplete"
        try:
            # The second tensor is asked for ahead of the file's being opened for the first.
            deadline = time.monotonic() + 60
            while not (incomplete.exists() and incomplete.stat().st_size):
                assert time.monotonic() < deadline, "the first tensor never reached the disk"
                time.sleep(0.01)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    assert incomplete.stat().st_size > 0
    assert_equal_trees(load_params(tmp_path, config, "model"), old)
    mj.MllamaForConditionalGeneration.from_pretrained(tmp_path)
    save_params(old, config, tmp_path, "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

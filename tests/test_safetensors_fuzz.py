"""Damaged safetensors files: an error that says so, or exactly what the library reads."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from etils import epath

from mllama_jax.convert import CheckpointError
from mllama_jax.convert.lazy import read_whole
from mllama_jax.convert.sources.safetensors_files import read_file_header

TENSORS = {
    "model.norm.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "lm_head.weight": np.arange(5, dtype=np.float16),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
Damage = Callable[[bytes, random.Random], bytes]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the header or its length are other ones."""
    end = 8 + int.from_bytes(data[:8], "little")
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def extended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 40))


def rewritten(data: bytes, rng: random.Random) -> bytes:
    """The header is valid JSON, and one thing in it is another one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    odd = [-1, 2**63, 2**70, 1.5, None, "4", [], {}, True, [1, 2], [0, 2**62], [2**62, 4]]
    change = rng.choice(["dtype", "shape", "data_offsets", "shift", "drop", "entry", "metadata"])
    if change == "shift":
        begin, end = header[name]["data_offsets"]
        step = rng.choice([-4, -1, 1, 4, 10**6])
        header[name]["data_offsets"] = [begin + step, end + step]
    elif change == "drop":
        del header[name][rng.choice(["dtype", "shape", "data_offsets"])]
    elif change == "entry":
        header[name] = rng.choice(odd)
    elif change == "metadata":
        header["__metadata__"] = rng.choice([*odd, {"format": 3}, {"format": "pt"}])
    elif change == "dtype":
        header[name]["dtype"] = rng.choice(["F32", "F16", "BF16", "I8", "F128", "f32", 3, None])
    else:
        header[name][change] = rng.choice([*odd, [3, 2], [6], [2, 3, 1], [0]])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("damage", [truncated, flipped, extended, rewritten])
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(tmp_path, damage: Damage):
    whole = safetensors.numpy.save(TENSORS, metadata={"format": "pt"})
    file = tmp_path / "model.safetensors"
    rng = random.Random(damage.__name__)
    messages = []
    for _ in range(1500):
        file.write_bytes(damage(whole, rng))
        try:
            found = {tensor.name: tensor for tensor in read_file_header(epath.Path(file))}
            values = {name: read_whole(tensor) for name, tensor in found.items()}
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert_as_the_library(file, values)
    assert len(messages) > 300
    assert all("model.safetensors: " in message for message in messages)


def assert_as_the_library(file: Path, values: dict[str, np.ndarray]) -> None:
    with safetensors.safe_open(file, "numpy") as expected:
        assert {*values} == {*expected.keys()}
        for name, found in values.items():
            part = expected.get_slice(name)
            assert found.shape == tuple(part.get_shape())
            if found.dtype.kind == "f":
                assert found.tobytes() == expected.get_tensor(name).tobytes()

"""PyTorch's files, read without PyTorch: the same values, and nothing of a pickle runs."""

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from etils import epath

from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import LazyTensor, read_whole
from mllama_jax.convert.sources import torch_pickle
from mllama_jax.convert.sources.torch_files import read_torch_headers

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.complex64: np.complex64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint64: np.uint64,
    torch.uint32: np.uint32,
    torch.uint16: np.uint16,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
BASE = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))


def read(path: Path) -> dict[str, LazyTensor]:
    return read_torch_headers(epath.Path(path))


def saved(tensors: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    file = folder / "weights.pth"
    torch.save(tensors, file, **options)
    return file


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_as_torch(file: Path) -> None:
    expected = torch.load(file, weights_only=True)
    found = read(file)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        lazy = found[name]
        assert lazy.shape == tuple(tensor.shape), name
        assert lazy.dtype == DTYPES[tensor.dtype], name
        assert read_whole(lazy).tobytes() == bits(tensor), name
        region = tuple(slice(size // 3, max(size // 3, size - 1)) for size in tensor.shape)
        part = lazy.read(region)
        assert part.shape == tuple(tensor[region].shape), name
        assert np.ascontiguousarray(part).tobytes() == bits(tensor[region]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(tmp_path, dtype):
    values = (BASE * 3).abs().to(dtype)
    assert_same_as_torch(saved({"a": values, "b": values[0, 0, 0]}, tmp_path))


def test_layouts(tmp_path):
    tensors = {
        "whole": BASE,
        "transposed": BASE.transpose(0, 2),
        "part": BASE[1:4, 2],
        "steps": BASE[::2, 1::3, 1:],
        "one axis": BASE[2:3, :, 1:2],
        "expanded": BASE[:, :1].expand(6, 3, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "empty view": BASE[6:, :, ::2],
        "tied": BASE,
        "half of bfloat16": BASE.bfloat16()[3:].permute(2, 0, 1),
    }
    assert_same_as_torch(saved(tensors, tmp_path))


def test_modules(tmp_path):
    """Parameters, buffers, and the versions of modules that lie beside them."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert_same_as_torch(saved(module.state_dict(), tmp_path))
    assert_same_as_torch(saved(dict(module.named_parameters()), tmp_path))
    newer = read(saved(module.state_dict(), tmp_path, pickle_protocol=4))
    assert {name: read_whole(lazy).tobytes() for name, lazy in newer.items()} == {
        name: bits(tensor) for name, tensor in module.state_dict().items()
    }


def archive(folder: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED, **more) -> Path:
    """A file like torch's around a pickle, with a storage of 12 float32."""
    file = folder / "made.pth"
    values = np.arange(12, dtype=np.float32)
    records = {"version": b"3\n", "byteorder": b"little", "data/0": values.tobytes(), **more}
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("made/data.pkl", data)
        for name, content in records.items():
            made.writestr(f"made/{name}", content)
    return file


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
)
HOOKS = b"\x89ccollections\nOrderedDict\n)R"


def tensor_pickle(view: bytes = b"K\x00(K\x03K\x04t(K\x04K\x01t") -> bytes:
    """A state dict of one tensor; `view` is offset, shape and strides."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + view + HOOKS + b"tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


def test_made_by_hand(tmp_path):
    file = archive(tmp_path, tensor_pickle())
    assert np.array_equal(read_whole(read(file)["w"]), np.arange(12).reshape(3, 4))
    assert_same_as_torch(file)


class Calls:
    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda marker: Calls(__import__("os").system, f"touch {marker}"), "system"),
        (lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"), "eval"),
        (lambda marker: Calls(open, str(marker), "w"), "open"),
        (lambda marker: Calls(getattr, Calls(__import__, "os"), "system"), "getattr"),
        (lambda marker: {"a": [Calls(__import__, "os")]}, "__import__"),
        (lambda marker: {Calls(exec, f"open({str(marker)!r}, 'w')"): BASE.numpy()}, "exec"),
    ],
)
def test_code_is_refused(tmp_path, function, name, protocol):
    marker = tmp_path / "it-ran"
    file = archive(tmp_path, pickle.dumps(function(marker), protocol))
    with pytest.raises(CheckpointError, match=rf"made\.pth: its pickle names \w+\.{name}, which"):
        read(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02ios\nsystem\n(S'true'\n.",  # INST
        b"\x80\x02(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02ctorch\n_utils._rebuild_tensor_v2.__class__\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R.",
        b"\x80\x02ctorch.serialization\nload\n)R.",
    ],
)
def test_other_ways_to_call_are_refused(tmp_path, data):
    with pytest.raises(CheckpointError, match="refused, nothing was run"):
        read(archive(tmp_path, data))


ATTRIBUTES = b"}X\x08\x00\x00\x00__call__K\x01sX\x04\x00\x00\x00evilK\x01s"


@pytest.mark.parametrize("name", sorted(torch_pickle._GLOBALS))
@pytest.mark.parametrize("state", [ATTRIBUTES + b"b", b"N" + ATTRIBUTES + b"\x86b"])
def test_nothing_that_a_pickle_can_name_can_be_changed(tmp_path, name, state):
    module, _, attribute = name.rpartition(".")
    before = repr(torch_pickle._GLOBALS[name])
    data = f"\x80\x02c{module}\n{attribute}\n".encode("latin1")
    with pytest.raises(CheckpointError, match="damaged pickle: AttributeError"):
        read(archive(tmp_path, data + state + b"."))
    assert repr(torch_pickle._GLOBALS[name]) == before
    assert not hasattr(torch_pickle._GLOBALS[name], "evil")
    # What it makes can't be changed either: a mapping drops what it is given.
    made = tensor_pickle()[:-1] + state + b"."
    with pytest.raises(CheckpointError, match="damaged pickle"):
        read(archive(tmp_path, made))
    mapping = b"\x80\x02ccollections\nOrderedDict\n)R" + state + b"."
    assert read(archive(tmp_path, mapping)) == {}


@pytest.mark.parametrize(
    ("view", "problem"),
    [
        (b"K\x00(K\x03K\x05t(K\x05K\x01t", "reaches beyond its storage of 12 values"),
        (b"K\x01(K\x03K\x04t(K\x04K\x01t", "reaches beyond"),
        (b"K\x00(K\x02K\x02t(K\x0bK\x01t", "reaches beyond"),
        (b"J\xff\xff\xff\xff(K\x03t(K\x01t", "offset -1"),
        (b"K\x00(J\xff\xff\xff\xfft(K\x01t", "shape"),
        (b"K\x00(K\x03t(J\xff\xff\xff\xfft", "strides"),
        (b"K\x00(K\x03t(K\x04K\x01t", "strides"),
        (b"K\x00(\x88t(K\x01t", "shape"),
        (b"K\x00]K\x03a(K\x01t", "shape"),
        (b"K\x00(K\x00\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01t(K\x01K\x01t", "shape"),
    ],
)
def test_views_that_do_not_fit_their_storage(tmp_path, view, problem):
    with pytest.raises(CheckpointError, match=rf"made\.pth: damaged: w: .*{problem}"):
        read(archive(tmp_path, tensor_pickle(view)))


def test_damaged_archives(tmp_path):
    def problem(**changes: Any) -> str:
        data = changes.pop("data", tensor_pickle())
        with pytest.raises(CheckpointError) as error:
            read(archive(tmp_path, data, **changes))
        return str(error.value)

    assert "compressed" in problem(compression=zipfile.ZIP_DEFLATED)
    assert "byte order b'big'" in problem(byteorder=b"big")
    assert "storage of 12 float32 is 44 bytes long" in problem(**{"data/0": bytes(44)})
    assert "2 data.pkl" in problem(**{"more/data.pkl": b""})
    assert "at most" in problem(data=bytes(2**25 + 1))
    assert "damaged pickle" in problem(data=b"\x80\x02r\xff\xff\xff\xff.")
    assert "data/1 is absent" in problem(
        data=tensor_pickle().replace(b"\x00\x00\x000", b"\x00\x00\x001")
    )


def test_other_files(tmp_path):
    file = saved({"a": BASE}, tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6.*save it again: torch\.save"):
        read(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="42 bytes, not a file that torch"):
        read(file)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes"):
        read(file)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            {"model": {"a": BASE}, "step": 3},
            r"2 of 2 entries are not tensors: model \(dict\), step",
        ),
        ({"a": BASE, 3: BASE}, r"int \(view\)"),
        ({"a": BASE, "b": None}, r"b \(nonetype\)"),
        ([BASE], "holds a list; expected a state dict"),
        (BASE, "holds a view"),
    ],
)
def test_more_than_a_state_dict(tmp_path, content, problem):
    with pytest.raises(CheckpointError, match=problem):
        read(saved(content, tmp_path))


@pytest.fixture(scope="module")
def small() -> tuple[bytes, dict[str, tuple[Any, ...]]]:
    """A file with little in it, and what it holds."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).reshape(2, 2).t()}
    stream = io.BytesIO()
    torch.save(OrderedDict(tensors), stream)
    held = {"a": ((2, 3), np.dtype(np.float32)), "b": ((2, 2), np.dtype(np.int64))}
    return stream.getvalue(), held


def test_cut_short_anywhere(tmp_path, small):
    file = tmp_path / "cut.pth"
    for length in range(len(small[0])):
        file.write_bytes(small[0][:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            read(file)


def test_damaged_anywhere(tmp_path, small):
    """A changed byte outside the values is found, or changes neither names, shapes nor dtypes."""
    contents, held = small
    file = tmp_path / "damaged.pth"
    chance = random.Random(3)
    found = 0
    for position in range(len(contents)):
        damaged = bytearray(contents)
        damaged[position] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            tensors = read(file)
        except CheckpointError as error:
            assert "damaged.pth" in str(error)  # noqa: PT017
            found += 1
        else:
            assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == held
            assert all(read_whole(tensor).shape == tensor.shape for tensor in tensors.values())
    assert found > 500


def test_damaged_pickles_with_good_checksums(tmp_path):
    """Never anything but a message or tensors that can be read."""
    chance = random.Random(4)
    original = tensor_pickle()
    outcomes = set()
    for _ in range(700):
        data = bytearray(original)
        for _ in range(chance.choice([1, 1, 2, 4])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            tensors = read(archive(tmp_path, bytes(data)))
        except CheckpointError as error:
            outcomes.add(str(error).split(":")[1])
        else:
            for tensor in tensors.values():
                assert tensor.read(tuple(slice(0, min(n, 3)) for n in tensor.shape)).ndim <= 32
    assert len(outcomes) > 3

"""Orbax checkpoints that are written: Orbax loads them, and nothing else is ever found there."""

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax_folders import CONFIG, DTYPES, write_folders
from tiny_checkpoint import arrays, assert_equal_trees, random_params, save_tensors

from mllama_jax.configs import MllamaConfig, MllamaVisionConfig
from mllama_jax.convert import convert
from mllama_jax.convert.lazy import ArrayTensor, LazyTensor, Region, extent
from mllama_jax.convert.parts import RELEASED
from mllama_jax.convert.pipeline import prepare, write_at_once
from mllama_jax.convert.table import Tensor, tensors
from mllama_jax.convert.targets.orbax import OrbaxTarget


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("orbax"))


@pytest.fixture
def hf(folders):
    return folders[0]


@pytest.fixture
def ours(folders):
    return folders[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_loads_what_is_written(ours, dtype, caplog):
    expected = random_params(CONFIG, dtype=DTYPES[dtype])
    assert_equal_trees(ocp.load(ours / dtype), expected)
    described = flax.traverse_util.flatten_dict(ocp.metadata(ours / dtype).metadata)
    for path, value in flax.traverse_util.flatten_dict(expected).items():
        assert (described[path].shape, described[path].dtype) == (value.shape, value.dtype)
    assert ocp.checkpointables_metadata(ours / dtype).metadata.keys() == {"state"}
    beside = {"config.json", "generation_config.json", "tokenizer.json", "provenance.json"}
    assert beside <= {file.name for file in (ours / dtype).iterdir()}
    assert not [record for record in caplog.records if record.levelname != "INFO"]


ONTO_MESHES = """
import math
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from tiny_checkpoint import assert_equal_trees, random_params, tiny_config

def split(leaf):
    axes = [None] * leaf.ndim
    for name, size in mesh.shape.items():
        free = [i for i, n in enumerate(leaf.shape) if axes[i] is None and n % size == 0]
        if free:
            axes[free[-1]] = name
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = random_params(tiny_config(), dtype=folder.name)
    for sizes, names in (((6,), "a"), ((2, 3), "ab")):
        mesh = jax.make_mesh(sizes, tuple(names), devices=jax.devices()[: math.prod(sizes)])
        abstract = jax.tree.map(split, expected)
        found = ocp.load(folder, abstract)
        assert_equal_trees(found, expected)
        pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(abstract)))
        assert all(leaf.sharding == wanted.sharding for leaf, wanted in pairs)
        print(folder.name, sum(not leaf.is_fully_replicated for leaf, _ in pairs) > len(pairs) / 2)
"""


def test_orbax_loads_onto_any_mesh(ours):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", ONTO_MESHES, ours],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "6",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parent),
        },
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} True" for name in sorted(DTYPES) for _ in "12"]
    assert "WARNING" not in result.stderr


def test_the_small_files_are_those_that_orbax_writes(ours, tmp_path):
    found, wanted = ours / "float32", tmp_path / "theirs"
    ocp.save(wanted, random_params(CONFIG))
    assert {file.name for file in wanted.iterdir()} <= {file.name for file in found.iterdir()}

    def both(name):
        return [json.loads((path / name).read_text()) for path in (found, wanted)]

    tree, expected = both("state/_METADATA")
    assert tree == expected
    checkpoint, expected = both("_CHECKPOINT_METADATA")
    for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
        assert abs(checkpoint.pop(key) - expected.pop(key)) < 3600 * 10**9
    assert checkpoint == expected
    for name in ("orbax.checkpoint", "commit_success.txt"):
        text, expected = (
            (path / name).read_text().replace(str(path), "") for path in (found, wanted)
        )
        assert text == expected


def test_layers_of_several_dtypes_become_a_leaf_of_the_widest(hf, tmp_path):
    values = arrays(hf / "bfloat16")
    wide = "language_model.model.layers.3.mlp.up_proj.weight"
    values[wide] = values[wide].astype(np.float32)
    save_tensors(values, hf / "bfloat16", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    expected = flax.traverse_util.flatten_dict(random_params(CONFIG, dtype=DTYPES["bfloat16"]))
    path = ("language_model", "model", "layers", "block_0", "mlp", "up_proj", "kernel")
    expected[path] = expected[path].astype(np.float32)
    assert_equal_trees(ocp.load(tmp_path / "orbax"), flax.traverse_util.unflatten_dict(expected))


@dataclass(frozen=True)
class Asked:
    """A tensor without values that remembers the last region it was asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    regions: list[Region] = field(default_factory=list)

    def read(self, region: Region) -> np.ndarray:
        self.regions.append(region)
        return np.empty(extent(region), self.dtype)


@pytest.mark.parametrize("size", RELEASED)
def test_blocks_of_the_released_models(size, tmp_path):
    """Whole rows of what is stored become whole chunks, in pieces that fit any machine."""
    expected = tensors(MllamaConfig(MllamaVisionConfig(), RELEASED[size]), "model")
    dtype = np.dtype(ml_dtypes.bfloat16)
    matched = {tensor.hub: (tensor.hub, Asked(tensor.hub_shape, dtype)) for tensor in expected}
    order = [tensor.hub for tensor in reversed(expected)]
    target = OrbaxTarget(tmp_path, expected, matched, lambda _: dtype, order)
    assert [output.source for output in target.outputs] == order
    for output in {tuple(output.shape): output for output in target.outputs}.values():
        path, index = target._places[output.name]
        chunk = target._leaves[path].chunk
        assert np.prod(chunk) * 2 <= 2**21
        if index is not None:
            assert chunk[0] == 1
            chunk = chunk[1:]
        for block in output.blocks:
            assert np.prod(extent(block)) * 2 <= 2**26
            for axis, step, end in zip(block, chunk, output.shape, strict=True):
                assert axis.start % step == 0
                assert axis.stop % step == 0 or axis.stop == end
        assert sum(np.prod(extent(block)) for block in output.blocks) == np.prod(output.shape)
        prepare(output, output.blocks[-1])
        _, tensor = matched[output.source]
        _, *inner = tensor.regions[-1]
        assert extent(inner) == tensor.shape[1:]
        assert np.prod(extent(tensor.regions[-1])) == np.prod(extent(output.blocks[-1]))


def make_target(folder: Path, seed: int) -> OrbaxTarget:
    """The decoder of the tiny model with random values."""
    params = flax.traverse_util.flatten_dict(random_params(CONFIG, seed=seed))
    expected = tensors(CONFIG, "model")

    def values(tensor: Tensor) -> LazyTensor:
        leaf = params[tensor.path]
        return tensor.to_hub(ArrayTensor(leaf if tensor.index is None else leaf[tensor.index]))

    matched = {tensor.hub: (tensor.hub, values(tensor)) for tensor in expected}
    return OrbaxTarget(folder, expected, matched, lambda _: np.dtype(np.float32), list(matched))


def write_some(target: OrbaxTarget, start: int, stop: int | None) -> list[str]:
    outputs = target.outputs[start:stop]
    for output in outputs:
        for block in output.blocks:
            target.write(output, block, prepare(output, block))
    return [output.name for output in outputs]


def test_an_earlier_checkpoint_stays_until_the_end(tmp_path):
    write_at_once(make_target(tmp_path, 1), epath.Path(tmp_path), {})
    target = make_target(tmp_path, 2)
    target.start(())
    write_some(target, 0, None)
    target.flush()
    assert_equal_trees(ocp.load(tmp_path), random_params(CONFIG, seed=1))
    target.finish({})
    assert_equal_trees(ocp.load(tmp_path), random_params(CONFIG, seed=2))


def test_what_was_flushed_outlasts_a_crash_of_the_machine(tmp_path):
    """Files that were not flushed may be left empty, whatever refers to them."""
    target = make_target(tmp_path, 1)
    state = tmp_path / ".state.incomplete"
    target.start(())
    done = write_some(target, 0, 20)
    target.flush()
    done += write_some(target, 20, 50)
    target.flush()
    flushed = set((state / "d").iterdir())
    write_some(target, 50, 90)
    target.close()
    lost = set((state / "d").iterdir()) - flushed
    assert lost
    for file in lost:
        file.write_bytes(b"")
    (state / "d" / "half.__lock").write_bytes(b"half")

    target = make_target(tmp_path, 1)
    target.start(done)
    assert set((state / "d").iterdir()) == flushed
    write_some(target, len(done), None)
    target.flush()
    target.close()
    # Stopped again, after all was flushed.
    target = make_target(tmp_path, 1)
    target.start([output.name for output in target.outputs])
    target.finish({})
    assert_equal_trees(ocp.load(tmp_path), random_params(CONFIG, seed=1))
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        *("_METADATA", "manifest.ocdbt", "d")
    }


def test_going_on_without_what_was_written_is_refused(tmp_path):
    target = make_target(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="what an earlier process wrote is gone"):
        target.start([target.outputs[0].name])


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """The limit on a file's size stands in for the disk's."""
    target = make_target(tmp_path, 1)
    target.start(())

    def write_all() -> None:
        write_some(target, 0, None)
        target.flush()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_all()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG

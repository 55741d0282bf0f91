"""What the tests of loading onto a mesh run in processes of their own.

The number of devices is fixed when jax starts, so `test_load_onto_mesh.py` runs this file as a
script, `mesh_processes.py TASK ARGUMENT …`, and reads what it found from its last line, as JSON.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.experimental import multihost_utils
from processes import memory

import mllama_jax as mj
from mllama_jax.convert import load_params, save_params
from mllama_jax.convert.lazy import LazyTensor, Region, extent
from mllama_jax.convert.sources import open_source
from mllama_jax.sharding import param_shardings, parse_mesh

MODEL = mj.MllamaForConditionalGeneration


def eight_devices(folder: str, cases: str, saved: str) -> list[dict[str, Any]]:
    """Loads checkpoints onto meshes of all devices, and onto one device.

    Args:
        folder: holds the checkpoints.
        cases: JSON, (checkpoint, mesh, dtype) of each case.
        saved: the first case is saved here from where it lies.
    """

    @functools.cache
    def on_one(name: str, dtype: str) -> Any:
        return MODEL.from_pretrained(Path(folder, name), dtype=dtype)

    @functools.cache
    def shardings(name: str, mesh: Any) -> Any:
        return param_shardings(on_one(name, "float32")[0], mesh)

    found = []
    for name, written, dtype in json.loads(cases):
        mesh = parse_mesh(written)
        model, params = MODEL.from_pretrained(Path(folder, name), dtype=dtype, mesh=mesh)
        if not found:
            model.save_pretrained(params, saved)
        found.append(_facts(params, on_one(name, dtype)[1], shardings(name, mesh)))
    return found


def _facts(params: Any, expected: Any, shardings: Any) -> dict[str, Any]:
    leaves, expected, shardings = (
        {"/".join(path): leaf for path, leaf in flax.traverse_util.flatten_dict(tree).items()}
        for tree in (params, expected, shardings)
    )
    assert leaves.keys() == expected.keys() == shardings.keys()
    on_device = dict.fromkeys(range(8), 0)
    for leaf in leaves.values():
        for shard in leaf.addressable_shards:
            on_device[shard.device.id] += shard.data.nbytes
    return {
        "different": [name for name in leaves if not _same(leaves[name], expected[name])],
        "misplaced": [name for name in leaves if leaves[name].sharding != shardings[name]],
        "bytes": list(on_device.values()),
    }


def _same(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def one_of_two(port: str, folder: str, large: str, index: str) -> dict[str, Any]:
    """Loads checkpoints onto a mesh of which this process has half of the devices.

    Args:
        folder: holds the checkpoints.
        large: a checkpoint of a text model with a large table.
    """
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    assert len(jax.local_devices()) == 4
    found: dict[str, Any] = {"large": _load_large(large)}
    for checkpoint in sorted(Path(folder).iterdir()):
        source = open_source(checkpoint)
        config = source.config
        counted = {name: Counted(tensor, []) for name, tensor in source.tensors.items()}
        params = load_params(
            dataclasses.replace(source, tensors=counted),
            config,
            "model",
            shardings=param_shardings(MODEL(config), parse_mesh("fsdp=8")),
        )
        found[checkpoint.name] = {
            "asked": {name: sum(tensor.asked) for name, tensor in counted.items()},
            "different": list(_different_parts(params, load_params(source, config, "model"))),
        }
    try:
        save_params(params, config, Path(folder, f"saved by {index}"), "model")
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def _different_parts(params: Any, expected: Any) -> Iterator[str]:
    """Names of leaves of which this process's part, or the output layer's whole, is not as
    expected."""
    leaves = flax.traverse_util.flatten_dict(params)
    for path, value in flax.traverse_util.flatten_dict(expected).items():
        value = np.asarray(value)
        for shard in leaves[path].addressable_shards:
            if not _same(shard.data, value[shard.index]):
                yield "/".join((*path, str(shard.index)))
        if "lm_head" in path and not _same(
            multihost_utils.process_allgather(leaves[path], tiled=True), value
        ):
            yield "/".join(path)


@dataclass(frozen=True)
class Counted:
    """A tensor that notes how many bytes it is asked for."""

    base: LazyTensor
    asked: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, region: Region) -> np.ndarray:
        self.asked.append(math.prod(extent(region)) * self.dtype.itemsize)
        return self.base.read(region)


def _load_large(folder: str) -> dict[str, int]:
    """The memory that it takes to load a part of a large table as bfloat16."""
    source = open_source(folder)
    model = mj.MllamaTextModel(source.config)
    shardings = param_shardings(model, parse_mesh("fsdp=8"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is taken from here on
    before = memory("VmRSS")
    params = load_params(
        source, model.config, "text_model", param_dtype="bfloat16", shardings=shardings
    )
    table = params["embed_tokens"]["embedding"]
    return {
        "peak": memory("VmHWM") - before,
        "held": sum(shard.data.nbytes for shard in table.addressable_shards),
    }


if __name__ == "__main__":
    task = {"eight_devices": eight_devices, "one_of_two": one_of_two}[sys.argv[1]]
    print(json.dumps(task(*sys.argv[2:])))

"""Checkpoints of every format straight onto meshes: eight virtual devices, and two processes."""

import json
import math
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import SingleDeviceSharding
from processes import results, start
from tiny_checkpoint import arrays, stored
from tiny_model import random_params

import mllama_jax as mj
from mllama_jax.convert import leaves, load_params
from mllama_jax.convert.conversion import convert
from mllama_jax.convert.lazy import ArrayTensor, whole
from mllama_jax.convert.table import Tensor, tensors

VISION = {
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "num_attention_heads": 4,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 120,
    "image_size": 12,
    "patch_size": 4,
    "max_num_tiles": 3,
    "supported_aspect_ratios": [[1, 1], [1, 2], [3, 1]],
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 6,
    "cross_attention_layers": [1, 4],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_theta": 100.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "scanned": (VISION, TEXT),
    "aperiodic": (VISION, {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [0, 1]}),
    # Meta's code fixes the number of vision layers, and more.
    "meta": (
        {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_attention_heads": 16,
            "vision_output_dim": 192,
            "image_size": 28,
        },
        {**TEXT, "intermediate_size": 128},
    ),
}
MIXED = "data=2,fsdp=2,tensor=2"
CASES = [
    # checkpoint, mesh, dtype
    *[("scanned", mesh, "float32") for mesh in ("fsdp=8", "tensor=8", MIXED)],
    *[("scanned", mesh, "bfloat16") for mesh in ("fsdp=8", "tensor=8", MIXED)],
    ("aperiodic", "fsdp=8", "bfloat16"),
    ("aperiodic", MIXED, "float32"),
    *[(name, MIXED, "bfloat16") for name in ("torch", "meta", "orbax")],
]


def model_of(checkpoint: str) -> mj.MllamaForConditionalGeneration:
    vision, text = MODELS.get(checkpoint, MODELS["scanned"])
    return mj.MllamaForConditionalGeneration(mj.MllamaConfig(vision, text, image_token_index=64))


def stored_tensors(checkpoint: str) -> tuple[Tensor, ...]:
    return tensors(model_of(checkpoint).config, "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds float32 checkpoints of different models and of every format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        model = model_of(name)
        params = random_params(model)
        if name == "meta":  # which has no place for most of these tables' values
            params = jax.tree_util.tree_map_with_path(
                lambda path, leaf: (
                    jnp.zeros_like(leaf) if "tile" in str(path) and leaf.ndim > 2 else leaf
                ),
                params,
            )
        model.save_pretrained(params, folder / name)
    convert(folder / "scanned", folder / "orbax", to="orbax")
    (folder / "torch").mkdir()
    values = {name: torch.tensor(value) for name, value in arrays(folder / "scanned").items()}
    torch.save(values, folder / "torch" / "pytorch_model.bin")
    shutil.copy(folder / "scanned" / "config.json", folder / "torch")
    hugging_face = (folder / "meta").rename(tmp_path_factory.mktemp("meta") / "hugging face")
    convert(hugging_face, folder / "meta", to="meta")
    return folder


# Eight devices ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def loaded(folder, saved) -> dict[tuple, dict[str, Any]]:
    """What became of each case."""
    ((found, *_),) = results(
        [start("mesh_processes.py", 8, "eight_devices", folder, json.dumps(CASES), saved)]
    )
    return dict(zip(CASES, found, strict=True))


def num_parts(name: str, mesh: str) -> int:
    """Into how many parts a stored tensor is split, said a second time and without axes."""
    sizes = dict(item.split("=") for item in mesh.split(","))
    fsdp, tensor = int(sizes.get("fsdp", 1)), int(sizes.get("tensor", 1))
    if re.search(r"norm|gate$|gate_attn$|gate_ffn$", name):
        return 1
    if name.endswith("fc1.bias"):
        return tensor
    if name.endswith("bias") or re.search(r"vision_model.*embedding", name):
        return fsdp
    # Two key/value heads and four vision heads are whole on eight devices.
    whole_heads = r"[kv]_proj" if tensor <= 2 else r"[kv]_proj|vision_model.*[qo]_proj"
    if tensor > 2 and re.search(whole_heads, name):
        return fsdp
    return fsdp * tensor


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_each_device_gets_its_part_bit_for_bit(case, loaded):
    name, mesh, dtype = case
    facts = loaded[case]
    assert facts["different"] == []
    assert facts["misplaced"] == []
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    sizes = {t.hub: itemsize * math.prod(t.shape) for t in stored_tensors(name)}
    part = sum(size // num_parts(hub, mesh) for hub, size in sizes.items())
    assert facts["bytes"] == [part] * 8
    assert part < sum(sizes.values()) * {"fsdp=8": 0.14, "tensor=8": 0.42, MIXED: 0.28}[mesh]


def test_saves_what_is_split_over_devices(loaded, folder, saved):
    assert stored(saved) == stored(folder / CASES[0][0])


# Any regions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "language_model/model/layers/block_0/self_attn/q_proj/kernel",
        "language_model/model/layers/block_1/cross_attn/o_proj/kernel",
        "language_model/lm_head/kernel",
        "vision_model/pre_tile_positional_embedding/embedding",
        "vision_model/global_transformer/layers/gate_attn",
    ],
)
def test_regions_are_read_in_small_blocks_and_with_gaps(path, monkeypatch):
    monkeypatch.setattr(leaves, "_BLOCK_BYTES", 100)
    model = model_of("scanned")
    expected = flax.traverse_util.flatten_dict(random_params(model))[tuple(path.split("/"))]
    expected = np.asarray(expected).astype(np.float16)
    parts = [part for part in stored_tensors("scanned") if part.path == tuple(path.split("/"))]
    matched = {
        part.hub: (
            part.hub,
            part.to_hub(ArrayTensor(expected if part.index is None else expected[part.index])),
        )
        for part in parts
    }
    leaf = leaves.make_leaf(parts, matched, np.dtype(np.float32))
    middle = tuple(slice(size // 3, size - size // 4) for size in expected.shape)
    corners = [
        tuple(slice(0, -(-size // 3)) for size in expected.shape),
        tuple(slice(-(-size // 3), size) for size in expected.shape),
    ]
    regions = [whole(expected.shape), middle, *corners]
    for wanted in (regions, corners, [middle], []):
        for region, found in zip(wanted, leaf.read(wanted), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected[region].astype(np.float32))


def test_shardings_of_another_tree_are_refused(folder):
    shardings = {"extra": SingleDeviceSharding(jax.devices()[0])}
    with pytest.raises(ValueError, match=r"shardings: not a tree like the parameters'; .* extra$"):
        load_params(
            folder / "aperiodic", model_of("aperiodic").config, "model", shardings=shardings
        )


# Two processes of four devices each -------------------------------------------------------------

LARGE_ROWS, LARGE_COLUMNS = 2**19, 384


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A text model whose table of 805 MB is a hole in a file."""
    folder = tmp_path_factory.mktemp("large")
    config = mj.MllamaTextConfig(
        **TEXT
        | {"vocab_size": LARGE_ROWS - 8, "hidden_size": LARGE_COLUMNS}
        | {"num_hidden_layers": 1, "cross_attention_layers": []}
    )
    config.save_pretrained(folder)
    header: dict[str, Any] = {}
    end = 0
    for tensor in tensors(config, "text_model"):
        begin, end = end, end + 4 * math.prod(tensor.hub_shape)
        header[tensor.saved] = {
            "dtype": "F32",
            "shape": tensor.hub_shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def processes(folder, large) -> list[dict[str, Any]]:
    """What each process found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = ("one_of_two", port, folder, large)
    both = [start("mesh_processes.py", 4, *arguments, index) for index in (0, 1)]
    return [result.found for result in results(both)]


@pytest.mark.parametrize("name", ["scanned", "aperiodic", "torch", "meta", "orbax"])
def test_each_process_reads_its_half(name, processes):
    sizes = {t.hub: 4 * math.prod(t.shape) for t in stored_tensors(name)}
    for process in processes:
        assert process[name]["different"] == []
        asked = process[name]["asked"]
        for hub, size in sizes.items():
            # These tables store the split axis inside of one that is not split.
            nested = re.search(r"tile.*embedding\.weight", hub)
            parts = 1 if nested else min(2, num_parts(hub, "fsdp=8"))
            assert asked[hub] == size // parts, hub
    # Together both read the checkpoint once, but for what both devices hold whole.
    together = sum(sum(process[name]["asked"].values()) for process in processes)
    assert together < 1.1 * sum(sizes.values())


def test_a_host_holds_its_part_of_a_large_leaf_only(processes):
    stored_bytes = 4 * LARGE_ROWS * LARGE_COLUMNS
    for process in processes:
        # The virtual devices are host memory: half of the table in half of the bytes.
        assert process["large"]["held"] == stored_bytes // 4
        blocks = min(8, os.cpu_count()) * 2 * 2**24  # what each thread looks at; half is wanted
        assert process["large"]["peak"] < stored_bytes // 4 + blocks + 2**26
        assert process["large"]["peak"] < 0.65 * stored_bytes


def test_saving_what_other_processes_hold_is_refused(processes):
    for process in processes:
        assert "lie partly on other processes' devices" in process["refusal"]
        assert "Orbax" in process["refusal"]
